"""The result of attention over some of the keys, and how such results become one.

Attention over a set of keys is known by two things: `out`, the weighted mean of the values, and
`lse`, the natural logarithm of the sum of exp(score).  Two disjoint sets of keys merge exactly, so
every algorithm of this package is a way to make partial results and one way to merge them.
A set without keys is (0, -inf), and so is the merge of two such sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results and gradients are added up: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


class Partial:
    """`out` (b, h, s, dv) and `lse` (b, h, s), natural log; both float32, or both float64.

    Without an `out` it is zeros for values of `head_dim`, which are made only if they are needed.
    """

    __slots__ = ("_head_dim", "_lse", "_out")

    def __init__(self, out: Tensor | None, lse: Tensor, head_dim: int = 0) -> None:
        self._out, self._lse, self._head_dim = out, lse, head_dim

    @property
    def out(self) -> Tensor:
        """The weighted mean of the values."""
        if self._out is None:
            self._out = self._lse.new_zeros((*self._lse.shape, self._head_dim))
        return self._out

    @property
    def lse(self) -> Tensor:
        """The natural logarithm of the sum of exp(score)."""
        return self._lse

    @staticmethod
    def empty(queries: Tensor, head_dim: int) -> Partial:
        """No keys yet, for `queries` (b, h, s, d) and values of `head_dim`."""
        shape, dtype = queries.shape[:3], wide(queries.dtype)
        return Partial(None, queries.new_full(shape, -torch.inf, dtype=dtype), head_dim)

    @staticmethod
    def of_sinks(sinks: Tensor, queries: Tensor, head_dim: int) -> Partial:
        """Attention sinks (h,) as one more key per head, whose value is zero."""
        nothing = Partial.empty(queries, head_dim)
        return Partial(nothing.out, nothing.lse.copy_(sinks.detach()[None, :, None]))

    def of_batch(self, batch: slice) -> Partial:
        """A view of some sequences."""
        return self._view(0, batch)

    def of_heads(self, heads: slice) -> Partial:
        """A view of some heads."""
        return self._view(1, heads)

    def _view(self, dim: int, part: slice) -> Partial:
        start, stop, _ = part.indices(self._lse.shape[dim])
        if stop - start == self._lse.shape[dim]:
            return self
        length = stop - start
        return Partial(self.out.narrow(dim, start, length), self._lse.narrow(dim, start, length))

    def add_(self, out: Tensor, lse: Tensor, row: int = 0, *, given: bool = False) -> None:
        """Merge another partial result, of the queries from `row` on, into this one, in place.

        With `given` nobody else uses `out` and `lse`: the first ones are kept as they are.
        """
        out, lse = out.to(self._lse.dtype), lse.to(self._lse.dtype)
        if given and self._out is None and out.shape[:3] == self._lse.shape:
            self._out, self._lse = out, lse  # saves two passes over them
            return
        rows = out.shape[2]
        into, known = self.out.narrow(2, row, rows), self._lse.narrow(2, row, rows)
        # clamped, as of two empties: -inf - -inf
        share = torch.sigmoid(lse - known.clamp_min(torch.finfo(lse.dtype).min))
        into.lerp_(out, share.unsqueeze(-1))
        torch.logaddexp(known, lse, out=known)


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
