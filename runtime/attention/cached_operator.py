"""Attention over a cache as an operator that compilers do not look into."""

from __future__ import annotations

from functools import wraps
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..cache.cache import KVCache
from ..cache.handles import cache_behind
from ..mesh.collectives import Axis
from ..mesh.opaque import axis_known_as
from . import cached
from .kept import like_result


@wraps(cached.cached_attention)
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
    sinks: Tensor | None = None,
    up: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """As in `cached.py`; in a compiled layer it is one operator."""
    if not torch.compiler.is_compiling():
        return cached.cached_attention(
            q, k, v, cache, positions, algorithm=algorithm, axis=axis, scale=scale, sinks=sinks,
            up=up, **options,
        )  # fmt: skip
    window, chunk = options.pop("window", 0), options.pop("chunk", 0)
    causal, softcap = options.pop("causal", True), options.pop("softcap", 0.0)
    if options:
        raise TypeError(f"cached_attention has no options {', '.join(options)}")
    return _cached_attention(
        q, k, v, sinks, up, cache.handle, positions, algorithm,
        "" if axis is None else axis.known_as, [causal, window, chunk],
        [1.0 / sqrt(q.shape[3]) if scale is None else scale, softcap],
        cache.values_of(k).shape[3] if v is None else v.shape[3],
    )  # fmt: skip


@torch.library.custom_op("shardwright::run_cached_attention", mutates_args=())
def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sinks: Tensor | None,
    up: Tensor | None,
    handle: Tensor,
    positions: Tensor,
    algorithm: str,
    axis: str,
    words: list[int],
    numbers: list[float],
    value_dim: int,
) -> Tensor:
    causal, window, chunk = words
    scale, softcap = numbers
    out = cached.cached_attention(
        q, k, v, cache_behind(handle), positions, algorithm=algorithm,
        axis=axis_known_as(axis) if axis else None, scale=scale, window=window, softcap=softcap,
        causal=bool(causal), sinks=sinks, chunk=chunk, up=up,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@_cached_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sinks: Tensor | None,
    up: Tensor | None,
    handle: Tensor,
    positions: Tensor,
    algorithm: str,
    axis: str,
    words: list[int],
    numbers: list[float],
    value_dim: int,
) -> Tensor:
    return like_result(q, k, v, up, value_dim)


__all__ = ["cached_attention"]
