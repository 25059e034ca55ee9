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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...costmodel.collective import AxisLink, axis_links, joint_link, staged_s
from ...costmodel.compute import Number, elementwise_s
from ...costmodel.machines.cluster import Cluster
from ...facts.blocks import local_shape, moved_numel
from ...facts.collectives import collective_for, others
from ...facts.mesh import Mesh
from ...facts.moves import BETWEEN_RANKS, Primitive, backward_primitive, primitive
from ...facts.spec import P, R, S, Spec, State, V, format_spec, format_state, is_shard
from ...facts.traffic import Traffic
from ...ir.graph import TensorType

# A price for the step itself, so that the shortest of equally cheap paths is the cheapest
STEP_S = 1e-12
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
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

    def seconds(self, kind: str, axes: tuple[int, ...], n_bytes: float) -> float:
        """Seconds of a collective, or of a primitive that is a local copy of `n_bytes`."""
        if kind == "nothing":
            return 0.0
        if kind in _LOCAL:
            return self.traffic_seconds(2.0 * n_bytes)
        return self.once((kind, axes, n_bytes), lambda: staged_s(kind, n_bytes, axes, self.links))

    def seconds_of(self, kind: str, axes: tuple[int, ...], n_bytes: Ints) -> Floats:
        """`seconds` for an array of bytes."""
        different, where = np.unique(n_bytes, return_inverse=True)
        prices = np.array([self.seconds(kind, axes, int(n)) for n in different])
        return prices[where]

    def traffic_seconds(self, n_bytes: float) -> float:
        """Seconds of an elementwise kernel that reads and writes `n_bytes` in all."""
        return self.once(("bytes", n_bytes), lambda: elementwise_s(n_bytes, self.cluster))


def spec_fits(shape: tuple[int, ...], spec: Spec, sizes: tuple[int, ...]) -> bool:
    """May `spec` cut this shape?  A dim that does not divide may be cut by one axis at most."""
    ways: dict[int, list[int]] = {}
    for state, n in zip(spec, sizes, strict=True):
        if is_shard(state):
            ways.setdefault(state, []).append(n)
    return all(
        dim < len(shape)
        and (shape[dim] % prod(cuts) == 0 or (len(cuts) == 1 and shape[dim] >= cuts[0]))
        for dim, cuts in ways.items()
    )


class _Lattice:
    """All legal specs of one shape as an array, so that steps are found for many at once."""

    def __init__(
        self, states: tuple[State, ...], shape: tuple[int, ...], sizes: tuple[int, ...]
    ) -> None:
        every = list(product(states, repeat=len(sizes)))
        self.specs = [spec for spec in every if spec_fits(shape, spec, sizes)]
        self.row = {spec: row for row, spec in enumerate(self.specs)}
        self._sizes = sizes
        self._array = np.array(self.specs)
        shapes = [local_shape(shape, spec, sizes) for spec in self.specs]
        self._shapes = np.array(shapes, dtype=np.int64)
        # a spec's code is a number whose digits are its states, by their position in `states`
        self._digit = {state: i for i, state in enumerate(states)}
        self._digits = np.array([[self._digit[s] for s in spec] for spec in self.specs])
        self._powers = len(states) ** np.arange(len(sizes))[::-1]
        self._row_of_code = np.full(len(every), -1)
        self._row_of_code[self._digits @ self._powers] = np.arange(len(self.specs))

    def moves(self, axes: tuple[int, ...], a: State, b: State) -> tuple[Ints, Ints]:
        """(rows, columns) of the legal steps a -> b on `axes`.

        A step moves contiguous blocks: no other axis after the first of `axes` cuts the same dim,
        since axes cut a dim in mesh order, so that such an axis has cut it finer, or has its cuts
        between theirs.
        """
        here = np.all(self._array[:, axes] == a, axis=1)
        others = [i for i in range(axes[0] + 1, self._array.shape[1]) if i not in axes]
        for state in (a, b):
            if is_shard(state):
                here &= np.all(self._array[:, others] != state, axis=1)
        rows = np.flatnonzero(here)
        columns = self._replaced(rows, axes, b)
        legal = columns >= 0
        return rows[legal], columns[legal]

    def moved_numel(self, rows: Ints, axes: tuple[int, ...], a: State, b: State) -> Ints:
        """How many numbers the collectives of the steps a -> b from `rows` are called with."""
        gathered = self._shapes[self._replaced(rows, axes, R)]
        ways = prod(self._sizes[axis] for axis in axes)
        return np.broadcast_to(moved_numel(list(gathered.T), (a, b), ways), rows.shape)

    def _replaced(self, rows: Ints, axes: tuple[int, ...], state: State) -> Ints:
        """Rows of the specs with `state` on `axes`; -1 where that spec is not legal."""
        digits = self._digits[rows]
        digits[:, axes] = self._digit[state]
        return self._row_of_code[digits @ self._powers]


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Legal steps as columns of a table: from which row of a lattice to which, bytes and seconds,
    forward and backward, and what they go by (see `Step`)."""

    rows: Ints
    columns: Ints
    bytes: Ints
    seconds: Floats
    by: NDArray[np.str_]

    def following(self, row: int) -> Ints:
        """Positions in the table of the steps that leave `row`."""
        return np.flatnonzero(self.rows == row)


class Conversions:
    """Cheapest conversions between all specs of one tensor type on one network.

    `gradient` says whether a gradient flows back.  `regather` prices a parameter that backward
    needs: what collectives bring in forward is not kept, but brought a second time.  `again` prices
    a value of a layer that is recomputed: everything that forward does is done twice.  `param`: a
    parameter is gathered, never summed up from zero-padded parts, so that it can come again.
    `usual`: ranks know the way by its specs alone, so that each move goes by its own collective.
    """

    def __init__(
        self,
        kind: TensorType,
        network: Network,
        *,
        gradient: bool,
        regather: bool = False,
        again: bool = False,
        param: bool = False,
        usual: bool = False,
    ) -> None:
        self.type = kind
        self.network = network
        self.gradient = gradient
        self.regather = regather
        self.again = again
        self.param = param
        self.usual = usual
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
        left, table = self._distance[:, goal], self._steps
        if not np.isfinite(left[at]):
            raise ValueError(
                f"no conversion of {self.type} from {format_spec(a)} to {format_spec(b)}"
            )
        steps: list[Step] = []
        while at != goal:
            leaving = table.following(at)
            total = table.seconds[leaving] + left[table.columns[leaving]]
            cheap = leaving[total < total.min() + STEP_S / 2]  # sums differ by their rounding
            chosen = cheap[table.seconds[cheap].argmin()]
            following, by = int(table.columns[chosen]), str(table.by[chosen])
            specs = self._lattice.specs
            steps.append(replace(_step_between(specs[at], specs[following]), by=by))
            at = following
        return tuple(steps)

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
        n_bytes = self._step_bytes(step, spec)
        kinds = self._kinds(step.a, step.b, step.by)
        return sum(self.network.seconds(kind, step.axes, n_bytes) for kind, _ in kinds)

    def step_traffic(self, step: Step, spec: Spec) -> tuple[Traffic, ...]:
        """The collectives of one step from `spec`."""
        n_bytes = self._step_bytes(step, spec)
        kinds = self._kinds(step.a, step.b, step.by)
        return tuple(Traffic(k, step.axes, n_bytes, back) for k, back in kinds if k not in _LOCAL)

    # -- the search -------------------------------------------------------------------------

    @cached_property
    def _lattice(self) -> _Lattice:
        return _Lattice(self._states, self.type.shape, self.network.mesh.sizes)

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
        tables = [
            self._steps_of(moving, a, b, by)
            for moving, a, b in (*single, *joint)
            for by in self._ways(moving, a, b)
        ]
        return _Steps(*(np.concatenate(column) for column in zip(*tables, strict=True)))

    def _ways(self, axes: tuple[int, ...], a: State, b: State) -> tuple[str, ...]:
        """What a step may go by: its usual collectives, or another that does one of its moves."""
        if self.usual:
            return ("",)
        moves: set[Primitive] = {primitive(a, b)}
        if self.gradient:
            moves.add(backward_primitive(a, b))
        sizes = tuple(self.network.mesh.sizes[axis] for axis in axes)
        return ("", *others(moves, sizes))

    def _steps_of(
        self, axes: tuple[int, ...], a: State, b: State, by: str
    ) -> tuple[Ints, Ints, Ints, Floats, NDArray[np.str_]]:
        """The columns of the table for the step a -> b on `axes`, wherever it is legal."""
        rows, columns = self._lattice.moves(axes, a, b)
        n_bytes = self._lattice.moved_numel(rows, axes, a, b) * self.type.dtype.itemsize
        seconds = np.full(len(rows), STEP_S)
        for kind, _ in self._kinds(a, b, by):
            seconds += self.network.seconds_of(kind, axes, n_bytes)
        return rows, columns, n_bytes, seconds, np.full(len(rows), by)

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

    def _kinds(self, a: State, b: State, by: str) -> list[tuple[str, bool]]:
        """(collective or local primitive, is it in backward) of every move that a step makes."""
        moves: list[tuple[Primitive, bool]] = [(primitive(a, b), False)]
        if self.again:
            moves *= 2
        if self.gradient:
            moves.append((backward_primitive(a, b), True))
        if self.regather and moves[0][0] in BETWEEN_RANKS:
            moves.append((moves[0][0], True))
        return [(collective_for(move, by), back) for move, back in moves if move != "nothing"]


def _apply(spec: Spec, step: Step) -> Spec:
    return tuple(step.b if axis in step.axes else state for axis, state in enumerate(spec))


def _step_between(spec: Spec, following: Spec) -> Step:
    """The one step that leads from a spec to a neighbour of it."""
    pairs = enumerate(zip(spec, following, strict=True))
    axes = tuple(axis for axis, (a, b) in pairs if a != b)
    return Step(axes, spec[axes[0]], following[axes[0]])
