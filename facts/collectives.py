"""The collectives: one declaration each, of all that is known about it but what ranks do.

A declaration says in shares of a tensor and in hops what passes over which links; the cost model
makes seconds of that, the planner chooses by them, counter and report read the same formulas.  What
ranks do is a function of the same name in `runtime/mesh/transfers.py`.

Several collectives may do the same move of values (`does`).  The one that is called like the move
is what the move is run by unless another is cheaper over its axes.

Ring formulas are those of NCCL's tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from math import ceil, log2, prod
from typing import ClassVar

from .moves import Primitive


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the `size` ranks of a group lie: on `nodes` nodes, `local` of them in one node."""

    size: int
    nodes: int
    local: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A collective `name` over some of the axes (by position), called with a share of the bytes."""

    name: str
    axes: tuple[int, ...]
    share: float


class Collective:
    """What ranks do together on a tensor of n bytes.

    n is what `tensor` says.  `sizes` are those of the mesh axes that it runs over, outermost first.
    """

    name: ClassVar[str]
    words: ClassVar[str]  # in reports
    tensor: ClassVar[str] = "the whole tensor"  # whose bytes it is called with
    does: ClassVar[Primitive | None] = None  # the move of values, see `moves.py`
    copies: ClassVar[bool] = True  # a rank copies its own part, n / p, from input to output
    pairwise: ClassVar[bool] = False  # each pair of ranks agrees on a buffer first

    def suits(self, sizes: tuple[int, ...]) -> bool:
        """May it run over axes of these sizes?"""
        return True

    def stages(self, sizes: tuple[int, ...]) -> tuple[Stage, ...]:
        """The collectives that it is made of, one after the other; none: it is one itself.

        What they take, receive and send is then what it does, and nothing below is asked.
        """
        return ()

    def received(self, size: int) -> float:
        """How much of n each of `size` ranks receives."""
        raise NotImplementedError

    def messages(self, size: int) -> int:
        """In how many messages that is, one after the other."""
        return size - 1

    def inside(self, at: Placement) -> float:
        """How much of n passes a rank's links inside its node."""
        return self.received(at.size)

    def across(self, at: Placement) -> float:
        """How much of n comes in over a rank's network card."""
        raise NotImplementedError

    def cards(self, at: Placement) -> int:
        """How many network cards of a node take part for one group."""
        return at.local

    def hops(self, at: Placement) -> tuple[int, int]:
        """Steps of latency: inside nodes, between nodes.  A ring goes once around."""
        return max(at.size - at.nodes, 0), at.nodes - 1

    def in_switch(self, at: Placement) -> float:
        """How much of n passes a rank's links where the switch between them adds; 0: it is no use.

        What is faster counts.
        """
        return 0.0


class AllGather(Collective):
    """A ring.  What a node lacks, (nodes - 1) / nodes of n, comes in over all of its cards."""

    name, words, does = "all_gather", "all-gather", "all_gather"
    tensor = "the whole tensor, after the gather"

    def received(self, size: int) -> float:
        return (size - 1) / size

    def across(self, at: Placement) -> float:
        return (at.nodes - 1) / at.nodes / at.local


class ReduceScatter(AllGather):
    """The all-gather backwards."""

    name, words, does = "reduce_scatter", "reduce-scatter", "reduce_scatter"
    tensor = "the whole tensor, before the scatter"


class AllReduce(Collective):
    """A ring that goes round twice; NCCL's is a tree between nodes, with its hops.

    A switch that adds (NVLink SHARP) takes n in and gives n / p more: the node's own part.
    """

    name, words, does = "all_reduce", "all-reduce", "all_reduce"
    copies = False

    def received(self, size: int) -> float:
        return 2 * (size - 1) / size

    def messages(self, size: int) -> int:
        return 2 * (size - 1)

    def across(self, at: Placement) -> float:
        return 2 * (at.nodes - 1) / at.nodes / at.local

    def hops(self, at: Placement) -> tuple[int, int]:
        return 2 * (at.local - 1), 2 * ceil(log2(at.nodes))

    def in_switch(self, at: Placement) -> float:
        return 1 + 1 / at.size if at.nodes == 1 else 0.0


class AllToAll(Collective):
    """Every rank sends to all others directly, each over its own card.

    Start-up between nodes is counted as ceil(log2 nodes) hops (not measured).
    """

    name, words, does = "all_to_all", "all-to-all", "all_to_all"
    tensor = "one rank's buffer"
    pairwise = True

    def received(self, size: int) -> float:
        return (size - 1) / size

    def inside(self, at: Placement) -> float:
        return (at.local - 1) / at.size

    def across(self, at: Placement) -> float:
        return (at.size - at.local) / at.size

    def hops(self, at: Placement) -> tuple[int, int]:
        return int(at.local > 1), ceil(log2(at.nodes))


class SendRecv(Collective):
    """One step of a ring that operators run themselves: it enters a node once."""

    name, words = "send_recv", "send-recv"
    tensor = "the message"
    copies = False

    def received(self, size: int) -> float:
        return float(size > 1)

    def messages(self, size: int) -> int:
        return 1

    def across(self, at: Placement) -> float:
        return 1.0

    def cards(self, at: Placement) -> int:
        return 1

    def hops(self, at: Placement) -> tuple[int, int]:
        return (1, 0) if at.nodes == 1 else (0, 1)


COLLECTIVES: dict[str, Collective] = {
    each.name: each for each in (AllGather(), ReduceScatter(), AllReduce(), AllToAll(), SendRecv())
}


def register(collective: Collective) -> None:
    """Add one.  Its function for ranks goes into `runtime/mesh/transfers.py`."""
    if collective.name in COLLECTIVES:
        raise ValueError(f"there is a collective `{collective.name}` already")
    COLLECTIVES[collective.name] = collective


def find_collective(name: str) -> Collective:
    """The collective called so.  Raises ValueError with the names that there are."""
    if name not in COLLECTIVES:
        known = ", ".join(COLLECTIVES)
        raise ValueError(f"unknown collective `{name}`; expected one of {known}")
    return COLLECTIVES[name]


def collective_for(move: Primitive, by: str = "") -> str:
    """The name of the collective that runs `move`: `by` if that does it, else its own."""
    return by if by and find_collective(by).does == move else move


def others(moves: Set[Primitive], sizes: tuple[int, ...]) -> tuple[str, ...]:
    """Collectives over axes of `sizes` that do one of `moves` otherwise than is usual."""
    return tuple(
        name
        for name, each in COLLECTIVES.items()
        if each.does in moves and each.does != name and each.suits(sizes)
    )


def received_share(name: str, sizes: tuple[int, ...]) -> float:
    """How much of the bytes that it is called with each rank receives.

    >>> received_share("all_reduce", (4,))
    1.5
    """
    stages = find_collective(name).stages(sizes)
    if not stages:
        return find_collective(name).received(_ranks(sizes))
    return sum(
        stage.share * received_share(stage.name, tuple(sizes[i] for i in stage.axes))
        for stage in stages
    )


def message_count(name: str, sizes: tuple[int, ...]) -> int:
    """In how many messages these come, one after the other."""
    stages = find_collective(name).stages(sizes)
    if not stages:
        return find_collective(name).messages(_ranks(sizes))
    return sum(message_count(stage.name, tuple(sizes[i] for i in stage.axes)) for stage in stages)


def _ranks(sizes: tuple[int, ...]) -> int:
    if min(sizes, default=0) < 1:
        raise ValueError(f"a group has at least one rank, got {sizes}")
    return prod(sizes)
