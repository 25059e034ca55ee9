"""States of earlier tokens: memory of fixed size for each sequence, whatever its length.

A short convolution remembers its last inputs, a recurrence what it has made of all tokens.  A state
goes forward only: it is what it was after the last token of a sequence, so that a sequence can be
forgotten, but not shortened.

New tokens of a sequence stand in order, padding (position -1) behind them; a sequence without new
tokens keeps its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Turn:
    """New tokens: as they were given, how many each sequence has, (b,) on the device, and which
    sequences (b,) had none before.

    `rows` (b,) on the device says which rows of the states the sequences have; None: all in order.
    """

    number: int
    given: Tensor
    counts: Tensor
    fresh: Tensor
    rows: Tensor | None = None

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last `count` columns of `x` (b, c, count + t) before padding: (b, c, count)."""
        index = self.counts[:, None] + torch.arange(count, device=x.device)
        return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


class StateTable:
    """How many tokens the states of `batch` sequences have seen; layers share it.

    The bookkeeping is done on the CPU once per step, by the first layer of the step, or for several
    steps together after them (`device.py`).
    """

    def __init__(self, batch: int, *, device: torch.device | str = "cpu") -> None:
        self.batch, self.device = batch, torch.device(device)
        self.counts = torch.zeros(batch, dtype=torch.int64)
        self.turns = 0
        self.on_device: Turn | None = None  # while the host does not follow the steps
        self._turn: Turn | None = None

    def __repr__(self) -> str:
        return f"StateTable({self.counts.tolist()} tokens)"

    def advance(self, number: int, positions: Tensor) -> Turn:
        """The step in which a layer sees its `number`-th tokens; the first layer opens it.

        `positions` (b, t) int64.  Raises ValueError where they do not follow what was seen, are
        not in order, or differ between layers.
        """
        if number == self.turns:
            self._turn = self._open(positions)
            self.turns += 1
        turn = self._turn
        if turn is None or turn.number != number:
            raise ValueError(
                f"a state sees step {number}, the others are at step {self.turns - 1}; every layer"
                " must see every step once, before the next begins and before anything is dropped"
            )
        if positions is not turn.given and not torch.equal(positions, turn.given):
            raise ValueError("states: the positions differ from those of the first layer")
        return turn

    def lost(self, lengths: Tensor) -> str:
        """Why sequences cannot go back to `lengths` (b,), or nothing if they can."""
        for i, (limit, count) in enumerate(
            zip(lengths.tolist(), self.counts.tolist(), strict=True)
        ):
            if 0 < limit < count:
                return (
                    f"sequence {i} cannot go back to {limit} tokens: its layers keep a state of"
                    f" all {count}, which does not tell what it was before; begin anew with 0"
                    " tokens, and read the sequence again"
                )
        return ""

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Forget sequences with a length of 0; a state cannot go back to another one."""
        limits = torch.as_tensor(lengths, dtype=torch.int64).cpu()
        if lost := self.lost(limits):
            raise ValueError(lost)
        self.counts = torch.minimum(self.counts, limits)
        self._turn = None

    def record(self, added: Tensor) -> None:
        """Say that states have seen `added` (b,) tokens more of each sequence."""
        self.counts = self.counts + added

    def begin_after(self, count: int) -> None:
        """Say of states that they have seen `count` tokens of each sequence."""
        self.counts = torch.full_like(self.counts, count)

    def _open(self, positions: Tensor) -> Turn:
        if positions.ndim != 2 or len(positions) != self.batch or positions.dtype != torch.int64:
            raise ValueError(
                f"states: positions must be int64 ({self.batch}, tokens), got {positions.dtype}"
                f" {tuple(positions.shape)}"
            )
        host = positions.detach().cpu()
        new = (host >= 0).sum(1)
        columns = torch.arange(host.shape[1])
        follows = torch.where(columns < new[:, None], self.counts[:, None] + columns, -1)
        if not torch.equal(host, follows):
            i = int((host != follows).any(1).nonzero()[0])
            raise ValueError(
                f"states: sequence {i} has {int(self.counts[i])} tokens, and the next must follow"
                f" in order, with padding (-1) behind them; got positions {host[i].tolist()}"
            )
        fresh = (self.counts == 0).to(self.device)
        self.counts = self.counts + new
        return Turn(self.turns, positions, new.to(self.device), fresh)


class StateCache:
    """The states of one layer on this rank: `values` (batch, *shape), zeros at first.

    Layers that see the same sequences share `table`.
    """

    def __init__(
        self,
        batch: int,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        table: StateTable | None = None,
    ) -> None:
        self.table = StateTable(batch, device=device) if table is None else table
        # Behind the states is a row for sequences of a step that are padding.
        self._rows = torch.zeros(batch + 1, *shape, dtype=dtype, device=self.table.device)
        self.values = self._rows[:batch]
        self._turns = self.table.turns

    def __repr__(self) -> str:
        return f"StateCache({tuple(self.values.shape)}, {self.values.dtype}, {self.table})"

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's states."""
        return self.values.nbytes

    def turn(self, positions: Tensor) -> Turn:
        """New tokens at `positions` (b, t) int64; what is made of them must be kept (`keep`)."""
        if self.table.on_device is not None:
            return self.table.on_device
        turn = self.table.advance(self._turns, positions)
        self._turns += 1
        return turn

    def before(self, turn: Turn) -> Tensor:
        """The states (b, *shape) of the sequences of a turn; the next `keep` changes them."""
        return self.values if turn.rows is None else self._rows.index_select(0, turn.rows)

    def keep(self, values: Tensor) -> None:
        """Remember `values` (b, *shape), the states after the new tokens of the last turn."""
        turn = self.table.on_device
        if turn is not None and turn.rows is not None:
            self._rows.index_copy_(0, turn.rows, values.detach())
            return
        if values.shape != self.values.shape or values.dtype != self.values.dtype:
            raise ValueError(
                f"a state is {self.values.dtype} {tuple(self.values.shape)}, got {values.dtype}"
                f" {tuple(values.shape)}"
            )
        self.values.copy_(values.detach())

    def reset(self, rows: Tensor) -> None:
        """Forget the sequences where `rows` (b,) says so."""
        self.values[rows.to(self.values.device)] = 0

    def clear(self) -> None:
        """Forget all sequences, also after a step that failed half-way."""
        self.table.truncate([0] * self.table.batch)
        self.values.zero_()
        self._turns = self.table.turns


__all__ = ["StateCache", "StateTable", "Turn"]
