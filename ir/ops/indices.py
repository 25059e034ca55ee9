"""Which integers an input may hold."""

from __future__ import annotations

from ..graph import Graph


def index_limits(graph: Graph, name: str) -> tuple[list[int], int | None]:
    """Rows of the tables that the integers of this input look up; the label that is ignored.

    The latter only where the input is nothing but labels.
    """
    limits: list[int] = []
    ignored: list[int | None] = []
    reached = {name: 0}  # what was added on the way
    for node in graph.nodes:
        added = [reached[operand.name] for operand in node.operands if operand.name in reached]
        if not added:
            continue
        if node.op == "aten.embedding.default":
            limits.append(node.operands[0].type.shape[0] - max(added))
            ignored.append(None)
        elif node.op == "shardwright.cross_entropy":
            limits.append(node.operands[0].type.shape[-1])
            index = node.arg("ignore_index")
            ignored.append(index if isinstance(index, int) else None)
        elif not node.output.type.dtype.is_floating_point:
            other = dict(node.args).get("other") if node.op.startswith("aten.add.") else 0
            offset = other if isinstance(other, int) else 0  # positions begin at 2 in some models
            reached |= {out.name: max(added) + offset for out in node.outputs}
    same = ignored[0] if ignored and all(index == ignored[0] for index in ignored) else None
    return limits, same


__all__ = ["index_limits"]
