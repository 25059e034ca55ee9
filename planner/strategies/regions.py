"""Regions: the units that the planner decides about.

A region is one heavy op (a matrix product, attention, a lookup, a loss) or a connected group of
light ops (elementwise, views, norms) that hold a gradient.  Inside a region values are not
converted: a conversion in the middle of such a chain is never cheaper than at one of its ends,
where the ends of a chain of casts are the two dtypes to choose from.  The one exception is the
small result of a reduction (the mean of a norm over a dim that is cut), which may be all-reduced.

A region's *strategy* is a choice for each of its nodes on each mesh axis that agrees on every
internal value.  Axis by axis the agreeing choices are found by search; strategies are their
products, as far as sizes divide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Literal, NamedTuple, TypeAlias

import networkx as nx
import torch

from ...facts.spec import P, R, Spec, State, V, format_spec
from ...ir.graph import Block, Graph, Loop, Node, Value
from ...ir.ops.caches import cache_name
from ...ir.ops.local import node_specs, plain_state
from ...ir.ops.order import fits_order
from ...ir.ops.registry import operator_of, rule_of
from ...ir.ops.rule import Choice, Rule

_States: TypeAlias = tuple[tuple[str, State], ...]

_MOST_NODES = 128  # of a region: longer ones (loops that are written out) are taken in runs
_MAX_PER_AXIS = 24  # more agreeing choices than this on one axis: the region is split into nodes


@dataclass(frozen=True, slots=True)
class TopLevel:
    """The code outside loops, with what is converted there before a loop: it runs once."""


@dataclass(frozen=True, slots=True)
class InLoop:
    """The code of one kind of block of the loop over `path`."""

    path: str
    kind: int


Place: TypeAlias = TopLevel | InLoop
TOP_LEVEL = TopLevel()
# Whose weights come together: a kind of block's, or those of stage n, which runs after n loops
Unit: TypeAlias = int | InLoop


@dataclass(frozen=True, slots=True)
class Scope:
    """A straight run of nodes: the code outside loops between two loops, or one kind of block."""

    nodes: tuple[Node, ...]
    weight: int = 1  # how often it runs per step
    loop: Loop | None = None
    block: Block | None = None
    place: Place = TopLevel()  # what is converted for a user is there for others in this place
    stage: int = 0  # how many loops run before

    @property
    def unit(self) -> Unit:
        """With whose weights its own come."""
        return self.stage if isinstance(self.place, TopLevel) else self.place


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Which layers of a loop run forward again in backward: none where `any` is False, else all but
    the last `kept`; of those the last `part` keep the results of products and of attention, and
    run again what is between these.  Backward frees first what the last layers keep."""

    any: bool = False
    kept: int = 0
    part: int = 0

    def of(self, loop: Loop) -> Modes:
        """How many layers of a loop do what, from the first on."""
        count = len(loop.order)
        kept = min(self.kept, count) if self.any else count
        part = min(self.part, count - kept)
        return Modes(count - kept - part, part, kept)

    def runs(self, scope: Scope) -> Modes:
        """The same of the runs of a scope."""
        if scope.loop is None or not isinstance(scope.place, InLoop):
            return Modes(0, 0, scope.weight)
        (full, part, _), order, kind = self.of(scope.loop), scope.loop.order, scope.place.kind
        ends = 0, full, full + part, len(order)
        return Modes(*(order[a:b].count(kind) for a, b in pairwise(ends)))

    def in_fewer(self, layers: int) -> Recomputed:
        """The same where loops have so many layers or more: each mode that others have is left to
        one at least, if there are as many."""
        if not self.any:
            return self
        kept = min(self.kept, layers - 1)
        return replace(self, kept=kept, part=min(self.part, max(layers - kept - 1, 1)))

    def words(self, layers: int) -> str:
        """What is done with the layers of a loop that has so many."""
        if not self.any:
            return "kept"
        others = f" but for {self.kept}" if self.kept else ""
        if self.part + self.kept >= layers:
            return f"selective{others}"
        return f"recomputed{others}" + (f", {self.part} selective" if self.part else "")

    def __str__(self) -> str:
        if not self.any:
            return "kept"
        kept = f" but for the last {self.kept}" if self.kept else ""
        return f"recomputed{kept}" + (f", the last {self.part} in part" if self.part else "")


class Modes(NamedTuple):
    """How many layers, or runs, are recomputed whole, keep a part, and keep all."""

    full: int
    part: int
    kept: int

    @property
    def again(self) -> float:
        """The share of those that run again, whole or in part."""
        return (self.full + self.part) / sum(self)

    def mode(self, number: int) -> Literal["full", "part", "kept"]:
        """What is done with layer `number`."""
        return "full" if number < self.full else "part" if number < sum(self[:2]) else "kept"

    def shares(self) -> tuple[float, float]:
        """The shares of those that are recomputed whole, and that keep a part."""
        return self.full / sum(self), self.part / sum(self)


def scopes(graph: Graph) -> Iterator[Scope]:
    """The graph's straight runs in order."""
    run: list[Node] = []
    stage = 0
    for item in graph.body:
        if isinstance(item, Node):
            run.append(item)
            continue
        if run:
            yield Scope(tuple(run), stage=stage)
            run = []
        for kind, block in enumerate(item.blocks):
            place = InLoop(item.path, kind)
            yield Scope(block.nodes, item.order.count(kind), item, block, place, stage)
        stage += 1
    if run:
        yield Scope(tuple(run), stage=stage)


def units(graph: Graph) -> list[Unit]:
    """The units of weights in the order in which a model uses them, one for each layer."""
    found: list[Unit] = [0]
    for stage, loop in enumerate(graph.loops, start=1):
        found += [*(InLoop(loop.path, kind) for kind in loop.order), stage]
    return found


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run a region: per node its choice on each axis, and the specs that follow.

    `requires` has, per boundary operand, the specs that its uses need (usually one); `produces` has
    the spec of every value made in the region.
    """

    choices: tuple[tuple[Choice, ...], ...]
    requires: tuple[tuple[Spec, ...], ...]
    produces: tuple[Spec, ...]

    def line(self, node: int) -> str:
        """The choices of one node of the region, the specs needed and those made.

        `b,o: S0,R V,S0 -> S0,S1`; operands needed in several specs have them joined by `|`.
        """
        needed = " ".join("|".join(map(format_spec, specs)) or "-" for specs in self.requires)
        made = " ".join(map(format_spec, self.produces))
        return f"{','.join(self.choices[node])}: {needed} -> {made}"


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes that are decided together, with their strategies."""

    nodes: tuple[Node, ...]
    scope: Scope
    operands: tuple[Value, ...]  # values from outside the region
    values: tuple[Value, ...]  # values made here
    strategies: tuple[Strategy, ...]

    @property
    def name(self) -> str:
        """Name of the region's heavy or first node."""
        return self._head.name

    @property
    def _head(self) -> Node:
        return next((node for node in self.nodes if operator_of(node).heavy), self.nodes[0])

    def __str__(self) -> str:
        """Its operands and values, then a line for each strategy: what it needs and makes.

        The choices are those of the node that names the region.
        """
        values = " -> ".join(
            ", ".join(v.name for v in side) for side in (self.operands, self.values)
        )
        head = self.nodes.index(self._head)
        return "\n".join(
            [f"{self.name}: {values}", *(f"  {s.line(head)}" for s in self.strategies)]
        )


def make_regions(
    graph: Graph, axis_sizes: tuple[int, ...], *, training: bool, order: str = "contiguous"
) -> list[Region]:
    """All regions of the graph, in order of their first node.

    `order` is how ranks that share a sequence hold its tokens: not all strategies allow zigzag.
    """
    out: list[Region] = []
    for scope in scopes(graph):
        groups = _groups(scope)
        visible = _visible(graph, scope, groups)
        for group in groups:
            out += _regions_of(group, scope, axis_sizes, training, visible)
    return [_in_order(region, order) for region in out] if order != "contiguous" else out


def _in_order(region: Region, order: str) -> Region:
    """The region with those strategies that allow this order of the tokens."""
    kept = tuple(
        strategy
        for strategy in region.strategies
        if all(
            fits_order(node, choice, order)
            for node, choices in zip(region.nodes, strategy.choices, strict=True)
            for choice in choices
        )
    )
    return replace(region, strategies=kept)


def _visible(graph: Graph, scope: Scope, groups: list[list[Node]]) -> set[str]:
    """Names of values that are used outside the group of nodes that makes them."""
    group_of = {v.name: i for i, group in enumerate(groups) for n in group for v in n.outputs}
    seen = {
        v.name
        for i, g in enumerate(groups)
        for n in g
        for v in n.operands
        if group_of.get(v.name, i) != i
    }
    if scope.block is not None:
        return seen | {value.name for value in scope.block.outputs}
    inside = {value.name for node in scope.nodes for value in node.outputs}
    elsewhere = {out.value.name for out in graph.outputs}
    for item in graph.body:
        if isinstance(item, Loop):
            elsewhere |= {value.name for value in (*item.carried, *item.invariants)}
        elif item not in scope.nodes:
            elsewhere |= {value.name for value in item.operands}
    return seen | (elsewhere & inside)


def _groups(scope: Scope) -> list[list[Node]]:
    """Light nodes joined along values that hold a gradient, and what shares a state; every other
    node alone."""
    at = {value.name: i for i, node in enumerate(scope.nodes) for value in node.outputs}
    light = [not operator_of(node).heavy for node in scope.nodes]
    joined = nx.empty_graph(len(light))
    for i, node in enumerate(scope.nodes):
        for value in node.operands if light[i] else ():
            source = at.get(value.name)
            if source is not None and light[source] and value.differentiable:
                joined.add_edge(source, i)
    joined.add_edges_from(_pairs_of_states(scope.nodes))
    groups = [sorted(group) for group in nx.connected_components(joined)]
    runs = [
        group[start : start + _MOST_NODES]
        for group in groups
        for start in range(0, len(group), _MOST_NODES)
    ]
    return [[scope.nodes[i] for i in run] for run in runs]


def _pairs_of_states(nodes: Sequence[Node]) -> Iterator[tuple[int, int]]:
    """Where a state is read and where it is kept: it lies alike in both."""
    first: dict[str, int] = {}
    for i, node in enumerate(nodes):
        if operator_of(node).remembers:
            at = first.setdefault(cache_name(node), i)
            if at != i:
                yield at, i


def _regions_of(
    nodes: list[Node],
    scope: Scope,
    axis_sizes: tuple[int, ...],
    training: bool,
    visible: set[str],
) -> list[Region]:
    per_axis = _agreeing(nodes, training, visible)
    if per_axis is None:
        every = {value.name for node in nodes for value in node.outputs}
        singles = (_regions_of([n], scope, axis_sizes, training, every) for n in nodes)
        return [region for single in singles for region in single]
    made = {value.name for node in nodes for value in node.outputs}
    operands = {v.name: v for n in nodes for v in n.operands if v.name not in made}
    values = tuple(value for node in nodes for value in node.outputs)
    rules = [rule_of(node) for node in nodes]
    strategies: list[Strategy] = []
    for combination in product(per_axis, repeat=len(axis_sizes)):
        choices = tuple(zip(*combination, strict=True))
        if all(r.ways(c, axis_sizes) is not None for r, c in zip(rules, choices, strict=True)):
            strategies.append(_strategy(nodes, rules, choices, tuple(operands), training))
    return [Region(tuple(nodes), scope, tuple(operands.values()), values, tuple(strategies))]


def _strategy(
    nodes: list[Node],
    rules: list[Rule],
    choices: tuple[tuple[Choice, ...], ...],
    operands: tuple[str, ...],
    training: bool,
) -> Strategy:
    requires: dict[str, list[Spec]] = {name: [] for name in operands}
    produces: list[Spec] = []
    for node, rule, choice in zip(nodes, rules, choices, strict=True):
        needed, made = node_specs(node, rule, choice, training)
        produces += made
        for value, spec in zip(node.operands, needed, strict=True):
            if value.name in requires and spec not in requires[value.name]:
                requires[value.name].append(spec)
    return Strategy(choices, tuple(tuple(requires[n]) for n in operands), tuple(produces))


def _agreeing(
    nodes: list[Node], training: bool, visible: set[str]
) -> list[tuple[Choice, ...]] | None:
    """Choices per node on one axis that agree on every value inside; None if too many, or if most
    ways to look for them end in none.

    Of choices with the same states at the region's border the first is kept: factors are tried
    before `R`, so it is the one that cuts most.
    """
    ways = [_different_choices(node, training) for node in nodes]
    found: dict[tuple[_States, _States, Choice], tuple[Choice, ...]] = {}
    tries = 4 * _MAX_PER_AXIS * len(nodes)  # of nodes: as many as without dead ends, at the most

    def extend(at: int, states: dict[str, State], border: _States, taken: list[Choice]) -> bool:
        nonlocal tries
        tries -= 1
        if tries < 0:
            return False
        if at == len(nodes):
            key = (tuple(dict.fromkeys(border)), tuple(states.items()), _algorithm(nodes, taken))
            found.setdefault(key, tuple(taken))
            return len(found) <= 4 * _MAX_PER_AXIS
        node = nodes[at]
        for choice, needed, made in ways[at]:
            if not _agrees(node, needed, states, nodes):
                continue
            inner = dict(states)
            inner |= {value.name: state for value, state in zip(node.outputs, made, strict=True)}
            outside = tuple(
                (v.name, s)
                for v, s in zip(node.operands, needed, strict=True)
                if v.name not in states
            )
            if not extend(at + 1, inner, (*border, *outside), [*taken, choice]):
                return False
        return True

    if not extend(0, {}, (), []):
        return None
    kept: dict[tuple[_States, _States, Choice], tuple[Choice, ...]] = {}
    for (border, states, algorithm), choices in found.items():
        outputs = tuple(item for item in states if item[0] in visible)
        kept.setdefault((border, outputs, algorithm), choices)
    return list(kept.values()) if len(kept) <= _MAX_PER_AXIS or len(nodes) == 1 else None


def _different_choices(node: Node, training: bool) -> list[tuple[Choice, list[State], list[State]]]:
    """(choice, states of the operands, states of the outputs), factors first.

    Of choices with the same states (`R` and `V` where there is no gradient) the first is kept:
    otherwise a region of n nodes would have 2^n equal strategies.
    """
    rule = rule_of(node)
    out: list[tuple[Choice, list[State], list[State]]] = []
    for choice, states in sorted(rule.choices().items(), key=lambda c: c[0] not in rule.sizes):
        needed, made = (
            [
                plain_state(s, training and v.differentiable)
                for s, v in zip(side, values, strict=True)
            ]
            for side, values in zip(states, (node.operands, node.outputs), strict=True)
        )
        if _adds_flags(node, (*needed, *made)):
            continue
        if choice in rule.algorithms or not any((needed, made) == row[1:] for row in out):
            out.append((choice, needed, made))
    return out


def _adds_flags(node: Node, states: Sequence[State]) -> bool:
    """Would ranks hold summands of True and False, which cannot be added up?"""
    values = (*node.operands, *node.outputs)
    flags = (value.type.dtype == torch.bool for value in values)
    return any(flag and state == P for flag, state in zip(flags, states, strict=True))


def _algorithm(nodes: list[Node], choices: list[Choice]) -> Choice:
    """The algorithm among the choices: two with the same states differ in price."""
    for node, choice in zip(nodes, choices, strict=True):
        if choice in rule_of(node).algorithms:
            return choice
    return ""


def _agrees(node: Node, needs: list[State], states: dict[str, State], nodes: list[Node]) -> bool:
    for value, need in zip(node.operands, needs, strict=True):
        have = states.get(value.name, need)
        if have == need:
            continue
        if have == P and need in (R, V) and _is_reduction(value, nodes):
            continue
        return False
    return True


def _is_reduction(value: Value, nodes: list[Node]) -> bool:
    return any(operator_of(n).sums_inside for n in nodes if value in n.outputs)
