"""Which nodes are needed: those that lead to something that is read, and those that act."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..graph import Graph, Loop, Node
from ..graph.rewrite import flat
from .registry import operator_of


def remove_dead(graph: Graph) -> Graph:
    """Drop nodes of a flat graph whose results nothing reads."""
    read = {output.value.name for output in graph.outputs}
    return replace(graph, body=live_items(flat(graph), read))


def live_items(items: Sequence[Node | Loop], read: Iterable[str]) -> tuple[Node | Loop, ...]:
    """`items` without nodes that lead to no value named in `read`; loops stay as they are, and
    what acts besides (`Operator.acts`)."""
    live = set(read)
    kept: list[Node | Loop] = []
    for item in reversed(items):
        if isinstance(item, Loop):
            live.update(value.name for value in (*item.carried, *item.invariants))
        elif operator_of(item).acts or any(value.name in live for value in item.outputs):
            live.update(value.name for value in item.operands)
        else:
            continue
        kept.append(item)
    return tuple(reversed(kept))


__all__ = ["live_items", "remove_dead"]
