"""Softcaps, biases, ALiBi, documents and bands in one kernel each: torch's `flex_attention`.

Its kernels are made by inductor for a CUDA device.  Whatever differs from call to call (where the
rows stand, biases, documents) goes in as tensors, so that calls of one shape share a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .pieces import Piece
from .scores import Scores

_BLOCK = 128  # queries and keys that a kernel skips, or takes without a mask, as one

Kernel: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, piece: Piece, scores: Scores
) -> tuple[Tensor, Tensor]:
    """(out (b, hq, sq, dv), lse (b, hq, sq) float32) of the rows of a piece."""
    place = _Place.of(piece, scores, q.device)
    return kernel()(q, k, v, _score(scores, place), _block_mask(piece, scores, place), scores.scale)


def attend_flex_backward(
    queries: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    piece: Piece,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a piece, which is computed again; adds to the bias's gradient.

    `queries` are q, the final lse, and the gradient of the final result and its sum with it.  The
    final result has w = exp(lse - final lse) of the piece's own out, so that has the gradient
    w grad, and its lse w grad (out - final result).
    """
    q, final, grad, delta = queries
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if scores.dbias is not None and scores.bias is not None:
        leaves.append(scores.bias.detach().requires_grad_())
        scores = replace(scores, bias=leaves[3])
    with torch.enable_grad():
        out, lse = attend_flex(leaves[0], leaves[1], leaves[2], piece, scores)
    weight = torch.exp(lse.detach() - final)
    own = (out.detach() * grad).sum(-1, dtype=lse.dtype)
    grads = (grad * weight.unsqueeze(-1)).to(out.dtype), weight * (own - delta)
    dq, dk, dv, *dbias = torch.autograd.grad((out, lse), leaves, grads)
    if scores.dbias is not None:
        scores.dbias.add_(dbias[0])
    return dq, dk, dv


@lru_cache(maxsize=1)
def kernel() -> Kernel:
    """(q, k, v, score function, block mask, scale) -> (out, lse), compiled for what it gets."""
    return torch.compile(_attend)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, score: Callable[..., Tensor], mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    grouped, request = q.shape[1] != k.shape[1], AuxRequest(lse=True)
    found: Any = flex_attention(q, k, v, score, mask, scale, grouped, return_aux=request)
    return found[0], found[1].lse


# --- what functions of indices see --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the rows of a piece stand, as tensors of one number on the device."""

    row: Tensor  # of the bias, of the first query
    query: Tensor  # positions of the first query and of the first key
    key: Tensor
    window: Tensor

    @staticmethod
    def of(piece: Piece, scores: Scores, device: torch.device) -> _Place:
        numbers = piece.q_row, piece.q_position, piece.k_position, scores.window
        # Never one tensor for two of them: Dynamo would recompile where it is two.
        return _Place(*(_number(which, number, device) for which, number in enumerate(numbers)))


@lru_cache(maxsize=4096)
def _number(which: int, number: int, device: torch.device) -> Tensor:
    return torch.tensor(number, dtype=torch.int32, device=device)


def _score(scores: Scores, place: _Place) -> Callable[..., Tensor]:
    """The function from a product to a score."""
    function = _unchanged
    if scores.softcap:
        function = _capped(scores.softcap)
    if scores.bias is not None:
        function = _biased(function, scores.bias, place.row, place.key)
    if scores.slopes is not None:
        function = _sloped(function, scores.slopes, place, scores.causal)
    return function


def _unchanged(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _biased(
    before: Callable[..., Tensor], bias: Tensor, row: Tensor, key: Tensor
) -> Callable[..., Tensor]:
    of_batch, of_head = bias.shape[0] > 1, bias.shape[1] > 1

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = bias[b if of_batch else 0, h if of_head else 0, row + i, key + j]
        return before(score, b, h, i, j) + own

    return biased


def _sloped(
    before: Callable[..., Tensor], slopes: Tensor, place: _Place, causal: bool
) -> Callable[..., Tensor]:
    first, opening = place.query, place.key

    def sloped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (opening + j) - (first + i)
        distance = distance if causal else -distance.abs()
        return before(score, b, h, i, j) + slopes[h] * distance

    return sloped


def _block_mask(piece: Piece, scores: Scores, place: _Place) -> BlockMask:
    """Which blocks a kernel computes, and what it masks in them."""
    ruled = piece.rule != "full"
    causal, window = ruled and scores.causal, scores.window if ruled else 0
    distance = piece.k_position - piece.q_position
    marked = scores.mask.keys is not None or scores.mask.documents is not None
    some, whole = _blocks(
        piece.queries, piece.keys, distance, causal, window, marked, place.query.device
    )
    return BlockMask.from_kv_blocks(
        *some, *whole, _BLOCK, _mask(scores, place, causal, window > 0),
        seq_lengths=(piece.queries, piece.keys),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _blocks(
    queries: int,
    keys: int,
    distance: int,
    causal: bool,
    window: int,
    marked: bool,
    device: torch.device,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(Blocks that need a mask, blocks that need none): numbers (1, 1, n) and indices (1, 1, n, m).

    `distance` is the position of the first key less that of the first query.  If keys are `marked`
    one by one, every block needs a mask.
    """
    rows = torch.arange(0, queries, _BLOCK, device=device)[:, None]
    columns = torch.arange(0, keys, _BLOCK, device=device)[None]
    last_row = (rows + _BLOCK - 1).clamp(max=queries - 1)
    last_column = (columns + _BLOCK - 1).clamp(max=keys - 1)
    nearest, farthest = distance + last_column - rows, distance + columns - last_row
    computed = torch.ones_like(nearest, dtype=torch.bool)
    whole = (columns + _BLOCK <= keys) & computed
    if causal:
        computed, whole = computed & (farthest <= 0), whole & (nearest <= 0)
    if window:
        computed, whole = computed & (nearest > -window), whole & (farthest > -window)
    whole = whole & (not marked)
    return _in_order(computed & ~whole), _in_order(computed & whole)


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are True, and their columns before all others."""
    order = torch.argsort(blocks.to(torch.int32), dim=1, descending=True, stable=True)
    count = blocks.sum(1)
    return count.to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def _mask(scores: Scores, place: _Place, causal: bool, windowed: bool) -> Callable[..., Tensor]:
    """The function that says which keys queries attend."""
    function = _everything
    if causal:
        function = _not_ahead(place.query, place.key)
    if windowed:
        function = _near(function, place.query, place.key, place.window)
    if scores.mask.keys is not None:
        function = _marked(function, scores.mask.keys, place.key)
    if scores.mask.documents is not None:
        function = _of_document(function, scores.mask.documents, place.query, place.key)
    return function


def _everything(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= 0


def _not_ahead(query: Tensor, key: Tensor) -> Callable[..., Tensor]:
    def not_ahead(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return key + j <= query + i

    return not_ahead


def _near(
    before: Callable[..., Tensor], query: Tensor, key: Tensor, window: Tensor
) -> Callable[..., Tensor]:
    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return before(b, h, i, j) & (key + j > query + i - window)

    return near


def _marked(before: Callable[..., Tensor], keys: Tensor, key: Tensor) -> Callable[..., Tensor]:
    def marked(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return before(b, h, i, j) & keys[b, key + j]

    return marked


def _of_document(
    before: Callable[..., Tensor], documents: Tensor, query: Tensor, key: Tensor
) -> Callable[..., Tensor]:
    def of_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return before(b, h, i, j) & (documents[b, query + i] == documents[b, key + j])

    return of_document
