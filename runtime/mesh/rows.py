"""Batches whose rows each rank loads for itself: which ones, and what is then still to be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from os.path import commonprefix
from typing import Any

from torch import Tensor

from ...facts.spec import parse_spec
from .batches import Fixed, Input, shard_inputs
from .mesh import Mesh


@dataclass(frozen=True, slots=True)
class DataShard:
    """Which rows of a batch a rank needs: part `index` of `count` equal ones."""

    index: int
    count: int

    def of(self, rows: Tensor) -> Tensor:
        """This part of the rows (b, ...), a view; ValueError where b is no multiple of `count`."""
        if rows.shape[0] % self.count:
            raise ValueError(f"{rows.shape[0]} rows are not {self.count} equal parts")
        return rows.chunk(self.count)[self.index]


def data_shard(
    inputs: Mapping[str, Input], mesh: Mesh, axes: Sequence[int] | None = None
) -> DataShard:
    """Which rows of a batch this rank needs; ranks that share them have the same part.

    `axes` are those that cut the rows (default: as `data_axes` of the inputs).
    """
    index, count = 0, 1
    for number in data_axes(inputs) if axes is None else axes:
        index = index * mesh.sizes[number] + mesh.coordinates[number]
        count *= mesh.sizes[number]
    return DataShard(index, count)


def shard_rows(
    inputs: Mapping[str, Input],
    rows: Mapping[str, object],
    mesh: Mesh,
    fixed: Fixed,
    axes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """As `shard_inputs`, of batches that have the rows of this rank's `data_shard` alone."""
    axes = data_axes(inputs) if axes is None else axes
    ways = prod(mesh.sizes[number] for number in axes)
    own = {
        name: _of_rows(each, axes, ways) if 0 in each.free else each
        for name, each in inputs.items()
    }
    return shard_inputs(own, rows, mesh, fixed)


def add_over_shards(
    x: Tensor, inputs: Mapping[str, Input], mesh: Mesh, axes: Sequence[int] | None = None
) -> Tensor:
    """The sum of what each data shard has of `x`; all ranks of a shard have the same."""
    axes = data_axes(inputs) if axes is None else axes
    names = tuple(mesh.names[number] for number in axes)
    return mesh[names].reduce(x) if names else x


def _of_rows(wanted: Input, axes: Sequence[int], ways: int) -> Input:
    """An input whose rows `axes` have cut already, into `ways`."""
    states = wanted.spec.split(",")
    spec = ",".join("R" if number in axes else state for number, state in enumerate(states))
    shape = (wanted.shape[0] // ways, *wanted.shape[1:])
    step = wanted.step and (max(wanted.step[0] // ways, 1), *wanted.step[1:])
    return replace(wanted, spec=spec, shape=shape, step=step)


def data_axes(inputs: Mapping[str, Input]) -> list[int]:
    """Numbers of the mesh axes that cut the rows of every batch, outermost first.

    Only the first cuts, which all batches have in common: rows that a further axis cuts of some of
    them, its ranks must all have.
    """
    cut = [
        [number for number, state in enumerate(parse_spec(each.spec)) if state == 0]
        for each in inputs.values()
        if 0 in each.free
    ]
    return list(commonprefix(cut))


__all__ = ["DataShard", "add_over_shards", "data_axes", "data_shard", "shard_rows"]
