"""Sliding-window attention: a rank fetches the few keys before its own from its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .algorithm import Given, run, save, saved, saved_more, start
from .kernels import attend, attend_backward
from .links import Group, Hop, pack, unpack
from .options import Options
from .partial import wide
from .pieces import Piece
from .scores import Mask
from .task import ShardTask
from .tokens import Layout


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    layout: Layout | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Causal attention to the last `window` keys, own one included, by halo exchange.

    Tensors and options are those of `ring_attention`; `layout` must be contiguous.  Differentiable.

    Cost: forward receives b hkv min(window-1, rows before) (d + dv) e bytes, in one message from
    each of ceil((window-1) / sk) neighbours, while its own block is computed; backward sends the
    gradients of as many rows back in float32.  Memory: `window` keys.  Wins whenever
    window is shorter than the sequence.

    Raises ValueError for sizes that do not fit together or to the layout, NotImplementedError for
    what a halo cannot do: other layouts, a prefix, and causal=False, as a window bounds the keys
    before a query alone.
    """
    options = Options("window_attention", causal, window, scale, softcap, sinks, bias, slopes, mask)
    if not causal:
        raise NotImplementedError(
            "window_attention: causal=False; a window bounds the keys before a query and not those"
            " after it, which a halo would bring from all later ranks: use ring_attention or"
            " gather_kv_attention"
        )
    if window < 1:
        options.refuse(f"window is the number of keys that a query attends, got {window}")
    task = ShardTask.of(options, group, q, k, v, layout)
    keys = task.keys
    if keys.runs != Layout.contiguous(keys.length, keys.ranks, start=keys.start).runs:
        raise NotImplementedError(
            "window_attention: a halo needs the contiguous layout; for other layouts use"
            " ring_attention or gather_kv_attention with `window`"
        )
    return run(_ByHalos(task), Given(q, k, v, sinks, bias, None))


@dataclass(frozen=True, slots=True)
class Halo:
    """The last `rows` rows of the shard `distance` ranks before a rank."""

    distance: int
    rows: int


def halos(window: int, rows: int, ranks: int) -> list[Halo]:
    """What a rank needs of its neighbours, the nearest first, where it has so many."""
    needed, found = window - 1, list[Halo]()
    while needed > 0 and rows > 0 and len(found) < ranks - 1:
        found.append(Halo(len(found) + 1, min(needed, rows)))
        needed -= rows
    return found


@dataclass(frozen=True, slots=True)
class _ByHalos:
    task: ShardTask

    def forward(self, ctx: Any, given: Given) -> Tensor:
        (q, k, v, sinks, *_), task = given, self.task
        assert v is not None
        hop = _fetch(task, k, v)
        into = start(q, v.shape[3], sinks)
        attend(into, q, k, v, _own(task), task.scores)
        fetched = hop.wait()
        for halo, buffer in zip(_before(task), fetched, strict=True):
            keys, values = _unpack(buffer, halo, k, v)
            attend(into, q, keys, values, _pieces(task, halo), task.scores)
        return save(ctx, (q, k, v, sinks), into, *fetched)

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        task, dbias = self.task.with_bias_gradient(ctx.needs_input_grad[4])
        queries, k, v, dsinks = saved(ctx, grad)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in (queries.q, k, v))
        shares: list[Tensor] = []
        for halo, buffer in zip(_before(task), saved_more(ctx), strict=True):
            keys, values = _unpack(buffer, halo, k, v)
            shares.append(torch.zeros_like(buffer, dtype=dk.dtype))
            into = (dq, *_unpack(shares[-1], halo, k, v))
            attend_backward(into, queries, keys, values, _pieces(task, halo), task.scores)
        hop = _give_back(task, shares, k, v)
        attend_backward((dq, dk, dv), queries, k, v, _own(task), task.scores)
        for halo, share in zip(_after(task), hop.wait(), strict=True):
            for total, part in zip((dk, dv), _unpack(share, halo, k, v), strict=True):
                total.narrow(2, total.shape[2] - halo.rows, halo.rows).add_(part)
        return dq.to(k.dtype), dk.to(k.dtype), dv.to(k.dtype), dsinks, dbias, None


def _own(task: ShardTask) -> tuple[Piece, ...]:
    """What this rank's queries attend of its keys."""
    rank = task.link.rank
    return task.scores.pieces(task.queries, rank, task.keys, rank)


def _all(task: ShardTask) -> list[Halo]:
    return halos(task.scores.window, task.keys.rows, task.link.size)


def _before(task: ShardTask) -> list[Halo]:
    """Halos that this rank receives."""
    return [halo for halo in _all(task) if halo.distance <= task.link.rank]


def _after(task: ShardTask) -> list[Halo]:
    """Halos that this rank's rows are for others."""
    return [halo for halo in _all(task) if halo.distance < task.link.size - task.link.rank]


def _fetch(task: ShardTask, k: Tensor, v: Tensor) -> Hop:
    rank, rows = task.link.rank, k.shape[2]
    send = [
        (pack(*(x.narrow(2, rows - halo.rows, halo.rows) for x in (k, v))), rank + halo.distance)
        for halo in _after(task)
    ]
    receive = [(k.new_empty(size_of(halo, k, v)), rank - halo.distance) for halo in _before(task)]
    return task.link.swap(send, receive, "forward")


def _give_back(task: ShardTask, shares: list[Tensor], k: Tensor, v: Tensor) -> Hop:
    """Gradients of the halos to the owners of their rows."""
    rank, dtype = task.link.rank, wide(k.dtype)
    before = [rank - halo.distance for halo in _before(task)]
    receive = [
        (k.new_empty(size_of(halo, k, v), dtype=dtype), rank + halo.distance)
        for halo in _after(task)
    ]
    return task.link.swap(list(zip(shares, before, strict=True)), receive, "backward")


def size_of(halo: Halo, k: Tensor, v: Tensor) -> int:
    """Numbers in the message that brings it."""
    return k.shape[0] * k.shape[1] * halo.rows * (k.shape[3] + v.shape[3])


def _unpack(buffer: Tensor, halo: Halo, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = unpack(
        buffer, (*k.shape[:2], halo.rows, k.shape[3]), (*v.shape[:2], halo.rows, v.shape[3])
    )
    return keys, values


def _pieces(task: ShardTask, halo: Halo) -> tuple[Piece, ...]:
    """What this rank's queries attend of a halo's rows."""
    keys, source = task.keys, task.link.rank - halo.distance
    runs = keys.clip(source, keys.rows - halo.rows, keys.rows)
    return task.scores.pieces_of(task.queries.runs[task.link.rank], runs)
