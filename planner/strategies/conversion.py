"""What it costs to bring a value from one spec to another, and by which steps.

A conversion is a path of single-axis steps over the lattice of specs (plus collectives over
several axes at once).  Each step has one forward and one backward primitive:

    forward    value state of a -> value state of b      (whole W, slice S, partial P)
    backward   the forward primitive of dual(b) -> dual(a)

| from \\ to | W          | S(j)           | P        |
|-----------|------------|----------------|----------|
| W         | nothing    | slice          | mask     |
| S(i)      | all-gather | all-to-all     | zero-pad |
| P         | all-reduce | reduce-scatter | nothing  |

`R` and `V` are both whole as values, and differ in their gradient: whole or partial.
The cheapest paths between all specs are found at once, so a pair of specs without a direct
collective (a dim cut by two axes, of which the outer one is to be gathered) is still right, at its
true price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...costmodel.collective import AxisLink, axis_links, joint_link, staged_s
from ...costmodel.compute import Number, elementwise_s
from ...costmodel.machines.cluster import Cluster
from ...facts.collectives import collective_for, others
from ...facts.mesh import Mesh
from ...facts.moves import BETWEEN_RANKS, KEPT_MOVES, Primitive, backward_primitive, primitive
from ...facts.spec import P, R, S, Spec, State, V, format_spec, format_state, is_shard
from ...facts.together import GROUP_BYTES
from ...facts.traffic import Traffic
from ...ir.graph import TensorType
from .lattice import Ints, Lattice

# A price for the step itself, so that the shortest of equally cheap paths is the cheapest
STEP_S = 1e-12
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
_Sized = TypeVar("_Sized", int, Ints)
_LOCAL = frozenset({"slice", "mask", "pad"})


@dataclass(frozen=True, slots=True)
class Step:
    """Change the state on `axes` (one, or several that are reduced together) from `a` to `b`.

    `by` names a collective that does a move of it otherwise than is usual.
    """

    axes: tuple[int, ...]
    a: State
    b: State
    by: str = ""

    def __str__(self) -> str:
        return f"{self.axes}: {format_state(self.a)} -> {format_state(self.b)}"


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


@dataclass(frozen=True)
class Network:
    """A mesh on a cluster: the links of its axes, alone and together."""

    mesh: Mesh
    cluster: Cluster

    @cached_property
    def links(self) -> dict[tuple[int, ...], AxisLink]:
        """Link of every set of axes, keyed by axis numbers."""
        axes = range(len(self.mesh.axes))
        links: dict[tuple[int, ...], AxisLink] = {}
        for i, link in enumerate(axis_links(self.mesh, self.cluster)):
            links[(i,)] = link
        for n in range(2, len(self.mesh.axes) + 1):
            for subset in combinations(axes, n):
                links[subset] = joint_link(self.mesh, self.cluster, subset)
        return links

    @cached_property
    def _prices(self) -> dict[tuple[object, ...], float]:
        return {}

    def once(self, key: tuple[object, ...], price: Callable[[], Number]) -> float:
        """`price()`, worked out the first time that `key` is asked for on this network."""
        if key not in self._prices:
            self._prices[key] = float(price())
        return self._prices[key]

    @cached_property
    def _conversions(self) -> dict[tuple[object, ...], Conversions]:
        return {}

    def conversions(
        self,
        kind: TensorType,
        *,
        gradient: bool,
        regather: float = 0.0,
        again: float = 0.0,
        param: bool = False,
        reduced: torch.dtype | None = None,
        stays: float = 0.0,
    ) -> Conversions:
        """The conversions of a tensor type, worked out once for all graphs; see there."""
        key = (kind, gradient, regather, again, param, reduced, stays)
        if key not in self._conversions:
            self._conversions[key] = Conversions(
                kind, self, gradient=gradient, regather=regather, again=again, param=param,
                reduced=reduced, stays=stays,
            )  # fmt: skip
        return self._conversions[key]

    def seconds(self, kind: str, axes: tuple[int, ...], n_bytes: float) -> float:
        """Seconds of a collective, or of a primitive that is a local copy of `n_bytes`."""
        if kind == "nothing":
            return 0.0
        if kind in _LOCAL:
            return self.traffic_seconds(2.0 * n_bytes)
        return self.once((kind, axes, n_bytes), lambda: staged_s(kind, n_bytes, axes, self.links))

    def line(self, kind: str, axes: tuple[int, ...], n_bytes: float) -> tuple[float, float]:
        """(seconds, seconds per byte) of a collective of about `n_bytes`.

        So much are `n_bytes`, and twice as many; between the bandwidth that a message has grows.
        """
        one, two = (self.seconds(kind, axes, times * n_bytes) for times in (1.0, 2.0))
        return 2 * one - two, (two - one) / n_bytes

    def seconds_of(self, kind: str, axes: tuple[int, ...], n_bytes: Ints) -> Floats:
        """`seconds` for an array of bytes."""
        different, where = np.unique(n_bytes, return_inverse=True)
        prices = np.array([self.seconds(kind, axes, int(n)) for n in different])
        return prices[where]

    def traffic_seconds(self, n_bytes: float, *, mixed: bool = False) -> float:
        """Seconds of an elementwise kernel that reads and writes `n_bytes` in all; `mixed`: one
        that adds up rows or changes formats as it reads."""
        return self.once(
            ("bytes", n_bytes, mixed), lambda: elementwise_s(n_bytes, self.cluster, mixed=mixed)
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Legal steps as columns of a table, ordered by the row of a lattice that they leave.

    From which row to which, by which of the moves, bytes, and seconds forward and backward.
    """

    rows: Ints
    columns: Ints
    moves: Ints
    bytes: Ints
    seconds: Floats

    @staticmethod
    def of(tables: Sequence[tuple[Ints, Ints, Ints, Ints, Floats]]) -> _Steps:
        """The tables of all moves as one."""
        rows, *columns = (np.concatenate(column) for column in zip(*tables, strict=True))
        order = np.argsort(rows, kind="stable")
        return _Steps(rows[order], *(column[order] for column in columns))

    def following(self, row: int) -> Ints:
        """Positions in the table of the steps that leave `row`."""
        return np.arange(*np.searchsorted(self.rows, [row, row + 1]))

    def towards(self, left: Floats) -> Ints:
        """By row, the step to take to each of some goals (columns), which `left` seconds are left
        to from every row; of equally cheap ones the cheapest step.  -1 where no step leaves."""
        total = self.seconds[:, None] + left[self.columns]
        leaving, starts, at = np.unique(self.rows, return_index=True, return_inverse=True)
        # sums differ by their rounding
        cheap = total < np.minimum.reduceat(total, starts)[at] + STEP_S / 2
        seconds = np.where(cheap, self.seconds[:, None], np.inf)
        taken = cheap & (seconds == np.minimum.reduceat(seconds, starts)[at])
        numbers = np.where(taken, np.arange(len(self.rows))[:, None], len(self.rows))
        found = np.full(left.shape, -1)
        found[leaving] = np.minimum.reduceat(numbers, starts)
        return found


class Conversions:
    """Cheapest conversions between all specs of one tensor type on one network.

    `gradient` says whether a gradient flows back.  `again` is the share, 0 to 1, of a value's
    layers that are recomputed: all that forward does is done once more there, but for the
    `KEPT_MOVES` in the share `stays`, whose results are kept.  `regather` is the
    share of the others, for a parameter that backward needs: what collectives bring in forward is
    not kept, but brought once more.  `param`: a
    parameter is gathered, never summed up from zero-padded parts, so that it can come again.
    `usual`: ranks know the way by its specs alone, so that each move goes by its own collective.
    `reduced` is the dtype of a gradient on its way, where it is not that of the value.
    """

    def __init__(
        self,
        kind: TensorType,
        network: Network,
        *,
        gradient: bool,
        regather: float = 0.0,
        again: float = 0.0,
        param: bool = False,
        usual: bool = False,
        reduced: torch.dtype | None = None,
        stays: float = 0.0,
    ) -> None:
        self.type = kind
        self.network = network
        self.gradient = gradient
        self.regather = regather
        self.again = again
        self.stays = stays
        self.param = param
        self.usual = usual
        self._itemsize = kind.dtype.itemsize
        self._reduced_itemsize = self._itemsize if reduced is None else reduced.itemsize
        dims = map(S, range(len(kind.shape)))
        self._states = (R, P, *((V,) if gradient else ()), *dims)

    def canonical(self, spec: Spec) -> Spec:
        """Without a gradient `V` and `R` are the same state."""
        return spec if self.gradient else tuple(R if state == V else state for state in spec)

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
        towards = table.towards(self._distance[:, [goal]])[:, 0]
        steps: list[Step] = []
        while at != goal:
            taken = towards[at]
            steps.append(self._moves[int(table.moves[taken])])
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
        towards = table.towards(self._distance[:, goals[0]])
        ahead = np.where(np.isfinite(self._distance[at, goals]), 0.0, np.inf)
        back = ahead.copy()
        calls: dict[Call, Bools] = {}
        while (on := (at != goals) & np.isfinite(ahead)).any():
            rows, columns = np.nonzero(on)
            steps = towards[at[on], columns]
            for move in np.unique(table.moves[steps]).tolist():
                taken = table.moves[steps] == move
                where, n_bytes = (rows[taken], columns[taken]), table.bytes[steps[taken]]
                step = self._moves[move]
                for move_of in self._runs(step):
                    if move_of.kind in _LOCAL:
                        seconds = back if move_of.gradient else ahead
                        size = self._sized(n_bytes, gradient=move_of.gradient)
                        one = self.network.seconds_of(move_of.kind, step.axes, size)
                        seconds[where] += move_of.times * one
                for call in self._calls(step):
                    start, each = self.network.line(call.kind, call.axes, message)
                    size = self._sized(n_bytes, gradient=call.when == "gradient")
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
            spec = _apply(spec, step)
        return tuple(out)

    def step_seconds(self, step: Step, spec: Spec) -> float:
        """Seconds of one step from `spec`, forward and backward."""
        return sum(self._priced(step, spec, self._runs(step)))

    def local_seconds(self, step: Step, spec: Spec) -> float:
        """Those of them that no collective takes."""
        return sum(self._priced(step, spec, [r for r in self._runs(step) if r.kind in _LOCAL]))

    def _priced(self, step: Step, spec: Spec, runs: Iterable[_Run]) -> Iterator[float]:
        n_bytes = self._step_bytes(step, spec)
        for run in runs:
            size = self._sized(n_bytes, gradient=run.gradient)
            yield run.times * self.network.seconds(run.kind, step.axes, size)

    def step_traffic(self, step: Step, spec: Spec) -> tuple[Traffic, ...]:
        """The collectives of one step from `spec`."""
        n_bytes = self._step_bytes(step, spec)
        return tuple(
            Traffic(r.kind, step.axes, self._sized(n_bytes, gradient=r.gradient), r.backward)
            for r in self._runs(step)
            if r.kind not in _LOCAL
        )

    # -- the search -------------------------------------------------------------------------

    @cached_property
    def _lattice(self) -> Lattice:
        return Lattice(self._states, self.type.shape, self.network.mesh.sizes)

    def _row(self, spec: Spec) -> int:
        return self._lattice.row[self.canonical(spec)]

    @cached_property
    def _distance(self) -> Floats:
        """Seconds between all pairs of specs, by the algorithm of Floyd and Warshall.

        By hand: for 340 specs (four dims on three axes) `floyd_warshall_numpy` of networkx takes
        0.12 s where this takes 0.07, its Dijkstra from all specs 1 s; a search asks many times.
        """
        steps, n = self._steps, len(self._lattice.specs)
        distance = np.full((n, n), np.inf)
        np.minimum.at(distance, (steps.rows, steps.columns), steps.seconds)
        np.fill_diagonal(distance, 0.0)
        for k in range(n):
            np.minimum(distance, distance[:, k, None] + distance[k], out=distance)
        return distance

    @cached_property
    def _steps(self) -> _Steps:
        """Every step between two specs of the lattice: on one axis, then on several together."""
        return _Steps.of([self._steps_of(i, move) for i, move in enumerate(self._moves)])

    @cached_property
    def _moves(self) -> tuple[Step, ...]:
        """Every kind of step."""
        axes = range(len(self.network.mesh.axes))
        single = [
            ((axis,), a, b)
            for axis in axes
            for a, b in product(self._states, repeat=2)
            if a != b and not (self.param and a == P)
        ]
        joint = [
            (subset, a, b)
            for n in range(2, len(axes) + 1)
            for subset, (a, b) in product(combinations(axes, n), self._joint_moves)
        ]
        return tuple(
            Step(moving, a, b, by)
            for moving, a, b in (*single, *joint)
            for by in self._ways(moving, a, b)
        )

    def _ways(self, axes: tuple[int, ...], a: State, b: State) -> tuple[str, ...]:
        """What a step may go by: its usual collectives, or another that does one of its moves."""
        if self.usual:
            return ("",)
        moves: set[Primitive] = {primitive(a, b)}
        if self.gradient:
            moves.add(backward_primitive(a, b))
        sizes = tuple(self.network.mesh.sizes[axis] for axis in axes)
        return ("", *others(moves, sizes))

    def _steps_of(self, number: int, move: Step) -> tuple[Ints, Ints, Ints, Ints, Floats]:
        """The columns of the table for a kind of step, wherever it is legal."""
        axes, a, b = move.axes, move.a, move.b
        rows, columns = self._lattice.moves(axes, a, b)
        n_bytes = self._lattice.moved_numel(rows, axes, a, b) * self.type.dtype.itemsize
        seconds = np.full(len(rows), STEP_S)
        for run in self._runs(move):
            size = self._sized(n_bytes, gradient=run.gradient)
            seconds += run.times * self.network.seconds_of(run.kind, axes, size)
        return rows, columns, np.full(len(rows), number), n_bytes, seconds

    def _step_bytes(self, step: Step, spec: Spec) -> int:
        at, to = self._row(spec), self._row(_apply(spec, step))
        leaving = self._steps.following(at)
        return int(self._steps.bytes[leaving[self._steps.columns[leaving] == to][0]])

    @property
    def _joint_moves(self) -> tuple[tuple[State, State], ...]:
        """Conversions that several axes make in one collective."""
        dims = [state for state in self._states if is_shard(state)]
        wholes = (R, V) if self.gradient else (R,)
        moves = [(R, V)] if self.gradient else []
        moves += [(state, whole) for state in dims for whole in wholes]
        if not self.param:
            moves += [(P, other) for other in (*wholes, *dims)]
        return tuple(moves)

    def _calls(self, step: Step) -> list[Call]:
        """The collectives of a step."""
        forward, back = primitive(step.a, step.b), backward_primitive(step.a, step.b)
        calls: list[Call] = []
        if forward in BETWEEN_RANKS:
            kind = collective_for(forward, step.by)
            calls.append(Call(kind, step.axes, "forward"))
            if self.again:
                calls.append(Call(kind, step.axes, "again", self.again))
            if self.regather:
                calls.append(Call(kind, step.axes, "regather", self.regather))
        if self.gradient and back in BETWEEN_RANKS:
            calls.append(Call(collective_for(back, step.by), step.axes, "gradient"))
        return calls

    def _runs(self, step: Step) -> list[_Run]:
        """Every move that a step makes."""
        ahead = primitive(step.a, step.b)
        moves: list[tuple[Primitive, bool, bool, float]] = [(ahead, False, False, 1.0)]
        again = self.again - self.stays * (ahead in KEPT_MOVES)
        if again:
            moves.append((ahead, False, False, again))
        if self.gradient:
            moves.append((backward_primitive(step.a, step.b), True, True, 1.0))
        if self.regather and ahead in BETWEEN_RANKS:
            moves.append((ahead, True, False, self.regather))
        return [
            _Run(collective_for(move, step.by), backward, gradient, times)
            for move, backward, gradient, times in moves
            if move != "nothing"
        ]

    def _sized(self, n_bytes: _Sized, *, gradient: bool) -> _Sized:
        """Bytes on their way of what takes `n_bytes` as a value."""
        if not gradient or self._reduced_itemsize == self._itemsize:
            return n_bytes
        return n_bytes // self._itemsize * self._reduced_itemsize


def _apply(spec: Spec, step: Step) -> Spec:
    return tuple(step.b if axis in step.axes else state for axis, state in enumerate(spec))
