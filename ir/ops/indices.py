"""Which integers an input may hold."""

from __future__ import annotations

from ..graph import Graph, Value
from .registry import operator_of


def index_limits(graph: Graph, name: str) -> tuple[list[int], int | None]:
    """Rows of the tables that the integers of this input look up; the label that is ignored.

    The latter only where the input is nothing but labels.
    """
    limits: list[int] = []
    ignored: list[int | None] = []
    reached = {name: 0}  # what was added on the way, as far as that is known
    for node in graph.nodes:
        operator = operator_of(node)
        for argument, limit in operator.limits(node).items():
            indices = node.arg(argument)
            if isinstance(indices, Value) and indices.name in reached:
                limits.append(limit.rows - reached[indices.name])
                ignored.append(limit.ignored)
        added = [reached[operand.name] for operand in node.operands if operand.name in reached]
        if added and not node.outputs[0].type.dtype.is_floating_point:
            offset = max(added) + (operator.shift(node) or 0)
            reached |= {out.name: offset for out in node.outputs}
    same = ignored[0] if ignored and all(index == ignored[0] for index in ignored) else None
    return limits, same


def highest(graph: Graph, name: str) -> int:
    """What the integers of this input must be below, 0 where that is not known.

    Where parts of it are looked up in several tables, as the first token of each row in one of its
    own, the largest: which of them an integer is for is not told.  What is made of them otherwise
    (remainders, masks, running sums) says nothing about them.
    """
    reached = {name: (0, True)}  # what was added on the way, and whether to all of them
    limits: dict[bool, list[int]] = {True: [], False: []}
    for node in graph.nodes:
        operator = operator_of(node)
        for argument, limit in operator.limits(node).items():
            indices = node.arg(argument)
            if isinstance(indices, Value) and indices.name in reached:
                added, every = reached[indices.name]
                limits[every].append(limit.rows - added)
        shift = operator.shift(node)
        if shift is None or node.operands[0].name not in reached:
            continue
        added, every = reached[node.operands[0].name]
        for out in node.outputs:
            if not out.type.continuous:
                whole = out.type.numel >= node.operands[0].type.numel
                reached[out.name] = (added + shift, every and whole)
    return min(limits[True]) if limits[True] else max(limits[False], default=0)


__all__ = ["highest", "index_limits"]
