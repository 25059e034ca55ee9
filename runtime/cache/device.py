"""Steps that run whole on the device: a page table as tensors that operators read and change.

Decoding stores one token after another of sequences whose ends the host knows only roughly.  For a
round of such steps the host takes pages ahead (`PageTable.reserve`) and uploads where they are;
then no step asks the host anything, and none tells it anything.  After the round the host learns
how many tokens each sequence got (`PageTable.record`).  So a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import PAGE, DeviceStep, PageTable, owners
from .state import StateTable, Turn


class DeviceTable:
    """Rows of a page table on its device, for sequences of up to `tokens` tokens on this rank.

    The tensors stay where they are, so that captured steps find them.  Of `ranks` that are given
    the same tokens this one, `rank`, keeps the pages that it owns.
    """

    def __init__(self, table: PageTable, tokens: int, *, ranks: int = 1, rank: int = 0) -> None:
        self._table, self._ranks, self._rank = table, ranks, rank
        self._most = min(-(-tokens // PAGE), table.pages)
        rows, device = table.batch, table.device
        # A last column for what is not kept: its page is behind the pool.
        self._blocks = torch.zeros(rows, self._most + 1, dtype=torch.int32, device=device)
        self._blocks[:, -1] = table.pages
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)
        shape = rows, self._most * PAGE + 1
        self._positions = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._known: tuple[int, list[int]] | None = None  # whose positions are there
        self._size, self._width, self._in_place = rows, self._most, 0

    @property
    def form(self) -> tuple[int, int, int]:
        """(sequences, pages of each, `in_place`) of a step: a captured one fits no other."""
        return self._size, self._width, self._in_place

    def upload(self, rows: list[int]) -> None:
        """Begin a round: sequence i of a step is `rows[i]` of the table, or none for -1.

        On the CPU, where steps are not captured, they see no more pages than there are.
        """
        table, self._size = self._table, len(rows)
        pages = [table.pages_of(row) if row >= 0 else [] for row in rows]
        longest = max((len(own) for own in pages), default=0)
        self._width = self._most if table.device.type == "cuda" else max(longest, 1)
        in_order = rows == list(range(len(rows))) and self._width <= table.home
        self._in_place = table.home * PAGE if in_order and table.in_place else 0
        filled = [own + [0] * (longest - len(own)) for own in pages]
        copy_in(self._blocks[: self._size, :longest], filled)
        held = [int(table.counts[row]) if row >= 0 else 0 for row in rows]
        copy_in(self._counts[: self._size], held)
        if self._known != (table.changes, rows):
            stored = table.positions[[max(row, 0) for row in rows]]
            copy_in(self._positions[: self._size, : stored.shape[1]], stored)
            self._known = table.changes, rows

    def open(self, queries: Tensor) -> None:
        """Begin a step: new tokens at positions (b, t) int64, -1 for padding.

        Those of a sequence go up from column to column, and follow what is cached.
        """
        kept, size, width = queries, self._size, self._width
        if self._ranks > 1:
            kept = queries.where(owners(queries, self._ranks) == self._rank, -1)
        new, counts = kept >= 0, self._counts[:size]
        places = counts[:, None]  # slot in the sequence
        if queries.shape[1] > 1:
            places = places + new.cumsum(1) - 1
        places = places.where(new, self._most * PAGE)
        pages = self._blocks[:size].gather(1, places // PAGE)
        self._positions[:size].scatter_(1, places, kept.to(torch.int32))
        counts += new.sum(1)
        self._table.on_device = DeviceStep(
            self._blocks[:size, :width],
            counts,
            self._positions[:size, : width * PAGE],
            queries,
            (pages * PAGE + places % PAGE).flatten(),
            self._in_place,
        )


class DeviceStates:
    """Which sequences of a table of states take part in a step, on its device.

    The tensors stay where they are, so that captured steps find them.
    """

    def __init__(self, table: StateTable) -> None:
        self._table = table
        self._rows, self._seen = torch.zeros(2, table.batch, dtype=torch.int64, device=table.device)
        self._size, self._in_order = table.batch, True

    @property
    def form(self) -> tuple[int, bool]:
        """(sequences, whether they are all in order) of a step: a captured one fits no other."""
        return self._size, self._in_order

    def upload(self, rows: list[int]) -> None:
        """Begin a round: sequence i of a step is `rows[i]` of the table, or none for -1."""
        table, self._size = self._table, len(rows)
        self._in_order = rows == list(range(table.batch))
        copy_in(self._rows[: self._size], [row if row >= 0 else table.batch for row in rows])
        copy_in(self._seen[: self._size], [int(table.counts[row]) for row in rows])

    def open(self, positions: Tensor) -> None:
        """Begin a step: new tokens at positions (b, t) int64, -1 for padding behind them."""
        new, seen = (positions >= 0).sum(1), self._seen[: self._size]
        rows = None if self._in_order else self._rows[: self._size]
        self._table.on_device = Turn(self._table.turns, positions, new, seen == 0, rows)
        seen += new


def copy_in(into: Tensor, given: object) -> None:
    """Numbers of the host to where they are used, without waiting for what is computed there."""
    numbers = torch.as_tensor(given, dtype=into.dtype)
    if into.is_cuda:
        into.copy_(numbers.pin_memory(), non_blocking=True)
    else:
        into.copy_(numbers)
