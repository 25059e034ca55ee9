"""What it costs to bring a value from one spec to another, and by which steps.

A conversion is a path of single-axis steps over the lattice of specs (plus collectives over
several axes at once), as `steps` has them.  The cheapest paths between all specs are found at once,
so a pair of specs without a direct collective (a dim cut by two axes, of which the outer one is to
be gathered) is still right, at its true price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...facts.collectives import collective_for
from ...facts.moves import BETWEEN_RANKS, KEPT_MOVES, Primitive, backward_primitive, primitive
from ...facts.spec import Spec, format_spec
from ...facts.together import GROUP_BYTES
from ...facts.traffic import Traffic
from .lattice import Bools, Floats, Ints
from .network import LOCAL, Network
from .steps import ONCE, STEP_S, Moving, Repeats, Step, Steps, applied


@dataclass(frozen=True, slots=True)
class Call:
    """A collective that weights of a block run together: in forward, `again` where that is run
    again, `regather` for backward where it is not, or for their gradients; once a step to `refresh`
    what is kept for its uses, or `late`, for the gradients of all its micro-batches.  `times` of
    these, on average."""

    kind: str
    axes: tuple[int, ...]
    when: Literal["forward", "again", "regather", "gradient", "refresh", "late"]
    times: float = 1.0

    @property
    def often(self) -> bool:
        """Does it run in each micro-batch of a step?"""
        return self.when not in ("refresh", "late")

    def __str__(self) -> str:
        return f"{self.when} {self.kind} {self.axes}"


@dataclass(frozen=True, slots=True)
class _Run:
    """A collective or local primitive of a step: does it run in backward, and for the gradient?
    How often, on average?"""

    kind: str
    backward: bool
    gradient: bool
    times: float


@dataclass(frozen=True, slots=True, eq=False)
class Brought:
    """How a weight comes from each of some specs (rows) to each of others (columns).

    `ahead` are the seconds of the weight, in all its uses, and `back` those of its gradient, both
    without what the collectives of `calls` take whatever their bytes are, which it shares with
    other weights; `moved` says whether a collective brings it in forward.
    """

    ahead: Floats
    back: Floats
    calls: Mapping[Call, Bools]
    moved: Bools

    def at(self, rows: Ints, columns: Ints) -> Brought:
        """From and to some of the specs only."""
        there = np.ix_(rows, columns)
        return self._picked(lambda table: table[there])

    def pairs(self, rows: Ints, columns: Ints) -> Brought:
        """From each of some specs to one of the others: as many rows, and one column."""
        return self._picked(lambda table: table[rows, columns][:, None])

    def _picked(self, pick: Callable[[NDArray[Any]], NDArray[Any]]) -> Brought:
        calls = {call: there for call, ran in self.calls.items() if (there := pick(ran)).any()}
        return Brought(pick(self.ahead), pick(self.back), calls, pick(self.moved))


class Conversions:
    """Cheapest conversions between all specs of what is moved on one network."""

    def __init__(self, moving: Moving, network: Network, repeats: Repeats = ONCE) -> None:
        self.type = moving.kind
        self.network = network
        self._moving = moving
        self._repeats = repeats

    def canonical(self, spec: Spec) -> Spec:
        """Without a gradient `V` and `R` are the same state."""
        return self._moving.canonical(spec)

    def seconds(self, a: Spec, b: Spec) -> float:
        """Seconds of the cheapest conversion, forward and backward; inf where there is none."""
        return float(self.matrix([a], [b])[0, 0])

    def matrix(self, froms: Sequence[Spec], tos: Sequence[Spec]) -> Floats:
        """Seconds from each of `froms` (rows) to each of `tos` (columns)."""
        return self._distance[np.ix_([self._row(a) for a in froms], [self._row(b) for b in tos])]

    def path(self, a: Spec, b: Spec) -> tuple[Step, ...]:
        """The steps of the cheapest conversion; of equally cheap ones the cheapest step first."""
        at, goal = self._row(a), self._row(b)
        if not np.isfinite(self._distance[at, goal]):
            raise ValueError(
                f"no conversion of {self.type} from {format_spec(a)} to {format_spec(b)}"
            )
        table = self._steps
        towards = self._towards(self._distance[:, [goal]])[:, 0]
        steps: list[Step] = []
        while at != goal:
            taken = towards[at]
            steps.append(table.every[int(table.moves[taken])])
            at = int(table.columns[taken])
        return tuple(steps)

    def brought(self, froms: Sequence[Spec], tos: Sequence[Spec], message: float) -> Brought:
        """How a weight comes from each of `froms` to each of `tos`, along the paths of `path`.

        With others it makes messages of about `message` bytes.  It pays for its own bytes, and of
        what a message takes whatever its bytes are (`Network.line`) only as much of it as it fills,
        if `GROUP_BYTES` fill one.
        """
        at, goals = np.ix_([self._row(a) for a in froms], [self._row(b) for b in tos])
        at, table = np.repeat(at, goals.size, axis=1), self._steps
        towards = self._towards(self._distance[:, goals[0]])
        ahead = np.where(np.isfinite(self._distance[at, goals]), 0.0, np.inf)
        back = ahead.copy()
        calls: dict[Call, Bools] = {}
        while (on := (at != goals) & np.isfinite(ahead)).any():
            rows, columns = np.nonzero(on)
            steps = towards[at[on], columns]
            for move in np.unique(table.moves[steps]).tolist():
                taken = table.moves[steps] == move
                where, n_bytes = (rows[taken], columns[taken]), table.bytes[steps[taken]]
                step = table.every[move]
                for move_of in self._runs(step):
                    if move_of.kind in LOCAL:
                        seconds = back if move_of.gradient else ahead
                        size = self._moving.sized(n_bytes, gradient=move_of.gradient)
                        one = self.network.seconds_of(move_of.kind, step.axes, size)
                        seconds[where] += move_of.times * one
                for call in self._calls(step):
                    start, each = self.network.line(call.kind, call.axes, message)
                    size = self._moving.sized(n_bytes, gradient=call.when == "gradient")
                    ran = calls.setdefault(call, np.zeros(at.shape, dtype=bool))
                    fills = np.minimum(size / GROUP_BYTES, 1.0)
                    alone = np.where(ran[where], 1.0, fills)  # twice on a way: once by itself
                    seconds = back if call.when == "gradient" else ahead
                    seconds[where] += call.times * (each * size + alone * start)
                    ran[where] = True
            at[on] = table.columns[steps]
        moved = np.zeros(at.shape, dtype=bool)
        for call, ran in calls.items():
            moved |= ran & (call.when == "forward")
        return Brought(ahead, back, calls, moved)

    def traffic(self, a: Spec, b: Spec) -> tuple[Traffic, ...]:
        """Every collective that the conversion runs, forward and backward."""
        out: list[Traffic] = []
        spec = self.canonical(a)
        for step in self.path(a, b):
            out += self.step_traffic(step, spec)
            spec = applied(spec, step)
        return tuple(out)

    def step_seconds(self, step: Step, spec: Spec) -> float:
        """Seconds of one step from `spec`, forward and backward."""
        return sum(self._priced(step, spec, self._runs(step)))

    def local_seconds(self, step: Step, spec: Spec) -> float:
        """Those of them that no collective takes."""
        return sum(self._priced(step, spec, [r for r in self._runs(step) if r.kind in LOCAL]))

    def _priced(self, step: Step, spec: Spec, runs: Iterable[_Run]) -> Iterator[float]:
        n_bytes = self._steps.bytes_of(step, spec)
        for run in runs:
            size = self._moving.sized(n_bytes, gradient=run.gradient)
            yield run.times * self.network.seconds(run.kind, step.axes, size)

    def step_traffic(self, step: Step, spec: Spec) -> tuple[Traffic, ...]:
        """The collectives of one step from `spec`."""
        n_bytes = self._steps.bytes_of(step, spec)
        return tuple(
            Traffic(r.kind, step.axes, self._moving.sized(n_bytes, gradient=r.gradient), r.backward)
            for r in self._runs(step)
            if r.kind not in LOCAL
        )

    # -- the search -------------------------------------------------------------------------

    @cached_property
    def _steps(self) -> Steps:
        return self.network.once(("steps", self._moving), lambda: Steps(self._moving, self.network))

    @cached_property
    def _seconds(self) -> Floats:
        """Of each step, in all its runs."""
        return self._steps.seconds(self._repeats)

    def _row(self, spec: Spec) -> int:
        return self._steps.row(spec)

    @cached_property
    def _distance(self) -> Floats:
        """Seconds between all pairs of specs, by the algorithm of Floyd and Warshall.

        By hand: for 340 specs (four dims on three axes) `floyd_warshall_numpy` of networkx takes
        0.12 s where this takes 0.07, its Dijkstra from all specs 1 s; a search asks many times.
        """
        steps, n = self._steps, len(self._steps.lattice.specs)
        distance = np.full((n, n), np.inf)
        np.minimum.at(distance, (steps.rows, steps.columns), self._seconds)
        np.fill_diagonal(distance, 0.0)
        for k in range(n):
            np.minimum(distance, distance[:, k, None] + distance[k], out=distance)
        return distance

    def _towards(self, left: Floats) -> Ints:
        """By row, the step to take to each of some goals (columns), which `left` seconds are left
        to from every row; of equally cheap ones the cheapest step.  -1 where no step leaves."""
        table, each = self._steps, self._seconds[:, None]
        total = each + left[table.columns]
        leaving, starts, at = np.unique(table.rows, return_index=True, return_inverse=True)
        # sums differ by their rounding
        cheap = total < np.minimum.reduceat(total, starts)[at] + STEP_S / 2
        seconds = np.where(cheap, each, np.inf)
        taken = cheap & (seconds == np.minimum.reduceat(seconds, starts)[at])
        numbers = np.where(taken, np.arange(len(table.rows))[:, None], len(table.rows))
        found = np.full(left.shape, -1)
        found[leaving] = np.minimum.reduceat(numbers, starts)
        return found

    def _calls(self, step: Step) -> list[Call]:
        """The collectives of a step."""
        forward, back = primitive(step.a, step.b), backward_primitive(step.a, step.b)
        calls: list[Call] = []
        if forward in BETWEEN_RANKS:
            kind = collective_for(forward, step.by)
            calls.append(Call(kind, step.axes, "forward"))
            if self._repeats.again:
                calls.append(Call(kind, step.axes, "again", self._repeats.again))
            if self._repeats.regather:
                calls.append(Call(kind, step.axes, "regather", self._repeats.regather))
        if self._moving.gradient and back in BETWEEN_RANKS:
            calls.append(Call(collective_for(back, step.by), step.axes, "gradient"))
        return calls

    def _runs(self, step: Step) -> list[_Run]:
        """Every move that a step makes."""
        ahead = primitive(step.a, step.b)
        moves: list[tuple[Primitive, bool, bool, float]] = [(ahead, False, False, 1.0)]
        again = self._repeats.again - self._repeats.stays * (ahead in KEPT_MOVES)
        if again:
            moves.append((ahead, False, False, again))
        if self._moving.gradient:
            moves.append((backward_primitive(step.a, step.b), True, True, 1.0))
        if self._repeats.regather and ahead in BETWEEN_RANKS:
            moves.append((ahead, True, False, self._repeats.regather))
        return [
            _Run(collective_for(move, step.by), backward, gradient, times)
            for move, backward, gradient, times in moves
            if move != "nothing"
        ]


def conversions(moving: Moving, network: Network, repeats: Repeats = ONCE) -> Conversions:
    """The conversions of what is moved, worked out once for all graphs."""
    key = "conversions", moving, repeats
    return network.once(key, lambda: Conversions(moving, network, repeats))


__all__ = ["Brought", "Call", "Conversions", "conversions"]
