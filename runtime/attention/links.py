"""The ranks that share one attention: messages between them, every one of them counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..mesh import counter, transport
from ..mesh.collectives import Axis
from ..mesh.counter import Phase

Group: TypeAlias = ProcessGroup | Axis

# Of `Link.tell`; the tag of other messages is 0.
_TELL_TAG = 1


class Link:
    """A process group, or an axis of a mesh, as attention uses it; None is this rank alone.

    `size`, `rank` and `name`; the name of an axis, or `group`, is what counters call it.
    Nothing is sent or counted where there is one rank or nothing to send.
    """

    __slots__ = ("size", "rank", "name", "_group")

    def __init__(self, group: Group | None) -> None:
        self._group = group
        if group is None:
            self.size, self.rank, self.name = 1, 0, "alone"
        elif isinstance(group, Axis):
            self.size, self.rank, self.name = group.size, group.rank, group.name
        else:
            self.size, self.rank, self.name = group.size(), group.rank(), "group"

    @property
    def group(self) -> ProcessGroup:
        """The process group; asked for anew each time, so that no link outlives it."""
        assert self._group is not None, "a rank alone sends nothing"
        return self._group.group if isinstance(self._group, Axis) else self._group

    def shift(self, x: Tensor, phase: Phase) -> Hop:
        """Start to send contiguous `x` to the next rank of the ring, and receive from the last."""
        received, works = torch.empty_like(x), []
        if x.numel():
            counter.record("send_recv", self.name, phase, x.nbytes, (self.size,))
            works = self._run(lambda: transport.post_shift(x, received, self.group))
        return Hop(self, works, [received], [x])

    def swap(
        self,
        send: Sequence[tuple[Tensor, int]],
        receive: Sequence[tuple[Tensor, int]],
        phase: Phase,
    ) -> Hop:
        """Start messages to and from single ranks; all tensors contiguous."""
        send = [(x, peer) for x, peer in send if x.numel()]
        full = [(x, peer) for x, peer in receive if x.numel()]
        for x, _ in full:
            counter.record("send_recv", self.name, phase, x.nbytes, (self.size,))
        works = self._run(lambda: transport.post(send, full, self.group) if send or full else [])
        return Hop(self, works, [x for x, _ in receive], [x for x, _ in send])

    def all_gather(self, x: Tensor, phase: Phase) -> Tensor:
        """The ranks' `x` along a new first dim."""
        if self.size == 1 or not x.numel():
            return x.expand(self.size, *x.shape)
        counter.record("all_gather", self.name, phase, (self.size - 1) * x.nbytes, (self.size,))
        return self._run(lambda: transport.all_gather(x.contiguous(), self.group))

    def tell(self, x: Tensor) -> Tensor:
        """The ranks' `x` along a new first dim; not counted, and apart from all other messages."""
        everywhere = x.new_empty((self.size, *x.shape))
        everywhere[self.rank] = x
        others = [peer for peer in range(self.size) if peer != self.rank]
        send, receive = [(x, peer) for peer in others], [(everywhere[i], i) for i in others]
        self._run(lambda: transport.wait(transport.post(send, receive, self.group, _TELL_TAG)))
        return everywhere

    def reduce_scatter(self, rows: Tensor, phase: Phase) -> Tensor:
        """The sum over ranks of their row for this rank."""
        if self.size == 1 or not rows.numel():
            return rows[0]
        received = (self.size - 1) / self.size * rows.nbytes
        counter.record("reduce_scatter", self.name, phase, received, (self.size,))
        return self._run(lambda: transport.reduce_scatter(rows.contiguous(), self.group))

    def all_reduce(self, x: Tensor, op: transport.Reduction, phase: Phase) -> Tensor:
        """The sum or maximum over ranks."""
        if self.size == 1 or not x.numel():
            return x
        received = 2 * (self.size - 1) / self.size * x.nbytes
        counter.record("all_reduce", self.name, phase, received, (self.size,))
        return self._run(lambda: transport.all_reduce(x, self.group, op))

    def all_to_all(
        self, send: Sequence[Tensor], sizes: Sequence[int], phase: Phase
    ) -> list[Tensor]:
        """What each rank i has for this one, `sizes[i]` numbers; 1-d `send[i]` goes to rank i."""
        receive = [
            send[peer] if peer == self.rank else send[peer].new_empty(size)
            for peer, size in enumerate(sizes)
        ]
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        received = sum(receive[peer].nbytes for peer in others)
        if received:
            counter.record("all_to_all", self.name, phase, received, (self.size,))
        outgoing = [(send[peer], peer) for peer in others if send[peer].numel()]
        incoming = [(receive[peer], peer) for peer in reversed(others) if receive[peer].numel()]
        if outgoing or incoming:
            self._run(lambda: transport.wait(transport.post(outgoing, incoming, self.group)))
        return receive

    def _run(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:
            raise RuntimeError(
                f"attention: rank {self.rank} of {self.size} on `{self.name}` lost the other ranks"
                " (one of them ended, failed, is late or calls with other sizes or options; see its"
                " own message):"
                f" {error}"
            ) from error


def link_of(name: str, group: object) -> Link:
    """The link over a group that a user of function `name` gave."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} can't be compiled; call `shardwright.runtime.ops.attention` with an algorithm"
            " and an axis, which is an operator for compilers"
        )
    if not isinstance(group, ProcessGroup | Axis):
        raise TypeError(
            f"{name}: a group is a ProcessGroup (torch.distributed.group.WORLD for all ranks) or an"
            f" Axis of a Mesh, got {group!r}"
        )
    return Link(group)


@dataclass(slots=True)
class Hop:
    """Messages under way; what is sent stays alive with it."""

    link: Link
    works: list[Any]
    received: list[Tensor]
    sent: list[Tensor]

    def wait(self) -> list[Tensor]:
        """What was received, in the order asked for."""
        self.link._run(lambda: transport.wait(self.works))  # pyright: ignore[reportPrivateUsage]
        return self.received


def pack(*tensors: Tensor) -> Tensor:
    """One contiguous 1-d buffer of all tensors' numbers, for one message instead of several."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unpack(buffer: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Views of a buffer that `pack` made, or of several along a first dim."""
    parts = buffer.split([prod(shape) for shape in shapes], -1)
    return [part.unflatten(-1, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
