"""Attention over gathered keys and values, all heads at once or some heads after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .latents import Held
from .links import Group, unpack
from .partial import wide
from .scores import Mask
from .task import Options, Task, save, saved_held, start
from .tokens import Layout


def gather_kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    group: Group,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    layout: Layout | None = None,
    query_layout: Layout | None = None,
    stride: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    mask: Mask | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Attention over a sequence that is sharded over `group`, by all-gather of keys and values.

    Tensors and options are those of `ring_attention`, latents k with `up` too.  `stride` key heads
    are gathered at a time (0: all), which bounds memory.  Differentiable: backward gathers again
    and reduce-scatters the gradients in float32.

    Cost, over p ranks, with kv = b hkv sk (d + dv) numbers of e bytes: forward one all-gather
    per stride, (p-1) kv e bytes in all; backward as much again and one reduce-scatter per stride,
    (p-1) kv 4 bytes.  Memory: the keys and values of `stride` heads from all ranks.  With `up` kv
    is b sk (r + rope), and heads are made of one rank's latents at a time.  Nothing hides the
    messages, but there are fewer of them than in a ring.  Wins for few key heads (GQA).

    Raises ValueError for sizes that do not fit together or to the layout.
    """
    options = Options(
        "gather_kv_attention", causal, window, scale, softcap, sinks, bias, slopes, mask
    )
    task = Task.of(options, group, q, k, v, layout, query_layout, up)
    if stride < 0:
        options.refuse(f"stride is a number of key heads, or 0 for all; got {stride}")
    return _Gather.apply(q, k, v, sinks, bias, up, task, stride or k.shape[1])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        sinks: Tensor | None,
        bias: Tensor | None,
        up: Tensor | None,
        task: Task,
        stride: int,
    ) -> Tensor:
        ctx.task, ctx.stride = task, stride
        held = Held.of(q, k, v, up)
        into = start(q, held.value_dim, sinks)
        for heads, of_heads in _strides(task, q, k, stride):
            own = slice(heads.start * _group(q, k), heads.stop * _group(q, k))
            part, some = into.of_heads(own), held.of_key_heads(heads)
            rows = task.link.all_gather(some.packed(), "forward")
            for source in _sources(task):
                there = some.received(rows[source])
                there.attend(part, q[:, own], task.pieces(source), of_heads.scores)
        return save(ctx, (q, k, v, sinks), into, up=up)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        task, dbias = ctx.task.with_bias_gradient(ctx.needs_input_grad[4])
        queries, held, dsinks = saved_held(ctx, grads[0])
        q, k, up = queries.q, held.k, held.heads and held.heads.up
        dq, *dsent = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in (q, *held.sent))
        dup = None if up is None else torch.zeros_like(up, dtype=dq.dtype)
        for heads, of_heads in _strides(task, q, k, ctx.stride):
            own = slice(heads.start * _group(q, k), heads.stop * _group(q, k))
            mine, some = queries.of_heads(own), held.of_key_heads(heads)
            rows = task.link.all_gather(some.packed(), "backward")
            summands = torch.zeros_like(rows, dtype=dq.dtype)
            for source in _sources(task):
                into = (dq[:, own], unpack(summands[source], *some.shapes), dup)
                pieces = task.pieces(source)
                some.received(rows[source]).attend_backward(into, mine, pieces, of_heads.scores)
            summed = task.link.reduce_scatter(summands, "backward")
            for whole, part in zip(dsent, unpack(summed, *some.shapes), strict=True):
                whole[:, heads] = part
        dk, *dv = (x.to(k.dtype) for x in dsent)
        return dq.to(k.dtype), dk, dv[0] if dv else None, dsinks, dbias, dup, None, None


def _group(q: Tensor, k: Tensor) -> int:
    """Query heads per key head."""
    return q.shape[1] // k.shape[1]


def _strides(task: Task, q: Tensor, k: Tensor, stride: int) -> Iterator[tuple[slice, Task]]:
    """Slices of key heads, each with the task of its query heads."""
    group = _group(q, k)
    for first in range(0, k.shape[1], stride):
        heads = slice(first, min(first + stride, k.shape[1]))
        count = heads.stop - heads.start
        scores = task.scores.of_heads(first * group, count * group)
        yield heads, Task(task.link, scores, task.queries, task.keys)


def _sources(task: Task) -> Iterator[int]:
    """Ranks in the order in which a ring brings their keys: both give the same bits."""
    for step in range(task.link.size):
        yield (task.link.rank - step) % task.link.size
