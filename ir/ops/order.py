"""Which dims stand in the order of the tokens.

Ranks that shard a sequence need not hold contiguous parts of it.  Under a causal mask they share
the work evenly if each holds two chunks, one from either end (zigzag).  An op that an axis
cuts along a factor treats that factor's rows one by one, in any order; so the order may be chosen
freely, if only it is the same for all dims that meet in a factor anywhere in the graph.  These
dims are found here.
"""

from __future__ import annotations

from typing import TypeAlias

import networkx as nx

from ..graph import Graph, Loop, Node, Value
from .registry import operator_of, rule_of
from .rule import Choice

Dim: TypeAlias = tuple[str, int]  # (name of a value, dim)
_Alike: TypeAlias = "nx.Graph[Dim]"  # edges join dims that must be in one order


def token_dims(graph: Graph) -> dict[str, frozenset[int]]:
    """By value, the dims in the order of the tokens that causal attention sees.

    Empty if there is no causal self-attention, or if a parameter has such a dim: parameters are
    kept in their own order.
    """
    alike: _Alike = nx.Graph()
    for item in graph.body:
        if isinstance(item, Loop):
            _tie_loop(item, alike)
        else:
            _tie_node(item, alike)
    seen = [
        (value.name, dim) for node in graph.nodes for value, dim in operator_of(node).causal(node)
    ]
    alike.add_nodes_from(seen)
    tokens = set[Dim]().union(*(nx.node_connected_component(alike, dim) for dim in seen))
    params = {p.value.name for p in graph.params} | {
        p.value.name for loop in graph.loops for block in loop.blocks for p in block.params
    }
    found: dict[str, set[int]] = {}
    for name, dim in filter(tokens.__contains__, alike):
        if name in params:
            return {}
        found.setdefault(name, set()).add(dim)
    return {name: frozenset(dims) for name, dims in found.items()}


def fits_order(node: Node, choice: Choice, order: str) -> bool:
    """Can `node` run under `choice` when ranks hold tokens in this order?"""
    if order == "contiguous":
        return True
    if way := rule_of(node).algorithms.get(choice):
        return order in way.orders
    return choice not in operator_of(node).contiguous(node)


def _tie_node(node: Node, alike: _Alike) -> None:
    """Dims that an axis cuts together: those with the same outermost factor, or one algorithm."""
    rule = rule_of(node)
    places: dict[str, list[Dim]] = {}
    values = zip((*node.operands, *node.outputs), (*rule.operands, *rule.results), strict=True)
    for value, dims in values:
        for number, names in enumerate(dims):
            major = next((name for name in names if rule.sizes[name] != 1), None)
            if major is not None and major not in rule.whole:
                places.setdefault(major, []).append((value.name, number))
    for dims in places.values():
        nx.add_path(alike, dims)
    for way in rule.algorithms.values():
        states = zip((*node.operands, *node.outputs), (*way.operands, *way.results), strict=True)
        nx.add_path(alike, ((value.name, state) for value, state in states if state >= 0))


def _tie_loop(loop: Loop, alike: _Alike) -> None:
    outer = (*loop.carried, *loop.invariants)
    for block in loop.blocks:
        for node in block.nodes:
            _tie_node(node, alike)
        for a, b in zip(block.inputs, outer, strict=True):
            _tie_values(a, b, alike)
        for a, b in zip(block.outputs, loop.outputs, strict=True):
            _tie_values(a, b, alike)
        for a, b in zip(block.inputs, loop.outputs, strict=False):
            _tie_values(a, b, alike)


def _tie_values(a: Value, b: Value, alike: _Alike) -> None:
    for dim in range(len(a.type.shape)):
        alike.add_edge((a.name, dim), (b.name, dim))


__all__ = ["fits_order", "token_dims"]
