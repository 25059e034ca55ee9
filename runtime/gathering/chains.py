"""Chains of moves: how a weight comes from the way it is stored to the way it is used.

Many tensors go along their chains together: what needs the same collective over the same axis in
the same dtype is one message (see `facts/together.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ...facts.blocks import block, local_shape, moved_numel
from ...facts.moves import BETWEEN_RANKS, primitive
from ...facts.spec import R, Spec
from ...facts.together import rounds
from ..mesh.collectives import Axis
from ..mesh.counter import Phase
from ..mesh.mesh import Mesh
from ..mesh.move import Move, moves_between
from ..mesh.together import Together, start_together


@dataclass(frozen=True, slots=True)
class Leg:
    """One primitive over `axis`; a collective is called with `nbytes` of `dtype`."""

    axis: Axis
    move: Move
    dtype: torch.dtype
    nbytes: int

    @property
    def collective(self) -> str | None:
        """Which one it is; None if it is done on this rank alone."""
        kind = primitive(self.move.source, self.move.target)
        return self.axis.collective(kind) if kind in BETWEEN_RANKS else None


Chain: TypeAlias = tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """To another dtype; in front of a collective it is done where tensors are packed for that."""

    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor in that dtype."""
        return x.to(self.dtype)


# A chain with what else is done on the way, on this rank alone
Way: TypeAlias = Sequence[Leg | Callable[[Tensor], Tensor]]
_Key: TypeAlias = tuple[str, str, torch.dtype]


def chains(
    path: Sequence[Spec],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mesh: Mesh,
    by: Sequence[str] = (),
    back_dtype: torch.dtype | None = None,
) -> tuple[Chain, Chain]:
    """The chain of a tensor of full `shape` from the first spec of `path` to the last, and that of
    its gradient back, in `back_dtype` (default: `dtype`).

    From one spec to the next the axes that differ move as one, from one state to one other; `by`
    has for each step the collective that it goes by otherwise than is usual, or "".
    """
    forward: list[Leg] = []
    backward: list[Leg] = []
    steps = zip(path[:-1], path[1:], by or [""] * (len(path) - 1), strict=True)
    for a, b, collective in steps:
        axes = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        if not axes:
            continue
        states = a[axes[0]], b[axes[0]]
        names = tuple(mesh.names[i] for i in axes)
        axis = mesh[names[0] if len(names) == 1 else names]
        axis = axis.by(collective) if collective else axis
        there, back = moves_between(
            *states,
            _rows(states[0], a, axes, shape, mesh),
            _rows(states[1], a, axes, shape, mesh),
        )
        here = tuple(R if i in axes else state for i, state in enumerate(a))
        gathered = local_shape(shape, here, mesh.sizes)
        numel = moved_numel(gathered, states, axis.size)
        if axis.size > 1:
            forward.append(Leg(axis, there, dtype, numel * dtype.itemsize))
            reduced = back_dtype or dtype
            backward.insert(0, Leg(axis, back, reduced, numel * reduced.itemsize))
    return tuple(forward), tuple(backward)


def _rows(
    dim: int, spec: Spec, moving: Sequence[int], shape: Sequence[int], mesh: Mesh
) -> int | None:
    """True size of `dim` on this rank's side of the axes that move; None where it is no dim."""
    if dim < 0:
        return None
    cuts = [n for i, n in enumerate(mesh.sizes) if spec[i] == dim and i not in moving]
    return block(shape[dim], [(n, 0) for n in cuts]).rows


_away = torch.empty(0)  # stands for a tensor that is under way


class Flight:
    """Tensors on their ways; the first collectives are under way when it is made.

    All ranks start and finish their flights in the same order.
    """

    def __init__(self, tensors: Sequence[Tensor], ways: Sequence[Way], phase: Phase) -> None:
        self._tensors = list(tensors)
        self._phase: Phase = phase
        self._left = [list(way) for way in ways]
        self._coming = list(_rounds(ways))
        self._packed_in: dict[int, torch.dtype] = {}  # of tensors that are cast as they are packed
        self._started: list[tuple[tuple[int, ...], Together]] = []
        self._go_on(range(len(self._tensors)))

    def finish(self) -> list[Tensor]:
        """Where the tensors end, in their order."""
        while self._started:
            members, together = self._started.pop(0)
            for i, tensor in zip(members, together.finish(), strict=True):
                self._tensors[i] = tensor
            self._go_on(members)
        return self._tensors

    def _go_on(self, free: Sequence[int]) -> None:
        """Bring `free` tensors to their next message; start those that have all of theirs."""
        for i in free:
            while self._left[i] and not _is_collective(self._left[i][0]):
                step = self._left[i].pop(0)
                if isinstance(step, Cast) and self._left[i] and _is_collective(self._left[i][0]):
                    self._packed_in[i] = step.dtype
                else:
                    self._tensors[i] = self._done_here(step, self._tensors[i])
        busy = {i for members, _ in self._started for i in members}
        for members in list(self._coming):
            if busy.isdisjoint(members):
                self._coming.remove(members)
                self._started.append((members, self._start(members)))
            busy.update(members)

    def _start(self, members: Sequence[int]) -> Together:
        """Start a collective of some tensors, which need not be held when they are packed for it;
        all of its shares have one dtype."""
        steps = [self._left[i].pop(0) for i in members]
        legs = [step for step in steps if isinstance(step, Leg)]
        tensors, moves = [self._tensors[i] for i in members], [leg.move for leg in legs]
        dtypes = [self._packed_in.pop(i, self._tensors[i].dtype) for i in members]
        together = start_together(legs[0].axis, tensors, moves, self._phase, dtypes[0])
        for i in members:
            self._tensors[i] = _away
        return together

    def _done_here(self, step: Leg | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if isinstance(step, Leg):
            return step.axis.move(x, step.move, self._phase)
        return step(x)


def _is_collective(step: Leg | Callable[[Tensor], Tensor]) -> bool:
    return isinstance(step, Leg) and step.collective is not None


def _rounds(ways: Sequence[Way]) -> tuple[tuple[int, ...], ...]:
    """The collectives that take tensors along `ways`: which tensors each of them moves."""
    return _members(
        tuple(
            tuple(
                ((leg.collective, leg.axis.name, leg.dtype), leg.nbytes)
                for leg in way
                if isinstance(leg, Leg) and leg.collective
            )
            for way in ways
        )
    )


@lru_cache(maxsize=1024)
def _members(keys: tuple[tuple[tuple[_Key, int], ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(each.members for each in rounds(keys))
