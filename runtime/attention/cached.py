"""Attention of new tokens over a KV cache: prefill, decode and append are one operation.

The new keys and values are stored, then the new queries attend everything that is cached, the new
tokens included.  Who may attend whom follows from positions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache.cache import DeviceStep, KVCache, Step
from ..mesh.collectives import Axis
from .algorithm import Algorithm
from .algorithms import LOCAL, OVER_A_CACHE
from .held import Held
from .links import Link
from .options import Options
from .paged import attend_pages, partial_over_pages, with_sinks
from .positions import work_at
from .scores import Scores
from .task import Task
from .tree import merged
from .work import Work


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cache: KVCache,
    positions: Tensor,
    *,
    algorithm: str = "local",
    axis: Axis | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    sinks: Tensor | None = None,
    chunk: int = 0,
    up: Tensor | None = None,
) -> Tensor:
    """Store `k`, `v` in `cache`, then attend over the cache; (b, hq, t, dv), no gradient.

    q (b, hq, t, d), k (b, hkv, t, d), v (b, hkv, t, dv) belong to new tokens at `positions` (b, t)
    int64 in their sequences; -1 is padding: not stored, never attended, its result is finite and
    means nothing.  A query at p attends keys at j <= p if `causal`, j > p - window if `window` > 0.
    `v` is None for a cache with `values_in_keys`: the values are the first dv numbers of the keys,
    which alone are stored and sent.
    `scale` is 1/sqrt(d) if None; `softcap` > 0 makes scores softcap * tanh(score / softcap);
    `sinks` (hq,) are logits of one more key per head whose value is 0.  `chunk` > 0: a query at p
    attends keys of its own chunk only, j // chunk = p // chunk.

    With `up` (hq, d_nope + dv, r), k (b, 1, t, r + rope) are latents c and behind them the part of
    the keys that all heads share; the cache has `values_in_keys`, r of them.  They alone are stored
    and sent.  Of all cached tokens that it is about to attend, a rank makes keys, up[:, :d_nope] c
    and the shared part, d = d_nope + rope, and values, up[:, d_nope:] c, of its query heads: for s
    tokens 2 b s r hq (d_nope + dv) FLOP, and b s hq (d + d_nope + dv) numbers of memory.

    `algorithm` says how ranks of `axis` that share sequences work together.  Below s is
    the longest part of a sequence that a rank caches, e the bytes of an element, p the ranks; bytes
    are those that a rank receives.

    local   No axis cuts the sequence.
    ring    New tokens are sharded, each rank caches its own; K and V of the cache circulate:
            (p-1) b hkv s (d + dv) e bytes in p-1 messages, each under way while a block
            is computed.
    gather  The same in one all-gather.  Memory for p times b hkv s (d + dv) e bytes.
            (d instead of d + dv, in both, where the keys hold the values; r + rope with `up`.)
    pass_q  New tokens as for ring; queries circulate, (p-1) b hq t d e bytes in p-1 messages, and
            partial results return, (p-1) b hq t (dv e + 4) bytes in one all-to-all.
    tree    Every rank has all new tokens and caches the pages that it owns (`cache.owners`); the
            result is whole.  Two all-reduces in float32, of b hq t and b hq t (dv + 1) numbers.

    Once per step, not per layer, ring and gather share the cached positions (all-gathers of 8 and
    of b s * 4 bytes a rank), pass_q those of the queries (8 and b t * 4).
    With float64 inputs partial results are float64: 8 bytes where pass_q and tree have 4.

    Raises ValueError for tensors, positions or options that do not fit, CacheFullError if the
    cache has no room on this rank.  The other ranks then wait until this one ends, or for the time
    limit of the group; who would go on after it asks `cache.table.shortage` on all ranks before.
    """
    if cache.table.on_device is not None:  # as a step of the host has run and been checked before
        scale = 1.0 / sqrt(q.shape[3]) if scale is None else scale
        scores = _scores(scale, causal, window, softcap, chunk)
        return _on_device(cache, cache.table.on_device, axis, scores, q, k, v, sinks)
    options = Options("cached_attention", causal, window, scale, softcap, sinks, up=up, chunk=chunk)
    way = _way(options, algorithm, axis)
    _check_tensors(options, q, k, v, cache)
    scores = options.scores(q)
    step = cache.append(k, v, positions, axis=axis if way.whole else None)
    link = Link(None if axis is None or axis.size == 1 else axis)
    if link.size == 1:
        way = LOCAL
    cache.needs_host = _needs_host(way, up)
    held, task = _read(cache, step, way, link, scores, q, None if up is None else up.detach())
    return way.forward(q.detach(), held, sinks, task).out.to(q.dtype)


def _needs_host(way: Algorithm, up: Tensor | None) -> str:
    """Why steps that attend so can't run on the device alone, or nothing if they can."""
    if up is not None:
        return "it makes keys and values of cached latents, of as many as there are"
    if way.travels != "nothing":
        return f"`{way.name}` sends cached keys or queries, of as many as there are"
    return ""


@lru_cache
def _scores(scale: float, causal: bool, window: int, softcap: float, chunk: int) -> Scores:
    return Scores(scale, causal, window, softcap, chunk=chunk)


def _on_device(
    cache: KVCache,
    step: DeviceStep,
    axis: Axis | None,
    scores: Scores,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Store and attend in a step of which the host knows nothing: `local` or `tree`."""
    cache.put(k, v, step)
    if axis is None or axis.size == 1:
        return attend_pages(q, cache, step, scores, sinks)
    whole = merged(partial_over_pages(q, cache, step, scores), Link(axis))
    return with_sinks(whole, sinks).out.to(q.dtype)


def _check_tensors(
    options: Options, q: Tensor, k: Tensor, v: Tensor | None, cache: KVCache
) -> None:
    """Refuse what does not fit together or to the cache, and gradients."""
    up, kept = options.up, cache.table.window
    if up is None:
        options.check_heads(q, k, cache.values_of(k) if v is None else v)
    else:
        if v is not None or not cache.values_in_keys:
            options.refuse("with `up`, v is None and the cache holds values in its keys")
        options.check_latents(q, k, up)
        if up.shape[2] != (stored := cache.values.shape[2]):
            options.refuse(
                f"sizes do not fit together, with latents of {stored}: k {tuple(k.shape)}, up"
                f" {tuple(up.shape)}"
            )
    if kept and not 0 < options.window <= kept:
        options.refuse(
            f"the cache drops what a window of {kept} leaves behind, got window={options.window}"
        )
    given = (q, k, v, up)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        raise RuntimeError(
            "cached_attention has no backward; call it under torch.no_grad(), or train with the"
            " module that was planned for training"
        )


def _way(options: Options, algorithm: str, axis: Axis | None) -> Algorithm:
    """The algorithm of that name, if the axis suits it."""
    known = {LOCAL.name: LOCAL, **OVER_A_CACHE}
    if algorithm not in known:
        options.refuse(f"algorithm is one of {', '.join(known)}; got {algorithm!r}")
    if algorithm == LOCAL.name and axis is not None and axis.size > 1:
        options.refuse(f"`local` knows no axis, got {axis}; use {', '.join(OVER_A_CACHE)}")
    if algorithm != LOCAL.name and axis is None:
        options.refuse(f"`{algorithm}` needs the axis that cuts the sequences")
    return known[algorithm]


def _read(
    cache: KVCache,
    step: Step,
    way: Algorithm,
    link: Link,
    scores: Scores,
    q: Tensor,
    up: Tensor | None,
) -> tuple[Held, CacheTask]:
    """The keys that this rank caches, as wide as messages are; who attends whom."""
    k, v, stored = cache.gathered()
    queries, keys = {link.rank: step.whole}, {link.rank: stored}
    if way.travels == "queries":
        queries = dict(enumerate(_queries_everywhere(way, cache, step, link)))
    if way.travels == "keys":
        keys = dict(enumerate(_keys_everywhere(cache, step, link)))
        missing = keys[link.rank].shape[1] - k.shape[2]
        k = F.pad(k, (0, 0, 0, missing))
        v = v if cache.values_in_keys else F.pad(v, (0, 0, 0, missing))
    own = None if cache.values_in_keys else v
    held = Held.of(q, k, own, up, values_in_keys=cache.values.shape[2])
    return held, CacheTask(link, scores, step, cache.table.device, queries, keys)


@dataclass(frozen=True, slots=True)
class CacheTask(Task):
    """New queries over cached keys, by the positions of both on the ranks where they are known.

    queries  by rank (b, t)
    keys     by rank (b, s), -1 behind the end; all on the CPU
    """

    step: Step
    device: torch.device
    queries: Mapping[int, Tensor]
    keys: Mapping[int, Tensor]

    def work(self, queries: int, keys: int) -> Work:
        """By the positions, found once for all layers that ask the same."""
        scores = self.scores
        rules = (scores.causal, scores.window, scores.chunk, scores.plain)
        return self.step.once(
            (self.link.name, queries, keys, rules),
            lambda: work_at(self.queries[queries], self.keys[keys], scores, self.device),
        )


def _keys_everywhere(cache: KVCache, step: Step, link: Link) -> Tensor:
    """Positions that each rank caches (ranks, b, s) on the CPU, -1 behind the end."""

    def make() -> Tensor:
        own = cache.table.positions
        missing = max(_widths(own, link, cache)) - own.shape[1]
        return _shared(F.pad(own, (0, missing), value=-1), link, cache)

    return step.once(("keys", link.name), make)


def _queries_everywhere(way: Algorithm, cache: KVCache, step: Step, link: Link) -> Tensor:
    """Positions of the queries of each rank (ranks, b, t) on the CPU."""

    def make() -> Tensor:
        widths = _widths(step.positions, link, cache)
        if len(set(widths)) > 1:
            raise ValueError(
                f"cached_attention: the ranks of `{link.name}` have {widths} new tokens;"
                f" `{way.name}` needs the same number on all, padded with position -1"
            )
        return _shared(step.positions, link, cache)

    return step.once(("queries", link.name), make)


def _widths(positions: Tensor, link: Link, cache: KVCache) -> list[int]:
    """The ranks' numbers of columns."""
    own = torch.tensor([positions.shape[1]], device=cache.table.device)
    return link.all_gather(own, "forward").flatten().tolist()


def _shared(positions: Tensor, link: Link, cache: KVCache) -> Tensor:
    """The ranks' `positions` (b, n) of one width (ranks, b, n) on the CPU."""
    if not positions.shape[1]:
        return positions.expand(link.size, *positions.shape)
    everywhere = link.all_gather(positions.to(cache.table.device, torch.int32), "forward")
    return everywhere.to("cpu", torch.int64)
