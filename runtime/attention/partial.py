"""The result of attention over some of the keys, and how such results become one.

Attention over a set of keys is known by two things: `out`, the weighted mean of the values, and
`lse`, the natural logarithm of the sum of exp(score).  Two disjoint sets of keys merge exactly, so
every algorithm of this package is a way to make partial results and one way to merge them.
A set without keys is (0, -inf), and so is the merge of two such sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results and gradients are added up: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class Partial:
    """`out` (b, h, s, dv) and `lse` (b, h, s), natural log; both float32, or both float64."""

    out: Tensor
    lse: Tensor

    @staticmethod
    def empty(queries: Tensor, head_dim: int) -> Partial:
        """No keys yet, for `queries` (b, h, s, d) and values of `head_dim`."""
        shape = queries.shape[:3]
        dtype = wide(queries.dtype)
        return Partial(
            queries.new_zeros((*shape, head_dim), dtype=dtype),
            queries.new_full(shape, -torch.inf, dtype=dtype),
        )

    @staticmethod
    def of_sinks(sinks: Tensor, queries: Tensor, head_dim: int) -> Partial:
        """Attention sinks (h,) as one more key per head, whose value is zero."""
        part = Partial.empty(queries, head_dim)
        part.lse.copy_(sinks.detach()[None, :, None])
        return part

    def rows(self, start: int, length: int) -> Partial:
        """A view of the queries `start` to `start + length`."""
        return Partial(self.out.narrow(2, start, length), self.lse.narrow(2, start, length))

    def add_(self, out: Tensor, lse: Tensor) -> None:
        """Merge another partial result of the same queries into this one, in place."""
        lse = lse.to(self.lse.dtype)
        known = self.lse.clamp_min(torch.finfo(lse.dtype).min)  # of two empties: -inf - -inf
        share = torch.sigmoid(lse - known)
        self.out.lerp_(out.to(self.out.dtype), share.unsqueeze(-1))
        torch.logaddexp(self.lse, lse, out=self.lse)


def merge(partials: Sequence[Partial]) -> Partial:
    """One partial result from several of the same queries, added up in the order given.

    Differentiable.  The same order gives the same bits, whenever the parts arrived.  Raises
    ValueError if there is none.
    """
    if not partials:
        raise ValueError("merge: no partial results; attention over no keys is Partial.empty(...)")
    highest = partials[0].lse.detach()
    for part in partials[1:]:
        highest = torch.maximum(highest, part.lse.detach())
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weights = [torch.exp(part.lse - highest) for part in partials]
    total, out = weights[0], weights[0].unsqueeze(-1) * partials[0].out
    for weight, part in zip(weights[1:], partials[1:], strict=True):
        total = total + weight
        out = out + weight.unsqueeze(-1) * part.out
    return normalised(out, total, highest)


def normalised(numerator: Tensor, total: Tensor, highest: Tensor) -> Partial:
    """The partial result of summed exp(score - highest): `numerator` with values, `total` alone."""
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    lse = (highest + torch.log(total)).masked_fill(nothing, -torch.inf)
    return Partial(numerator / total.unsqueeze(-1), lse)
