"""Weights on their way: how each comes from where it is stored to its users, in time and memory.

A weight and one of its users are joined by a node of its own, whose strategies are pairs (spec that
it is stored in, spec that it is used in), so that what depends on both can be said of it:

- its bytes, while they are there or on their way, where a collective brings them (`Times`);
- its seconds, but for what collectives take to start: the weights of a unit share collectives, so
  that the latency of each is paid once, by a node with two strategies (not used, used) that all
  weights of the unit have edges to.

What several users in one place may need in the same spec comes once: then there is a node for each
spec, whose strategies are `not needed` and the specs that it may be stored in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...facts.spec import Spec, format_spec, is_shard
from ...facts.together import GROUP_BYTES
from ..ilp.problem import Edge, ProblemNode, Usage
from .conversion import Bools, Brought, Call, Floats, Ints
from .flows import User, ValueFlow
from .prices import Prices
from .regions import InLoop, Region, Scope, Unit
from .times import Times

_T = TypeVar("_T", bound=np.generic)
_Shared = tuple[Unit, torch.dtype, Call]  # a collective that weights of a unit run together


@dataclass(frozen=True, slots=True)
class Stay:
    """When a weight that a collective brought is on a rank: with its `unit`, for `users`.

    `again`: backward needs it once more.  `trained`: its gradient leaves as it came.
    """

    unit: Unit
    users: tuple[Region, ...]
    again: bool
    trained: bool

    def usages(self, times: Times, scopes: Sequence[Scope], size: Floats) -> tuple[Usage, ...]:
        """Its bytes, of `size` by strategy, over time.

        It is there, or its gradient is, while its unit runs, except when an op runs that is counted
        with it; on its way before that; and its gradient is on its way after that in backward.
        """
        copies = np.zeros(times.horizon + 1, dtype=np.int64)
        if not self.users:  # only handed on
            copies[:-1] = 1
        used = [i for i, s in enumerate(scopes) if any(r.scope is s for r in self.users)]
        for i, scope in enumerate(scopes):
            between = bool(used) and used[0] <= i <= used[-1]
            for window in times.ahead(scope):
                copies[_slice(window.times)] += between + (window.coming == self.unit)
            for window in times.back(scope):
                here = between and (self.again or self.trained)
                coming = self.again and window.coming == self.unit
                leaving = self.trained and window.leaving == self.unit
                copies[_slice(window.times)] += here + coming + leaving
        for region in self.users:
            if region.counts_operands:
                copies[list(times.forward(region))] -= 1
                if self.again or self.trained:
                    copies[list(times.backward(region))] -= 1
        changes = [*np.flatnonzero(np.diff(copies, prepend=0)).tolist(), times.horizon]
        return tuple(
            Usage(start, end, copies[start] * size)
            for start, end in pairwise(changes)
            if copies[start] and size.any()
        )


def _slice(times: range) -> slice:
    return slice(times.start, times.stop)


@dataclass(frozen=True, slots=True, eq=False)
class _Ways:
    """How a weight is brought to users in one place, by the strategies of one node: the number of
    the spec that it is stored in (-1: it is not needed, whatever that is), the spec that it is used
    in, and what `Brought` says of the way."""

    stored: Ints
    used: tuple[Spec | None, ...]
    seconds: Floats
    moved: Bools
    calls: Mapping[Call, Bools]

    @staticmethod
    def of(brought: Brought, targets: Sequence[Spec], *, needless: bool) -> _Ways:
        """All ways to `targets`, the columns of `brought`, that are not forbidden."""
        rows, columns = np.nonzero(np.isfinite(brought.seconds))
        none = int(needless)

        def listed(table: NDArray[_T]) -> NDArray[_T]:
            return np.concatenate([np.zeros(none, dtype=table.dtype), table[rows, columns]])

        return _Ways(
            np.concatenate([np.full(none, -1), rows]),
            (*[None] * none, *(targets[i] for i in columns.tolist())),
            listed(brought.seconds),
            listed(brought.moved),
            {call: listed(ran) for call, ran in brought.calls.items()},
        )

    def at(self, keep: Sequence[int]) -> _Ways:
        """Some of them."""
        k = np.array(keep, dtype=np.int64)
        calls = {call: ran[k] for call, ran in self.calls.items()}
        used = tuple(self.used[i] for i in keep)
        return _Ways(self.stored[k], used, self.seconds[k], self.moved[k], calls)

    def undominated(self, stored: Sequence[Floats]) -> _Ways:
        """Those that are worth choosing: of two ways to one spec, where one takes no more of
        anything, that one.  `stored` are what the weight itself takes, by its stored spec."""
        takes = [self.seconds, self.moved, *self.calls.values(), *(s[self.stored] for s in stored)]
        table = np.stack([np.asarray(each, dtype=float) for each in takes])
        keep: list[int] = []
        for target in dict.fromkeys(self.used):
            here = np.array([i for i, used in enumerate(self.used) if used == target])
            mine = table[:, here]
            no_more = np.logical_and.reduce(mine[:, :, None] <= mine[:, None, :])
            later = np.arange(here.size)[:, None] >= np.arange(here.size)[None, :]
            beaten = no_more & ~(no_more.T & later)  # of equal ones the first is kept
            keep += here[~np.logical_or.reduce(beaten)].tolist()
        return self.at(keep)


class Bringing:
    """Adds to the nodes and edges of a problem those that bring its weights."""

    def __init__(
        self, prices: Prices, times: Times, nodes: list[ProblemNode], edges: list[Edge]
    ) -> None:
        self._prices = prices
        self._times = times
        self._nodes = nodes
        self._edges = edges
        self._scopes = list({id(r.scope): r.scope for r in prices.regions}.values())
        self._bytes = weighty(prices)
        self._shared: dict[_Shared, dict[int, Bools]] = {}
        self._runs: dict[Unit, int] = {}
        self.paid: list[int] = []  # the nodes whose costs are what it takes to bring weights

    def connect(self, flow: ValueFlow, users: Sequence[User], kept: Sequence[int]) -> None:
        """Nodes between a weight and its users in one place; over the axes `kept` it must not be
        gathered."""
        targets = list(dict.fromkeys(t for user in users for needs in user.needs for t in needs))
        inside = isinstance(users[0].place, InLoop)
        conversions = self._prices.conversions(flow.value, param=True, inside=inside)
        unit = _unit_of(users)
        brought = conversions.brought(flow.specs, targets, self._message(unit))
        brought.seconds[_gathers(flow.specs, targets, kept)] = np.inf
        again = conversions.regather or conversions.again
        common = _common(users)
        groups = [([user for user in users if user.wants(t)], [t]) for t in common]
        for user in users:
            groups.append(([user], [t for t in targets if user.wants(t) and t not in common]))
        for group, wanted in groups:
            part = brought.to([targets.index(t) for t in wanted])
            if not part.seconds.any() and not part.calls:
                continue
            needless = any(not set(wanted).intersection(n) for user in group for n in user.needs)
            ways = _Ways.of(part, wanted, needless=needless)
            if len(flow.users) == len(groups) == 1 and self._prices.setting.alone:
                # nobody else looks at how it is stored
                own = self._nodes[flow.node]
                ways = ways.undominated([own.costs, *(usage.bytes for usage in own.usages)])
            regions = tuple(user.region for user in group if user.region is not None)
            stay = Stay(unit, regions, again, conversions.gradient)
            self._add(flow, group, wanted, ways, stay)

    def _add(
        self,
        flow: ValueFlow,
        users: Sequence[User],
        wanted: Sequence[Spec],
        ways: _Ways,
        stay: Stay,
    ) -> None:
        """The node of some users that want some specs, with its edges."""
        index, value, runs = len(self._nodes), flow.value, users[0].weight
        used = [0 if spec is None else self._prices.local_bytes(value, spec) for spec in ways.used]
        usages = stay.usages(self._times, self._scopes, np.array(used) * ways.moved)
        name = f"{value.name} -> {', '.join(map(format_spec, wanted))}"
        self._nodes.append(ProblemNode(name, runs * ways.seconds, usages))
        self.paid.append(index)
        stored = np.arange(len(flow.specs))[:, None]
        self._allow(flow.node, index, (stored == ways.stored) | (ways.stored == -1))
        column = {spec: i for i, spec in enumerate(wanted)}
        brings = [len(column) if spec is None else column[spec] for spec in ways.used]
        for user in users:
            needs = np.zeros((len(user.needs), len(column) + 1), dtype=bool)
            for row, specs in enumerate(user.needs):
                needs[row, [column[spec] for spec in specs if spec in column]] = True
            needed = np.logical_or.reduce(needs, axis=1)
            self._allow(user.node, index, needs[:, brings] | ~needed[:, None])
        self._runs[stay.unit] = runs
        for call, ran in ways.calls.items():
            if ran.any():
                self._shared.setdefault((stay.unit, value.type.dtype, call), {})[index] = ran

    def _message(self, unit: Unit) -> float:
        """Bytes of a message in which all weights of a unit move."""
        return max(min(self._bytes.get(unit, GROUP_BYTES), GROUP_BYTES), 1.0)

    def _allow(self, a: int, b: int, allowed: Bools) -> None:
        if not allowed.all():
            self._edges.append(Edge(a, b, np.where(allowed, 0.0, np.inf)))

    def share_latencies(self) -> None:
        """A node for each collective that weights of a unit share; one for those that are always
        run for the same."""
        groups: dict[tuple[Unit, tuple[tuple[int, bytes], ...]], list[_Shared]] = {}
        for shared, ran in self._shared.items():
            same = tuple((node, strategies.tobytes()) for node, strategies in ran.items())
            groups.setdefault((shared[0], same), []).append(shared)
        for (unit, _), members in groups.items():
            lines = (
                self._prices.network.line(call.kind, call.axes, self._message(unit))
                for _, _, call in members
            )
            seconds = sum(start for start, _ in lines)
            index = len(self._nodes)
            where = f"stage {unit}" if isinstance(unit, int) else f"{unit.path} {unit.kind}"
            name = f"{where}: {', '.join(str(call) for _, _, call in members)}"
            self._nodes.append(ProblemNode(name, np.array([0.0, self._runs[unit] * seconds])))
            self.paid.append(index)
            for node, ran in self._shared[members[0]].items():
                self._allow(node, index, ~ran[:, None] | np.array([False, True]))


def weighty(prices: Prices) -> dict[Unit, float]:
    """The units that have weights, and the bytes of all these."""
    unit_of: dict[str, Unit] = {}
    size: dict[str, float] = {}
    for region in prices.regions:
        for value in region.operands:
            name = prices.outer_name(value.name)
            if name in prices.params and name not in unit_of:
                own = name == value.name  # and not what the loop takes from outside
                unit_of[name] = region.scope.unit if own else region.scope.stage
                size[name] = float(value.type.bytes)
    found: dict[Unit, float] = {}
    for name, unit in unit_of.items():
        found[unit] = found.get(unit, 0.0) + size[name]
    return found


def _unit_of(users: Sequence[User]) -> Unit:
    """The unit with which a weight comes for users in one place: the first stage that uses it, or
    their block."""
    place = users[0].place
    if isinstance(place, InLoop):
        return place
    return min((user.region.scope.stage for user in users if user.region), default=0)


def _gathers(stored: Sequence[Spec], used: Sequence[Spec], kept: Sequence[int]) -> Bools:
    """Which ways gather over any of the axes `kept`."""
    return np.array(
        [[any(is_shard(a[x]) and a[x] != b[x] for x in kept) for b in used] for a in stored]
    )


def _common(users: Sequence[User]) -> list[Spec]:
    """Specs that several users may need, or one besides another."""
    count: dict[Spec, int] = {}
    for user in users:
        several = any(len(needs) > 1 for needs in user.needs)
        for target in dict.fromkeys(t for needs in user.needs for t in needs):
            count[target] = count.get(target, 0) + (2 if several else 1)
    return [target for target, n in count.items() if n > 1]


__all__ = ["Bringing", "Stay", "weighty"]
