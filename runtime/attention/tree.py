"""Tree attention: every rank has all queries and a part of the keys; two all-reduces merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .agreement import Call, agree
from .algorithm import Algorithm, Gradients, differentiable
from .held import Held
from .kernels import Queries
from .links import Group, Link, link_of
from .options import Options
from .partial import Partial, normalised, wide
from .pieces import Piece
from .scores import Mask, Scores
from .task import KnownTask, Task
from .tokens import Layout
from .work import Work


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    layout: Layout | None = None,
    query_start: int | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Attention of the same queries on every rank over keys that are sharded over `group`.

    q (b, hq, sq, d) is the same on all ranks, and so is the result (b, hq, sq, dv); k (b, hkv, sk,
    d) and v (b, hkv, sk, dv) are this rank's shards.  Options are those of `ring_attention`.  Who
    has the queries in shards gathers them before, or calls `pass_q_attention`.

    `layout` says which positions the keys have; query i stands at `query_start + i` (by default
    the queries are the last tokens of the layout).  Instead of a layout `lengths` (b,) may say how
    many rows of this rank's shard each sequence has, all of which are attended: decoding
    sequences of different lengths.  Then rows may differ from rank to rank.

    Cost: two all-reduces in float32, of b hq sq and of b hq sq (dv + 1) numbers; nothing depends on
    the number of keys.  Wins for decoding, where sq is 1.  Differentiable; the gradient of q costs
    one more all-reduce of b hq sq d numbers.  Gradients of q and sinks are whole on every rank.

    Raises ValueError for sizes that do not fit together or to the layout, NotImplementedError for a
    `bias` that needs a gradient.
    """
    options = Options("tree_attention", causal, window, scale, softcap, sinks, bias, slopes, mask)
    options.check_heads(q, k, v)
    if bias is not None and bias.requires_grad:
        raise NotImplementedError(
            "tree_attention: no gradient is computed for bias; detach it, or use ring_attention or"
            " gather_kv_attention"
        )
    link, scores = link_of(options.name, group), options.scores(q)
    # Messages hold queries alone: what keys a rank has is its own affair, if it says so rightly.
    alone = lengths is not None or (layout is not None and layout.rows == k.shape[2])
    call = Call.of(options.name, scores, (q, k, v, sinks), (), k_rows=0 if alone else k.shape[2])
    agree(call, [link], q.device, every_time=layout is None and lengths is None)
    if lengths is not None:
        work = _by_length(options, scores, q, k, lengths, layout)
    else:
        work = _by_layout(options, scores, link, q, k, layout, query_start)
    return differentiable(TREE, KnownTask(link, scores, work), q, k, v, sinks)


def _by_layout(
    options: Options,
    scores: Scores,
    link: Link,
    q: Tensor,
    k: Tensor,
    layout: Layout | None,
    query_start: int | None,
) -> Work:
    keys = layout or Layout.contiguous(k.shape[2] * link.size, link.size)
    if keys.ranks != link.size or keys.rows != k.shape[2]:
        options.refuse(
            f"k {tuple(k.shape)} on {link.size} ranks does not fit the layout of {keys.ranks}"
            f" shards of {keys.rows} rows"
        )
    stop = keys.start + keys.length
    first = stop - q.shape[2] if query_start is None else query_start
    if first < 0 or len(keys.documents) > 1:
        options.refuse("the queries must be a run of positions from 0 on in one document")
    queries = Layout.contiguous(q.shape[2], 1, start=first)
    options.check_covers(scores, queries, keys)
    return Work.alike(scores.pieces(queries, 0, keys, link.rank))


def _by_length(
    options: Options,
    scores: Scores,
    q: Tensor,
    k: Tensor,
    lengths: Tensor | Sequence[int],
    layout: Layout | None,
) -> Work:
    """Neighbouring sequences of one length go together; each attends all its rows."""
    counts = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    if len(counts) != q.shape[0] or not all(0 <= n <= k.shape[2] for n in counts):
        options.refuse(f"lengths must be {q.shape[0]} numbers from 0 to {k.shape[2]}, got {counts}")
    if layout or scores.causal or scores.window or scores.bias is not None or not _simple(scores):
        options.refuse(
            "with `lengths` the keys have no positions: no layout, causal, window, mask, bias or"
            " slopes"
        )
    parts: list[tuple[slice, tuple[Piece, ...]]] = []
    for index, count in enumerate(counts):
        pieces = (Piece(0, q.shape[2], 0, count, 0, 0, "full"),) if count else ()
        if parts and parts[-1][1] == pieces:
            parts[-1] = (slice(parts[-1][0].start, index + 1), pieces)
        else:
            parts.append((slice(index, index + 1), pieces))
    return Work.of(parts)


def _simple(scores: Scores) -> bool:
    mask = scores.mask
    return (
        scores.slopes is None and mask.keys is None and mask.documents is None and not mask.prefix
    )


def _forward(q: Tensor, held: Held, sinks: Tensor | None, task: Task) -> Partial:
    """The queries, which all ranks have, over the keys of each, merged on all ranks."""
    own, link = Partial.empty(q, held.value_dim), task.link
    held.attend(own, q, task.work(link.rank, link.rank), task.scores)
    whole = merged(own, link)
    if sinks is not None:
        sink = Partial.of_sinks(sinks, q, held.value_dim)
        whole.add_(sink.out, sink.lse)
    return whole


def _backward(queries: Queries, held: Held, task: Task) -> Gradients:
    """A rank has the whole gradient of its own keys; queries' gradients are added up over ranks."""
    dq, *dsent = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in (queries.q, *held.sent))
    dup = None if held.heads is None else torch.zeros_like(held.heads.up, dtype=dq.dtype)
    work = task.work(task.link.rank, task.link.rank)
    held.attend_backward((dq, dsent, dup), queries, work, task.scores)
    return task.link.all_reduce(dq, "sum", "backward"), dsent, dup


TREE = Algorithm("tree", _forward, _backward, travels="nothing", whole=True)


def merged(own: Partial, link: Link) -> Partial:
    """The ranks' partial results of the same queries as one, the same on all ranks."""
    highest = link.all_reduce(own.lse, "max", "forward")
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weight = torch.exp(own.lse - highest).unsqueeze(-1)
    summed = link.all_reduce(torch.cat([own.out * weight, weight], -1), "sum", "forward")
    return normalised(summed[..., :-1], summed[..., -1], highest)
