"""What a layer keeps that keeps a part of what it makes, and what of it runs again.

The results of products and of attention are kept (`Operator.stays`), as far as the second run of
the layer takes them: to make anew what backward needs, or because backward needs them themselves.
All else runs again until everything is back that autograd had kept.

    x -> norm -> up -> silu -> down -> + -> y      kept: x, up; again: norm and silu, not + and down

A sum over ranks, or an exchange, of such a result is kept in its place, and not paid again
(`KEPT_MOVES`); what is gathered is gathered again.  Experts run again, but not their products and
exchanges (`Operator.spares`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...ir.graph import Graph, Node, Value
from ...ir.ops.registry import is_view, operator_of, saved_values
from .regions import Region, Scope, scopes


def again_in_part(nodes: Sequence[Node]) -> frozenset[str]:
    """The names of a block's nodes that run again where it keeps a part."""
    return frozenset(node.name for node in _until_all_is_back(nodes) if not operator_of(node).stays)


def again_in(nodes: Sequence[Node], mode: str) -> frozenset[str]:
    """The same in any mode (see `Modes`)."""
    if mode == "part":
        return again_in_part(nodes)
    return frozenset(node.name for node in nodes) if mode == "full" else frozenset()


def _until_all_is_back(nodes: Sequence[Node]) -> Sequence[Node]:
    """Those up to the last of which autograd keeps something."""
    ends = [at for at, node in enumerate(nodes) if saved_values(node)]
    return nodes[: ends[-1] + 1] if ends else ()


def _root(value: Value, views: Mapping[str, str]) -> str:
    return views.get(value.name, value.name)


def _views_in(scope: Scope) -> dict[str, str]:
    """By name, what each view of the block is a view of."""
    found: dict[str, str] = {}
    for node in scope.nodes:
        if is_view(node):
            found |= {value.name: _root(node.operands[0], found) for value in node.outputs}
    return found


def kept_results(graph: Graph) -> frozenset[str]:
    """The names of the results in blocks that stay, and of their views."""
    found: set[str] = set()
    for scope in scopes(graph):
        views = _views_in(scope) if scope.block is not None else {}
        nodes = scope.nodes if scope.block is not None else ()
        made = {v.name for node in nodes if operator_of(node).stays for v in node.outputs}
        found |= made | {name for name, root in views.items() if root in made}
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Reread:
    """A result that is kept for the second run alone: who takes it there first, and as what."""

    node: Node
    value: Value


def reread(region: Region) -> Iterator[Reread]:
    """The results that stay for the second run and that autograd does not keep, as far as a node of
    the region is the first to take them."""
    if region.scope.block is None:
        return
    views, saved = _views_in(region.scope), set[str]()
    for node in region.scope.nodes:
        saved |= {_root(value, views) for value in saved_values(node)}
    stays = {
        value.name
        for node in region.scope.nodes
        if operator_of(node).stays
        for value in node.outputs
    }
    left = stays - saved
    for node in _until_all_is_back(region.scope.nodes):
        if is_view(node) or operator_of(node).stays:
            continue
        for value in node.operands:
            if (root := _root(value, views)) in left:
                left.discard(root)
                if node in region.nodes:
                    yield Reread(node, value)


__all__ = ["Reread", "again_in", "again_in_part", "kept_results", "reread"]
