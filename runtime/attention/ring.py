"""Ring attention: keys and values travel from rank to rank, queries stay."""

from __future__ import annotations

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


def ring_attention(
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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    mask: Mask | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Attention over a sequence that is sharded over `group`, by ring pass-KV.

    q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv) are this rank's shards, the result
    (b, hq, sq, dv) is that of its queries.  Differentiable.

    `group` is a ProcessGroup or an `Axis`; `layout` says which tokens the shards hold
    (`Layout.zigzag` balances causal work), `query_layout` those of q where they are others (new
    tokens over a cache).  Without a layout shards are equal and contiguous, and one all-gather of
    96 bytes makes sure that the ranks agree on sizes, options and layouts, else it is an error on
    all ranks; with a layout only the first call of each kind does.  Ranks that mix up kinds which
    were compared before are not noticed, and one that alone has a new kind waits for the others
    until the group's time limit.

    A query at position p attends key j where j <= p if `causal`, j > p - window if `window` > 0
    (a bound to the left alone: without `causal`, all later keys too), and `mask` allows it.
    `scale` is 1/sqrt(d) if None.  `softcap` > 0 makes scores softcap * tanh(score / softcap).
    `sinks` (hq,) are logits of one more key per head whose value is 0; their gradient is this
    rank's summand.  `bias` (b or 1, hq or 1, sq, S) is added to the scores of this rank's queries,
    with a column per position; its gradient is whole for these rows.  `slopes` (hq,) are ALiBi's
    and get no gradient.

    With `up` (hq, d_nope + dv, r), v is None and k (b, 1, sk, r + rope) are latents: c, and behind
    it the part of the keys that all heads share.  They alone are sent and kept for backward.  Of
    those of each rank in turn, and in backward again, keys up[:, :d_nope] c and the shared part,
    d = d_nope + rope, and values up[:, d_nope:] c are made: 2 b sk r hq (d_nope + dv) FLOP, and
    twice as many for their gradients; b hq sk (d + d_nope + dv) numbers of memory, in backward
    also b hq sk (d + dv) in float32.  The gradient of `up` is this rank's summand.

    Cost, over p ranks, with kv = b hkv sk (d + dv) numbers of e bytes, b sk (r + rope) with `up`:
    forward receives (p-1) kv e bytes in p-1 messages, each under way while a block is computed;
    backward twice as many messages, (p-1) kv (e + 4) bytes, as gradients travel in float32.
    Memory: two blocks of keys and values, in backward also two of their gradients.  Wins for long
    new sequences (training, prefill), where computing a block takes longer than its message.

    Raises ValueError for sizes that do not fit together or to the layout.
    """
    options = Options(
        "ring_attention", causal, window, scale, softcap, sinks, bias, slopes, mask, up
    )
    task = ShardTask.of(options, group, q, k, v, layout, query_layout)
    return differentiable(RING, task, q, k, v, sinks, up)


def _forward(q: Tensor, held: Held, sinks: Tensor | None, task: Task) -> Partial:
    """This rank's queries over the keys of all ranks, from its own backwards around the ring."""
    into = start(q, held.value_dim, sinks)
    link, buffer = task.link, held.packed() if task.link.size > 1 else None
    for step in range(link.size):
        source = (link.rank - step) % link.size
        last = step == link.size - 1
        hop = None if last or buffer is None else link.shift(buffer, "forward")
        held.attend(into, q, task.work(link.rank, source), task.scores)
        if hop is not None:
            (buffer,) = hop.wait()
            held = held.received(buffer)
    return into


def _backward(queries: Queries, held: Held, task: Task) -> Gradients:
    """Keys travel again, their gradients one rank behind them.

    A rank adds its share to the gradient that comes with the keys and passes it on; after p-1
    hops it is with the keys' owner, whose own share never left.
    """
    link, dtype = task.link, wide(held.k.dtype)
    dq = queries.q.new_zeros(queries.q.shape, dtype=dtype)
    dup = None if held.heads is None else torch.zeros_like(held.heads.up, dtype=dtype)
    shapes, size = held.shapes, sum(x.numel() for x in held.sent)
    own = held.k.new_zeros(size, dtype=dtype)
    buffer = held.packed() if link.size > 1 else None
    gradients = None  # the hop that brings gradients of the keys that are here now
    for step in range(link.size):
        source = (link.rank - step) % link.size
        last = step == link.size - 1
        keys = None if last or buffer is None else link.shift(buffer, "backward")
        share = own if step == 0 else torch.zeros_like(own)
        grads = (dq, unpack(share, *shapes), dup)
        held.attend_backward(grads, queries, task.work(link.rank, source), task.scores)
        if step > 0:
            if gradients is not None:
                share += gradients.wait()[0]
            gradients = link.shift(share, "backward")
        if keys is not None:
            (buffer,) = keys.wait()
            held = held.received(buffer)
    if gradients is not None:
        own += gradients.wait()[0]
    return dq, unpack(own, *shapes), dup


RING = Algorithm("ring", _forward, _backward, travels="keys")
