"""Attention of new tokens over a KV cache: prefill, decode and append are one operation.

The new keys and values are stored, then the new queries attend everything that is cached, the new
tokens included.  Who may attend whom follows from positions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache.cache import KVCache, Step
from ..mesh.collectives import Axis
from .kernels import attend
from .latents import Heads
from .links import Link, pack, unpack
from .partial import Partial
from .pass_q import return_partials
from .pieces import Piece, cut, fuse
from .scores import Mask, Scores
from .task import Options, check_heads, check_latents, start
from .tokens import Run
from .tree import merge_over

CacheAlgorithm: TypeAlias = Literal["local", "ring", "gather", "pass_q", "tree"]

# Sequences of the batch, and what their queries attend.
_Parts: TypeAlias = list[tuple[slice, tuple[Piece, ...]]]

# One query each of more than so many sequences of different lengths is computed at once, under a
# mask, if at most half of the keys are masked: a kernel call per sequence would take longer.
_MANY = 4


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cache: KVCache,
    positions: Tensor,
    *,
    algorithm: CacheAlgorithm = "local",
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
    options = Options("cached_attention", causal, window, scale, softcap, sinks, None, None, None)
    heads = None if up is None else _checked_heads(options, up.detach(), q, k, v, cache)
    if heads is None:
        check_heads(options.name, q, k, cache.values_of(k) if v is None else v)
    _check_algorithm(options, algorithm, axis)
    kept = cache.table.window
    if kept and not 0 < window <= kept:
        options.refuse(
            f"the cache drops what a window of {kept} leaves behind, got window={window}"
        )
    given = (q, k, v, up)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        raise RuntimeError(
            "cached_attention has no backward; call it under torch.no_grad(), or train with the"
            " module that was planned for training"
        )
    if chunk < 0:
        options.refuse(f"chunk is 0 or a number of tokens, got {chunk}")
    scores = replace(options.scores(q), chunk=chunk)
    step = cache.append(k, v, positions, axis=axis if algorithm == "tree" else None)
    alone = axis is None or axis.size == 1
    run = _local if alone else _ALGORITHMS[algorithm]
    out = run(q.detach(), cache, step, scores, sinks, heads, axis)
    return out.to(q.dtype)


def _check_algorithm(options: Options, algorithm: str, axis: Axis | None) -> None:
    if algorithm not in get_args(CacheAlgorithm):
        options.refuse(
            f"algorithm is one of {', '.join(get_args(CacheAlgorithm))}; got {algorithm!r}"
        )
    if algorithm == "local" and axis is not None and axis.size > 1:
        options.refuse(f"`local` knows no axis, got {axis}; use ring, gather, pass_q or tree")
    if algorithm != "local" and axis is None:
        options.refuse(f"`{algorithm}` needs the axis that cuts the sequences")


def _checked_heads(
    options: Options, up: Tensor, q: Tensor, k: Tensor, v: Tensor | None, cache: KVCache
) -> Heads:
    """What makes heads of the latents to be stored in `cache`."""
    if v is not None or not cache.values_in_keys:
        options.refuse("with `up`, v is None and the cache holds values in its keys")
    check_latents(options, q, k, up)
    if up.shape[2] != (stored := cache.values.shape[2]):
        options.refuse(
            f"sizes do not fit together, with latents of {stored}: k {tuple(k.shape)}, up"
            f" {tuple(up.shape)}"
        )
    return Heads.of(up, q, k)


def _of_heads(k: Tensor, v: Tensor, heads: Heads | None) -> tuple[Tensor, Tensor]:
    """The keys and values that queries attend, from those that are cached."""
    return (k, v) if heads is None else heads.made(k)


# --- the algorithms ------------------------------------------------------------------------------


def _local(
    q: Tensor,
    cache: KVCache,
    step: Step,
    scores: Scores,
    sinks: Tensor | None,
    heads: Heads | None,
    axis: Axis | None,
) -> Tensor:
    k, v, key_positions = cache.gathered()
    k, v = _of_heads(k, v, heads)
    into = start(q, v.shape[3], sinks)
    work = _work(cache, step, "own", scores, step.whole, key_positions)
    _attend(into, q, k, v, work, scores)
    return into.out


def _ring(
    q: Tensor,
    cache: KVCache,
    step: Step,
    scores: Scores,
    sinks: Tensor | None,
    heads: Heads | None,
    axis: Axis | None,
) -> Tensor:
    assert axis is not None
    link = Link(axis)
    everywhere = _key_positions(cache, step, link)
    k, v = _padded(cache, everywhere.shape[2])
    into = start(q, v.shape[3] if heads is None else heads.value_dim, sinks)
    buffer = _sent(cache, k, v)
    for hop_number in range(link.size):
        source = (link.rank - hop_number) % link.size
        hop = link.shift(buffer, "forward") if hop_number < link.size - 1 else None
        work = _work(
            cache, step, ("keys", source, link.name), scores, step.positions, everywhere[source]
        )
        _attend(into, q, *_of_heads(k, v, heads), work, scores)
        if hop is not None:
            (buffer,) = hop.wait()
            k, v = _received(cache, buffer, k, v)
    return into.out


def _gather(
    q: Tensor,
    cache: KVCache,
    step: Step,
    scores: Scores,
    sinks: Tensor | None,
    heads: Heads | None,
    axis: Axis | None,
) -> Tensor:
    assert axis is not None
    link = Link(axis)
    everywhere = _key_positions(cache, step, link)
    k, v = _padded(cache, everywhere.shape[2])
    into = start(q, v.shape[3] if heads is None else heads.value_dim, sinks)
    rows = link.all_gather(_sent(cache, k, v), "forward")
    for behind in range(link.size):  # the order of a ring, so that both give the same bits
        source = (link.rank - behind) % link.size
        k, v = _received(cache, rows[source], k, v)
        work = _work(
            cache, step, ("keys", source, link.name), scores, step.positions, everywhere[source]
        )
        _attend(into, q, *_of_heads(k, v, heads), work, scores)
    return into.out


def _pass_q(
    q: Tensor,
    cache: KVCache,
    step: Step,
    scores: Scores,
    sinks: Tensor | None,
    heads: Heads | None,
    axis: Axis | None,
) -> Tensor:
    assert axis is not None
    link = Link(axis)
    k, v, key_positions = cache.gathered()
    k, v = _of_heads(k, v, heads)
    everywhere = _query_positions(cache, step, link)
    partials = [Partial.empty(q, v.shape[3]) for _ in range(link.size)]
    here = q.contiguous()
    for hop_number in range(link.size):
        owner = (link.rank - hop_number) % link.size
        hop = link.shift(here, "forward") if hop_number < link.size - 1 else None
        work = _work(
            cache, step, ("queries", owner, link.name), scores, everywhere[owner], key_positions
        )
        _attend(partials[owner], here, k, v, work, scores)
        if hop is not None:
            (here,) = hop.wait()
    into = start(q, v.shape[3], sinks)
    for part in return_partials(partials, q, v, link):
        into.add_(part.out, part.lse)
    return into.out


def _tree(
    q: Tensor,
    cache: KVCache,
    step: Step,
    scores: Scores,
    sinks: Tensor | None,
    heads: Heads | None,
    axis: Axis | None,
) -> Tensor:
    assert axis is not None
    k, v, key_positions = cache.gathered()
    k, v = _of_heads(k, v, heads)
    own = Partial.empty(q, v.shape[3])
    work = _work(cache, step, "own", scores, step.whole, key_positions)
    _attend(own, q, k, v, work, scores)
    whole = merge_over(own, Link(axis))
    if sinks is not None:
        sink = Partial.of_sinks(sinks, q, v.shape[3])
        whole.add_(sink.out, sink.lse)
    return whole.out


_Algorithm: TypeAlias = Callable[
    [Tensor, KVCache, Step, Scores, Tensor | None, Heads | None, Axis | None], Tensor
]
_ALGORITHMS: dict[str, _Algorithm] = {
    "local": _local,
    "ring": _ring,
    "gather": _gather,
    "pass_q": _pass_q,
    "tree": _tree,
}


def _attend(into: Partial, q: Tensor, k: Tensor, v: Tensor, work: _Work, scores: Scores) -> None:
    """Merge attention of `q` over `k`, `v` into `into`, as `work` says."""
    if work.attended is None:
        for batch, pieces in work.parts:
            attend(into.of_batch(batch), q[batch], k[batch], v[batch], pieces, scores)
        return
    # The query heads that share a key head stand in for queries: K and V are read once for all.
    heads = (k.shape[1], -1)
    q = q.unflatten(1, heads).squeeze(3)
    grouped = Partial(
        into.out.unflatten(1, heads).squeeze(3), into.lse.unflatten(1, heads).squeeze(3)
    )
    if q.device.type == "cpu" and scores.plain and q.shape[3] == v.shape[3]:
        grouped.add_(*_flash_with_mask(q, k, v, work.attended, scores.scale), given=True)
        return
    everything = Piece(0, q.shape[2], 0, k.shape[2], 0, 0, "full")
    attend(grouped, q, k, v, (everything,), replace(scores, mask=Mask(keys=work.attended)))


def _flash_with_mask(
    q: Tensor, k: Tensor, v: Tensor, attended: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) where all queries of a sequence attend the keys (b, s) that are True."""
    mask = torch.zeros(attended.shape, dtype=q.dtype).masked_fill_(~attended, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, 0.0, False, attn_mask=mask[:, None, None], scale=scale)
    nothing = ~attended.any(1)[:, None, None]  # for which the kernel says 0
    return out, lse.masked_fill(nothing, -torch.inf)


def _key_positions(cache: KVCache, step: Step, link: Link) -> Tensor:
    """Positions that each rank caches (ranks, b, s) on the CPU, -1 behind the end."""

    def make() -> Tensor:
        own = cache.table.positions
        missing = max(_widths(own, link, cache)) - own.shape[1]
        return _shared(F.pad(own, (0, missing), value=-1), link, cache)

    return step.once(("keys", link.name), make)


def _query_positions(cache: KVCache, step: Step, link: Link) -> Tensor:
    """Positions of the queries of each rank (ranks, b, t) on the CPU."""

    def make() -> Tensor:
        widths = _widths(step.positions, link, cache)
        if len(set(widths)) > 1:
            raise ValueError(
                f"cached_attention: the ranks of `{link.name}` have {widths} new tokens; `pass_q`"
                " needs the same number on all, padded with position -1"
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


def _padded(cache: KVCache, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of this rank with `width` rows."""
    k, v, positions = cache.gathered()
    missing = width - positions.shape[1]
    k = F.pad(k, (0, 0, 0, missing))
    return k, cache.values_of(k) if cache.values_in_keys else F.pad(v, (0, 0, 0, missing))


def _sent(cache: KVCache, k: Tensor, v: Tensor) -> Tensor:
    """The message that tells another rank `k` and `v`."""
    return pack(k) if cache.values_in_keys else pack(k, v)


def _received(cache: KVCache, buffer: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, shaped like `k` and `v`, of a message that `_sent` made."""
    if cache.values_in_keys:
        (k,) = unpack(buffer, k.shape)
        return k, cache.values_of(k)
    k, v = unpack(buffer, k.shape, v.shape)
    return k, v


# --- who attends whom ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """What to compute: the pieces of `parts`, or, if there is one query each, the `attended` keys.

    `attended` (b, s) is True for rows that a sequence's query attends, on the device.
    """

    parts: _Parts
    attended: Tensor | None = None


def _work(
    cache: KVCache, step: Step, pairs: object, scores: Scores, queries: Tensor, keys: Tensor
) -> _Work:
    """For queries (b, t) and keys (b, s) that are called `pairs`, found once for all layers."""

    def make() -> _Work:
        single = queries.shape[1] == 1 and len(queries) > _MANY
        if single and not (_all_rows_equal(queries) and _all_rows_equal(keys)):
            attended = _attended(queries, keys, scores)
            if 2 * int(attended.sum()) >= attended.numel():
                return _Work([], attended.to(cache.table.device))
        return _Work(parts_of(queries, keys, scores))

    known = (pairs, scores.causal, scores.window, scores.chunk, scores.plain)
    return step.once(known, make)


def _attended(queries: Tensor, keys: Tensor, scores: Scores) -> Tensor:
    """Which keys (b, s) the only query (b, 1) of each sequence attends."""
    attended = (keys >= 0) & (queries >= 0)
    if scores.causal:
        attended &= keys <= queries
    if scores.window:
        attended &= keys > queries - scores.window
    if scores.chunk:
        attended &= keys // scores.chunk == queries // scores.chunk
    return attended


def parts_of(queries: Tensor, keys: Tensor, scores: Scores) -> _Parts:
    """What to compute for queries at positions (b, t) over keys at positions (b, s), on the CPU.

    Keys go up and padding (-1) is behind them; queries may stand in any order.  Neighbouring
    sequences that need the same go together.
    """
    if len(queries) > 1 and _all_rows_equal(queries) and _all_rows_equal(keys):
        return [(slice(0, len(queries)), _pieces(queries[0], keys[0], scores))]
    parts: _Parts = []
    for i in range(len(queries)):
        pieces = _pieces(queries[i], keys[i], scores)
        if parts and parts[-1][1] == pieces:
            parts[-1] = (slice(parts[-1][0].start, i + 1), pieces)
        else:
            parts.append((slice(i, i + 1), pieces))
    return parts


def _all_rows_equal(x: Tensor) -> bool:
    return bool((x == x[:1]).all())


def _pieces(queries: Tensor, keys: Tensor, scores: Scores) -> tuple[Piece, ...]:
    """All allowed pairs of one sequence, queries (t,) and keys (s,)."""
    stored = keys[: int((keys >= 0).sum())]
    found: list[Piece] = []
    for run in _within_chunks(runs_of(queries), scores.chunk):
        found += _pieces_of_run(run, stored, scores)
    return fuse(tuple(found)) if scores.plain else tuple(found)


def _within_chunks(runs: Iterable[Run], chunk: int) -> Iterable[Run]:
    """The runs, cut where a chunk ends.

    >>> [(run.row, run.position, run.length) for run in _within_chunks([Run(0, 2, 7)], 4)]
    [(0, 2, 2), (2, 4, 4), (6, 8, 1)]
    """
    if not chunk:
        yield from runs
        return
    for run in runs:
        at, stop = run.position, run.position + run.length
        while at < stop:
            end = min(at - at % chunk + chunk, stop)
            yield Run(run.row + at - run.position, at, end - at, run.document)
            at = end


def _pieces_of_run(run: Run, keys: Tensor, scores: Scores) -> Iterable[Piece]:
    """One piece for the keys that every query of the run attends; the borders are cut exactly."""
    first, last = run.position, run.position + run.length - 1
    marks = torch.tensor([first - scores.window, last - scores.window, first, last])
    low, low_end, high_end, high = torch.searchsorted(keys, marks, right=True).tolist()
    if not scores.window:
        low = low_end = 0
    if not scores.causal:
        high_end = high = len(keys)
    if scores.chunk:  # all queries of a run are in one
        opening = first - first % scores.chunk
        own = torch.searchsorted(keys, torch.tensor([opening, opening + scores.chunk])).tolist()
        low, low_end = max(low, own[0]), max(low_end, own[0])
        high_end, high = min(high_end, own[1]), min(high, own[1])
    if low_end < high_end:
        start = int(keys[low_end])
        count = high_end - low_end
        yield Piece(run.row, run.length, low_end, count, first, start, "full")
        borders = [(low, low_end), (high_end, high)]
    else:
        borders = [(low, high)]
    for begin, end in borders:
        shifted = [r._replace(row=r.row + begin) for r in runs_of(keys[begin:end])]
        yield from cut((run,), tuple(shifted), scores.causal, scores.window, 0)


def runs_of(positions: Tensor) -> tuple[Run, ...]:
    """Neighbouring rows of `positions` (n,) that hold neighbouring tokens; -1 is in no run.

    >>> runs_of(torch.tensor([4, 5, -1, 0, 1, 7]))
    (Run(row=0, position=4, length=2, document=0), Run(row=3, position=0, length=2, document=0), \
Run(row=5, position=7, length=1, document=0))
    """
    if not len(positions):
        return ()
    before, after = positions[:-1], positions[1:]
    broken = (after != before + 1) | (before < 0)
    starts = [0, *(broken.nonzero().flatten() + 1).tolist()]
    ends = [*starts[1:], len(positions)]
    firsts = positions[starts].tolist()
    return tuple(
        Run(row, position, end - row)
        for row, end, position in zip(starts, ends, firsts, strict=True)
        if position >= 0
    )
