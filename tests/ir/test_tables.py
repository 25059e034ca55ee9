"""Sequences longer than a table of positions are refused before anything is planned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.reference.tables import check_tables


class Positions(nn.Module):
    """A table of 32 positions, from `first` on, on the way reversed or drawn at random."""

    def __init__(self, kind: str, first: int) -> None:
        super().__init__()
        self.kind, self.first = kind, first
        self.tokens, self.places = nn.Embedding(50, 8), nn.Embedding(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device) + self.first
        if self.kind == "reversed":
            places = places.flip(0).unsqueeze(0)
        if self.kind == "given":
            places = ids
        if self.kind == "drawn":
            places = torch.randint(0, 99, (ids.shape[1],), device=ids.device)
        return self.tokens(ids) + self.places(places)


@pytest.mark.parametrize(
    ("kind", "first", "length", "row"),
    [
        ("counted", 0, 32, None),
        ("counted", 0, 33, 32),
        ("counted", 2, 31, 32),
        ("reversed", 0, 32, None),
        ("reversed", 0, 40, 39),
        ("given", 0, 99, None),
        ("drawn", 0, 99, None),
    ],
)
def test_rows_beyond_a_table(kind: str, first: int, length: int, row: int | None) -> None:
    with torch.device("meta"):
        model = Positions(kind, first)
        ids = torch.zeros(2, length, dtype=torch.int64)
    graph = capture_folded(model, {"ids": ids}, training=False)
    if row is None:
        check_tables(graph)
        return
    with pytest.raises(ValueError, match=f"`places.weight` has 32 rows, and row {row} is read"):
        check_tables(graph)
