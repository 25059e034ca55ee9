"""Views and copies that arrange the numbers of their operands otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..graph import Arg, Node
from .forms import along, call, dim_of, dims_of, factors, same_shape
from .operator import Family, Light, Render, View, opaque, shapes_of
from .rule import Rule, broadcast_rule, reshape_rule
from .sizes import Resizing, Size, Sizes

FAMILY = Family()


def _view_rule(node: Node) -> Rule:
    return reshape_rule(node.operands[0].type.shape, node.output.type.shape)


class Reshape(View):
    """Other dims for the same numbers."""

    rigid = True
    infers_size = True


def _new_parts(node: Node, new: Resizing) -> dict[str, Arg]:
    """The sizes of an unflattened dim."""
    if "sizes" not in dict(node.args):
        return {}
    given, result = new.shape(node.operands[0]), new.shape(node.output)
    first = node.int_arg("dim") % len(given)
    return {"sizes": result[first : first + len(result) - len(given) + 1]}


def _emit_view(node: Node, render: Render) -> str:
    return render.view()


FAMILY.add(
    "aten.view.default aten.reshape.default aten._unsafe_view.default aten.unsqueeze.default"
    " aten.squeeze.dim aten.squeeze.dims aten.squeeze.default aten.flatten.using_ints"
    " aten.unflatten.int",
    Reshape(_view_rule, _emit_view, resized=_new_parts),
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
    # what was gathered along the last dim, or cut and sent, may lie in another order
    Reshape(_complex_pairs("... [two] -> ..."), "torch.view_as_complex({self}.contiguous())"),
)
FAMILY.add(
    "aten.view_as_real.default",
    Reshape(_complex_pairs("... -> ... [two]"), "torch.view_as_real({self})"),
)


def _reversed_rule(node: Node) -> Rule:
    return _permute(node, list(reversed(range(len(node.operands[0].type.shape)))))


FAMILY.add("aten.t.default", View(_reversed_rule, "{self}.t()"))
FAMILY.add("aten.numpy_T.default", View(_reversed_rule, "{self}.T"))


def _expand_rule(node: Node) -> Rule:
    """New rows of a broadcast dim are a factor of the result alone: each rank makes its own."""
    return broadcast_rule(shapes_of(node.operands), node.output.type.shape, linear=[[0]])


def _emit_expand(node: Node, render: Render) -> str:
    """Dims that stay are -1."""
    before, after = node.operands[0].type.shape, node.output.type.shape
    added = [None] * (len(after) - len(before))
    stays = [old == new for old, new in zip((*added, *before), after, strict=True)]
    sizes = zip(stays, render.sizes(), strict=True)
    return call(f"{render.arg('self')}.expand", *("-1" if stay else size for stay, size in sizes))


FAMILY.add("aten.expand.default", View(_expand_rule, _emit_expand))


def _roll_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    return along(node, dims_of(node, "dims", rank), linear=True)


def _emit_roll(node: Node, render: Render) -> str:
    dims = [render.arg("dims")] if node.arg("dims") else []
    return call(f"{render.arg('self')}.roll", render.arg("shifts"), *dims)


FAMILY.add("aten.roll.default", Light(_roll_rule, _emit_roll, ties=same_shape))
FAMILY.add("aten.flip.default", Light(_roll_rule, "{self}.flip({dims})", ties=same_shape))


def _triangle_rule(node: Node) -> Rule:
    rank = len(node.operands[0].type.shape)
    return along(node, [rank - 2, rank - 1], linear=node.output.type.continuous)


def _emit_triangle(function: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        diagonal = [render.arg("diagonal")] if node.arg("diagonal") else []
        return call(function, render.arg("self"), *diagonal)

    return emit


FAMILY.add(
    "aten.tril.default", Light(_triangle_rule, _emit_triangle("torch.tril"), ties=same_shape)
)
FAMILY.add(
    "aten.triu.default", Light(_triangle_rule, _emit_triangle("torch.triu"), ties=same_shape)
)


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


def _tie_repeats(sizes: Sizes, node: Node) -> None:
    """`repeats` stays."""
    dim = node.int_arg("dim") % len(node.output.type.shape)
    x, y = sizes.dim(node.operands[0], dim), sizes.dim(node.output, dim)
    sizes.equate([y], [x, Size(y.size // x.size, fixed=True)])


FAMILY.add(
    "aten.repeat_interleave.self_int",
    Light(
        _repeat_interleave_rule,
        "{self}.repeat_interleave({repeats}, dim={dim})",
        ties=_tie_repeats,
    ),
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
