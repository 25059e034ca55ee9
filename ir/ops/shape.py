"""Views and copies that arrange the numbers of their operands otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..graph import Node
from .forms import along, call, dim_of, dims_of, factors, optional
from .operator import Family, Light, Render, View, opaque, shapes_of
from .rule import Dims, Rule, broadcast_rule, reshape_rule

FAMILY = Family()


def _view_rule(node: Node) -> Rule:
    return reshape_rule(node.operands[0].type.shape, node.output.type.shape)


def _emit_view(node: Node, render: Render) -> str:
    return call(f"{render.arg('self')}.reshape", *render.sizes())


FAMILY.add(
    "aten.view.default aten.reshape.default aten._unsafe_view.default aten.unsqueeze.default"
    " aten.squeeze.dim aten.squeeze.dims aten.squeeze.default aten.flatten.using_ints"
    " aten.unflatten.int",
    View(_view_rule, _emit_view),
)


def _permute(node: Node, order: Sequence[int]) -> Rule:
    shape = node.operands[0].type.shape
    operand = tuple((f"d{i}",) for i in range(len(shape)))
    sizes = {f"d{i}": size for i, size in enumerate(shape)}
    return Rule(
        operands=(operand,),
        results=(tuple(operand[i] for i in order),),
        sizes=sizes,
        linear=(frozenset({0}),),
        uneven=frozenset(sizes),
        passes=True,
    )


def _transpose_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    order = list(range(rank))
    a, b = dim_of(node, "dim0", rank), dim_of(node, "dim1", rank)
    order[a], order[b] = order[b], order[a]
    return _permute(node, order)


def _permute_rule(node: Node) -> Rule:
    return _permute(node, dims_of(node, "dims", len(node.operands[0].type.shape)))


FAMILY.add("aten.transpose.int", View(_transpose_rule, "{self}.transpose({dim0}, {dim1})"))
FAMILY.add("aten.permute.default", View(_permute_rule, "{self}.permute({dims})"))


def _complex_pairs(text: str) -> Callable[[Node], Rule]:
    """Complex numbers and the pairs of real ones that they are."""

    def build(node: Node) -> Rule:
        return replace(factors(text)(node), linear=(frozenset({0}),), passes=True)

    return build


FAMILY.add(
    "aten.view_as_complex.default",
    View(_complex_pairs("... [two] -> ..."), "torch.view_as_complex({self})"),
)
FAMILY.add(
    "aten.view_as_real.default",
    View(_complex_pairs("... -> ... [two]"), "torch.view_as_real({self})"),
)


def _reversed_rule(node: Node) -> Rule:
    return _permute(node, list(reversed(range(len(node.operands[0].type.shape)))))


FAMILY.add("aten.t.default", View(_reversed_rule, "{self}.t()"))
FAMILY.add("aten.numpy_T.default", View(_reversed_rule, "{self}.T"))


def _expand_rule(node: Node) -> Rule:
    """New rows of a broadcast dim are a factor of the result alone: each rank makes its own."""
    return broadcast_rule(shapes_of(node.operands), node.output.type.shape, linear=[[0]])


def _emit_expand(node: Node, render: Render) -> str:
    return call(f"{render.arg('self')}.expand", *render.sizes())


FAMILY.add("aten.expand.default", View(_expand_rule, _emit_expand))


def _slice_rule(node: Node) -> Rule:
    return along(node, [dim_of(node, "dim", len(node.operands[0].type.shape))], linear=True)


def _emit_slice(node: Node, render: Render) -> str:
    rank = len(node.operands[0].type.shape)
    dim = dim_of(node, "dim", rank)
    size = node.operands[0].type.shape[dim]
    start, end, step = (node.arg(name) for name in ("start", "end", "step"))
    first = "" if start in (None, 0) else str(start)
    last = "" if end is None or (isinstance(end, int) and end >= size) else str(end)
    window = f"{first}:{last}" + (f":{step}" if step not in (None, 1) else "")
    if dim == rank - 1 and rank > 1:
        return f"{render.arg('self')}[..., {window}]"
    return f"{render.arg('self')}[{', '.join([':'] * dim + [window])}]"


FAMILY.add("aten.slice.Tensor", View(_slice_rule, _emit_slice))


def _select_rule(node: Node) -> Rule:
    shape = node.operands[0].type.shape
    dim = dim_of(node, "dim", len(shape))
    operand = tuple((f"d{i}",) for i in range(len(shape)))
    sizes = {f"d{i}": size for i, size in enumerate(shape)}
    return Rule(
        operands=(operand,),
        results=(tuple(d for i, d in enumerate(operand) if i != dim),),
        sizes=sizes,
        whole=frozenset({f"d{dim}"}),
        linear=(frozenset({0}),),
        passes=True,
    )


FAMILY.add("aten.select.int", View(_select_rule, "{self}.select({dim}, {index})"))


def _split_rule(node: Node) -> Rule:
    return along(node, [dim_of(node, "dim", len(node.operands[0].type.shape))], linear=True)


def _emit_split(method: str, how: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        text = call(f"{render.arg('self')}.{method}", render.arg(how), dim=render.arg("dim"))
        return text if len(node.outputs) > 1 else f"{text}[0]"

    return emit


FAMILY.add("aten.chunk.default", View(_split_rule, _emit_split("chunk", "chunks")))
FAMILY.add("aten.split.Tensor", View(_split_rule, _emit_split("split", "split_size")))
FAMILY.add(
    "aten.split_with_sizes.default",
    View(_split_rule, _emit_split("split", "split_sizes")),
)
FAMILY.add("aten.split.sizes", View(_split_rule, _emit_split("split", "split_size")))


def _unbind_rule(node: Node) -> Rule:
    rule = _select_rule(node)
    return Rule(
        operands=rule.operands,
        results=rule.results * len(node.outputs),
        sizes=rule.sizes,
        whole=rule.whole,
        linear=rule.linear,
        passes=True,
    )


def _emit_unbind(node: Node, render: Render) -> str:
    text = call(f"{render.arg('self')}.unbind", render.arg("dim"))
    return text if len(node.outputs) > 1 else f"{text}[0]"


FAMILY.add("aten.unbind.int", View(_unbind_rule, _emit_unbind))


def _cat_rule(node: Node) -> Rule:
    shape = node.output.type.shape
    dim = dim_of(node, "dim", len(shape))
    sizes = {f"d{i}": size for i, size in enumerate(shape) if i != dim}
    operands: list[Dims] = []
    for k, value in enumerate(node.operands):
        sizes[f"x{k}"] = value.type.shape[dim]
        operands.append(tuple((f"x{k}",) if i == dim else (f"d{i}",) for i in range(len(shape))))
    sizes["y"] = shape[dim]
    result = tuple(("y",) if i == dim else (f"d{i}",) for i in range(len(shape)))
    whole = frozenset({"y", *(f"x{k}" for k in range(len(node.operands)))})
    group = frozenset(range(len(node.operands)))
    return Rule(
        operands=tuple(operands), results=(result,), sizes=sizes, whole=whole, linear=(group,)
    )


FAMILY.add("aten.cat.default", Light(_cat_rule, "torch.cat({tensors}, dim={dim})"))


def _stack_rule(node: Node) -> Rule:
    shape = node.output.type.shape
    dim = dim_of(node, "dim", len(shape))
    result = tuple((f"d{i}",) for i in range(len(shape)))
    operand = tuple(d for i, d in enumerate(result) if i != dim)
    n = len(node.operands)
    return Rule(
        operands=(operand,) * n,
        results=(result,),
        sizes={f"d{i}": size for i, size in enumerate(shape)},
        whole=frozenset({f"d{dim}"}),
        linear=(frozenset(range(n)),),
    )


FAMILY.add("aten.stack.default", Light(_stack_rule, "torch.stack({tensors}, dim={dim})"))


def _pad_rule(node: Node) -> Rule:
    pad = node.arg("pad")
    assert isinstance(pad, tuple)
    rank = len(node.operands[0].type.shape)
    dims = [rank - 1 - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1]]
    return along(node, dims, linear=node.arg("value") in (None, 0))


def _emit_pad(node: Node, render: Render) -> str:
    mode = optional(render, "mode", '"constant"') if "mode" in dict(node.args) else ""
    value = optional(render, "value") if node.arg("value") != 0 else ""
    return call("F.pad", render.arg("self"), render.arg("pad"), mode=mode, value=value)


FAMILY.add("aten.pad.default aten.constant_pad_nd.default", Light(_pad_rule, _emit_pad))


def _roll_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    return along(node, dims_of(node, "dims", rank), linear=True)


def _emit_roll(node: Node, render: Render) -> str:
    dims = [render.arg("dims")] if node.arg("dims") else []
    return call(f"{render.arg('self')}.roll", render.arg("shifts"), *dims)


FAMILY.add("aten.roll.default", Light(_roll_rule, _emit_roll))
FAMILY.add("aten.flip.default", Light(_roll_rule, "{self}.flip({dims})"))


def _triangle_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    return along(node, [rank - 2, rank - 1], linear=True)


def _emit_triangle(function: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        diagonal = [render.arg("diagonal")] if node.arg("diagonal") else []
        return call(function, render.arg("self"), *diagonal)

    return emit


FAMILY.add("aten.tril.default", Light(_triangle_rule, _emit_triangle("torch.tril")))
FAMILY.add("aten.triu.default", Light(_triangle_rule, _emit_triangle("torch.triu")))


def _repeat_interleave_rule(node: Node) -> Rule:
    """`b n s d -> b (n r) s d`: the repeated dim keeps its blocks."""
    shape, result = node.operands[0].type.shape, node.output.type.shape
    if node.arg("dim") is None:
        return opaque(node)
    dim = dim_of(node, "dim", len(shape))
    sizes = {f"d{i}": size for i, size in enumerate(shape)} | {"r": result[dim] // shape[dim]}
    operand = tuple((f"d{i}",) for i in range(len(shape)))
    out = tuple((f"d{i}", "r") if i == dim else (f"d{i}",) for i in range(len(shape)))
    return Rule(
        operands=(operand,), results=(out,), sizes=sizes, whole=frozenset({"r"}),
        linear=(frozenset({0}),), passes=True,
    )  # fmt: skip


FAMILY.add(
    "aten.repeat_interleave.self_int",
    Light(_repeat_interleave_rule, "{self}.repeat_interleave({repeats}, dim={dim})"),
)


def _repeat_rule(node: Node) -> Rule:
    """Dims that are not repeated may be cut; a cut of a repeated one would change the order."""
    shape, result = node.operands[0].type.shape, node.output.type.shape
    lead = len(result) - len(shape)
    sizes: dict[str, int] = {}
    operand: list[tuple[str, ...]] = []
    out: list[tuple[str, ...]] = []
    for i, size in enumerate(result):
        own = shape[i - lead] if i >= lead else 1
        sizes |= {f"r{i}": size // own if own else 1, f"d{i}": own}
        out.append((f"r{i}", f"d{i}"))
        if i >= lead:
            operand.append((f"d{i}",))
    return Rule(
        operands=(tuple(operand),), results=(tuple(out),), sizes=sizes,
        whole=frozenset(f"r{i}" for i in range(len(result))),
        linear=(frozenset({0}),), passes=True,
    )  # fmt: skip


FAMILY.add("aten.repeat.default", Light(_repeat_rule, "{self}.repeat({repeats})"))

__all__ = ["FAMILY"]
