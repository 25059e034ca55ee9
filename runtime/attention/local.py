"""Attention as generated modules call it: on one rank, or over an axis by an algorithm.

On one rank queries may be a part of the sequence.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mesh.collectives import Axis
from ..mesh.keeping import is_keeping
from ..mesh.stochastic import dropout
from . import calls, operator
from .options import Options


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None = None,
    *,
    algorithm: str = "",
    axis: Axis | None = None,
    zigzag: bool = False,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    query_start: int | None = None,
    generator: torch.Generator | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T scale) v for q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv).

    Query i stands at position `query_start + i` and key j at j; ranks that share the queries must
    all give `query_start`, so that all compute alike.  A query at p attends key j where
    j <= p if `causal`; j > p - window if `window` > 0; and
    `mask` allows it: bool (True attends) or a float to add, broadcastable to (b, hq, sq, sk).
    `softcap` > 0 makes scores softcap * tanh(scores / softcap).  `sinks` (hq,) are the scores of
    one more key per head, whose value is zero.  Query head h uses key head h // (hq // hkv).
    Result (b, hq, sq, dv).  With `up`, v is None and k are latents, as in `ring_attention`; they
    take neither mask nor dropout.

    With `axis`, q, k and v are this rank's shards of a sequence that the axis cuts, in contiguous
    blocks or in `zigzag` order, and `algorithm` (ring, gather, pass_q, ulysses, window; see
    `OVER_SHARDS`) says how the ranks work together; neither mask nor dropout is known to it.

    Without mask and dropout memory grows with sq + sk and not with their product, whatever the
    positions, and beside a mask that wants a gradient its gradient alone is held; with dropout, or
    another mask together with positions or softcap, it has sq x sk scores.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads over {k.shape[1]} key heads")
    sq, sk = q.shape[2], k.shape[2]
    # Nothing here may depend on the rank: backward asks for gathered operands in one order.
    shared = query_start is not None
    query_start = query_start or 0
    options = Options("attention", causal, window, scale, softcap, sinks, up=up)
    if axis is not None:
        if mask is not None or dropout_p > 0:
            options.refuse("over an axis attention takes neither mask nor dropout")
        call = operator.over_shards if _as_operator() else calls.over_shards
        return call(options, algorithm, axis, zigzag, q, k, v)
    if up is not None or v is None:
        if mask is not None or dropout_p > 0:
            options.refuse("latents k, of which `up` makes heads, take neither mask nor dropout")
        return _by_positions(options, q, k, v, query_start)
    bounded = window > 0 and (shared or sq > window)
    positioned = bounded or causal and (shared or sq != sk)
    if mask is None and dropout_p == 0 and (softcap > 0 or positioned or sinks is not None):
        return _by_positions(options, q, k, v, query_start)
    if mask is not None and dropout_p == 0 and sinks is None and _is_learned(mask, (sq, sk)):
        return _by_positions(replace(options, bias=mask), q, k, v, query_start)
    if softcap == 0 and dropout_p == 0 and mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    mask = _with_positions(mask, options, (sq, sk), query_start, q.device)
    if softcap > 0 or dropout_p > 0 or sinks is not None:
        return _explicit_attention(options, q, k, v, mask, dropout_p, generator)
    if q.is_cuda and q.shape[1] != k.shape[1]:
        # Of CUDA's kernels, the one that takes masks does not take grouped heads.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _as_operator() -> bool:
    """Is attention one operator: for a compiler, or for a layer that keeps its result?"""
    return torch.compiler.is_compiling() or is_keeping()


def _is_learned(mask: Tensor, shape: tuple[int, int]) -> bool:
    """Is it a whole bias of the scores that wants a gradient?  Fused kernels give it none."""
    return mask.requires_grad and mask.ndim == 4 and mask.shape[2:] == shape


def _by_positions(
    options: Options, q: Tensor, k: Tensor, v: Tensor | None, query_start: int
) -> Tensor:
    """Attention without a mask of queries x keys, in the dtype of autocast, as SDPA's."""
    up = options.up
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k = q.to(dtype), k.to(dtype)
        v, up = (None if x is None else x.to(dtype) for x in (v, up))
    call = operator.by_positions if _as_operator() else calls.by_positions
    return call(replace(options, up=up), query_start, q, k, v)


def _with_positions(
    mask: Tensor | None,
    options: Options,
    shape: tuple[int, int],
    query_start: int,
    device: torch.device,
) -> Tensor | None:
    """`mask` with the rules on positions put in; None if everything may be attended."""
    causal, window = options.causal, options.window
    sq, sk = shape
    if not window and not (causal and sk - 1 > query_start):
        return mask
    query = torch.arange(query_start, query_start + sq, device=device).unsqueeze(-1)
    key = torch.arange(sk, device=device)
    allowed = torch.ones(shape, dtype=torch.bool, device=device)
    if causal:
        allowed &= key <= query
    if window:
        allowed &= key > query - window
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, -torch.inf)


def _explicit_attention(
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Attention with the scores written out, for what the fused kernels do not know."""
    heads, scale, softcap, sinks = k.shape[1], options.scale, options.softcap, options.sinks
    grouped = q.unflatten(1, (heads, -1))
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    scores = scores.flatten(1, 2) * (1.0 / sqrt(q.shape[-1]) if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    blocked: Tensor | None = None
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
        blocked = ~mask.any(-1, keepdim=True)
    elif mask is not None:
        scores = scores + mask
        blocked = (mask == -torch.inf).all(-1, keepdim=True)
    if blocked is not None:  # softmax of nothing but -inf is NaN, backward too
        scores = scores.masked_fill(blocked, 0)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
    weights = weights if sinks is None else weights[..., :-1]
    if blocked is not None:  # a query that may attend nothing gives zeros, as the fused kernels do
        weights = weights.masked_fill(blocked, 0)
    weights = dropout(weights.to(q.dtype), dropout_p, generator=generator)
    return (weights.unflatten(1, (heads, -1)) @ v.unsqueeze(2)).flatten(1, 2)
