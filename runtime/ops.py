"""Local parts of the operations that know they are sharded: embedding, loss, attention, dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..facts.users import import_user as import_user
from .attention.cached import cached_attention as cached_attention
from .attention.local import attention as attention
from .convolution import cached_convolution as cached_convolution
from .convolution import causal_convolution as causal_convolution
from .mesh.collectives import Axis
from .mesh.stochastic import dropout as dropout
from .moe import moe as moe  # generated modules call it `ops.moe`
from .recurrence import state_after as state_after
from .recurrence import state_before as state_before
from .recurrence import state_step as state_step

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


def last_token(x: Tensor, positions: Tensor, axis: Axis | None = None) -> Tensor:
    """The row of `x` (b, t, ...) with the highest of `positions` (b, t) per sequence: (b, 1, ...).

    With `axis` the tokens of a sequence are sharded over it and the result is partial (`P`) over
    it: all ranks but the one that holds the token give zeros.  A sequence of padding alone (all
    positions -1) gives a meaningless row.
    """
    highest, index = positions.max(1)
    index = index.view(-1, *[1] * (x.ndim - 1)).expand(-1, 1, *x.shape[2:])
    own = x.gather(1, index)
    if axis is None or axis.size == 1:
        return own
    elsewhere = axis.reduce(highest, "max") != highest
    return own.masked_fill(elsewhere.view(-1, *[1] * (x.ndim - 1)), 0)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: Literal["halves", "pairs", "pairs_to_halves"] = "halves",
) -> Tensor:
    """Rotary position embedding of x (..., d): (a, b) -> (a cos - b sin, b cos + a sin).

    The planes (a, b) are numbers in the same place of both `halves` of the last dim, or `pairs` of
    neighbours; `pairs_to_halves` takes pairs and puts all first coordinates before the second
    ones.  `cos` and `sin` broadcast against `x`; their last dim is d/2, a number for each plane,
    or d.
    """
    first, second = _coordinates(x, pairing)
    if cos.size(-1) == x.size(-1):
        (cos, cos_2), (sin, sin_2) = _coordinates(cos, pairing), _coordinates(sin, pairing)
    else:
        cos_2, sin_2 = cos, sin
    turned = first * cos - second * sin, second * cos_2 + first * sin_2
    return torch.stack(turned, -1).flatten(-2) if pairing == "pairs" else torch.cat(turned, -1)


def _coordinates(x: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """The first and the second coordinates of the planes in the last dim."""
    if pairing != "halves":
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second


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
