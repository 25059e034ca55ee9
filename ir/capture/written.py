"""Tensors that a model writes part by part, as what they then are: parts, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..graph import Arg, Graph, Node, TensorType, Value
from ..graph.rewrite import flat, producers, with_body

_WRITE, _WRITE_ONE = "aten.slice_scatter.default", "aten.select_scatter.default"


def written_whole(graph: Graph) -> Graph:
    """A tensor of which parts are written is the parts, and what stays of it before and behind.

        y = new_empty(x, (b, s, 24))                          y = cat((p, q), dim=2)
        y[..., :16] = p; y[..., 16:] = q            ->

        x[:, 0] = p                                 ->        x = cat((p[:, None], x[:, 1:]), dim=1)

    Nothing stays where the writes cover the dim without a gap, in order.  Strided ones are kept.
    """
    nodes = flat(graph)
    made = producers(nodes)
    return with_body(graph, [new for node in nodes for new in _joined(node, made)], {})


def _joined(node: Node, made: dict[str, Node]) -> Iterator[Node]:
    """A cat for a write, or for the last of several that cover a dim; other nodes as they are."""
    part = _written(node)
    if part is None:
        yield node
        return
    dim, start, stop = part
    before, source = node.operands
    size = node.output.type.shape[dim]
    values = _covering(node, made)
    if not values:
        if node.op == _WRITE_ONE:
            row = _node(node, "row", "aten.unsqueeze.default", source, 1, dim, {})
            yield row
            source = row.output
        values = [source]
        for name, first, last in (("before", 0, start), ("behind", stop, size)):
            if first == last:
                continue
            bounds: dict[str, Arg] = {"start": first, "end": last, "step": 1}
            kept = _node(node, name, "aten.slice.Tensor", before, last - first, dim, bounds)
            yield kept
            values.insert(0 if first == 0 else len(values), kept.output)
    yield replace(node, op="aten.cat.default", args=(("tensors", tuple(values)), ("dim", dim)))


def _written(node: Node) -> tuple[int, int, int] | None:
    """(dim, first row, the row after the last) of what a node writes; None if it is no write."""
    if node.op not in (_WRITE, _WRITE_ONE):
        return None
    shape = node.output.type.shape
    dim = node.int_arg("dim") % len(shape)
    size = shape[dim]
    if node.op == _WRITE_ONE:
        row = node.int_arg("index") % size
        return dim, row, row + 1
    start, stop = node.arg("start") or 0, node.arg("end")
    assert isinstance(start, int) and (stop is None or isinstance(stop, int))
    first, last, _ = slice(start, stop).indices(size)
    return (dim, first, last) if node.arg("step") == 1 and first < last else None


def _covering(node: Node, made: dict[str, Node]) -> list[Value]:
    """What several writes of slices, of which `node` is the last, cover a dim with; or nothing."""
    values: list[Value] = []
    write: Node | None = node
    end, dim = node.output.type.shape[node.int_arg("dim")], None
    while write is not None and write.op == _WRITE and (part := _written(write)) is not None:
        if part[2] != end or dim not in (None, part[0]):
            return []
        values.insert(0, write.operands[1])
        dim, end = part[0], part[1]
        if end == 0:
            return values if len(values) > 1 else []
        write = made.get(write.operands[0].name)
    return []


def _node(
    at: Node, name: str, op: str, value: Value, size: int, dim: int, more: dict[str, Arg]
) -> Node:
    """A node that gives `value` in the shape of what `at` gives, with `size` rows along `dim`."""
    shape = list(at.output.type.shape)
    shape[dim] = size
    name = f"{at.name}_{name}"
    output = Value(name, TensorType(tuple(shape), value.type.dtype), value.differentiable)
    args: tuple[tuple[str, Arg], ...] = (("self", value), ("dim", dim), *more.items())
    return Node(name, op, args, (output,), at.loc)


__all__ = ["written_whole"]
