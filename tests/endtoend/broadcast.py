"""An algorithm of attention that is no part of Shardwright: all that one takes.

Every rank sends its keys and values to every other at once, and waits for theirs.  The declaration
would be a file of `ir/ops/algorithms` and a line in its registry, the rest a file of
`runtime/attention` and a line or two in its `algorithms.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shardwright.facts.traffic import Traffic
from shardwright.ir.ops.algorithms.algorithm import AttentionAlgorithm, Steps, steps_over
from shardwright.ir.ops.algorithms.part import Part
from shardwright.ir.ops.algorithms.registry import ALGORITHMS
from shardwright.runtime.attention.algorithm import Algorithm, Gradients, differentiable, start
from shardwright.runtime.attention.algorithms import OVER_A_CACHE, OVER_SHARDS
from shardwright.runtime.attention.held import Held
from shardwright.runtime.attention.kernels import Queries
from shardwright.runtime.attention.links import Link, unpack
from shardwright.runtime.attention.options import Options
from shardwright.runtime.attention.partial import Partial, wide
from shardwright.runtime.attention.task import ShardTask, Task
from shardwright.runtime.mesh.counter import Phase

# --- what the planner knows of it ----------------------------------------------------------------


class Broadcast(AttentionAlgorithm):
    """p - 1 messages of keys and values, in backward again, and as many of their gradients."""

    name = "broadcast"
    words = "sequence, K/V broadcast"
    over_shards = over_cache = balanced = True
    tells = "keys"

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """Nothing hides it."""
        axes, peers, kv = (part.axis,), part.ranks - 1, float(part.kv_bytes)
        yield Traffic("send_recv", axes, kv, times=peers)
        yield Traffic("send_recv", axes, kv, times=peers, backward=True)
        yield Traffic("send_recv", axes, float(part.gradient_bytes), times=peers, backward=True)

    def steps(self, part: Part) -> Steps:
        """One, over everything."""
        share = sum(part.ring_shares()) / part.ranks
        if part.cached:
            share = part.cached_share(part.queries * part.ranks)
        return steps_over(part, (share,), times=part.ranks)

    def buffers(self, part: Part) -> float:
        """The keys and values of all ranks."""
        return float(part.kv_bytes * part.ranks)


# --- what ranks run ------------------------------------------------------------------------------


def broadcast_attention(q: Tensor, k: Tensor, v: Tensor | None, **given: Any) -> Tensor:
    """As `ring_attention`, with its options."""
    group, layout = given.pop("group"), given.pop("layout")
    options = Options("broadcast_attention", **given)
    task = ShardTask.of(options, group, q, k, v, layout)
    return differentiable(BROADCAST, task, q, k, v, options.sinks, options.up)


def _forward(q: Tensor, held: Held, sinks: Tensor | None, task: Task) -> Partial:
    """This rank's queries over the keys of all ranks."""
    link, into = task.link, start(q, held.value_dim, sinks)
    for rank, message in _exchanged(link, held.packed(), "forward"):
        held.received(message).attend(into, q, task.work(link.rank, rank), task.scores)
    return into


def _backward(queries: Queries, held: Held, task: Task) -> Gradients:
    """Keys are sent again, and each rank's share of their gradients goes back to them."""
    link, dtype = task.link, wide(held.k.dtype)
    dq = torch.zeros_like(queries.q, dtype=dtype)
    dup = None if held.heads is None else torch.zeros_like(held.heads.up, dtype=dtype)
    shares: dict[int, Tensor] = {}
    for rank, message in _exchanged(link, held.packed(), "backward"):
        shares[rank] = torch.zeros_like(message, dtype=dtype)
        grads = (dq, unpack(shares[rank], *held.shapes), dup)
        work = task.work(link.rank, rank)
        held.received(message).attend_backward(grads, queries, work, task.scores)
    peers = [rank for rank in shares if rank != link.rank]
    own = shares[link.rank]
    hop = link.swap(
        [(shares[rank], rank) for rank in peers],
        [(torch.empty_like(own), rank) for rank in peers],
        "backward",
    )
    for share in hop.wait():
        own += share
    return dq, unpack(own, *held.shapes), dup


def _exchanged(link: Link, message: Tensor, phase: Phase) -> Iterator[tuple[int, Tensor]]:
    """The messages of all ranks, the own one first."""
    yield link.rank, message
    peers = [rank for rank in range(link.size) if rank != link.rank]
    hop = link.swap(
        [(message, rank) for rank in peers],
        [(torch.empty_like(message), rank) for rank in peers],
        phase,
    )
    yield from zip(peers, hop.wait(), strict=True)


BROADCAST = Algorithm("broadcast", _forward, _backward, travels="keys")


# --- the lines in the registries -----------------------------------------------------------------


@contextmanager
def known() -> Iterator[None]:
    """Inside, planner and runtime know the algorithm."""
    lines: list[tuple[dict[str, Any], Any]] = [
        (ALGORITHMS, Broadcast()), (OVER_SHARDS, broadcast_attention), (OVER_A_CACHE, BROADCAST)
    ]  # fmt: skip
    for table, line in lines:
        table["broadcast"] = line
    try:
        yield
    finally:
        for table, _ in lines:
            del table["broadcast"]


def knowing(function: Callable[..., Any], *args: Any) -> Any:
    """In a rank: `function(*args)`, where the algorithm is known."""
    with known():
        return function(*args)
