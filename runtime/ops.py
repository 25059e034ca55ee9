"""Local parts of the operations that know they are sharded: embedding, loss, attention, dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import Layout as Layout
from .attention import gather_kv_attention as gather_kv_attention
from .attention import ring_attention as ring_attention
from .attention import ulysses_attention as ulysses_attention
from .attention import window_attention as window_attention
from .collectives import Axis
from .moe import moe as moe  # generated modules call it `ops.moe`

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def vocab_embedding(
    ids: Tensor, weight: Tensor, axis: Axis, size: int, padding_idx: int | None = None
) -> Tensor:
    """Rows of an embedding table of `size` rows that is sharded along dim 0 over `axis`.

    `weight` is this rank's block (rows, h); the result (*ids.shape, h) is partial (`P`) over
    `axis`: rows that other ranks hold are zero.  Row `padding_idx` gets no gradient.
    """
    own = axis.block(size)
    count = own.stop - own.start
    local = ids - own.start
    here = (local >= 0) & (local < count)
    known = (ids >= 0) & (ids < size)
    # -1 for ids outside the table, so that the look-up refuses them as it does unsharded.
    index = torch.where(here, local, known.to(local.dtype) - 1)
    fixed = None
    if padding_idx is not None and own.start <= padding_idx % size < own.stop:
        fixed = padding_idx % size - own.start
    return F.embedding(index, weight, fixed).masked_fill(~here.unsqueeze(-1), 0)


def dropout(
    x: Tensor, p: float, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Zero each element with probability `p` and scale the others by 1 / (1 - p).

    `generator` comes from `mesh.generator(axes that shard x)`: ranks that hold the same values
    then drop the same ones, ranks that hold different values draw independently.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    if not training or p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    kept.bernoulli_(1.0 - p, generator=generator)
    return (x * kept) * (1.0 / (1.0 - p))  # backward keeps one byte per element, the mask


# --- cross entropy -------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    vocab_axis: Axis | None = None,
    vocab_size: int | None = None,
    token_axes: Sequence[Axis] = (),
) -> Tensor:
    """`F.cross_entropy` of logits (..., v) and class labels (...), the classes last.

    With `vocab_axis`, `logits` holds this rank's columns of `vocab_size` (default: v times the
    axis size); only three numbers per token are communicated (four with label smoothing), and
    the result is the same on all ranks of the axis.  With `token_axes`, the tokens are sharded
    over them; a mean divides by the number of labels on all of them that are not ignored, so that
    a mean or sum is partial (`P`) over these axes.  Half-precision logits are computed in float32
    and the loss is rounded once.
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy takes integer labels of shape {tuple(logits.shape[:-1])} for logits of"
            f" shape {tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    axis = vocab_axis if vocab_axis is not None and vocab_axis.size > 1 else None
    local = logits.shape[-1]
    size = vocab_size if vocab_size is not None else local * (1 if axis is None else axis.size)
    own = None if axis is None else axis.block(size)
    loss_of = _Vocabulary(
        axis=axis,
        start=0 if own is None else own.start,
        count=size if own is None else own.stop - own.start,
        size=size,
        ignore_index=ignore_index,
        smoothing=label_smoothing,
    )
    loss: Tensor = _CrossEntropy.apply(logits, labels, loss_of)
    if reduction == "none":
        return loss.to(logits.dtype)
    total = loss.sum()
    if reduction == "mean":
        count = (labels != ignore_index).sum()
        for tokens in token_axes:
            count = tokens.reduce(count)
        total = total / count
    return total.to(logits.dtype)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """This rank's columns, `start` to `start + count` of `size`, and how the loss treats labels."""

    axis: Axis | None
    start: int
    count: int
    size: int
    ignore_index: int
    smoothing: float

    def own(self, logits: Tensor) -> Tensor:
        """The columns that exist, in the dtype of the computation."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.narrow(-1, 0, self.count).to(dtype)

    def column(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(column of the label on this rank, or 0; is it on this rank?), each (..., 1)."""
        local = labels.unsqueeze(-1) - self.start
        here = (local >= 0) & (local < self.count)
        here &= labels.unsqueeze(-1) != self.ignore_index
        return local.where(here, 0), here

    def over_axis(self, x: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """`x` reduced over the vocabulary's axis."""
        return x if self.axis is None else self.axis.reduce(x, op)


class _CrossEntropy(torch.autograd.Function):
    """Loss per token (0 where ignored); backward is local and keeps only the logits themselves."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocabulary: _Vocabulary) -> Tensor:
        z = vocabulary.own(logits)
        _check_labels(labels, vocabulary)
        if vocabulary.count:
            top = z.amax(-1, keepdim=True)
            column, here = vocabulary.column(labels)
            target = z.gather(-1, column).where(here, 0)
        else:  # a rank that holds padding alone
            top = z.new_full((*labels.shape, 1), -torch.inf)
            target = z.new_zeros((*labels.shape, 1))
        top = vocabulary.over_axis(top, "max")
        terms = [(z - top).exp_().sum(-1, keepdim=True), target]
        if vocabulary.smoothing:
            terms.append(z.sum(-1, keepdim=True))
        total, target, *sums = vocabulary.over_axis(torch.stack(terms), "sum")
        lse = top + total.log()
        loss = lse - target
        if vocabulary.smoothing:
            loss = loss.lerp(lse - sums[0] / vocabulary.size, vocabulary.smoothing)
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(logits, labels, lse)
        return loss.squeeze(-1).where(labels != vocabulary.ignore_index, 0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, lse = ctx.saved_tensors
        vocabulary: _Vocabulary = ctx.vocabulary
        scale = grad_outputs[0].where(labels != vocabulary.ignore_index, 0).unsqueeze(-1)
        grad = (vocabulary.own(logits) - lse).exp_()
        if vocabulary.smoothing:
            grad -= vocabulary.smoothing / vocabulary.size
        if vocabulary.count:
            column, here = vocabulary.column(labels)
            grad.scatter_add_(-1, column, here.to(grad.dtype) * (vocabulary.smoothing - 1.0))
        grad *= scale
        grad = grad.to(logits.dtype)
        padding = logits.shape[-1] - vocabulary.count
        if padding:
            grad = F.pad(grad, (0, padding))
        return grad, None, None


def _check_labels(labels: Tensor, vocabulary: _Vocabulary) -> None:
    """Refuse labels outside the vocabulary, on the CPU where looking costs nothing."""
    if labels.is_cuda or labels.numel() == 0:
        return
    wrong = (labels != vocabulary.ignore_index) & ((labels < 0) | (labels >= vocabulary.size))
    if bool(wrong.any()):
        raise IndexError(
            f"label {int(labels[wrong][0])} is outside the vocabulary of {vocabulary.size} and is"
            f" not ignore_index={vocabulary.ignore_index}"
        )


# --- attention -----------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    query_start: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """softmax(q k^T scale) v for q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv).

    Query i stands at position `query_start + i` and key j at j.  A query at p attends key j where
    j <= p if `causal`; j > p - window if `window` > 0; and
    `mask` allows it: bool (True attends) or a float to add, broadcastable to (b, hq, sq, sk).
    `softcap` > 0 makes scores softcap * tanh(scores / softcap).  `sinks` (hq,) are the scores of
    one more key per head, whose value is zero.  Query head h uses key head h // (hq // hkv).
    Result (b, hq, sq, dv).
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads over {k.shape[1]} key heads")
    sq, sk = q.shape[2], k.shape[2]
    first, last = _reach(sq, sk, causal, window, query_start)
    if (first, last) != (0, sk):  # keys that no query reaches
        k, v = k[:, :, first:last], v[:, :, first:last]
        if mask is not None and mask.shape[-1] == sk:
            mask = mask[..., first:last]
        query_start -= first
        sk = last - first
    if causal and window >= query_start + sq:
        window = 0
    explicit = softcap > 0 or dropout_p > 0 or sinks is not None
    if causal and not window and mask is None and not explicit and query_start == 0 and sq == sk:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    mask = _with_positions(mask, (sq, sk), causal, window, query_start, q.device)
    if explicit:
        return _explicit_attention(q, k, v, mask, scale, softcap, sinks, dropout_p, generator)
    if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
        # Of CUDA's kernels, the one that takes masks does not take grouped heads.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _reach(sq: int, sk: int, causal: bool, window: int, query_start: int) -> tuple[int, int]:
    """First and last + 1 of the keys that some query may attend; at least one key."""
    end = query_start + sq
    last = min(sk, end) if causal else sk
    first = max(0, query_start - window + 1) if window else 0
    last = max(last, 1)
    return min(first, last - 1), last


def _with_positions(
    mask: Tensor | None,
    shape: tuple[int, int],
    causal: bool,
    window: int,
    query_start: int,
    device: torch.device,
) -> Tensor | None:
    """`mask` with the rules on positions put in; None if everything may be attended."""
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Attention with the scores written out, for what the fused kernels do not know."""
    heads = k.shape[1]
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
