"""Steps between specs of one tensor type: which there are, and what each takes.

Each step has one forward and one backward primitive:

    forward    value state of a -> value state of b      (whole W, slice S, partial P)
    backward   the forward primitive of dual(b) -> dual(a)

| from \\ to | W          | S(j)           | P        |
|-----------|------------|----------------|----------|
| W         | nothing    | slice          | mask     |
| S(i)      | all-gather | all-to-all     | zero-pad |
| P         | all-reduce | reduce-scatter | nothing  |

`R` and `V` are both whole as values, and differ in their gradient: whole or partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import TypeVar

import numpy as np
import torch

from ...facts.collectives import collective_for, others
from ...facts.moves import BETWEEN_RANKS, KEPT_MOVES, Primitive, backward_primitive, primitive
from ...facts.spec import P, R, S, Spec, State, V, format_state, is_shard
from ...ir.graph import TensorType
from .lattice import Bools, Floats, Ints, Lattice
from .network import Network

# A price for the step itself, so that the shortest of equally cheap paths is the cheapest
STEP_S = 1e-12
Sized = TypeVar("Sized", int, Ints)


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
class Moving:
    """What moves: a tensor type, and whether a gradient flows back.

    `param`: a parameter is gathered, never summed up from zero-padded parts, so that it can come
    again.  `usual`: ranks know the way by its specs alone, so that each move goes by its own
    collective.  `reduced` is the dtype of a gradient on its way, where it is not that of the value.
    """

    kind: TensorType
    gradient: bool
    param: bool = False
    usual: bool = False
    reduced: torch.dtype | None = None

    @property
    def states(self) -> tuple[State, ...]:
        """What a spec may have on an axis."""
        dims = map(S, range(len(self.kind.shape)))
        return (R, P, *((V,) if self.gradient else ()), *dims)

    def canonical(self, spec: Spec) -> Spec:
        """Without a gradient `V` and `R` are the same state."""
        return spec if self.gradient else tuple(R if state == V else state for state in spec)

    def sized(self, n_bytes: Sized, *, gradient: bool) -> Sized:
        """Bytes on their way of what takes `n_bytes` as a value."""
        itemsize = self.kind.dtype.itemsize
        reduced = itemsize if self.reduced is None else self.reduced.itemsize
        return n_bytes // itemsize * reduced if gradient and reduced != itemsize else n_bytes


@dataclass(frozen=True, slots=True)
class Repeats:
    """What is moved once more.

    `again` is the share, 0 to 1, of a value's layers that are recomputed: all that forward does is
    done once more there, but for the `KEPT_MOVES` in the share `stays`, whose results are kept.
    `regather` is the share of the others, for a parameter that backward needs: what collectives
    bring in forward is not kept, but brought once more.
    """

    again: float = 0.0
    regather: float = 0.0
    stays: float = 0.0


ONCE = Repeats()


class Steps:
    """Every legal step, on one axis or on several together, as columns of a table that is ordered
    by the row of a lattice that they leave.

    From which of its `rows` to which of its `columns`, by which of the `moves`, bytes, and seconds
    of a run: `ahead`, of which `kept` are those whose results a layer may keep and `fetched` those
    of collectives, and `back`, for the gradient.
    """

    def __init__(self, moving: Moving, network: Network) -> None:
        self._moving = moving
        self._network = network
        sizes = network.mesh.sizes
        self.lattice = Lattice(moving.states, moving.kind.shape, sizes)
        tables = [self._of(number, move) for number, move in enumerate(self.every)]
        rows, *columns = (np.concatenate(column) for column in zip(*tables, strict=True))
        order = np.argsort(rows, kind="stable")
        self.rows: Ints = rows[order]
        self.columns, self.moves, self.bytes, self.ahead, self.back = (
            column[order] for column in columns
        )
        kinds = [primitive(move.a, move.b) for move in self.every]
        self.kept: Bools = np.array([kind in KEPT_MOVES for kind in kinds])[self.moves]
        self.fetched: Bools = np.array([kind in BETWEEN_RANKS for kind in kinds])[self.moves]

    def row(self, spec: Spec) -> int:
        """The row of a spec."""
        return self.lattice.row[self._moving.canonical(spec)]

    def following(self, row: int) -> Ints:
        """Positions in the table of the steps that leave `row`."""
        return np.arange(*np.searchsorted(self.rows, [row, row + 1]))

    def bytes_of(self, step: Step, spec: Spec) -> int:
        """What a step from `spec` is called with."""
        at, to = self.row(spec), self.row(applied(spec, step))
        leaving = self.following(at)
        return int(self.bytes[leaving[self.columns[leaving] == to][0]])

    def seconds(self, repeats: Repeats) -> Floats:
        """What each takes in all its runs."""
        again = repeats.again - repeats.stays * self.kept
        more = again + repeats.regather * self.fetched
        return STEP_S + (1.0 + more) * self.ahead + self.back

    @cached_property
    def every(self) -> tuple[Step, ...]:
        """Every kind of step."""
        axes = range(len(self._network.mesh.axes))
        single = [
            ((axis,), a, b)
            for axis in axes
            for a, b in product(self._moving.states, repeat=2)
            if a != b and not (self._moving.param and a == P)
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
        if self._moving.usual:
            return ("",)
        moves: set[Primitive] = {primitive(a, b)}
        if self._moving.gradient:
            moves.add(backward_primitive(a, b))
        sizes = tuple(self._network.mesh.sizes[axis] for axis in axes)
        return ("", *others(moves, sizes))

    @property
    def _joint_moves(self) -> tuple[tuple[State, State], ...]:
        """Conversions that several axes make in one collective."""
        dims = [state for state in self._moving.states if is_shard(state)]
        wholes = (R, V) if self._moving.gradient else (R,)
        moves = [(R, V)] if self._moving.gradient else []
        moves += [(state, whole) for state in dims for whole in wholes]
        if not self._moving.param:
            moves += [(P, other) for other in (*wholes, *dims)]
        return tuple(moves)

    def _of(self, number: int, move: Step) -> tuple[Ints, Ints, Ints, Ints, Floats, Floats]:
        """The columns of the table for a kind of step, wherever it is legal."""
        axes, a, b = move.axes, move.a, move.b
        rows, columns = self.lattice.moves(axes, a, b)
        n_bytes = self.lattice.moved_numel(rows, axes, a, b) * self._moving.kind.dtype.itemsize
        ahead = self._seconds(primitive(a, b), move, n_bytes)
        back = np.zeros(len(rows))
        if self._moving.gradient:
            size = self._moving.sized(n_bytes, gradient=True)
            back = self._seconds(backward_primitive(a, b), move, size)
        return rows, columns, np.full(len(rows), number), n_bytes, ahead, back

    def _seconds(self, does: Primitive, move: Step, n_bytes: Ints) -> Floats:
        if does == "nothing":
            return np.zeros(len(n_bytes))
        return self._network.seconds_of(collective_for(does, move.by), move.axes, n_bytes)


def applied(spec: Spec, step: Step) -> Spec:
    """The spec after a step."""
    return tuple(step.b if axis in step.axes else state for axis, state in enumerate(spec))


__all__ = ["ONCE", "Moving", "Repeats", "Sized", "Step", "Steps", "STEP_S", "applied"]
