"""All legal specs of a shape over a mesh, and which single steps lead from one to another."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...facts.blocks import local_shape, moved_numel
from ...facts.spec import R, Spec, State, is_shard

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]


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


class Lattice:
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


__all__ = ["Bools", "Floats", "Ints", "Lattice", "spec_fits"]
