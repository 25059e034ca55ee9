"""What it costs to bring a value from one spec to another, and by which steps.

A conversion is a path of single-axis steps over the lattice of specs (plus all-reduces over
several axes at once).  Each step has one forward and one backward primitive:

    forward    value state of a -> value state of b      (whole W, slice S, partial P)
    backward   the forward primitive of dual(b) -> dual(a)

| from \\ to | W          | S(j)           | P        |
|-----------|------------|----------------|----------|
| W         | nothing    | slice          | mask     |
| S(i)      | all-gather | all-to-all     | zero-pad |
| P         | all-reduce | reduce-scatter | nothing  |

`R` and `V` are both whole as values, and differ in their gradient: whole or partial.
The cheapest path is found by Dijkstra's algorithm, so a pair of specs without a direct collective
(a dim cut by two axes, of which the outer one is to be gathered) is still right, at its true price.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...costmodel.collective import AxisLink, axis_links, collective_s, joint_link
from ...costmodel.compute import Number, elementwise_s
from ...costmodel.machines.cluster import Cluster
from ...facts.blocks import local_shape
from ...facts.mesh import Mesh
from ...facts.moves import COLLECTIVES, backward_primitive, primitive
from ...facts.spec import P, R, S, Spec, State, V, format_state, is_shard
from ...facts.traffic import Traffic
from ...ir.graph import TensorType

# A price for the step itself, so that the shortest of equally cheap paths is the cheapest
STEP_S = 1e-12
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
_LOCAL = frozenset({"slice", "mask", "pad"})


@dataclass(frozen=True, slots=True)
class Step:
    """Change the state on `axes` (one, or several that are reduced together) from `a` to `b`."""

    axes: tuple[int, ...]
    a: State
    b: State

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
        """Seconds of one primitive: a collective, or a local copy of `n_bytes`."""
        if kind == "nothing":
            return 0.0
        if kind in _LOCAL:
            return self.traffic_seconds(2.0 * n_bytes)
        return self.once(
            (kind, axes, n_bytes), lambda: collective_s(kind, n_bytes, self.links[axes])
        )

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
        self._array = np.array(self.specs).reshape(len(self.specs), len(sizes))
        self._digit = {state: i for i, state in enumerate(states)}
        self._powers = len(states) ** np.arange(len(sizes))[::-1]
        self._row = np.full(len(every), -1)
        self._code = np.array(
            [sum(self._digit[s] * int(p) for s, p in zip(spec, self._powers, strict=True))
             for spec in self.specs]
        )  # fmt: skip
        self._row[self._code] = np.arange(len(self.specs))
        self.numel = np.array([prod(local_shape(shape, spec, sizes)) for spec in self.specs])

    def replaced(self, rows: Ints, axes: tuple[int, ...], state: State) -> Ints:
        """Rows of the specs with `state` on `axes`; -1 where that spec is not legal."""
        code = self._code[rows]
        for axis in axes:
            old = np.array([self._digit[s] for s in self._array[rows, axis].tolist()], dtype=int)
            code = code + (self._digit[state] - old) * self._powers[axis]
        return self._row[code]

    def moves(self, axes: tuple[int, ...], a: State, b: State) -> tuple[Ints, Ints]:
        """(rows, columns) of the legal steps a -> b: see `_contiguous`."""
        here = np.all(self._array[:, axes] == a, axis=1)
        others = [i for i in range(axes[0] + 1, self._array.shape[1]) if i not in axes]
        for state in (a, b):
            if is_shard(state):
                here &= np.all(self._array[:, others] != state, axis=1)
        rows = np.flatnonzero(here)
        columns = self.replaced(rows, axes, b)
        legal = columns >= 0
        return rows[legal], columns[legal]


class Conversions:
    """Cheapest conversions between all specs of one tensor type on one network.

    `gradient` says whether a gradient flows back.  `regather` prices a parameter that backward
    needs: what forward gathers is not kept but gathered a second time.  `again` prices a value of
    a layer that is recomputed: everything that forward does is done twice.  `param`: a parameter
    is gathered, never summed up from zero-padded parts, so that the runtime can gather it again.
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
    ) -> None:
        self.type = kind
        self.network = network
        self.gradient = gradient
        self.regather = regather
        self.again = again
        self.param = param
        self._sizes = network.mesh.sizes
        dims = map(S, range(len(kind.shape)))
        self._states = (R, P, *((V,) if gradient else ()), *dims)
        self._steps: dict[Spec, list[tuple[Step, Spec, float]]] = {}
        self._from: dict[Spec, tuple[dict[Spec, float], dict[Spec, tuple[Spec, Step]]]] = {}

    def canonical(self, spec: Spec) -> Spec:
        """Without a gradient `V` and `R` are the same state."""
        return spec if self.gradient else tuple(R if state == V else state for state in spec)

    def seconds(self, a: Spec, b: Spec) -> float:
        """Seconds of the cheapest conversion, forward and backward; inf where there is none."""
        return float(self.matrix([a], [b])[0, 0])

    def matrix(self, froms: Sequence[Spec], tos: Sequence[Spec]) -> Floats:
        """Seconds from each of `froms` (rows) to each of `tos` (columns)."""
        index, distance = self._all_pairs
        rows = [index[self.canonical(spec)] for spec in froms]
        columns = [index[self.canonical(spec)] for spec in tos]
        return distance[np.ix_(rows, columns)]

    def path(self, a: Spec, b: Spec) -> tuple[Step, ...]:
        """The steps of the cheapest conversion."""
        a, b = self.canonical(a), self.canonical(b)
        if a == b:
            return ()
        before = self._search(a)[1]
        if b not in before:
            raise ValueError(f"no conversion of {self.type} from {a} to {b}")
        steps: list[Step] = []
        while b != a:
            b, step = before[b]
            steps.append(step)
        return tuple(reversed(steps))

    def traffic(self, a: Spec, b: Spec) -> tuple[Traffic, ...]:
        """Every collective that the conversion runs, forward and backward."""
        out: list[Traffic] = []
        spec = self.canonical(a)
        for step in self.path(a, b):
            out += self.step_traffic(step, spec)
            spec = _apply(spec, step)
        return tuple(out)

    # -- the search -------------------------------------------------------------------------

    @cached_property
    def _all_pairs(self) -> tuple[dict[Spec, int], Floats]:
        """(row of each spec, seconds between all pairs), by the algorithm of Floyd and Warshall."""
        lattice = _Lattice(self._states, self.type.shape, self._sizes)
        distance = np.full((len(lattice.specs), len(lattice.specs)), np.inf)
        np.fill_diagonal(distance, 0.0)
        axes = range(len(self._sizes))
        for axis in axes:
            for a, b in product(self._states, repeat=2):
                if a != b and self._may_leave(a):
                    self._add_steps(distance, lattice, (axis,), a, b)
        for n in range(2, len(self._sizes) + 1):
            for subset, (a, b) in product(combinations(axes, n), self._joint_moves):
                self._add_steps(distance, lattice, subset, a, b)
        for k in range(len(distance)):
            np.minimum(distance, distance[:, k, None] + distance[k], out=distance)
        return {spec: i for i, spec in enumerate(lattice.specs)}, distance

    def _add_steps(
        self, distance: Floats, lattice: _Lattice, axes: tuple[int, ...], a: State, b: State
    ) -> None:
        """Enter the price of the step a -> b on `axes` from every spec where it is legal."""
        rows, columns = lattice.moves(axes, a, b)
        if len(rows) == 0:
            return
        numel = lattice.numel[lattice.replaced(rows, axes, R)]  # as in `_bytes`
        ways = prod(self._sizes[axis] for axis in axes)
        if is_shard(a) and is_shard(b):
            exact = lattice.numel.astype(object)  # the product does not fit 64 bits
            numel = (exact[rows] * exact[columns] * ways // numel).astype(np.int64)
        elif is_shard(a) or is_shard(b):
            numel = lattice.numel[rows if is_shard(a) else columns] * ways
        n_bytes = numel * self.type.dtype.itemsize
        seconds = np.full(len(rows), STEP_S)
        for kind, _ in self._kinds(a, b):
            seconds += self.network.seconds_of(kind, axes, n_bytes)
        np.minimum.at(distance, (rows, columns), seconds)

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

    def _may_leave(self, a: State) -> bool:
        return not (self.param and a == P)

    def _kinds(self, a: State, b: State) -> list[tuple[str, bool]]:
        """(primitive, is it in backward) of every move that a step a -> b makes."""
        kinds = [(primitive(a, b), False)] * (2 if self.again else 1)
        if self.gradient:
            kinds.append((backward_primitive(a, b), True))
        if self.regather and kinds[0][0] == "all_gather":
            kinds.append(("all_gather", True))
        return [(kind, backward) for kind, backward in kinds if kind != "nothing"]

    def _search(self, a: Spec) -> tuple[dict[Spec, float], dict[Spec, tuple[Spec, Step]]]:
        """Dijkstra from `a` over all specs; ties are broken by fewer steps, then by order."""
        if a in self._from:
            return self._from[a]
        distance: dict[Spec, float] = {a: 0.0}
        before: dict[Spec, tuple[Spec, Step]] = {}
        done: set[Spec] = set()
        queue: list[tuple[float, int, Spec]] = [(0.0, 0, a)]
        while queue:
            cost, hops, spec = heapq.heappop(queue)
            if spec in done:
                continue
            done.add(spec)
            for step, following, seconds in self._neighbours(spec):
                total = cost + seconds
                if following not in done and total < distance.get(following, float("inf")):
                    distance[following] = total
                    before[following] = (spec, step)
                    heapq.heappush(queue, (total, hops + 1, following))
        self._from[a] = distance, before
        return distance, before

    def _neighbours(self, spec: Spec) -> list[tuple[Step, Spec, float]]:
        if spec not in self._steps:
            self._steps[spec] = [
                (step, _apply(spec, step), self._seconds(step, spec))
                for step in self._legal_steps(spec)
            ]
        return self._steps[spec]

    def _legal_steps(self, spec: Spec) -> list[Step]:
        axes = range(len(spec))
        steps = [
            Step((axis,), spec[axis], b)
            for axis in axes
            for b in self._states
            if b != spec[axis]
            and self._may_leave(spec[axis])
            and _contiguous(spec, (axis,), spec[axis], b)
        ]
        for n in range(2, len(spec) + 1):
            for subset, (a, b) in product(combinations(axes, n), self._joint_moves):
                if all(spec[axis] == a for axis in subset) and _contiguous(spec, subset, a, b):
                    steps.append(Step(subset, a, b))
        return [
            step for step in steps if spec_fits(self.type.shape, _apply(spec, step), self._sizes)
        ]

    def _seconds(self, step: Step, spec: Spec) -> float:
        return self.step_seconds(step, spec) + STEP_S

    def step_seconds(self, step: Step, spec: Spec) -> float:
        """Seconds of one step from `spec`, forward and backward."""
        moves = self._moves(step, spec, local=True)
        return sum(self.network.seconds(t.kind, t.axes, t.bytes) for t in moves)

    def step_traffic(self, step: Step, spec: Spec) -> tuple[Traffic, ...]:
        """The collectives of one step from `spec`."""
        return tuple(self._moves(step, spec, local=False))

    def _moves(self, step: Step, spec: Spec, *, local: bool) -> list[Traffic]:
        out: list[Traffic] = []
        for kind, is_backward in self._kinds(step.a, step.b):
            if local or kind in COLLECTIVES:
                out.append(Traffic(kind, step.axes, self._bytes(spec, step), is_backward))
        return out

    def _bytes(self, spec: Spec, step: Step) -> int:
        """Bytes that a rank holds at this point of the path with the step's own axes gathered.

        A dim that is cut comes in blocks of equal size, the padding of the last one included; an
        all-to-all holds one block of the dim that it cuts, for the other dim is whole only then.
        """
        shape = list(local_shape(self.type.shape, _at(spec, step, R), self._sizes))
        ways = prod(self._sizes[axis] for axis in step.axes)
        cut = [state for state in (step.a, step.b) if is_shard(state)]
        for dim in cut:
            shape[dim] = -(-shape[dim] // ways) * ways
        return prod(shape) * self.type.dtype.itemsize // (ways if len(cut) == 2 else 1)


def _apply(spec: Spec, step: Step) -> Spec:
    return _at(spec, step, step.b)


def _at(spec: Spec, step: Step, here: State) -> Spec:
    """`spec` with the step's own axes in the state `here`."""
    return tuple(here if axis in step.axes else state for axis, state in enumerate(spec))


def _contiguous(spec: Spec, axes: tuple[int, ...], a: State, b: State) -> bool:
    """Are the blocks that a step a -> b on `axes` moves contiguous?

    They are if no other axis after the first of `axes` cuts the same dim: axes cut a dim in mesh
    order, so such an axis has cut it finer, or has its cuts between theirs.
    """
    others = [state for i, state in enumerate(spec) if i > axes[0] and i not in axes]
    return all(not is_shard(state) or state not in others for state in (a, b))
