"""Tables that are read beyond their rows: a sequence that is longer than a model's positions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..graph import Graph, Node, Output, Value
from ..ops.registry import operator_of
from .interpret import interpret

_LARGEST = 2**24  # numbers of an index that are looked at


def check_tables(graph: Graph) -> None:
    """Raises ValueError where rows are looked up that a table does not have, whatever the inputs.

    Looks at indices that no input decides, as `torch.arange` over the sequence.
    """
    makers = {
        out.name: item for item in graph.body if isinstance(item, Node) for out in item.outputs
    }
    names = {param.value.name: param.name for param in graph.params}
    for node, argument, rows in _lookups(graph):
        indices = node.arg(argument)
        if not isinstance(indices, Value) or indices.name not in makers:
            continue
        highest = _highest(graph, indices, makers)
        if highest is not None and highest >= rows:
            table = next((names[v.name] for v in node.operands if v.name in names), node.name)
            raise ValueError(
                f"`{table}` has {rows} rows, and row {highest} is read whatever the inputs are: "
                f"the sequence is longer than the model's positions; give {rows} tokens or fewer"
            )


def _lookups(graph: Graph) -> Iterator[tuple[Node, str, int]]:
    """Nodes outside the layers that look up rows, the argument with the indices, and the rows."""
    for item in graph.body:
        if isinstance(item, Node):
            for argument, limit in operator_of(item).limits(item).items():
                yield item, argument, limit.rows


def _highest(graph: Graph, indices: Value, makers: dict[str, Node]) -> int | None:
    """The highest of the whole numbers in `indices`; None where inputs or weights decide them."""
    if indices.type.dtype.is_floating_point or _size(indices) > _LARGEST:
        return None
    needed: dict[str, Node] = {}
    waiting = [indices]
    while waiting:
        value = waiting.pop()
        maker = makers.get(value.name)
        if maker is None or _size(value) > _LARGEST:
            return None
        if operator_of(maker).remembers or operator_of(maker).draws:
            return None
        if maker.name not in needed:
            needed[maker.name] = maker
            waiting += maker.operands
    body = tuple(item for item in graph.body if isinstance(item, Node) and item.name in needed)
    small = Graph(graph.name, (), (), body, (Output((), indices),))
    found: Tensor = interpret(small, {}, {})[()]
    return int(found.max()) if found.numel() else None


def _size(value: Value) -> int:
    return int(torch.Size(value.type.shape).numel())


__all__ = ["check_tables"]
