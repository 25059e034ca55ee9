"""One rank of many alone in a process: the others are played by a process group of ours.

Whatever this rank sends, the others send to it as well, as if each of them was a copy of it: an
all-gather repeats this rank's part, from every rank comes what this one has for itself, a message
of another rank is the one that goes out of the same size.  A sum or maximum over ranks is this
rank's own.  So buffers are as large as on all ranks, and no number is one that nobody has written.

    with alone(rank=3, ranks=512):
        model = ShardedModel()  # as torchrun would have it on rank 3
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import record_function

BACKEND = "peers"
PLAYED = "shardwright::peers"
"""The name under which a profiler has what is done in place of other ranks."""

_load = 1.0  # rows of experts that come to this rank, over those that it sends; see `alone`


# whose methods torch types by one of several ways to call them
_ProcessGroup: Any = ProcessGroup


class Peers(_ProcessGroup):
    """A group of `size` ranks, of which rank `rank` is here, and all others do as it does."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._name = ""
        self._sent: list[tuple[Tensor, int]] = []

    def getBackendName(self) -> str:
        """What torch asks a group for."""
        return BACKEND

    @property
    def group_name(self) -> str:
        """By which torch finds it again."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def expected_rows(self, sent: Tensor) -> Tensor:
        """How many rows come from each rank where this one has `sent[i]` (p,) for rank i: all
        together `load` times as many as it sends, shared out evenly."""
        total, ranks = ceil(float(sent.sum()) * _load), self.size()
        rows = [total // ranks + (rank < total % ranks) for rank in range(ranks)]
        return torch.tensor(rows, dtype=sent.dtype, device=sent.device)

    # --- collectives, by the names that torch has for them ----------------------------------------

    def allreduce(self, tensors: Sequence[Tensor], opts: object = None) -> Any:
        """Each is what it is."""
        return _Done()

    def broadcast(self, tensors: Sequence[Tensor], opts: object = None) -> Any:
        """Likewise, also where another rank would tell its own."""
        return _Done()

    def barrier(self, opts: object = None) -> Any:
        """Nobody is waited for."""
        return _Done()

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: object = None
    ) -> Any:
        """This rank's, as often as there are ranks."""
        with record_function(PLAYED):
            for rows, own in zip(outputs, inputs, strict=True):
                for row in rows:
                    row.copy_(own)
        return _Done()

    def all_gather_single(self, output: Tensor, own: Tensor, opts: object = None) -> Any:
        """Likewise into one tensor, of which `own` may be this rank's part."""
        with record_function(PLAYED):
            rows = output.view(self.size(), -1)
            for row in rows.unbind():
                if row.data_ptr() != own.data_ptr():
                    row.copy_(own.view(-1))
        return _Done()

    def reduce_scatter_single(self, output: Tensor, rows: Tensor, opts: object = None) -> Any:
        """This rank's row."""
        with record_function(PLAYED):
            output.view(-1).copy_(rows.view(self.size(), -1)[self.rank()])
        return _Done()

    def expected_experts(self, numbers: Tensor, sent: Sequence[int], count: int) -> Tensor:
        """The numbers of experts (n, k) in rows that go to other ranks, `sent[i]` to rank i, as if
        they came here: `count` experts are on each rank, and those of rank i are this one's."""
        ranks, rank = self.size(), self.rank()
        there = torch.tensor([(rank - i) * count for i in range(ranks)], device=numbers.device)
        away = there.repeat_interleave(torch.tensor(sent, device=numbers.device))
        return (numbers + away.unsqueeze(1).to(numbers.dtype)) % (ranks * count)

    def all_to_all_single(
        self,
        output: Tensor,
        rows: Tensor,
        receive: Sequence[int],
        send: Sequence[int],
        opts: object = None,
    ) -> Any:
        """From every rank what this one has for itself; where sizes are uneven, one after another
        the rows that it sends."""
        ranks, rank = self.size(), self.rank()
        with record_function(PLAYED):
            if receive or send:
                _repeat(rows, output)
            else:
                output.view(ranks, -1).copy_(rows.view(ranks, -1)[rank].expand(ranks, -1))
        return _Done()

    # torch 2.11 has other names for them
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    # --- messages ---------------------------------------------------------------------------------

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        """A message out, which one of the same size that is waited for may come as."""
        message = _Message(self, tensors[0], tag, out=True)
        self._sent.append((tensors[0], tag))
        return message

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> Any:
        """A message in: one that has gone out with this tag when it is waited for, else noise."""
        return _Message(self, tensors[0], tag, out=False)

    def take(self, into: Tensor, tag: int) -> None:
        """Fill in what a message brings."""
        with record_function(PLAYED):
            for x, under in self._sent:
                if under == tag and x.numel() == into.numel() and x.dtype == into.dtype:
                    into.copy_(x.view(into.shape))
                    return
            _noise(into)

    def forget(self, x: Tensor) -> None:
        """A message out has been waited for."""
        self._sent = [(sent, tag) for sent, tag in self._sent if sent is not x]


class _Done(dist.Work):
    """A collective that is there."""

    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Message(_Done):
    """A message, which comes when it is waited for."""

    def __init__(self, peers: Peers, x: Tensor, tag: int, *, out: bool) -> None:
        super().__init__()
        self._peers, self._x, self._tag, self._out = peers, x, tag, out

    def wait(self, timeout: object = None) -> bool:
        if self._out:
            self._peers.forget(self._x)
        else:
            self._peers.take(self._x, self._tag)
        return True


def _repeat(own: Tensor, into: Tensor) -> None:
    """The rows of `own` over and over, zeros where it has none."""
    if not len(own):
        into.zero_()
    for start in range(0, len(into), max(1, len(own))) if len(own) else ():
        part = into[start : start + len(own)]
        part.copy_(own[: len(part)])


def _noise(x: Tensor) -> None:
    """Small numbers of both signs, as activations and gradients are; whole numbers are zero."""
    if x.dtype == torch.uint8 or not x.dtype.is_floating_point:
        x.zero_()
    else:
        x.uniform_(-1e-2, 1e-2)


@contextmanager
def alone(rank: int, ranks: int, *, load: float = 1.0) -> Generator[None]:
    """torch.distributed as rank `rank` of `ranks` has it, whose other ranks are `Peers`.

    `load` is the load of this rank's experts over the mean: so many times the rows that it sends
    come to it.  Raises RuntimeError where torch.distributed is in use already.
    """
    global _load
    if dist.is_initialized():
        raise RuntimeError("torch.distributed is in use here; play other ranks in a new process")
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _made, devices=["cpu", "cuda"])
    before, _load = _load, load
    hook = sys.excepthook  # in whose place torch puts one that names the rank
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
        _load = before


def _made(store: object, rank: int, size: int, timeout: object) -> Peers:
    return Peers(rank, size)


__all__ = ["BACKEND", "PLAYED", "Peers", "alone"]
