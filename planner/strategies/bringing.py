"""Weights on their way: how each comes from where it is stored to its users, in time and memory.

A weight and one of its users are joined by a node of its own, whose strategies are pairs (way that
it is kept, spec that it is used in), so that what depends on both can be said of it:

- its bytes, while they are there or on their way, where a collective or a cast brings them
  (`Times`), and those of what is kept for its uses (`storage.py`);
- its seconds as far as computing beside them does not hide them (`Cluster.contention`; the plan
  that is found is priced by windows, `plan/overlap.py`), but for what collectives take to start:
  the weights of a unit share collectives, so that the latency of each is paid once, by a node with
  two strategies (not used, used) that all weights of the unit have edges to.

What several users in one place may need in the same spec comes once: then there is a node for each
spec, whose strategies are `not needed` and the ways that it may be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ...facts.spec import Spec, V, format_spec, is_shard
from ...facts.together import GROUP_BYTES
from ..ilp.problem import Edge, ProblemNode, Usage
from .conversion import Call
from .flows import User, ValueFlow
from .lattice import Bools, Floats, Ints
from .params import ParamRef
from .prices import Prices
from .regions import InLoop, Place, Region, Scope, Unit
from .storage import Storage
from .times import Times

# What bytes are for: parameters and their optimizer's states, copies that are kept for their uses,
# gradients, what is kept for backward or in KV caches, and what runs.
Use: TypeAlias = Literal["state", "copy", "gradient", "kept", "running"]
USES: tuple[Use, ...] = get_args(Use)
_T = TypeVar("_T", bound=np.generic)
_Shared = tuple[Unit, torch.dtype, Call]  # a collective that weights of a unit run together


@dataclass(frozen=True, slots=True)
class Stay:
    """When a weight that a collective or a cast brought is on a rank: with its `unit`, for `users`.

    `again`: backward needs it once more.  `trained`: its gradient leaves.
    """

    unit: Unit
    users: tuple[Region, ...]
    again: bool
    trained: bool

    def usages(
        self,
        times: Times,
        scopes: Sequence[tuple[Scope, Region | None]],
        size: Floats,
        leaving: Floats,
        made: Floats,
    ) -> tuple[Usage, ...]:
        """Its bytes over time: by strategy `size`, `leaving` those of its gradient on its way, and
        `made` those of its gradient where it does not lie in place of the weight.  `scopes` have
        the last of their regions that takes a weight: in backward they come when it needs one.

        It is there, or its gradient is, while its unit runs, both while the backward of a user
        does; on its way before that; and its gradient is on its way after that in backward.
        """
        copies = np.zeros((3, times.horizon + 1), dtype=np.int64)
        here, gone, beside = copies
        if not self.users:  # only handed on
            here[:-1] = 1
        used = [i for i, (s, _) in enumerate(scopes) if any(r.scope is s for r in self.users)]
        for i, (scope, needing) in enumerate(scopes):
            between = bool(used) and used[0] <= i <= used[-1]
            for window in times.ahead(scope):
                here[_slice(window.times)] += between + (window.coming == self.unit)
            starts = times.backward(needing) if needing is not None else ()
            for run, window in enumerate(times.back(scope)):
                there = between and (self.again or self.trained)
                coming = self.again and window.coming == self.unit
                start = starts[run] if starts else window.times.stop
                here[start : window.times.stop] += there + coming
                gone[_slice(window.times)] += self.trained and window.leaving == self.unit
                own = [times.backward(user)[run] for user in self.users if user.scope is scope]
                beside[min(own, default=start) : window.times.stop] += self.trained and between
        for region in self.users if self.trained else ():
            here[list(times.backward(region))] += 1  # the weight and its gradient
        changed = np.diff(copies, prepend=0).any(axis=0)
        changes = [*np.flatnonzero(changed).tolist(), times.horizon]
        every = [
            Usage(start, end, here[start] * size + gone[start] * leaving + beside[start] * made)
            for start, end in pairwise(changes)
        ]
        return tuple(usage for usage in every if usage.bytes.any())


def _slice(times: range) -> slice:
    return slice(times.start, times.stop)


@dataclass(frozen=True, slots=True, eq=False)
class _Ways:
    """How a weight is brought to users in one place, by the strategies of one node: the number of
    the way that it is kept (-1: it is not needed, whatever that is), the spec that it is used in,
    seconds of a step, collectives, and bytes: of its copy that is kept and of sums of its
    gradients, of what is there for a use, of a gradient on its way, and of one that is made beside
    a weight that stays."""

    stored: Ints
    used: tuple[Spec | None, ...]
    seconds: Floats
    calls: Mapping[Call, Bools]
    copies: Floats
    sums: Floats
    brought: Floats
    leaving: Floats
    made: Floats

    def at(self, keep: Sequence[int]) -> _Ways:
        """Some of them."""
        k = np.array(keep, dtype=np.int64)
        return _Ways(
            self.stored[k],
            tuple(self.used[i] for i in keep),
            self.seconds[k],
            {call: ran[k] for call, ran in self.calls.items()},
            *(bytes_of[k] for bytes_of in self.bytes),
        )

    @property
    def bytes(self) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """All that are live at some time."""
        return self.copies, self.sums, self.brought, self.leaving, self.made

    def undominated(self, stored: Sequence[Floats]) -> _Ways:
        """Those that are worth choosing: of two ways to one spec, where one takes no more of
        anything, that one.  `stored` are what the weight itself takes, by the way it is kept."""
        own = [s[self.stored] for s in stored]
        takes = [self.seconds, *self.bytes, *self.calls.values(), *own]
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


class _Steps:
    """How one weight comes to its users in one place, by the ways it may be kept."""

    def __init__(
        self,
        prices: Prices,
        flow: ValueFlow,
        ref: ParamRef,
        targets: Sequence[Spec],
        message: float,
        *,
        place: Place,
        ungathered: Sequence[int],
    ) -> None:
        """To `targets`, with others in messages of about `message` bytes, in one place, and not
        gathered over the axes `ungathered`."""
        ways = flow.storages
        homes = list(dict.fromkeys(way.spec for way in ways))
        conversions = prices.conversions(flow.value, param=True, place=place)
        self._prices = prices
        self._ref = ref
        self._targets = targets
        self._brought = conversions.brought(homes, targets, message)
        self._at = np.array([homes.index(way.spec) for way in ways])
        self._allowed = np.isfinite(self._brought.ahead[self._at])
        self._allowed &= ~_gathers(ways, targets, ungathered)
        self._allowed &= _as_at_home(ways, targets)
        self._held = prices.held(ref, ways, targets)
        self._home = _Home.of(prices, ref, ways, message)
        self.again = prices.comes_again(flow.value, place)
        self.trained = prices.trains(ref)

    def to(self, columns: Sequence[int], *, needless: bool) -> _Ways | None:
        """The ways to some of the targets, with one of not being needed if it is `needless`, or if
        there is no other, so that its users may not need it; None where all are possible and none
        takes anything."""
        rows, uses = np.nonzero(self._allowed[:, columns])
        uses = np.array(columns, dtype=np.int64)[uses]
        brought, held = self._brought.pairs(self._at[rows], uses), self._held(rows, uses)
        times = self._prices.setting.micro_batches
        seconds = times * (brought.ahead + brought.back)[:, 0] + self._home.seconds[rows]
        seconds *= self._prices.network.cluster.contention
        seconds += self._prices.casting_s(self._ref, held, again=self.again)
        calls = {call: ran[rows] for call, ran in self._home.calls.items() if ran[rows].any()}
        for call, ran in brought.calls.items():
            calls[call] = calls.get(call, np.zeros(len(rows), dtype=bool)) | ran[:, 0]
        cast = (held.stored_in != held.used_in) & ~held.kept
        moved = brought.moved[:, 0] | cast
        leaves = self.trained & (held.kept | moved | (held.reduced_in != held.used_in))
        ways = _Ways(
            rows,
            tuple(self._targets[i] for i in uses.tolist()),
            seconds,
            calls,
            held.copies,
            held.sums * (times > 1),
            held.used * held.used_in * moved,
            held.used * held.reduced_in * leaves,
            held.used * held.used_in * (leaves & ~moved),
        )
        free = not (seconds.any() or calls or any(size.any() for size in ways.bytes))
        if free and self._allowed[:, columns].all():
            return None
        return _with_none(ways) if needless or not len(rows) else ways


@dataclass(frozen=True, slots=True, eq=False)
class _Home:
    """By the ways to keep a weight: seconds of a step on the way home, and its collectives."""

    seconds: Floats
    calls: Mapping[Call, Bools]

    @staticmethod
    def of(prices: Prices, ref: ParamRef, ways: Sequence[Storage], message: float) -> _Home:
        """Of messages of about `message` bytes."""
        calls: dict[Call, Bools] = {}
        if not any(way.homebound for way in ways):
            return _Home(np.zeros(len(ways)), calls)
        stored = list(dict.fromkeys(way.stored for way in ways))
        homes = list(dict.fromkeys(way.spec for way in ways))
        brought = (
            prices.home_conversions(ref)
            .brought(stored, homes, message)
            .pairs(
                np.array([stored.index(way.stored) for way in ways]),
                np.array([homes.index(way.spec) for way in ways]),
            )
        )
        times = prices.setting.micro_batches
        late = np.array([way.late for way in ways])
        seconds = brought.ahead[:, 0] + np.where(late, 1, times) * brought.back[:, 0]
        for call, ran in brought.calls.items():
            if call.when == "forward":
                calls[replace(call, when="refresh")] = ran[:, 0]
                continue
            once, each = ran[:, 0] & late & (times > 1), ran[:, 0] & (~late | (times == 1))
            if once.any():
                calls[replace(call, when="late")] = once
            if each.any():
                calls[call] = each
        return _Home(seconds, calls)


def _with_none(ways: _Ways) -> _Ways:
    """With a first way, in which the weight is not needed."""

    def more(table: NDArray[_T]) -> NDArray[_T]:
        return np.concatenate([np.zeros(1, dtype=table.dtype), table])

    return _Ways(
        np.concatenate([np.array([-1]), ways.stored]),
        (None, *ways.used),
        more(ways.seconds),
        {call: more(ran) for call, ran in ways.calls.items()},
        *map(more, ways.bytes),
    )


class Bringing:
    """Adds to the nodes and edges of a problem those that bring its weights."""

    def __init__(
        self,
        prices: Prices,
        times: Times,
        nodes: list[ProblemNode],
        edges: list[Edge],
        uses: MutableMapping[int, Sequence[Use]],
    ) -> None:
        self._prices = prices
        self._uses = uses
        self._times = times
        self._nodes = nodes
        self._edges = edges
        self._scopes = _needing(prices)
        self._bytes = weighty(prices)
        self._shared: dict[_Shared, dict[int, Bools]] = {}
        self._runs: dict[Unit, int] = {}
        self.paid: list[int] = []  # the nodes whose costs are what it takes to bring weights

    def connect(
        self, flow: ValueFlow, ref: ParamRef, users: Sequence[User], kept: Sequence[int]
    ) -> None:
        """Nodes between a weight and its users in one place; over the axes `kept` it must not be
        gathered."""
        targets = list(dict.fromkeys(t for user in users for needs in user.needs for t in needs))
        place, unit = users[0].place, _unit_of(users)
        steps = _Steps(
            self._prices, flow, ref, targets, self._message(unit), place=place, ungathered=kept
        )
        common = _common(users)
        groups = [([user for user in users if user.wants(t)], [t]) for t in common]
        for user in users:
            groups.append(([user], [t for t in targets if user.wants(t) and t not in common]))
        for group, wanted in groups:
            needless = any(not set(wanted).intersection(n) for user in group for n in user.needs)
            ways = steps.to([targets.index(t) for t in wanted], needless=needless)
            if ways is None:
                continue
            if len(flow.users) == len(groups) == 1 and self._prices.setting.alone:
                # nobody else looks at how it is stored
                own = self._nodes[flow.node]
                ways = ways.undominated([own.costs, *(usage.bytes for usage in own.usages)])
            regions = tuple(user.region for user in group if user.region is not None)
            stay = Stay(unit, regions, steps.again > 0, steps.trained)
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
        always: list[tuple[Use, Floats]] = [("copy", ways.copies), ("gradient", ways.sums)]
        always = [(use, runs * size) for use, size in always if size.any()]
        self._uses[index] = [use for use, _ in always]
        usages = (
            *(Usage(0, self._times.horizon, size) for _, size in always),
            *stay.usages(self._times, self._scopes, *ways.bytes[2:]),
        )
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
            runs = self._prices.setting.micro_batches
            often = (c.times * (runs if c.often else 1) for _, _, c in members)
            seconds = sum(start * n for (start, _), n in zip(lines, often, strict=True))
            seconds *= self._prices.network.cluster.contention
            index = len(self._nodes)
            where = f"stage {unit}" if isinstance(unit, int) else f"{unit.path} {unit.kind}"
            name = f"{where}: {', '.join(str(call) for _, _, call in members)}"
            self._nodes.append(ProblemNode(name, np.array([0.0, self._runs[unit] * seconds])))
            self.paid.append(index)
            for node, ran in self._shared[members[0]].items():
                self._allow(node, index, ~ran[:, None] | np.array([False, True]))


def _needing(prices: Prices) -> list[tuple[Scope, Region | None]]:
    """The last region of each scope that takes a weight, if one does."""
    found: list[tuple[Scope, Region | None]] = []
    for region in prices.regions:
        if not found or found[-1][0] is not region.scope:
            found.append((region.scope, None))
        if any(prices.outer_name(value.name) in prices.params for value in region.operands):
            found[-1] = (region.scope, region)
    return found


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


def _gathers(kept: Sequence[Storage], used: Sequence[Spec], axes: Sequence[int]) -> Bools:
    """Which ways gather over any of `axes`, for a use or once a step."""
    return np.array(
        [
            [any(is_shard(way.stored[x]) and way.stored[x] != b[x] for x in axes) for b in used]
            for way in kept
        ]
    ).reshape(len(kept), len(used))


def _as_at_home(kept: Sequence[Storage], used: Sequence[Spec]) -> Bools:
    """Which uses take a weight as it is at home, on the axes where it has one."""
    return np.array([[all(b[x] == V for x in way.homebound) for b in used] for way in kept])


def _common(users: Sequence[User]) -> list[Spec]:
    """Specs that several users may need, or one besides another."""
    count: dict[Spec, int] = {}
    for user in users:
        several = any(len(needs) > 1 for needs in user.needs)
        for target in dict.fromkeys(t for needs in user.needs for t in needs):
            count[target] = count.get(target, 0) + (2 if several else 1)
    return [target for target, n in count.items() if n > 1]


__all__ = ["USES", "Bringing", "Stay", "Use", "weighty"]
