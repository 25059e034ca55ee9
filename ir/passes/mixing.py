"""Where a model mixes the tokens of a sequence: serving caches what attention and operators with a
state need, and no more.

Dims of tokens are followed from the inputs through the rules of the ops.  An op mixes them if its
result at one token can depend on another: it contracts the dim, or needs it whole, as a
convolution, a running sum, a shift or a recurrence over the tokens does.

So is what padding may have changed: none of it may reach a state (see `recurrences.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..graph import Graph, Loop, Node, Value
from ..ops.registry import operator_of, rule_of
from ..ops.rule import Dims, Rule
from .recurrences import Recurrences

_TOKENS = 1  # the dim of tokens in inputs (b, t)


def has_state(node: Node, shape: tuple[int, ...]) -> bool:
    """Does serving go on with this node over a state, if inputs (b, t) have this shape?"""
    operator = operator_of(node)
    if not operator.continued_by:
        return False
    given = node.operands[0].type.shape
    if not given or given[0] != shape[0]:
        return False
    return operator.tokens_dim < 0 or given[operator.tokens_dim] == shape[1]


@dataclass(frozen=True, slots=True)
class Followed:
    """Where tokens went.

    `mixing`: the first node that mixes them, or puts padding into a state, and has no cache.
    `padded`: the nodes that put zeros behind the tokens of a recurrence, and the dim of those.
    """

    mixing: Node | None
    padded: dict[str, int]


def follow(graph: Graph, shape: tuple[int, ...], known: Recurrences) -> Followed:
    """Follow the tokens of inputs (b, t) of this shape; one token alone is mixed with none."""
    if shape[1] == 1:
        return Followed(None, {})
    tokens = _Tokens(shape, known)
    seen = _Seen()
    for item in graph.inputs:
        seen.enter(item.value, frozenset({_TOKENS}), padding=True)
    for item in graph.body:
        found = tokens.loop(item, seen) if isinstance(item, Loop) else tokens.node(item, seen)
        if found is not None:
            return Followed(found, tokens.padded)
    return Followed(None, tokens.padded)


@dataclass(slots=True)
class _Seen:
    """Of the values of a body: which dims count tokens, and what padding may have changed.

    `merged` is for dims that count other things, too: whether tokens are the minor (-1) or the
    major (0) part of them, where that is known.
    """

    dims: dict[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    padding: set[str] = field(default_factory=set[str])
    merged: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])

    def factors(self, value: Value, dims: Dims, sizes: Mapping[str, int]) -> set[str]:
        """Of the factors of a value's dims those that count tokens, and what is merged with them
        where it is not known which part they are."""
        found: set[str] = set()
        for dim in self.of(value):
            several = [factor for factor in dims[dim] if sizes[factor] > 1]
            part = self.merged.get((value.name, dim))
            found |= set(dims[dim]) if part is None or not several else {several[part]}
        return found

    def of(self, value: Value) -> frozenset[int]:
        """The dims of a value that count tokens."""
        return self.dims.get(value.name, frozenset())

    def known(self, value: Value) -> tuple[frozenset[int], bool]:
        """(the dims of a value that count tokens, may padding have changed it?)."""
        return self.of(value), value.name in self.padding

    def enter(self, value: Value, dims: frozenset[int], padding: bool) -> None:
        """Note what is known of a value."""
        self.dims[value.name] = dims
        if padding:
            self.padding.add(value.name)

    def unclean(self, node: Node) -> bool:
        """May padding have changed what the node reads?"""
        return any(value.name in self.padding for value in node.operands)


@dataclass(slots=True)
class _Tokens:
    """Follows the tokens of inputs (b, t) of a shape."""

    shape: tuple[int, ...]
    known: Recurrences
    padded: dict[str, int] = field(default_factory=dict[str, int])

    def loop(self, loop: Loop, seen: _Seen) -> Node | None:
        """As `node`, for a loop: again until what is known of its carried values grows no more."""
        carried = [seen.known(value) for value in loop.carried]
        invariants = [seen.known(value) for value in loop.invariants]
        while True:
            before = list(carried)
            for block in loop.blocks:
                inside = _Seen()
                for value, known in zip(block.inputs, [*carried, *invariants], strict=True):
                    inside.enter(value, *known)
                for node in block.nodes:
                    if self.node(node, inside) is not None:
                        return node
                made = [inside.known(value) for value in block.outputs]
                carried = [(a | c, b or d) for (a, b), (c, d) in zip(carried, made, strict=True)]
            if carried == before:
                break
        for value, known in zip(loop.outputs, carried, strict=True):
            seen.enter(value, *known)
        return None

    def node(self, node: Node, seen: _Seen) -> Node | None:
        """Enter what is known of the node's results; the node itself if it mixes tokens."""
        if (refused := self._enter_padding(node, seen)) is not None:
            return refused
        if operator_of(node).continued_by and operator_of(node).tokens_dim < 0:
            if not has_state(node, self.shape):
                return node  # the state of something else than a sequence
        if node.name in self.known.inner:
            dim = self.known.picks.get(node.name, -1)
            if dim >= 0 and seen.of(node.operands[0]) != frozenset({dim}):
                return node  # rows of something else than tokens
            given = self.known.gives.get(node.name)
            for value in node.outputs:
                found = self._leaving(value) if given is None else frozenset({given})
                seen.dims[value.name] = found
            return None
        return self._enter_dims(node, seen)

    def _enter_padding(self, node: Node, seen: _Seen) -> Node | None:
        """The node itself if padding reaches a state through it."""
        names = {value.name for value in node.outputs}
        if node.name in self.known.ends:
            dims = seen.of(node.operands[0])
            if len(dims) == 1 and node.operands[0].type.shape[0] == self.shape[0]:
                (self.padded[node.name],) = dims
                return None
        operator = operator_of(node)
        if operator.keeps_out_padding or not seen.unclean(node):
            return None
        if operator.acts:
            return node
        seen.padding |= names
        return None

    def _enter_dims(self, node: Node, seen: _Seen) -> Node | None:
        rule = rule_of(node)
        used = [
            seen.factors(value, dims, rule.sizes)
            for value, dims in zip(node.operands, rule.operands, strict=True)
        ]
        tokens = {name for names in used for name in names if rule.sizes[name] > 1}
        mixed = tokens
        if has_state(node, self.shape):
            dim = operator_of(node).tokens_dim
            if dim >= 0 and seen.of(node.operands[0]) != frozenset({dim}):
                return node  # sizes that are alike by chance, or something else than tokens
            mixed = {name for names in used[1:] for name in names if rule.sizes[name] > 1}
        kept = {factor for places in rule.results for dim in places for factor in dim}
        if not operator_of(node).attends and (mixed & rule.whole or mixed - kept):
            return node
        for value, places in zip(node.outputs, rule.results, strict=True):
            found = {dim for dim, factors in enumerate(places) if tokens & set(factors)}
            if self.shape[0] != self.shape[1] and value.type.shape[:2] == self.shape:
                found -= {0} if 1 in found else set()  # sequences and tokens that were merged
            seen.dims[value.name] = frozenset(found)
            for dim in found:
                several = [factor for factor in places[dim] if rule.sizes[factor] > 1]
                part = _part(several, tokens, node, rule, seen)
                if part is not None:
                    seen.merged[value.name, dim] = part
        return None

    def _leaving(self, value: Value) -> frozenset[int]:
        """The dims of tokens of what leaves a recurrence; any that may be, if it is not clear."""
        if value.name not in self.known.leaving:
            return frozenset()
        shape, (batch, count) = value.type.shape, self.shape
        if shape[:2] == (batch, count):
            return frozenset({1})
        alike = frozenset(dim for dim, size in enumerate(shape) if size == count)
        if len(alike) == 1:
            return alike
        if shape and shape[0] % (batch * count) == 0:
            return frozenset({0})
        return alike or frozenset(dim for dim, size in enumerate(shape) if size > 1)


def _part(
    several: Sequence[str], tokens: set[str], node: Node, rule: Rule, seen: _Seen
) -> int | None:
    """Which part of the factors of a dim counts tokens, as `_Seen.merged` has it."""
    if len(several) > 1:
        counted = [i for i, factor in enumerate(several) if factor in tokens]
        return {0: 0, len(several) - 1: -1}.get(counted[0]) if len(counted) == 1 else None
    for value, places in zip(node.operands, rule.operands, strict=True):
        for dim, factors in enumerate(places):
            if several and [f for f in factors if rule.sizes[f] > 1] == list(several):
                if (part := seen.merged.get((value.name, dim))) is not None:
                    return part
    return None


__all__ = ["Followed", "follow", "has_state"]
