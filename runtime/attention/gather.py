"""Attention over gathered keys and values, all heads at once or some heads after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .algorithm import Algorithm, Gradients, differentiable, start
from .held import Held
from .kernels import Queries
from .links import Group, unpack
from .options import Options
from .partial import Partial, wide
from .scores import Mask
from .task import ShardTask, Task
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
        "gather_kv_attention", causal, window, scale, softcap, sinks, bias, slopes, mask, up
    )
    task = ShardTask.of(options, group, q, k, v, layout, query_layout)
    if stride < 0:
        options.refuse(f"stride is a number of key heads, or 0 for all; got {stride}")
    by_strides = replace(
        GATHER, forward=partial(_forward, stride=stride), backward=partial(_backward, stride=stride)
    )
    return differentiable(by_strides if stride else GATHER, task, q, k, v, sinks, up)


def _forward(q: Tensor, held: Held, sinks: Tensor | None, task: Task, stride: int = 0) -> Partial:
    """This rank's queries over the keys of all ranks, `stride` key heads at a time (0: all)."""
    into = start(q, held.value_dim, sinks)
    for heads, own, of_heads in _strides(task, q, held, stride):
        part, some = into.of_heads(own), held.of_key_heads(heads)
        rows = task.link.all_gather(some.packed(), "forward")
        for source in _sources(task):
            work = task.work(task.link.rank, source)
            some.received(rows[source]).attend(part, q[:, own], work, of_heads.scores)
    return into


def _backward(queries: Queries, held: Held, task: Task, stride: int = 0) -> Gradients:
    """Keys are gathered again; a reduce-scatter adds up their gradients."""
    link, q, up = task.link, queries.q, held.heads and held.heads.up
    dq, *dsent = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in (q, *held.sent))
    dup = None if up is None else torch.zeros_like(up, dtype=dq.dtype)
    for heads, own, of_heads in _strides(task, q, held, stride):
        mine, some = queries.of_heads(own), held.of_key_heads(heads)
        rows = link.all_gather(some.packed(), "backward")
        summands = torch.zeros_like(rows, dtype=dq.dtype)
        for source in _sources(task):
            into = (dq[:, own], unpack(summands[source], *some.shapes), dup)
            work = task.work(link.rank, source)
            some.received(rows[source]).attend_backward(into, mine, work, of_heads.scores)
        summed = link.reduce_scatter(summands, "backward")
        for whole, part in zip(dsent, unpack(summed, *some.shapes), strict=True):
            whole[:, heads] = part
    return dq, dsent, dup


GATHER = Algorithm("gather", _forward, _backward, travels="keys")


def _strides(task: Task, q: Tensor, held: Held, stride: int) -> Iterator[tuple[slice, slice, Task]]:
    """Slices of key heads, each with that of its query heads and the task of these."""
    key_heads, group = held.k.shape[1], q.shape[1] // held.k.shape[1]
    step = stride or key_heads
    for first in range(0, key_heads, step):
        heads = slice(first, min(first + step, key_heads))
        own = slice(first * group, heads.stop * group)
        yield heads, own, task.of_heads(own.start, own.stop - own.start)


def _sources(task: Task) -> Iterator[int]:
    """Ranks in the order in which a ring brings their keys: both give the same bits."""
    for step in range(task.link.size):
        yield (task.link.rank - step) % task.link.size
