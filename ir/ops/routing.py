"""What routers of experts use: sorting, choosing, counting and writing by index."""

from __future__ import annotations

from ..graph import Node
from .forms import along_dim, call, dim_of, factors
from .operator import Family, Light, Render, shapes_of
from .rule import Dims, Rule
from .sizes import Sizes

FAMILY = Family()


def _emit_sort(node: Node, render: Render) -> str:
    descending = "True" if node.arg("descending") else ""
    return call(f"{render.arg('self')}.sort", dim=render.arg("dim"), descending=descending)


FAMILY.add("aten.sort.default", Light(along_dim(), _emit_sort, saves=("result",)))


def _emit_topk(node: Node, render: Render) -> str:
    flags = {name: "" if node.arg(name) else "False" for name in ("largest", "sorted")}
    return call(f"{render.arg('self')}.topk", render.arg("k"), dim=render.arg("dim"), **flags)


def _tie_topk(sizes: Sizes, node: Node) -> None:
    """What is chosen from, and how much of it, stays: a router's experts and choices."""
    dim = node.int_arg("dim")
    sizes.fix(sizes.dim(node.operands[0], dim), sizes.dim(node.output, dim))


FAMILY.add("aten.topk.default", Light(along_dim(), _emit_topk, saves=("result",), ties=_tie_topk))


def _one_hot_rule(node: Node) -> Rule:
    return factors("... -> ... [c]")(node)


FAMILY.add("aten.one_hot.default", Light(_one_hot_rule, "F.one_hot({self}, {num_classes})"))


def _scatter_rule(node: Node) -> Rule:
    """Dims other than that written along may be cut, where index and source are as long."""
    shapes = shapes_of(node.operands)
    rank = len(shapes[0])
    dim = dim_of(node, "dim", rank)
    sizes: dict[str, int] = {}
    whole: set[str] = set()
    operands: list[Dims] = []
    for number, shape in enumerate(shapes):
        dims: list[tuple[str, ...]] = []
        for i, size in enumerate(shape):
            shared = i != dim and all(other[i] == shapes[0][i] for other in shapes)
            name = f"d{i}" if shared else f"x{number}_{i}"
            sizes[name] = size
            whole |= set() if shared else {name}
            dims.append((name,))
        operands.append(tuple(dims))
    return Rule(
        operands=tuple(operands), results=(operands[0],), sizes=sizes, whole=frozenset(whole)
    )


def _tie_scatter(sizes: Sizes, node: Node) -> None:
    """The dim that is written along stays, and that of the indices."""
    dim = node.int_arg("dim")
    sizes.fix(*(sizes.dim(value, dim) for value in node.operands))


for _name, _template in (
    ("aten.scatter.src", "{self}.scatter({dim}, {index}, {src})"),
    ("aten.scatter_add.default", "{self}.scatter_add({dim}, {index}, {src})"),
    ("aten.scatter.value", "{self}.scatter({dim}, {index}, {value})"),
):
    FAMILY.add(_name, Light(_scatter_rule, _template, saves=("index",), ties=_tie_scatter))

FAMILY.called("top", "topk")
FAMILY.called("sorted", "sort")

__all__ = ["FAMILY"]
