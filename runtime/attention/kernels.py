"""Attention of one block of queries over one block of keys: partial results and their gradients.

A plain piece goes to torch's flash kernels, on the CPU (any float dtype) and on CUDA (half
precision, heads up to 256); another to `flex_attention` on CUDA, and else, or in float64, to plain
torch operations on tiles of bounded size.
No path makes a score matrix of queries x keys, and none repeats K or V for grouped heads.

Backward passes take the *final* `out` and `lse` of each query, whatever the number of blocks: with
them exp(score - lse) is the final weight, so gradients of blocks simply add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat.torch import flash, flash_backward
from .flex import attend_flex, attend_flex_backward
from .partial import Partial, wide
from .pieces import Piece
from .scores import Scores

# Scores of one tile: at most so many queries x keys per head.
_TILE_QUERIES = 256
_TILE_KEYS = 1024

# So few queries are computed together for all heads of a group, which then read K and V once.
_FEW_QUERIES = 16

_CUDA_HEAD_DIM = 256


def attend(
    into: Partial,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    scores: Scores,
) -> None:
    """Merge attention of `q` (b, hq, sq, d) over `k`, `v` (b, hkv, sk, d or dv) into `into`.

    Work and memory of the pieces alone: 2 (d + dv) FLOP per head and pair.
    """
    if v.shape[3] == 0 or q.numel() == 0:  # which would kill the process in a kernel
        return
    for piece in pieces:
        if _fused(q, piece, scores):
            own, keys, values = _rows(q, k, v, piece)
            result = _flash(own, keys, values, piece, scores)
            into.add_(*result, piece.q_row, given=True)
        elif _flexible(q, v):
            result = attend_flex(*_rows(q, k, v, piece), piece, scores)
            into.add_(*result, piece.q_row, given=True)
        else:
            for tile in _tiles(piece):
                own, keys, values = _rows(q, k, v, tile)
                result = _explicit(own, keys, values, tile, scores)
                into.add_(*result, tile.q_row, given=True)


@dataclass(frozen=True, slots=True)
class Queries:
    """What backward needs of the queries: inputs, final results, and the gradient of `out`.

    q, out, grad (b, hq, sq, d or dv) in the dtype of the inputs; lse (b, hq, sq), +inf for a query
    that attends nothing; `delta` (b, hq, sq) is the sum of out * grad over the head dim.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    grad: Tensor
    delta: Tensor

    @staticmethod
    def of(q: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> Queries:
        """From what forward saved."""
        delta = (out.to(lse.dtype) * grad).sum(-1)
        # exp(score - inf) is 0 for every score; exp(-inf - -inf) would be NaN.
        return Queries(q, out, lse.masked_fill(lse == -torch.inf, torch.inf), grad, delta)

    def rows(self, start: int, length: int) -> Queries:
        """The queries `start` to `start + length`."""
        return self.each(lambda x: x.narrow(2, start, length))

    def of_heads(self, heads: slice) -> Queries:
        """Some of the query heads."""
        return self.each(lambda x: x[:, heads])

    def of_batch(self, batch: slice) -> Queries:
        """Some sequences of the batch."""
        return self.each(lambda x: x[batch])

    def flipped(self) -> Queries:
        """The last query first."""
        return self.each(lambda x: x.flip(2))

    def each(self, view: Callable[[Tensor], Tensor]) -> Queries:
        """`view` of every tensor."""
        return Queries(
            view(self.q), view(self.out), view(self.lse), view(self.grad), view(self.delta)
        )


def attend_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    queries: Queries,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    scores: Scores,
) -> None:
    """Add the gradients that the pieces contribute to `grads` (dq, dk, dv), float32 or float64."""
    if queries.q.numel() == 0 or queries.out.numel() == 0:
        return
    for piece in pieces:
        fused, flexible = _fused(queries.q, piece, scores), _flexible(queries.q, v)
        for part in (piece,) if fused or flexible else _tiles(piece):
            own = queries.rows(part.q_row, part.queries)
            _, keys, values = _rows(queries.q, k, v, part)
            if fused:
                parts = _flash_backward(own, keys, values, part, scores)
            elif flexible:
                saved = own.q, own.lse, own.grad, own.delta
                parts = attend_flex_backward(saved, keys, values, part, scores)
            else:
                parts = _explicit_backward(own, keys, values, part, scores)
            spans = [(part.q_row, part.queries), *[(part.k_row, part.keys)] * 2]
            for grad, (start, length), summand in zip(grads, spans, parts, strict=True):
                grad.narrow(2, start, length).add_(summand)


def sinks_gradient(sinks: Tensor, queries: Queries) -> Tensor:
    """Gradient (hq,) of attention sinks that were merged into the result of `queries`."""
    weight = torch.exp(sinks.to(queries.lse.dtype)[None, :, None] - queries.lse)
    return -(weight * queries.delta).sum((0, 2)).to(sinks.dtype)


def _rows(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.narrow(2, piece.q_row, piece.queries),
        k.narrow(2, piece.k_row, piece.keys),
        v.narrow(2, piece.k_row, piece.keys),
    )


# --- flash kernels ------------------------------------------------------------------------------


def _fused(q: Tensor, piece: Piece, scores: Scores) -> bool:
    """Whether a flash kernel takes the piece."""
    if not scores.plain:
        return False
    if q.is_cuda:
        known = q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= _CUDA_HEAD_DIM
        return known and (piece.rule != "band" or _ends_together(piece, scores))
    return q.device.type == "cpu" and piece.rule != "band"


def _ends_together(piece: Piece, scores: Scores) -> bool:
    """Is the last query at the last key, as CUDA's flash kernels have it under a window?"""
    ahead = piece.k_position + piece.keys - piece.q_position - piece.queries
    return scores.causal and scores.window > 0 and ahead == 0


def _flexible(q: Tensor, v: Tensor) -> bool:
    """Whether `flex_attention` takes what no flash kernel does."""
    fits = max(q.shape[3], v.shape[3]) <= _CUDA_HEAD_DIM
    return q.is_cuda and q.dtype != torch.float64 and fits


def _flash(q: Tensor, k: Tensor, v: Tensor, piece: Piece, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out, lse) of a piece that is full, a triangle or a band."""
    scale = scores.scale
    if piece.rule == "window":
        out, lse = _flash_kernel(q.flip(2), k.flip(2), v.flip(2), True, scale)
        return out.flip(2), lse.flip(2)
    if piece.rule == "band":
        return _flash_kernel(q, k, v, True, scale, scores.window)
    few = q.shape[2] <= _FEW_QUERIES and q.shape[1] > k.shape[1]
    if piece.rule == "full" and few:
        heads, rows = (k.shape[1], -1), (-1, q.shape[2])
        grouped = q.unflatten(1, heads).flatten(2, 3)
        out, lse = _flash_kernel(grouped, k, v, False, scale)
        return out.unflatten(2, rows).flatten(1, 2), lse.unflatten(2, rows).flatten(1, 2)
    return _flash_kernel(q, k, v, piece.rule == "causal", scale)


def _flash_backward(
    queries: Queries, k: Tensor, v: Tensor, piece: Piece, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a piece that is full, a triangle or a band."""
    scale = scores.scale
    if piece.rule == "band":
        return _flash_backward_kernel(queries, k, v, True, scale, scores.window)
    if piece.rule != "window":
        return _flash_backward_kernel(queries, k, v, piece.rule == "causal", scale)
    turned = queries.flipped()
    dq, dk, dv = _flash_backward_kernel(turned, k.flip(2), v.flip(2), True, scale)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def _flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    # The kernels want one head dim for all; zeros change neither scores nor the other columns.
    head_dim = _kernel_head_dim(q, v)
    q, k, values = (_pad_heads(x, head_dim) for x in (q, k, v))
    out, lse = flash(q, k, values, causal, scale, window=window)
    return out[..., : v.shape[3]], lse


def flash_masked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) on the CPU, with `mask` added to the scores."""
    if q.shape[3] == v.shape[3]:
        return flash(q, k, v, False, scale, mask)
    head_dim = _kernel_head_dim(q, v)
    q, k, values = (_pad_heads(x, head_dim) for x in (q, k, v))
    out, lse = flash(q, k, values, False, scale, mask)
    return out[..., : v.shape[3]], lse


def _flash_backward_kernel(
    queries: Queries, k: Tensor, v: Tensor, causal: bool, scale: float, window: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = _kernel_head_dim(queries.q, v)
    grad, q, keys, values, out = (
        _pad_heads(x, head_dim) for x in (queries.grad, queries.q, k, v, queries.out)
    )
    dq, dk, dv = flash_backward(grad, q, keys, values, out, queries.lse, causal, scale, window)
    d, dv_dim = queries.q.shape[3], v.shape[3]
    return dq[..., :d], dk[..., :d], dv[..., :dv_dim]


def _kernel_head_dim(q: Tensor, v: Tensor) -> int:
    widest = max(q.shape[3], v.shape[3])
    return -(-widest // 8) * 8 if q.is_cuda else widest


def _pad_heads(x: Tensor, head_dim: int) -> Tensor:
    return x if x.shape[3] == head_dim else F.pad(x, (0, head_dim - x.shape[3]))


# --- plain torch operations ---------------------------------------------------------------------


def _tiles(piece: Piece) -> Iterator[Piece]:
    for i in range(0, piece.queries, _TILE_QUERIES):
        for j in range(0, piece.keys, _TILE_KEYS):
            yield Piece(
                piece.q_row + i,
                min(_TILE_QUERIES, piece.queries - i),
                piece.k_row + j,
                min(_TILE_KEYS, piece.keys - j),
                piece.q_position + i,
                piece.k_position + j,
                piece.rule,
            )


def _raw_scores(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """q k^T scale, capped; (b, hkv, group, sq, sk), float32 or float64."""
    grouped = q.to(wide(q.dtype)).unflatten(1, (k.shape[1], -1))
    raw = grouped @ k.to(grouped.dtype).unsqueeze(2).transpose(-1, -2) * scores.scale
    return scores.softcap * torch.tanh(raw / scores.softcap) if scores.softcap else raw


def _masked(capped: Tensor, tile: Piece, scores: Scores) -> Tensor:
    addend = scores.addend(tile, (capped.shape[1], capped.shape[2]))
    if addend is not None:
        capped = capped + addend
    blocked = scores.blocked(tile, capped.device)
    return capped if blocked is None else capped.masked_fill(blocked, -torch.inf)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, tile: Piece, scores: Scores
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a tile."""
    logits = _masked(_raw_scores(q, k, scores), tile, scores)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
    out = weights @ v.to(weights.dtype).unsqueeze(2)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _explicit_backward(
    queries: Queries, k: Tensor, v: Tensor, tile: Piece, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a tile, whose weights are computed again; adds to the bias's gradient."""
    heads = (k.shape[1], -1)
    capped = _raw_scores(queries.q, k, scores)
    logits = _masked(capped, tile, scores)
    weights = torch.exp(logits - queries.lse.unflatten(1, heads).unsqueeze(-1))
    grad = queries.grad.to(weights.dtype).unflatten(1, heads)
    q = queries.q.to(weights.dtype).unflatten(1, heads)
    dv = (weights.transpose(-1, -2) @ grad).sum(2)
    dweights = grad @ v.to(weights.dtype).unsqueeze(2).transpose(-1, -2)
    dscores = weights * (dweights - queries.delta.unflatten(1, heads).unsqueeze(-1))
    scores.add_bias_gradient(tile, dscores)
    if scores.softcap:
        dscores = dscores * (1 - (capped / scores.softcap).square())
    dscores = dscores * scores.scale
    dq = dscores @ k.to(weights.dtype).unsqueeze(2)
    dk = (dscores.transpose(-1, -2) @ q).sum(2)
    return dq.flatten(1, 2), dk, dv
