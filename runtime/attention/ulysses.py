"""Ulysses and USP: an all-to-all turns shards of the sequence into shards of heads, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .agreement import Call, agree
from .algorithm import Given, run, save
from .held import Held
from .kernels import Queries, sinks_gradient
from .links import Group, Link, link_of, pack, unpack
from .options import Options
from .partial import wide
from .ring import RING
from .scores import Mask
from .task import ShardTask, check_rows, layouts_of
from .tokens import Layout


def ulysses_attention(
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
    slopes: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Attention over a sequence that is sharded over `group`, each rank doing some of the heads.

    Tensors and options are those of `ring_attention`, without `bias` (each rank needs the rows of
    all queries).  The query heads must divide by the ranks p.  The key heads need not: a rank gets
    those that its query heads attend, so with fewer than p of them some go to several ranks.

    Cost, over p ranks, with g key heads per rank (hkv / p, or those needed): forward receives
    (p-1)/p b hq sq d e + (p-1) b g sk (d + dv) e bytes in one all-to-all and (p-1)/p b hq sq dv e
    in another; backward the same.  Nothing hides them.  Memory: the whole sequence of hq/p heads.
    Wins where links are fast and p is at most the number of heads; it moves fewer bytes than a
    ring when p > hq/hkv + 1, and any layout is balanced.

    Raises ValueError for sizes that do not fit together or to the layout.
    """
    options = Options(
        "ulysses_attention", causal, window, scale, softcap, sinks, None, slopes, mask
    )
    link = link_of(options.name, group)
    return _attention(options, link, Link(None), q, k, v, layout, query_layout)


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ulysses: Group,
    ring: Group,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    layout: Layout | None = None,
    query_layout: Layout | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Attention over a sequence that is sharded over two groups: Ulysses in one, ring in the other.

    Rank (i of the ring, j of Ulysses) holds shard i * ulysses size + j of the layout; for causal
    balance that is `Layout.zigzag(length, ring size).split(ulysses size)`.  Tensors and options
    are those of `ulysses_attention`; query heads must divide by the size of `ulysses`, and the
    key heads must divide by it or it by them.

    Cost: `ulysses_attention` over u ranks plus `ring_attention` over r ranks on b hq/u heads and
    u times the rows.  Wins where there are more ranks than key heads, or several nodes:
    Ulysses inside a node, the ring across.

    Raises ValueError for sizes that do not fit together or to the layout, NotImplementedError for
    query heads that leave the ranks of `ulysses` with unequal groups.
    """
    options = Options("usp_attention", causal, window, scale, softcap, sinks, None, slopes, mask)
    inner, outer = link_of(options.name, ulysses), link_of(options.name, ring)
    return _attention(options, inner, outer, q, k, v, layout, query_layout)


def _attention(
    options: Options,
    ulysses: Link,
    ring: Link,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout | None,
    query_layout: Layout | None,
) -> Tensor:
    options.check_heads(q, k, v)
    rank, ranks = ring.rank * ulysses.size + ulysses.rank, ring.size * ulysses.size
    scores = options.scores(q)
    queries, keys = layouts_of(ranks, q, k, layout, query_layout)
    call = Call.of(options.name, scores, (q, k, v, options.sinks), (queries, keys))
    agree(call, [ulysses, ring], q.device, every_time=layout is None)
    check_rows(options, rank, ranks, q, k, (queries, keys))
    options.check_covers(scores, queries, keys)
    if q.shape[1] % ulysses.size:
        options.refuse(
            f"{q.shape[1]} query heads do not divide by {ulysses.size} ranks of `{ulysses.name}`;"
            " use ring_attention, or usp_attention with a smaller ulysses group"
        )
    heads = Heads(q.shape[1], k.shape[1], ulysses.size)
    if ring.size > 1 and any(heads.repeats(i) for i in range(ulysses.size)):
        raise NotImplementedError(
            f"{options.name}: {q.shape[1]} query heads over {k.shape[1]} key heads on"
            f" {ulysses.size} ranks of `{ulysses.name}` leave unequal groups, which the ring cannot"
            " carry; use a ulysses group whose size divides the key heads, or is a multiple of"
            " them"
        )
    own = heads.queries(ulysses.rank)
    count = own.stop - own.start
    task = ShardTask(
        ring,
        scores.of_heads(own.start, count),
        queries.join(ulysses.size),
        keys.join(ulysses.size),
    )
    return run(_ByHeads(task, ulysses, heads), Given(q, k, v, options.sinks, None, None))


@dataclass(frozen=True, slots=True)
class Heads:
    """Which heads each of `ranks` ranks computes."""

    query_heads: int
    key_heads: int
    ranks: int

    def queries(self, rank: int) -> slice:
        """Its query heads."""
        count = self.query_heads // self.ranks
        return slice(rank * count, (rank + 1) * count)

    def keys(self, rank: int) -> slice:
        """The key heads that its query heads attend."""
        own, group = self.queries(rank), self.query_heads // self.key_heads
        return slice(own.start // group, (own.stop - 1) // group + 1)

    def repeats(self, rank: int) -> list[int] | None:
        """Key head, among its own, of each query head; None where groups are equal."""
        own, keys = self.queries(rank), self.keys(rank)
        group = self.query_heads // self.key_heads
        index = [head // group - keys.start for head in range(own.start, own.stop)]
        count, among = len(index), keys.stop - keys.start
        even = count % among == 0
        if even and index == [head // (count // among) for head in range(count)]:
            return None
        return index


@dataclass(frozen=True, slots=True)
class _ByHeads:
    """`task` is that of this rank's heads."""

    task: ShardTask
    link: Link
    heads: Heads

    def forward(self, ctx: Any, given: Given) -> Tensor:
        assert given.v is not None
        q, k, v = self._to_heads(given.q, given.k, given.v)
        held = Held.of(q, *self._repeated(k, v), None)
        own = None if given.sinks is None else given.sinks[self._own]
        out = save(ctx, (q, k, v, given.sinks), RING.forward(q, held, own, self.task))
        return _swap(out, self.link, 2, 1, "forward")

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, _, out, lse = ctx.saved_tensors
        queries = Queries.of(q, out, lse, _swap(grad.to(q.dtype), self.link, 1, 2, "backward"))
        dsinks = None
        if sinks is not None:
            dsinks = torch.zeros_like(sinks)
            dsinks[self._own] = sinks_gradient(sinks[self._own], queries)
        held = Held.of(q, *self._repeated(k, v), None)
        dq, (dk, dv), _ = RING.backward(queries, held, self.task)
        index = self._index(k)
        if index is not None:
            dk, dv = (dq.new_zeros(x.shape).index_add_(1, index, g) for x, g in ((k, dk), (v, dv)))
        dq, dk, dv = self._to_tokens(*(x.to(q.dtype) for x in (dq, dk, dv)))
        return dq, dk, dv, dsinks, None, None

    @property
    def _own(self) -> slice:
        return self.heads.queries(self.link.rank)

    def _index(self, k: Tensor) -> Tensor | None:
        index = self.heads.repeats(self.link.rank)
        return None if index is None else torch.tensor(index, device=k.device)

    def _repeated(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Key heads for equal groups of query heads."""
        index = self._index(k)
        return (k, v) if index is None else (k.index_select(1, index), v.index_select(1, index))

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """(q, k, v) of all heads and own rows -> of own heads and all rows; one all-to-all."""
        link, heads = self.link, self.heads
        sent = [
            pack(q[:, heads.queries(i)], k[:, heads.keys(i)], v[:, heads.keys(i)])
            for i in range(link.size)
        ]
        shapes = _shapes_of((q.shape, k.shape, v.shape), heads, link.rank)
        received = link.all_to_all(sent, [sent[link.rank].numel()] * link.size, "forward")
        parts = [unpack(buffer, *shapes) for buffer in received]
        return tuple(torch.cat(same, 2) for same in zip(*parts, strict=True))

    def _to_tokens(self, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of what `_to_heads` made -> of what it took; one all-to-all."""
        link, heads = self.link, self.heads
        counts = (heads.query_heads, heads.key_heads, heads.key_heads)
        rows = [x.shape[2] // link.size for x in grads]
        taken = [
            torch.Size((x.shape[0], count, n, x.shape[3]))
            for x, count, n in zip(grads, counts, rows, strict=True)
        ]
        sent = [
            pack(*(x.narrow(2, i * n, n) for x, n in zip(grads, rows, strict=True)))
            for i in range(link.size)
        ]
        shapes = [_shapes_of(taken, heads, i) for i in range(link.size)]
        sizes = [sum(shape.numel() for shape in own) for own in shapes]
        received = link.all_to_all(sent, sizes, "backward")
        totals = [grads[0].new_zeros(s, dtype=wide(grads[0].dtype)) for s in taken]
        for i, buffer in enumerate(received):
            own = (heads.queries(i), heads.keys(i), heads.keys(i))
            for total, where, part in zip(totals, own, unpack(buffer, *shapes[i]), strict=True):
                total[:, where] += part
        return tuple(total.to(grads[0].dtype) for total in totals)


def _shapes_of(
    shapes: Sequence[torch.Size], heads: Heads, rank: int
) -> tuple[torch.Size, torch.Size, torch.Size]:
    """Shapes of what `rank` computes, of one shard of rows."""
    q, k, v = shapes
    counts = [own.stop - own.start for own in (heads.queries(rank), heads.keys(rank))]
    return (
        torch.Size((q[0], counts[0], q[2], q[3])),
        torch.Size((k[0], counts[1], k[2], k[3])),
        torch.Size((v[0], counts[1], v[2], v[3])),
    )


def _swap(x: Tensor, link: Link, cut: int, joined: int, phase: Any) -> Tensor:
    """The ranks' part i of `x` along dim `cut`, for rank i, put together along dim `joined`."""
    parts = x.chunk(link.size, cut) if x.shape[cut] else [x] * link.size
    shape = parts[0].shape
    sent = [part.reshape(-1) for part in parts]
    received = link.all_to_all(sent, [sent[0].numel()] * link.size, phase)
    return torch.cat([part.view(shape) for part in received], joined)
