"""When activations and their gradients are there, beside what autograd keeps.

A value is there from the region that makes it to its last use.  In training what of it lives on is
what autograd keeps; its gradient is there from the backward of the first region that gives some of
it, which is the last that takes the value, to the backward of the region that made it.

    x -> norm -> up -> silu -> down -> + -> y        y's gradient until +; x's from + to norm's
     \\------------------------------- /              predecessor, as one tensor: + hands it on

A gradient that an operator hands on as it is (`hands_on`) stays one tensor: it counts as that of
the operand that is there longest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...ir.graph import Node, Value
from ...ir.ops.registry import is_view, operator_of, saved_values
from .prices import Prices
from .regions import Region, Scope, Strategy
from .times import Times, Window


@dataclass(frozen=True, slots=True)
class Span:
    """From `start` until `end` a value of a region is there, or its gradient; by its number among
    the region's values, or among its operands."""

    number: int
    is_operand: bool
    start: int
    end: int


def hands_on(node: Node, value: Value) -> bool:
    """Is the gradient of an operand that of the result, as it is or as a view?"""
    if is_view(node):
        return value is node.operands[0]
    out = node.outputs[0]
    plain = not (saved_values(node) or operator_of(node).heavy)
    return plain and len(node.operands) > 1 and value.type == out.type


class Spans:
    """The spans that each region answers for."""

    def __init__(self, prices: Prices, times: Times) -> None:
        self._prices = prices
        self._times = times
        self._users: dict[str, list[int]] = {}
        self._made_by: dict[str, int] = {}
        self._scopes: list[Scope] = []
        for me, region in enumerate(prices.regions):
            if region.scope not in self._scopes[-1:]:
                self._scopes.append(region.scope)
            for value in region.operands:
                if prices.outer_name(value.name) not in prices.params:
                    self._users.setdefault(value.name, []).append(me)
            self._made_by |= {value.name: me for value in region.values}
        self._handed = self._handed_on()

    def _handed_on(self) -> set[tuple[int, str]]:
        """(region, operand) whose gradient is that of another operand, which is there longer."""
        found: set[tuple[int, str]] = set()
        for me, region in enumerate(self._prices.regions):
            for node in region.nodes:
                same = [v for v in node.operands if v.differentiable and hands_on(node, v)]
                outside = [v for v in same if v in region.operands]
                longest = min(outside, key=lambda v: self._made_by.get(v.name, -1), default=None)
                found |= {(me, v.name) for v in outside if v is not longest}
        return found

    def values(self, me: int) -> list[Span]:
        """Of the forward pass: what the region makes until it is used last, and what a layer was
        given as long as it runs, by the first region that takes it."""
        region, spans = self._prices.regions[me], list[Span]()
        for run, window in enumerate(self._times.ahead(region.scope)):
            at = self._times.forward(region)[run] + 1
            for number, value in enumerate(region.values):
                if (end := self._last_use(value, region.scope, run, window)) > at:
                    spans.append(Span(number, False, at, end))
            for number, value in self._taken_in(region):
                if me == min(self._inside(value, region.scope)):
                    spans.append(Span(number, True, window.times.start, window.times.stop))
        return spans

    def summands(self, me: int) -> list[tuple[int, int]]:
        """From when until when what the region makes is there beside what it is converted to: as
        long as the function runs that has a name for it."""
        scope = self._prices.regions[me].scope
        ends = [
            self._times.horizon if scope.loop is None else window.times.stop
            for window in self._times.ahead(scope)
        ]
        starts = self._times.forward(self._prices.regions[me])
        return [(start + 1, end) for start, end in zip(starts, ends, strict=True)]

    def _last_use(self, value: Value, scope: Scope, run: int, window: Window) -> int:
        regions = [self._prices.regions[user] for user in self._users.get(value.name, ())]
        ends = [
            self._times.forward(user)[run if user.scope is scope else -1] + 1 for user in regions
        ]
        if scope.block is not None and value in scope.block.outputs:
            ends.append(window.times.stop)
        return max(ends, default=0)

    def gradients(self, me: int) -> list[Span]:
        """Of the backward pass: gradients of what the region makes, and that of what a layer was
        given, by the first region that gives some of it."""
        region, spans = self._prices.regions[me], list[Span]()
        ends = self._times.backward(region)
        for run, window in enumerate(self._times.back(region.scope)):
            for number, value in enumerate(region.values):
                start = self._first_gradient(value, region.scope, run, window)
                if value.differentiable and start is not None and start <= ends[run]:
                    spans.append(Span(number, False, start, ends[run] + 1))
            for number, value in self._taken_in(region):
                users = self._giving(value, self._inside(value, region.scope))
                if value.differentiable and users and me == max(users):
                    spans.append(Span(number, True, ends[run] + 1, window.times.stop))
        return [span for span in spans if span.start < span.end]

    def _first_gradient(self, value: Value, scope: Scope, run: int, window: Window) -> int | None:
        """When a gradient is there first; None where none is, or only as that of another."""
        starts: list[int] = []
        for user in self._giving(value, self._users.get(value.name, ())):
            region = self._prices.regions[user]
            place = run if region.scope is scope else 0
            starts.append(self._times.backward(region)[place] + 1)
        if scope.block is not None and value in scope.block.outputs:
            starts.append(window.times.start)
        for loop in self._prices.graph.loops:
            if value in loop.carried:
                inside = [s for s in self._scopes if s.loop is loop]
                starts.append(max(self._times.back(s)[-1].times.stop for s in inside))
        return min(starts, default=None)

    def _giving(self, value: Value, users: Collection[int]) -> list[int]:
        """Those of the users whose gradient is a tensor of its own."""
        return [user for user in users if (user, value.name) not in self._handed]

    def _inside(self, value: Value, scope: Scope) -> list[int]:
        users = self._users.get(value.name, ())
        return [user for user in users if self._prices.regions[user].scope is scope]

    def _taken_in(self, region: Region) -> list[tuple[int, Value]]:
        """What the region takes of what loops carry, with its numbers among the operands."""
        scope = region.scope
        if scope.loop is None or scope.block is None:
            return []
        carried = scope.block.inputs[: len(scope.loop.carried)]
        return [(i, value) for i, value in enumerate(region.operands) if value in carried]


@dataclass(slots=True)
class _Alive:
    """Bytes of gradients that are there while the backward of a region runs."""

    sizes: dict[str, float] = field(default_factory=dict[str, float])
    peak: float = 0.0

    def node(
        self,
        node: Node,
        given: Mapping[str, float],
        beside: float,
    ) -> None:
        """The backward of one node, which gives the operands `given` gradients of so many bytes."""
        results = [value.name for value in node.outputs]
        handed = sum(self.sizes.get(name, 0.0) for name in results)
        new = dict(given)
        for value in node.operands:
            if value.name in new and hands_on(node, value):
                new[value.name] = 0.0
        self.peak = max(self.peak, sum(self.sizes.values()) + sum(new.values()) + beside)
        for name in results:
            self.sizes.pop(name, None)
        for value in node.operands:
            if value.name in new:
                own = handed if hands_on(node, value) else new[value.name]
                self.sizes[value.name] = max(self.sizes.get(value.name, 0.0), own)
                handed = 0.0 if hands_on(node, value) else handed


def while_backward(prices: Prices, region: Region, strategy: Strategy) -> float:
    """Bytes of gradients and buffers at the widest place of a region's backward, without those of
    what it makes and others take, and of parameters."""
    alive = _Alive()
    for node, choices in zip(reversed(region.nodes), reversed(strategy.choices), strict=True):
        cost = prices.node_cost(node, choices)
        given = {
            value.name: float(prices.local_bytes(value, need))
            for value, need in cost.needs
            if value.differentiable and prices.outer_name(value.name) not in prices.params
        }
        alive.node(node, given, cost.behind)
    return alive.peak


def while_forward(
    prices: Prices, region: Region, strategy: Strategy, kept: Mapping[str, int]
) -> float:
    """Bytes of operands, results and buffers at the widest node of a region, without parameters and
    what autograd keeps (`kept`, by name)."""
    made = dict(zip((v.name for v in region.values), strategy.produces, strict=True))
    widest = 0.0
    for node, choices in zip(region.nodes, strategy.choices, strict=True):
        cost = prices.node_cost(node, choices)
        if operator_of(node).free:
            continue
        sizes = {v.name: prices.local_bytes(v, need) for v, need in cost.needs}
        sizes |= {v.name: prices.local_bytes(v, made[v.name]) for v in node.outputs}
        here = sum(
            size
            for name, size in sizes.items()
            if prices.viewed(name)[0] not in kept and prices.outer_name(name) not in prices.params
        )
        widest = max(widest, here + cost.beside)
    return widest


__all__ = ["Span", "Spans", "hands_on", "while_backward", "while_forward"]
