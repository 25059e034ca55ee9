"""What the collectives moved: calls, bytes and messages by operation, axis and phase."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from ...facts.collectives import message_count

Phase: TypeAlias = Literal["forward", "backward", "step"]  # of an optimizer


class Key(NamedTuple):
    """One row of the count.

    `op` is the name of a collective, see `facts/collectives.py`.
    """

    op: str
    axis: str
    phase: Phase


@dataclass(slots=True)
class Count:
    """`calls` collectives that brought `bytes` to this rank in `messages`."""

    calls: int = 0
    bytes: float = 0.0
    messages: int = 0


@dataclass(slots=True)
class CollectiveCounter:
    """The collectives of this rank while `count_collectives` was active.

    Bytes are what a rank receives by the collectives' declarations, padding included: over p
    ranks all-gather and reduce-scatter (p-1)/p of the whole, all-reduce 2(p-1)/p of the whole,
    all-to-all (p-1)/p of the local part; `send_recv` what is received.  Messages are counted
    likewise, one after the other from rank to rank.
    """

    counts: dict[Key, Count] = field(default_factory=dict[Key, Count])

    def record(self, op: str, axis: str, phase: Phase, nbytes: float, messages: int) -> None:
        """Add one collective that brought `nbytes` to this rank."""
        count = self.counts.setdefault(Key(op, axis, phase), Count())
        count.calls += 1
        count.bytes += nbytes
        count.messages += messages

    def bytes(
        self, op: str | None = None, axis: str | None = None, phase: Phase | None = None
    ) -> float:
        """Bytes of all rows that match; `None` matches everything."""
        return sum(count.bytes for _, count in self._matching(op, axis, phase))

    def calls(
        self, op: str | None = None, axis: str | None = None, phase: Phase | None = None
    ) -> int:
        """Collectives of all rows that match; `None` matches everything."""
        return sum(count.calls for _, count in self._matching(op, axis, phase))

    def messages(
        self, op: str | None = None, axis: str | None = None, phase: Phase | None = None
    ) -> int:
        """Messages of all rows that match; `None` matches everything."""
        return sum(count.messages for _, count in self._matching(op, axis, phase))

    def _matching(
        self, op: str | None, axis: str | None, phase: Phase | None
    ) -> Iterator[tuple[Key, Count]]:
        for key, count in self.counts.items():
            if op in (None, key.op) and axis in (None, key.axis) and phase in (None, key.phase):
                yield key, count


# A plain list and not a context variable: autograd runs CUDA backward passes in threads of its
# own, which do not inherit the context of the thread that called `backward`.
active: list[CollectiveCounter] = []


def record(op: str, axis: str, phase: Phase, nbytes: float, sizes: tuple[int, ...]) -> None:
    """Tell the active counters of a collective over axes of `sizes` that brings `nbytes` here."""
    for listener in active:
        listener.record(op, axis, phase, nbytes, message_count(op, sizes))


@contextmanager
def count_collectives() -> Generator[CollectiveCounter]:
    """Count the collectives of this rank inside the `with` block.

    >>> with count_collectives() as counter:
    ...     pass
    >>> counter.bytes("all_gather", axis="tp", phase="forward")
    0
    """
    counter = CollectiveCounter()
    active.append(counter)
    try:
        yield counter
    finally:
        active.remove(counter)
