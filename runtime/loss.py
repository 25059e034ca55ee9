"""Cross entropy without a wide copy of the logits, which are often the largest tensor of a step.

    loss = lse - z[label]                       lse: log(sum(exp(z)))
    gradient of z: softmax(z) - one_hot(label), times what comes

`cross_entropy` takes logits, reads them a block of tokens at a time, and computes with these in
float32 or wider.  `linear_cross_entropy` makes them itself, a chunk of columns for all tokens at a
time, and makes each chunk again in backward.  So it takes four matrix products where three would
do, which costs a few percent of a step.  Gradients that are made in forward would save the fourth,
but that of the weight would be summed up over chunks of tokens, in a buffer of float32 as large as
the logits of twice as many tokens as the model is wide; and over a sharded vocabulary every chunk
would wait for the other ranks.  By columns each row of the weight's gradient is one product over
all tokens, rounded once.

Over a sharded vocabulary ranks exchange a few numbers per token, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..facts.logits import block_rows, chunk_columns
from .mesh.collectives import Axis
from .mesh.derivatives import first_order
from .training.shares import mean_loss

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    vocab_axis: Axis | None = None,
    vocab_size: int | None = None,
    token_axes: Sequence[Axis] = (),
) -> Tensor:
    """`F.cross_entropy` of logits (..., v) and class labels (...), the classes last.

    With `vocab_axis`, `logits` holds this rank's columns of `vocab_size` (default: v times the axis
    size); only three numbers per token are communicated (four with label smoothing), and the result
    is the same on all ranks of the axis.  With `token_axes`, the tokens are sharded over them; a
    mean divides by the number of labels on all of them that are not ignored, so that a mean or sum
    is partial (`P`) over these axes.  In a step of several micro-batches a mean is multiplied by
    its share of the step's labels (`training/shares.py`).  Half-precision logits are computed in
    float32 and the loss is rounded once, to `dtype` (default: that of the logits).
    """
    _check_shapes(logits, labels, reduction)
    vocabulary = _Vocabulary.of(
        logits.shape[-1], vocab_axis, vocab_size, ignore_index, label_smoothing
    )
    loss: Tensor = _CrossEntropy.apply(logits, labels, vocabulary)
    return _reduced(loss, labels, ignore_index, reduction, token_axes).to(dtype or logits.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    vocab_axis: Axis | None = None,
    vocab_size: int | None = None,
    token_axes: Sequence[Axis] = (),
) -> Tensor:
    """`cross_entropy` of the logits that a linear layer makes of x (..., k), of which a few are
    there at a time.

    `weight` is (v, k) and `bias` (v); with `vocab_axis` they hold this rank's rows.  Logits are
    multiplied by `scale`, then with a `softcap` c they become c tanh(logits / c).  `dtype` is that
    of the loss (default: that of `x`); the rest is as in `cross_entropy`.
    """
    _check_shapes(x, labels, reduction)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy takes a weight of shape (v, {x.shape[-1]}) for x of shape"
            f" {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    vocabulary = _Vocabulary.of(
        weight.shape[0], vocab_axis, vocab_size, ignore_index, label_smoothing
    )
    head = _Head(vocabulary, scale, softcap)
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, labels, head)
    return _reduced(loss, labels, ignore_index, reduction, token_axes).to(dtype or x.dtype)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap), elementwise: numbers between -cap and cap; keeps only its result."""
    return _Softcap.apply(x, cap)


def _check_shapes(x: Tensor, labels: Tensor, reduction: str) -> None:
    if labels.is_floating_point() or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"cross_entropy takes integer labels of shape {tuple(x.shape[:-1])} for logits of"
            f" shape {tuple(x.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")


def _reduced(
    loss: Tensor, labels: Tensor, ignore_index: int, reduction: str, token_axes: Sequence[Axis]
) -> Tensor:
    """The sum of the loss per token, or this rank's part of the mean."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = (labels != ignore_index).sum()
    for tokens in token_axes:
        count = tokens.reduce(count)
    return mean_loss(loss.sum(), count)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """This rank's columns, `start` to `start + count` of `size`, and how the loss treats labels."""

    axis: Axis | None
    start: int
    count: int
    size: int
    ignore_index: int
    smoothing: float

    @staticmethod
    def of(
        columns: int, axis: Axis | None, size: int | None, ignore_index: int, smoothing: float
    ) -> _Vocabulary:
        """The vocabulary of a rank that holds so many columns, padding among them."""
        axis = axis if axis is not None and axis.size > 1 else None
        size = size if size is not None else columns * (1 if axis is None else axis.size)
        own = range(size) if axis is None else axis.block(size)
        return _Vocabulary(axis, own.start, own.stop - own.start, size, ignore_index, smoothing)

    def check(self, labels: Tensor) -> None:
        """Refuse labels outside the vocabulary, on the CPU where looking costs nothing.

        Elsewhere their loss and gradients are NaN.
        """
        if labels.is_cuda or labels.numel() == 0 or torch.compiler.is_compiling():
            return
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= self.size))
        if bool(wrong.any()):
            raise IndexError(
                f"label {int(labels[wrong][0])} is outside the vocabulary of {self.size} and is"
                f" not ignore_index={self.ignore_index}"
            )

    def among(self, labels: Tensor, columns: range) -> tuple[Tensor, Tensor]:
        """(place of each label (t) among these of the own columns, or 0; is it there?), (t, 1)."""
        place = labels.unsqueeze(-1) - (self.start + columns.start)
        there = (place >= 0) & (place < len(columns))
        there &= labels.unsqueeze(-1) != self.ignore_index
        return place.where(there, 0), there

    def no_sums(self, tokens: int, like: Tensor) -> Tensor:
        """`sums` of no columns at all."""
        found = like.new_zeros((tokens, 3 if self.smoothing else 2), dtype=wide(like.dtype))
        found[:, 0] = -torch.inf
        return found

    def sums(self, z: Tensor, labels: Tensor, columns: range) -> Tensor:
        """Of logits z (t, c), in a wide format per token: lse, the label's logit or 0, and with
        label smoothing the sum."""
        place, there = self.among(labels, columns)
        lse = _lse(z)
        found = [lse, z.gather(-1, place).where(there, 0).squeeze(-1).to(lse.dtype)]
        if self.smoothing:
            found.append(z.sum(-1, dtype=lse.dtype))
        return torch.stack(found, -1)

    def loss(self, sums: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss per token, 0 where it is ignored; lse per token), of the sums of all ranks."""
        if self.axis is not None:
            top = self.axis.reduce(sums[:, 0].contiguous(), "max")
            sums = torch.cat(((sums[:, :1] - top.unsqueeze(-1)).exp(), sums[:, 1:]), -1)
            sums = self.axis.reduce(sums)
            lse = top + sums[:, 0].log()
        else:
            lse = sums[:, 0]
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= self.size))
        lse = lse.masked_fill(
            wrong, torch.nan
        )  # what `check` does not see, loss and gradients show
        loss = lse - sums[:, 1]
        if self.smoothing:
            loss = loss.lerp(lse - sums[:, 2] / self.size, self.smoothing)
        return loss.where(labels != self.ignore_index, 0), lse

    def slope(self, z: Tensor, labels: Tensor, lse: Tensor, columns: range) -> Tensor:
        """The gradient of a token's loss with respect to z (t, c), in a wide format."""
        slope = (z - lse.unsqueeze(-1)).exp_()
        if self.smoothing:
            slope -= self.smoothing / self.size
        place, there = self.among(labels, columns)
        return slope.scatter_add_(-1, place, there.to(slope.dtype) * (self.smoothing - 1.0))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The format in which numbers of `dtype` are computed with."""
    return torch.promote_types(dtype, torch.float32)


def _lse(z: Tensor) -> Tensor:
    """log(sum(exp(z))) over the last dim, in a wide format: by a kernel that is one pass.

    At the largest number it is that number less its logarithm in a softmax, of which nothing is
    lost where one is large and the other small.
    """
    top, place = z.max(-1, keepdim=True)
    logs = z.log_softmax(-1, dtype=wide(z.dtype)).gather(-1, place)
    return (top - logs).where(top != -torch.inf, -torch.inf).squeeze(-1)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix that are computed with together."""
    step = block_rows(columns)
    return (slice(at, at + step) for at in range(0, rows, step))


class _CrossEntropy(torch.autograd.Function):
    """Loss per token; backward is local and keeps only the logits themselves."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocabulary: _Vocabulary) -> Tensor:
        vocabulary.check(labels)
        z, flat = _own(logits, vocabulary), labels.reshape(-1)
        sums, columns = vocabulary.no_sums(len(z), logits), range(vocabulary.count)
        for rows in _blocks(*z.shape) if columns else ():
            sums[rows] = vocabulary.sums(z[rows], flat[rows], columns)
        loss, lse = vocabulary.loss(sums, flat)
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(logits, labels, lse)
        return loss.view(labels.shape)

    @staticmethod
    @first_order("the cross entropy")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        logits, labels, lse = ctx.saved_tensors
        vocabulary: _Vocabulary = ctx.vocabulary
        z, flat, columns = _own(logits, vocabulary), labels.reshape(-1), range(vocabulary.count)
        scale = grad_outputs[0].where(labels != vocabulary.ignore_index, 0).reshape(-1, 1)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        grad[..., vocabulary.count :] = 0
        own = _own(grad, vocabulary)
        for rows in _blocks(*z.shape) if columns else ():
            slope = vocabulary.slope(z[rows], flat[rows], lse[rows], columns)
            torch.mul(slope, scale[rows], out=own[rows])
        return grad, None, None


def _own(logits: Tensor, vocabulary: _Vocabulary) -> Tensor:
    """The columns that exist, tokens in one dim: (t, count)."""
    return logits.reshape(-1, logits.shape[-1]).narrow(-1, 0, vocabulary.count)


@dataclass(frozen=True, slots=True)
class _Head:
    """How logits come from products, and what they are compared with."""

    vocabulary: _Vocabulary
    scale: float
    softcap: float

    def chunks(self, x: Tensor) -> Iterator[range]:
        """Columns that are made together for the tokens of x (t, k)."""
        count = self.vocabulary.count
        step = chunk_columns(len(x), count, x.element_size())
        return (range(at, min(at + step, count)) for at in range(0, count, step))

    def logits(self, made: Tensor) -> Tensor:
        """Of products the logits, in a wide format where they are others."""
        if self.scale == 1.0 and not self.softcap:
            return made
        z = made.to(wide(made.dtype))
        z = z * self.scale if self.scale != 1.0 else z
        return (z / self.softcap).tanh_().mul_(self.softcap) if self.softcap else z

    def slope(self, made: Tensor, labels: Tensor, lse: Tensor, columns: range) -> Tensor:
        """The gradient of a token's loss with respect to products, in a wide format."""
        z = self.logits(made)
        slope = self.vocabulary.slope(z, labels, lse, columns)
        if self.softcap:
            slope *= 1 - (z / self.softcap).square_()
        return slope


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss per token; the logits are made again in backward, where gradients take their place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head
    ) -> Tensor:
        head.vocabulary.check(labels)
        tokens, flat = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
        sums = head.vocabulary.no_sums(len(tokens), x)
        for columns in head.chunks(tokens):
            made = _product(tokens, weight, bias, columns)
            for rows in _blocks(*made.shape):
                more = head.vocabulary.sums(head.logits(made[rows]), flat[rows], columns)
                sums[rows, 0] = sums[rows, 0].logaddexp(more[:, 0])
                sums[rows, 1:] += more[:, 1:]
        loss, lse = head.vocabulary.loss(sums, flat)
        ctx.head = head
        ctx.save_for_backward(x, weight, bias, labels, lse)
        return loss.view(labels.shape)

    @staticmethod
    @first_order("the cross entropy of a linear layer")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, bias, labels, lse = ctx.saved_tensors
        head: _Head = ctx.head
        tokens, flat = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
        ignored = labels == head.vocabulary.ignore_index
        scale = grad_outputs[0].masked_fill(ignored, 0).reshape(-1, 1) * head.scale
        needs = ctx.needs_input_grad
        grad_x = torch.zeros_like(tokens, dtype=wide(x.dtype)) if needs[0] else None
        grad_weight = _gradient_like(weight, head.vocabulary) if needs[1] else None
        grad_bias = _gradient_like(bias, head.vocabulary) if bias is not None and needs[2] else None
        for columns in head.chunks(tokens):
            made = _product(tokens, weight, bias, columns)
            for rows in _blocks(*made.shape):
                slope = head.slope(made[rows], flat[rows], lse[rows], columns)
                torch.mul(slope, scale[rows], out=made[rows])
            own = slice(columns.start, columns.stop)
            if grad_x is not None:
                grad_x += made @ weight[own]
            if grad_weight is not None:
                torch.mm(made.T, tokens, out=grad_weight[own])
            if grad_bias is not None:
                grad_bias[own] = made.sum(0)
        grad = None if grad_x is None else grad_x.to(x.dtype).view(x.shape)
        return grad, grad_weight, grad_bias, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, columns: range) -> Tensor:
    """What a linear layer makes of x (t, k), in these of its columns."""
    own = slice(columns.start, columns.stop)
    return F.linear(x, weight[own], None if bias is None else bias[own])


def _gradient_like(weight: Tensor, vocabulary: _Vocabulary) -> Tensor:
    """Room for the gradient of a weight; that of padding rows is 0."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad[vocabulary.count :] = 0
    return grad


class _Softcap(torch.autograd.Function):
    """Elementwise; backward computes with its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        y = (x / cap).tanh_().mul_(cap)
        ctx.cap = cap
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @first_order("the softcap")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        grad = torch.empty_like(y)
        flat, given, out = (t.reshape(-1, t.shape[-1]) for t in (y, grad_outputs[0], grad))
        for rows in _blocks(*flat.shape):
            kept = (flat[rows].to(wide(y.dtype)) / ctx.cap).square_().neg_().add_(1)
            torch.mul(kept, given[rows], out=out[rows])
        return grad, None
