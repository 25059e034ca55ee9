"""Attention of new tokens over pages of a pool, for sequences of any lengths, asking no host.

What `cached_attention` computes where a step is done on the device (`cache/device.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache.cache import PAGE, DeviceStep, KVCache
from .kernels import flash_masked
from .partial import Partial, wide
from .scores import Scores


def attend_pages(
    q: Tensor, cache: KVCache, step: DeviceStep, scores: Scores, sinks: Tensor | None
) -> Tensor:
    """q (b, hq, t, d) of the new tokens over all that is cached (b, hq, t, dv).

    What is padding has a finite result.  `sinks` as in `cached_attention`.
    """
    if _has_kernel(q):
        return _kernel(q, cache, step, scores, sinks, q.dtype)[0]
    inputs = _inputs(q, cache, step, scores)
    if sinks is None and not scores.softcap and q.shape[3] == cache.values.shape[2]:
        grouped, k, v, mask = inputs
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scores.scale)
        return out.reshape(q.shape)
    return with_sinks(Partial(*_attend(q, *inputs, scores)), sinks).out.to(q.dtype)


def partial_over_pages(q: Tensor, cache: KVCache, step: DeviceStep, scores: Scores) -> Partial:
    """The same without sinks, to be merged with what other ranks make of their pages."""
    exact = wide(q.dtype)
    if _has_kernel(q):
        return Partial(*_kernel(q, cache, step, scores, None, exact))
    out, lse = _attend(q, *_inputs(q, cache, step, scores), scores)
    nothing = step.once(("nothing", *_rules(scores)), lambda: ~_attended(step, scores).any(3))
    return Partial(out.to(exact), lse.to(exact).masked_fill(nothing, -torch.inf))


def with_sinks(whole: Partial, sinks: Tensor | None) -> Partial:
    """The result where sinks (hq,) take their share of the weights, and add nothing."""
    if sinks is None:
        return whole
    share = torch.sigmoid(whole.lse - sinks.detach()[:, None])
    return Partial(whole.out * share.unsqueeze(-1), whole.lse)


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float64


def _kernel(
    q: Tensor,
    cache: KVCache,
    step: DeviceStep,
    scores: Scores,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from . import paged_triton  # which only torch for CUDA can load

    return paged_triton.attend_pages(
        q, cache.keys, None if cache.values_in_keys else cache.values,
        step.blocks, step.counts, step.positions, step.queries,
        scale=scores.scale, causal=scores.causal, window=scores.window, chunk=scores.chunk,
        softcap=scores.softcap, sinks=sinks, page=PAGE, value_dim=cache.values.shape[2],
        dtype=dtype,
    )  # fmt: skip


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    counts: Tensor,
    positions: Tensor,
    queries: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    page: int = PAGE,
) -> tuple[Tensor, Tensor]:
    """(out (b, hq, t, dv), lse (b, hq, t)) of q (b, hq, t, d), float32, or float64 for float64.

    keys (slots, hkv, d) and values (slots, hkv, dv) are a pool.  Slot j of sequence i, for j below
    `counts[i]`, is j % page of page `blocks[i, j // page]`, and holds the token at position
    `positions[i, j]`.  blocks (b, pages) and positions (b, pages * page) are int32, counts (b,) and
    queries (b, t) int64: -1 is padding, whose result is 0 and its lse -inf.  Options are those of
    `cached_attention`.  Written for any device, as slow as reading all slots of `blocks` is.
    """
    step = DeviceStep(blocks, counts, positions, queries, counts, 0)
    scores = Scores(scale, causal, window, softcap, chunk=chunk)
    index = _slots(step, page)
    k, v = (pool[index].transpose(1, 2) for pool in (keys, values))
    attended = _attended(step, scores)
    nothing = ~attended.any(3)
    inputs = _grouped(q, k, v, _mask(attended, q.dtype))
    out, lse = (x.to(wide(q.dtype)) for x in _attend(q, *inputs, scores))
    return out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)


def _inputs(
    q: Tensor, cache: KVCache, step: DeviceStep, scores: Scores
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_grouped` makes of a step over a cache."""
    key = *_rules(scores), q.dtype
    mask = step.once(key, lambda: _mask(_attended(step, scores), q.dtype))
    return _grouped(q, *_read(cache, step), mask)


def _rules(scores: Scores) -> tuple[bool, int, int]:
    return scores.causal, scores.window, scores.chunk


def _attended(step: DeviceStep, scores: Scores) -> Tensor:
    """Which slots the queries attend (b, 1, t, s)."""
    queries, keys = step.queries[:, None, :, None], step.positions[:, None, None]
    column = torch.arange(keys.shape[3], device=keys.device)
    return scores.attended(queries, keys) & (column < step.counts[:, None, None, None])


def _mask(attended: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0, or -inf where a query does not attend.

    Queries that attend nothing attend everything, so that their results are finite.
    """
    mask = torch.zeros(attended.shape, dtype=dtype, device=attended.device)
    return mask.masked_fill_(~attended & attended.any(3, keepdim=True), -torch.inf)


def _slots(step: DeviceStep, page: int = PAGE) -> Tensor:
    """Slot in the pool of each slot of the sequences (b, s)."""
    return (step.blocks[:, :, None] * page + torch.arange(page, device=step.blocks.device)).flatten(
        1
    )


def _read(cache: KVCache, step: DeviceStep) -> tuple[Tensor, Tensor]:
    """Keys and values (b, hkv, s, d or dv): views of the pool where it has them in order."""
    if step.in_place:
        return cache.in_order(step.in_place, *step.positions.shape)
    index = step.once("slots", lambda: _slots(step))
    k, v = (pool[index].transpose(1, 2) for pool in (cache.keys, cache.values))
    return k, v


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same attention with as many query heads as key heads: those that share a key head stand
    in for queries, so that K and V are read once for all.  `mask` is of all heads."""
    (b, hq, t, d), heads = q.shape, k.shape[1]
    if heads == hq:
        return q, k, v, mask
    mask = mask if t == 1 else mask.repeat(1, 1, hq // heads, 1)
    return q.reshape(b, heads, -1, d), k, v, mask


def _attend(
    q: Tensor, grouped: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries q (b, hq, t, d) that are `_grouped`."""
    if q.device.type == "cpu" and not scores.softcap:
        out, lse = flash_masked(grouped, k, v, scores.scale, mask)
    else:
        out, lse = _explicit(grouped, k, v, mask, scores)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """(out, lse) by plain operators."""
    exact = wide(q.dtype)
    raw = q.to(exact) @ k.to(exact).transpose(-1, -2) * scores.scale
    if scores.softcap:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    logits = raw + mask
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse[..., None]) @ v.to(exact), lse
