"""Attention over gathered keys and values, all heads at once or some heads after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import attend, attend_backward
from .links import Group, pack, unpack
from .partial import Partial, wide
from .scores import Mask
from .task import Options, Task, save, saved, start
from .tokens import Layout


def gather_kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> Tensor:
    """Attention over a sequence that is sharded over `group`, by all-gather of keys and values.

    Tensors and options are those of `ring_attention`.  `stride` key heads are gathered at a time
    (0: all), which bounds memory.  Differentiable: backward gathers again and reduce-scatters
    the gradients in float32.

    Cost, over p ranks, with kv = b hkv sk (d + dv) numbers of e bytes: forward one all-gather
    per stride, (p-1) kv e bytes in all; backward as much again and one reduce-scatter per stride,
    (p-1) kv 4 bytes.  Memory: the keys and values of `stride` heads from all ranks.  Nothing hides
    the messages, but there are fewer of them than in a ring.  Wins for few key heads (GQA).

    Raises ValueError for sizes that do not fit together or to the layout.
    """
    options = Options(
        "gather_kv_attention", causal, window, scale, softcap, sinks, bias, slopes, mask
    )
    task = Task.of(options, group, q, k, v, layout, query_layout)
    if stride < 0:
        options.refuse(f"stride is a number of key heads, or 0 for all; got {stride}")
    return _Gather.apply(q, k, v, sinks, bias, task, stride or k.shape[1])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        task: Task,
        stride: int,
    ) -> Tensor:
        ctx.task, ctx.stride = task, stride
        into = start(q, v.shape[3], sinks)
        for heads, of_heads in _strides(task, q, k, stride):
            own = slice(heads.start * _group(q, k), heads.stop * _group(q, k))
            part = Partial(into.out[:, own], into.lse[:, own])
            keys, values = k[:, heads], v[:, heads]
            rows = task.link.all_gather(pack(keys, values), "forward")
            for source in _sources(task):
                keys, values = unpack(rows[source], keys.shape, values.shape)
                attend(part, q[:, own], keys, values, task.pieces(source), of_heads.scores)
        return save(ctx, (q, k, v, sinks), into)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        task, dbias = ctx.task.with_bias_gradient(ctx.needs_input_grad[4])
        queries, k, v, dsinks = saved(ctx, grads[0])
        dq, dk, dv = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in (queries.q, k, v))
        for heads, of_heads in _strides(task, queries.q, k, ctx.stride):
            own = slice(heads.start * _group(queries.q, k), heads.stop * _group(queries.q, k))
            keys, values = k[:, heads], v[:, heads]
            rows = task.link.all_gather(pack(keys, values), "backward")
            summands = torch.zeros_like(rows, dtype=dk.dtype)
            some = queries.of_heads(own)
            for source in _sources(task):
                keys, values = unpack(rows[source], keys.shape, values.shape)
                parts = unpack(summands[source], keys.shape, values.shape)
                into = (dq[:, own], parts[0], parts[1])
                attend_backward(into, some, keys, values, task.pieces(source), of_heads.scores)
            summed = task.link.reduce_scatter(summands, "backward")
            dk[:, heads], dv[:, heads] = unpack(summed, keys.shape, values.shape)
        return dq.to(k.dtype), dk.to(k.dtype), dv.to(k.dtype), dsinks, dbias, None, None


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
