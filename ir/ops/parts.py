"""Parts of a dim: taken out, put together, or padded; the dim stays whole."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from ..graph import Arg, Node, Value
from .forms import along, call, dim_of, optional
from .operator import Family, Light, Render, View
from .rule import Dims, Rule
from .sizes import RATIO, Resizing, Size, Sizes

FAMILY = Family()


def _slice_rule(node: Node) -> Rule:
    return along(node, [dim_of(node, "dim", len(node.operands[0].type.shape))], linear=True)


def _start(node: Node, size: int) -> int:
    start = node.arg("start")
    return (start + size if start < 0 else min(start, size)) if isinstance(start, int) else 0


def _tie_slice(sizes: Sizes, node: Node) -> None:
    operand = node.operands[0]
    dim = node.int_arg("dim") % len(operand.type.shape)
    x, y = sizes.dim(operand, dim), sizes.dim(node.output, dim)
    start = _start(node, x.size)
    unit = gcd(start, x.size, y.size)
    if x.size == y.size:
        sizes.equate([x], [y])
    elif node.int_arg("step") != 1:
        sizes.fix(x, y)
    elif x.size // unit <= RATIO:
        shared = Size(unit)
        sizes.ratio(x, x.size // unit, shared)
        sizes.ratio(y, y.size // unit, shared)
    elif x.size - y.size <= RATIO:
        sizes.sums.append((x, y, x.size - y.size))
    elif start == 0:
        sizes.fix(x)  # the beginning of a table, as long as needed
    else:
        sizes.fix(x, y)


def _new_slice(node: Node, new: Resizing) -> dict[str, Arg]:
    """Bounds of the slice: from the start, to the end, or the same parts of the whole; those that
    count from the end still do."""
    if node.int_arg("step") != 1:  # with steps the dim stays
        return {}
    given, result = new.shape(node.operands[0]), new.shape(node.output)
    old = node.operands[0].type.shape
    dim = node.int_arg("dim") % len(old)
    before, after = node.output.type.shape[dim], result[dim]
    if (given[dim], after) == (old[dim], before):
        return {}
    start = _start(node, old[dim])
    if start == 0:
        first = 0
    elif start + before == old[dim]:
        first = given[dim] - after
    else:
        first = start * after // before
    last = first + after
    back = {name: given[dim] * _counts_back(node, name) for name in ("start", "end")}
    return {
        "start": first - back["start"],
        "end": last - back["end"] if last < given[dim] else 2**63 - 1,
    }


def _counts_back(node: Node, bound: str) -> bool:
    """Is a bound of a slice one from the end?"""
    given = node.arg(bound)
    return isinstance(given, int) and given < 0


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


FAMILY.add("aten.slice.Tensor", View(_slice_rule, _emit_slice, ties=_tie_slice, resized=_new_slice))


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


def _tie_select(sizes: Sizes, node: Node) -> None:
    """Only the first and the last row can be told in another size."""
    operand, dim = node.operands[0], node.int_arg("dim")
    if node.int_arg("index") not in (0, -1, operand.type.shape[dim] - 1):
        sizes.fix(sizes.dim(operand, dim))


def _new_select(node: Node, new: Resizing) -> dict[str, Arg]:
    dim, index = node.int_arg("dim"), node.int_arg("index")
    last = index > 0 and index == node.operands[0].type.shape[dim] - 1
    return {"index": new.shape(node.operands[0])[dim] - 1} if last else {}


FAMILY.add(
    "aten.select.int",
    View(_select_rule, "{self}.select({dim}, {index})", ties=_tie_select, resized=_new_select),
)


def _split_rule(node: Node) -> Rule:
    return along(node, [dim_of(node, "dim", len(node.operands[0].type.shape))], linear=True)


def _emit_split(method: str, how: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        text = call(f"{render.arg('self')}.{method}", render.arg(how), dim=render.arg("dim"))
        return text if len(node.outputs) > 1 else f"{text}[0]"

    return emit


def _tie_parts(sizes: Sizes, node: Node) -> None:
    operand = node.operands[0]
    dim = node.int_arg("dim") % len(operand.type.shape)
    sizes.add_up(sizes.dim(operand, dim), [sizes.dim(out, dim) for out in node.outputs])


def _new_split_size(node: Node, new: Resizing) -> dict[str, Arg]:
    return {"split_size": new.shape(node.output)[node.int_arg("dim")]}


def _new_split_sizes(node: Node, new: Resizing) -> dict[str, Arg]:
    dim = node.int_arg("dim")
    return {"split_sizes": tuple(new.shape(out)[dim] for out in node.outputs)}


FAMILY.add("aten.chunk.default", View(_split_rule, _emit_split("chunk", "chunks"), ties=_tie_parts))
FAMILY.add(
    "aten.split.Tensor",
    View(_split_rule, _emit_split("split", "split_size"), ties=_tie_parts, resized=_new_split_size),
)
FAMILY.add(
    "aten.split_with_sizes.default",
    View(
        _split_rule, _emit_split("split", "split_sizes"), ties=_tie_parts, resized=_new_split_sizes
    ),
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


def _tie_unbind(sizes: Sizes, node: Node) -> None:
    sizes.fix(sizes.dim(node.operands[0], node.int_arg("dim")))


FAMILY.add("aten.unbind.int", View(_unbind_rule, _emit_unbind, ties=_tie_unbind))


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


def _tie_cat(sizes: Sizes, node: Node) -> None:
    dim = node.int_arg("dim") % len(node.output.type.shape)
    sizes.add_up(sizes.dim(node.output, dim), [sizes.dim(v, dim) for v in node.operands])


FAMILY.add("aten.cat.default", Light(_cat_rule, "torch.cat({tensors}, dim={dim})", ties=_tie_cat))


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


def _tie_stack(sizes: Sizes, node: Node) -> None:
    sizes.fix(sizes.dim(node.output, node.int_arg("dim")))


FAMILY.add(
    "aten.stack.default",
    Light(_stack_rule, "torch.stack({tensors}, dim={dim})", ties=_tie_stack),
)


def _pad_rule(node: Node) -> Rule:
    pad = node.arg("pad")
    assert isinstance(pad, tuple)
    rank = len(node.operands[0].type.shape)
    dims = [rank - 1 - k for k in range(len(pad) // 2) if pad[2 * k] or pad[2 * k + 1]]
    return along(node, dims, linear=node.arg("value") in (None, 0))


def _emit_pad(node: Node, render: Render) -> str:
    mode = optional(render, "mode", '"constant"') if "mode" in dict(node.args) else ""
    number, whole = node.arg("value"), not node.output.type.dtype.is_floating_point
    value = optional(render, "value") if number != 0 else ""
    if whole and isinstance(number, float) and number:
        value = str(int(number))
    return call("F.pad", render.arg("self"), render.arg("pad"), mode=mode, value=value)


def _tie_pad(sizes: Sizes, node: Node) -> None:
    operand = node.operands[0]
    for dim in range(len(operand.type.shape)):
        x, y = sizes.dim(operand, dim), sizes.dim(node.output, dim)
        if x.size == y.size:
            sizes.equate([x], [y])
        else:
            sizes.sums.append((y, x, y.size - x.size))


class Pad(Light):
    """More rows at the ends of dims; declared as `Light` is."""

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Nothing, or the operand where its own rows fill the ends (`reflect`)."""
        constant = dict(node.args).get("mode", "constant") == "constant"
        return () if constant else node.operands

    def shift(self, node: Node) -> int | None:
        """The operand's numbers are as they were."""
        return 0


FAMILY.add(
    "aten.pad.default aten.constant_pad_nd.default", Pad(_pad_rule, _emit_pad, ties=_tie_pad)
)


def _written_rule(node: Node) -> Rule:
    """Rows along `dim` are replaced by those of `src`, which has that dim unless it is one row."""
    whole, part = node.operands
    shape = whole.type.shape
    dim = dim_of(node, "dim", len(shape))
    dims = tuple((f"d{i}",) for i in range(len(shape)))
    row = tuple(("y",) if i == dim else own for i, own in enumerate(dims))
    selects = len(part.type.shape) < len(shape)
    source = tuple(own for i, own in enumerate(dims) if i != dim) if selects else row
    sizes = {f"d{i}": size for i, size in enumerate(shape)}
    if not selects:
        sizes["y"] = part.type.shape[dim]
    return Rule(
        operands=(dims, source),
        results=(dims,),
        sizes=sizes,
        whole=frozenset({f"d{dim}"} if selects else {f"d{dim}", "y"}),
        linear=(frozenset({0, 1}),) if node.output.type.continuous else (),
    )


def _tie_written(sizes: Sizes, node: Node) -> None:
    """The rows are told by numbers."""
    dim = node.int_arg("dim")
    sizes.fix(sizes.dim(node.operands[0], dim))
    if len(node.operands[1].type.shape) == len(node.output.type.shape):
        sizes.fix(sizes.dim(node.operands[1], dim))


FAMILY.add(
    "aten.select_scatter.default",
    Light(
        _written_rule,
        "torch.select_scatter({self}, {src}, {dim}, {index})",
        ties=_tie_written,
    ),
)
FAMILY.add(
    "aten.slice_scatter.default",
    Light(
        _written_rule,
        "torch.slice_scatter({self}, {src}, {dim}, {start}, {end}, {step})",
        ties=_tie_written,
    ),
)

FAMILY.called("written", "select_scatter slice_scatter")
FAMILY.called("part", "chunk split split_with_sizes unbind")
FAMILY.called("joined", "cat")
FAMILY.called("stacked", "stack")

__all__ = ["FAMILY"]
