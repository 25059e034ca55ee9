"""Ring attention: keys and values travel from rank to rank, queries stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import attend_backward
from .links import Group, pack, unpack
from .partial import Partial, wide
from .scores import Mask
from .task import Options, Task, save, saved, start
from .tokens import Layout

# Messages of keys and values, and of their gradients, which are under way at the same time.
_KV_TAG, _GRADIENT_TAG = 0, 1


def ring_attention(
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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Attention over a sequence that is sharded over `group`, by ring pass-KV.

    q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv) are this rank's shards, the result
    (b, hq, sq, dv) is that of its queries.  Differentiable.

    `group` is a ProcessGroup or an `Axis`; `layout` says which tokens the shards hold
    (`Layout.zigzag` balances causal work), `query_layout` those of q where they are others (new
    tokens over a cache).  Without a layout shards are equal and contiguous, and one all-gather of
    96 bytes makes sure that the ranks agree on their sizes; with one, the first call of each kind
    does, so that a rank with other sizes, options or layouts is an error on all ranks.

    A query at position p attends key j where j <= p if `causal`, j > p - window if `window` > 0
    (a bound to the left alone: without `causal`, all later keys too), and `mask` allows it.
    `scale` is 1/sqrt(d) if None.  `softcap` > 0 makes scores softcap * tanh(score / softcap).
    `sinks` (hq,) are logits of one more key per head whose value is 0; their gradient is this
    rank's summand.  `bias` (b or 1, hq or 1, sq, S) is added to the scores of this rank's queries,
    with a column per position; its gradient is whole for these rows.  `slopes` (hq,) are ALiBi's
    and get no gradient.

    Cost, over p ranks, with kv = b hkv sk (d + dv) numbers of e bytes: forward receives
    (p-1) kv e bytes in p-1 messages, each under way while a block is computed; backward twice as
    many messages, (p-1) kv (e + 4) bytes, as gradients travel in float32.  Memory: two blocks of
    keys and values, in backward also two of their gradients.  Wins for long new sequences
    (training, prefill), where computing a block takes longer than its message.

    Raises ValueError for sizes that do not fit together or to the layout.
    """
    options = Options("ring_attention", causal, window, scale, softcap, sinks, bias, slopes, mask)
    task = Task.of(options, group, q, k, v, layout, query_layout)
    return attend_over_ring(q, k, v, sinks, task)


def attend_over_ring(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, task: Task) -> Tensor:
    """`ring_attention` of checked inputs; on one rank it is local attention."""
    return _Ring.apply(q, k, v, sinks, task.scores.bias, task)


def ring_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, task: Task) -> Partial:
    """This rank's queries over the keys of all ranks, from its own backwards around the ring."""
    into = start(q, v.shape[3], sinks)
    link, buffer = task.link, pack(k, v) if task.link.size > 1 else None
    for step in range(link.size):
        source = (link.rank - step) % link.size
        last = step == link.size - 1
        hop = None if last or buffer is None else link.shift(buffer, "forward", _KV_TAG)
        task.attend(into, q, k, v, source)
        if hop is not None:
            (buffer,) = hop.wait()
            k, v = unpack(buffer, k.shape, v.shape)
    return into


def ring_backward(ctx: Any, grad: Tensor, task: Task) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, sinks: keys travel again, their gradients one rank behind them.

    A rank adds its share to the gradient that comes with the keys and passes it on; after p-1
    hops it is with the keys' owner, whose own share never left.
    """
    queries, k, v, dsinks = saved(ctx, grad)
    link, dtype = task.link, wide(k.dtype)
    dq = queries.q.new_zeros(queries.q.shape, dtype=dtype)
    size = k.numel() + v.numel()
    own = k.new_zeros(size, dtype=dtype)
    buffer = pack(k, v) if link.size > 1 else None
    shapes = (k.shape, v.shape)
    gradients = None  # the hop that brings gradients of the keys that are here now
    for step in range(link.size):
        source = (link.rank - step) % link.size
        last = step == link.size - 1
        keys = None if last or buffer is None else link.shift(buffer, "backward", _KV_TAG)
        share = own if step == 0 else k.new_zeros(size, dtype=dtype)
        dk, dv = unpack(share, *shapes)
        attend_backward((dq, dk, dv), queries, k, v, task.pieces(source), task.scores)
        if step > 0:
            if gradients is not None:
                share += gradients.wait()[0]
            gradients = link.shift(share, "backward", _GRADIENT_TAG)
        if keys is not None:
            (buffer,) = keys.wait()
            k, v = unpack(buffer, *shapes)
    if gradients is not None:
        own += gradients.wait()[0]
    dk, dv = unpack(own, *shapes)
    return dq.to(k.dtype), dk.to(k.dtype), dv.to(k.dtype), dsinks  # pyright: ignore


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,  # that of the task; autograd knows it by this
        task: Task,
    ) -> Tensor:
        ctx.task = task
        return save(ctx, (q, k, v, sinks), ring_forward(q, k, v, sinks, task))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        task, dbias = ctx.task.with_bias_gradient(ctx.needs_input_grad[4])
        return (*ring_backward(ctx, grads[0], task), dbias, None)
