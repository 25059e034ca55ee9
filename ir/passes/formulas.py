"""How formulas that a model writes out are found in a graph and become operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..graph import Arg, Block, Graph, Loop, Node, Value, reads
from ..graph.rewrite import producers
from ..ops.live import live_items

Found: TypeAlias = tuple[str, tuple[tuple[str, Arg], ...]]  # an operator and its arguments
Formula: TypeAlias = "Callable[[Body, Node], Found | None]"  # of the node that a formula ends in


def with_operators(graph: Graph, formulas: Sequence[Formula]) -> Graph:
    """`graph`, folded or flat, with each of the formulas replaced by its operator."""

    def block(old: Block) -> Block:
        nodes = _raised_nodes(old.nodes, old.outputs, formulas)
        return replace(old, nodes=tuple(node for node in nodes if isinstance(node, Node)))

    read = [output.value for output in graph.outputs]
    body = tuple(
        replace(item, blocks=tuple(map(block, item.blocks))) if isinstance(item, Loop) else item
        for item in _raised_nodes(graph.body, read, formulas)
    )
    return replace(graph, body=body)


def _raised_nodes(
    items: Sequence[Node | Loop], read: Sequence[Value], formulas: Sequence[Formula]
) -> tuple[Node | Loop, ...]:
    """`items` with the last node of each formula replaced by the operator; what it made alone goes.

    Formulas are looked for from their ends, so that the longest spelling of one is found first.
    """
    body = Body.of(items, read)
    found: list[Node | Loop] = []
    for item in items:
        operator = body.operator(item, formulas) if isinstance(item, Node) else None
        found.append(operator or item)
    return live_items(found, [value.name for value in read])


@dataclass(frozen=True, slots=True)
class Body:
    """The nodes of one body: who makes a value, and how many read it."""

    made: dict[str, Node]
    readers: dict[str, int]

    @staticmethod
    def of(items: Sequence[Node | Loop], read: Sequence[Value]) -> Body:
        readers: dict[str, int] = {}
        for value in (*read, *(value for item in items for value in reads(item))):
            readers[value.name] = readers.get(value.name, 0) + 1
        return Body(producers([item for item in items if isinstance(item, Node)]), readers)

    def operator(self, node: Node, formulas: Sequence[Formula]) -> Node | None:
        """The operator that a formula which ends in `node` is; None if it is none of ours."""
        for find in formulas:
            if (found := find(self, node)) is not None:
                op, args = found
                return Node(node.name, op, args, node.outputs, node.loc)
        return None

    def node(self, value: Arg) -> Node | None:
        """The node that makes `value`, if one of this body does."""
        return self.made.get(value.name) if isinstance(value, Value) else None

    def by(self, value: Arg, op: str) -> Node | None:
        """The node that makes `value`, if it is an `op`."""
        node = self.node(value)
        return node if node is not None and node.op == op else None

    def only(self, value: Arg, op: str) -> Node | None:
        """As `by`, for a value that is read once."""
        node = self.by(value, op)
        return node if node is not None and self.readers[node.output.name] == 1 else None

    def read_once(self, value: Arg) -> bool:
        """Is `value` read by one node alone?"""
        return isinstance(value, Value) and self.readers.get(value.name) == 1

    def pairs(self, node: Node, op: str) -> Iterator[tuple[Arg, Arg]]:
        """The two operands of a sum or product, in either order; nothing for another op."""
        if node.op == op and dict(node.args).get("alpha", 1) == 1:
            a, b = node.arg("self"), node.arg("other")
            yield from ((a, b), (b, a))


__all__ = ["Body", "Formula", "Found", "with_operators"]
