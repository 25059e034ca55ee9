"""Where a model mixes the tokens of a sequence: serving caches what attention and operators with a
state need, and no more.

Dims of tokens are followed from the inputs through the rules of the ops.  An op mixes them if its
result at one token can depend on another: it contracts the dim, or needs it whole, as a
convolution, a running sum, a shift or a recurrence over the tokens does.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Graph, Loop, Node
from ..ops.registry import operator_of, rule_of

_TOKENS = 1  # the dim of tokens in inputs (b, t)
_STATE_TOKENS = 2  # and in what an operator with a state is given, (b, c, t)


def has_state(node: Node, shape: tuple[int, ...]) -> bool:
    """Does serving keep a state for this node of a model whose inputs (b, t) have this shape?"""
    if not operator_of(node).continued_by:
        return False
    batch, *_, tokens = node.operands[0].type.shape
    return (batch, tokens) == shape


def mixing_node(graph: Graph, shape: tuple[int, ...]) -> Node | None:
    """The first node that mixes tokens of the inputs (b, t) and has no cache; None without one.

    One token alone is mixed with none.
    """
    tokens = _Tokens(shape)
    if shape[1] == 1:
        return None
    dims = {item.value.name: frozenset({_TOKENS}) for item in graph.inputs}
    for item in graph.body:
        found = tokens.loop(item, dims) if isinstance(item, Loop) else tokens.node(item, dims)
        if found is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Follows dims of tokens: by value, those of its dims that count tokens."""

    shape: tuple[int, ...]

    def loop(self, loop: Loop, dims: dict[str, frozenset[int]]) -> Node | None:
        """As `node`, for a loop: again until its carried values gain no more dims of tokens."""
        carried = [dims.get(value.name, frozenset()) for value in loop.carried]
        while True:
            before = list(carried)
            for block in loop.blocks:
                outer = [*carried, *(dims.get(v.name, frozenset()) for v in loop.invariants)]
                inside = dict(zip((value.name for value in block.inputs), outer, strict=True))
                for node in block.nodes:
                    if self.node(node, inside) is not None:
                        return node
                made = [inside.get(value.name, frozenset()) for value in block.outputs]
                carried = [a | b for a, b in zip(carried, made, strict=True)]
            if carried == before:
                break
        dims.update(zip((value.name for value in loop.outputs), carried, strict=True))
        return None

    def node(self, node: Node, dims: dict[str, frozenset[int]]) -> Node | None:
        """Enter the dims of tokens of the node's results; the node itself if it mixes them."""
        rule = rule_of(node)
        used = [
            {factor for dim in dims.get(value.name, ()) for factor in places[dim]}
            for value, places in zip(node.operands, rule.operands, strict=True)
        ]
        tokens = {name for names in used for name in names if rule.sizes[name] > 1}
        mixed = tokens
        if has_state(node, self.shape):
            if dims.get(node.operands[0].name) != frozenset({_STATE_TOKENS}):
                return node  # sizes that are alike by chance, or something else than tokens
            mixed = {name for names in used[1:] for name in names if rule.sizes[name] > 1}
        kept = {factor for places in rule.results for dim in places for factor in dim}
        if not operator_of(node).attends and (mixed & rule.whole or mixed - kept):
            return node
        for value, places in zip(node.outputs, rule.results, strict=True):
            found = {dim for dim, factors in enumerate(places) if tokens & set(factors)}
            dims[value.name] = frozenset(found)
        return None


__all__ = ["has_state", "mixing_node"]
