"""Where a model mixes the tokens of a sequence: serving caches what attention needs, and no more.

Dims of tokens are followed from the inputs through the rules of the ops.  An op mixes them if its
result at one token can depend on another: it contracts the dim, or needs it whole, as a
convolution, a running sum, a shift or a recurrence over the tokens does.
"""

from __future__ import annotations

from ..graph import Graph, Loop, Node
from ..ops.registry import operator_of, rule_of

_TOKENS = 1  # the dim of tokens in inputs (b, t)


def mixing_node(graph: Graph) -> Node | None:
    """The first node but attention that mixes tokens of the inputs (b, t); None without one."""
    dims = {item.value.name: frozenset({_TOKENS}) for item in graph.inputs}
    for item in graph.body:
        found = _loop(item, dims) if isinstance(item, Loop) else _node(item, dims)
        if found is not None:
            return found
    return None


def _loop(loop: Loop, dims: dict[str, frozenset[int]]) -> Node | None:
    """As `_node`, for a loop: again until its carried values gain no more dims of tokens."""
    carried = [dims.get(value.name, frozenset()) for value in loop.carried]
    while True:
        before = list(carried)
        for block in loop.blocks:
            outer = [*carried, *(dims.get(value.name, frozenset()) for value in loop.invariants)]
            inside = dict(zip((value.name for value in block.inputs), outer, strict=True))
            for node in block.nodes:
                if _node(node, inside) is not None:
                    return node
            made = [inside.get(value.name, frozenset()) for value in block.outputs]
            carried = [a | b for a, b in zip(carried, made, strict=True)]
        if carried == before:
            break
    dims.update(zip((value.name for value in loop.outputs), carried, strict=True))
    return None


def _node(node: Node, dims: dict[str, frozenset[int]]) -> Node | None:
    """Enter the dims of tokens of the node's results; the node itself if it mixes them."""
    rule = rule_of(node)
    tokens = {
        factor
        for value, places in zip(node.operands, rule.operands, strict=True)
        for dim in dims.get(value.name, ())
        for factor in places[dim]
        if rule.sizes[factor] > 1
    }
    kept = {factor for places in rule.results for dim in places for factor in dim}
    if not operator_of(node).attends and (tokens & rule.whole or tokens - kept):
        return node
    for value, places in zip(node.outputs, rule.results, strict=True):
        found = {dim for dim, factors in enumerate(places) if tokens & set(factors)}
        dims[value.name] = frozenset(found)
    return None
