"""Rows that each rank loads for itself come to be what a whole batch is cut into."""

from __future__ import annotations

import pytest
import torch

from shardwright.runtime.mesh.batches import Input, shard_inputs
from shardwright.runtime.mesh.mesh import Mesh
from shardwright.runtime.mesh.rows import DataShard, data_shard, shard_rows

INT = torch.int64
CASES = {
    "rows": ({"ids": ("S0,R", (8, 6)), "labels": ("S0,R", (8, 6))}, 2),
    "rows and tokens": ({"ids": ("S0,Z1", (8, 8)), "labels": ("S0,S1", (8, 8))}, 2),
    "both axes": ({"ids": ("S0,S0", (8, 6)), "labels": ("S0,S0", (8, 6))}, 4),
    "both axes of one of them": ({"ids": ("S0,S0", (8, 6)), "labels": ("S0,R", (8, 6))}, 2),
    "other axes": ({"ids": ("S0,R", (8, 6)), "labels": ("R,S0", (8, 6))}, 1),
    "one whole": ({"ids": ("S0,R", (8, 6)), "labels": ("R,R", (8, 6))}, 1),
    "positions of all": ({"ids": ("S0,R", (8, 6)), "positions": ("R,S1", (1, 6))}, 2),
}


@pytest.mark.parametrize(("table", "count"), CASES.values(), ids=CASES)
def test_rows_and_batches_give_the_same(
    table: dict[str, tuple[str, tuple[int, int]]], count: int
) -> None:
    inputs = {
        name: Input(spec, shape, INT, free=(0,) if shape[0] > 1 else ())
        for name, (spec, shape) in table.items()
    }
    batch = {name: torch.randint(0, 9, each.shape) for name, each in inputs.items()}
    for rank in range(4):
        mesh = Mesh({"x": 2, "y": 2}, torch.device("cpu"), None)
        mesh.coordinates = divmod(rank, 2)
        shard = data_shard(inputs, mesh)
        assert shard.count == count
        rows = {name: shard.of(x) if len(x) > 1 else x for name, x in batch.items()}
        found, wanted = shard_rows(inputs, rows, mesh, {}), shard_inputs(inputs, batch, mesh)
        assert all(torch.equal(found[name], wanted[name]) for name in batch)


def test_unequal_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="7 rows are not 2 equal parts"):
        DataShard(0, 2).of(torch.zeros(7, 3))
