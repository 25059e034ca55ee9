"""Attention of one rank, or over an axis by an algorithm, with options already sorted."""

from __future__ import annotations

from torch import Tensor

from ..mesh.collectives import Axis
from .algorithm import differentiable
from .algorithms import LOCAL, OVER_SHARDS
from .links import Link
from .options import Options
from .task import ShardTask
from .tokens import Layout


def over_shards(
    options: Options,
    algorithm: str,
    axis: Axis,
    zigzag: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> Tensor:
    """Attention of shards, which are equal."""
    if algorithm not in OVER_SHARDS:
        options.refuse(f"algorithm is one of {', '.join(OVER_SHARDS)}; got {algorithm!r}")
    make = Layout.zigzag if zigzag else Layout.contiguous
    more = {} if options.up is None else {"up": options.up}  # which not all algorithms know
    return OVER_SHARDS[algorithm](
        q, k, v, group=axis, causal=options.causal, window=options.window, scale=options.scale,
        softcap=options.softcap, sinks=options.sinks,
        layout=make(q.shape[2] * axis.size, axis.size), **more,
    )  # fmt: skip


def by_positions(
    options: Options, query_start: int, q: Tensor, k: Tensor, v: Tensor | None
) -> Tensor:
    """Attention without a mask of queries x keys: a ring of one rank."""
    options.check_keys(q, k, v)
    queries = Layout.contiguous(q.shape[2], 1, start=query_start)
    keys = Layout.contiguous(k.shape[2], 1)
    task = ShardTask(Link(None), options.scores(q), queries, keys)
    return differentiable(LOCAL, task, q, k, v, options.sinks, options.up)


__all__ = ["by_positions", "over_shards"]
