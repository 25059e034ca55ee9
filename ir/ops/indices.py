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
    reached = {name: 0}  # what was added on the way
    for node in graph.nodes:
        operator = operator_of(node)
        for argument, limit in operator.limits(node).items():
            indices = node.arg(argument)
            if isinstance(indices, Value) and indices.name in reached:
                limits.append(limit.rows - reached[indices.name])
                ignored.append(limit.ignored)
        added = [reached[operand.name] for operand in node.operands if operand.name in reached]
        if added and not node.outputs[0].type.dtype.is_floating_point:
            offset = max(added) + operator.shift(node)
            reached |= {out.name: offset for out in node.outputs}
    same = ignored[0] if ignored and all(index == ignored[0] for index in ignored) else None
    return limits, same


__all__ = ["index_limits"]
