"""A prefix that all sequences of a batch share: its keys and values are read once for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mesh.derivatives import first_order
from .algorithm import save, saved, saved_more, start
from .kernels import attend, attend_backward
from .options import Options
from .partial import Partial, wide
from .pieces import Piece
from .scores import Scores
from .tokens import Layout


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence over one common prefix and over keys of its own.

    q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv) as usual, on one rank; prefix_k (1, hkv,
    sp, d) and prefix_v (1, hkv, sp, dv) stand before the keys of every sequence.  The queries are
    the last sq of the sk own tokens: where `causal`, query i attends own keys up to i + sk - sq.
    `scale`, `softcap` and `sinks` as in `ring_attention`.  Result (b, hq, sq, dv).  Differentiable.

    Cost: that of attention over sp + sk keys, but the prefix is stored and read once and not b
    times: its queries are those of the whole batch in one block.

    Raises ValueError for sizes that do not fit together.
    """
    options = Options(
        "shared_prefix_attention", causal=causal, scale=scale, softcap=softcap, sinks=sinks
    )
    options.check_heads(q, k, v)
    options.check_heads(q[:1], prefix_k, prefix_v)
    if prefix_k.shape[1] != k.shape[1] or prefix_v.shape[3] != v.shape[3]:
        options.refuse(
            f"prefix {tuple(prefix_k.shape)}, {tuple(prefix_v.shape)} has other heads than k"
            f" {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        options.refuse(f"{q.shape[2]} queries are more than the {k.shape[2]} own tokens")
    return _SharedPrefix.apply(q, k, v, sinks, prefix_k, prefix_v, options.scores(q))


class _SharedPrefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        prefix_k: Tensor,
        prefix_v: Tensor,
        scores: Scores,
    ) -> Tensor:
        ctx.scores = scores
        folded = _fold(q)
        common = Partial.empty(folded, v.shape[3])
        attend(common, folded, prefix_k, prefix_v, _whole(folded, prefix_k), scores)
        into = start(q, v.shape[3], sinks)
        into.add_(_unfold(common.out, q.shape[0]), _unfold(common.lse, q.shape[0]))
        attend(into, q, k, v, _own(q, k, scores), scores)
        return save(ctx, (q, k, v, sinks), into, prefix_k, prefix_v)

    @staticmethod
    @first_order("attention over a shared prefix")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries, k, v, dsinks = saved(ctx, grads[0])
        prefix_k, prefix_v = saved_more(ctx)
        dk, dv, common_dk, common_dv = (
            torch.zeros_like(x, dtype=wide(x.dtype)) for x in (k, v, prefix_k, prefix_v)
        )
        folded = queries.each(_fold)
        folded_dq = torch.zeros_like(folded.q, dtype=dk.dtype)
        into = (folded_dq, common_dk, common_dv)
        pieces = _whole(folded.q, prefix_k)
        attend_backward(into, folded, prefix_k, prefix_v, pieces, ctx.scores)
        dq = _unfold(folded_dq, k.shape[0])
        own = _own(queries.q, k, ctx.scores)
        attend_backward((dq, dk, dv), queries, k, v, own, ctx.scores)
        gradients = (x.to(k.dtype) for x in (dq, dk, dv, common_dk, common_dv))
        dq, dk, dv, common_dk, common_dv = gradients
        return dq, dk, dv, dsinks, common_dk, common_dv, None


def _whole(q: Tensor, k: Tensor) -> tuple[Piece, ...]:
    """Everything attends everything."""
    sizes = (q.shape[2], k.shape[2])
    return (Piece(0, sizes[0], 0, sizes[1], 0, 0, "full"),) if all(sizes) else ()


def _own(q: Tensor, k: Tensor, scores: Scores) -> tuple[Piece, ...]:
    """The queries are the last tokens of the keys."""
    keys = Layout.contiguous(k.shape[2], 1)
    queries = Layout.contiguous(q.shape[2], 1, start=k.shape[2] - q.shape[2])
    return scores.pieces(queries, 0, keys, 0)


def _fold(x: Tensor) -> Tensor:
    """(b, h, s, ...) -> (1, h, b * s, ...)."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _unfold(x: Tensor, batch: int) -> Tensor:
    """Inverse of `_fold`."""
    return x.squeeze(0).unflatten(1, (batch, -1)).transpose(0, 1)
