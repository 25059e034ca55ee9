"""Are parameters still what copies of them were made of?  So evaluation makes each copy once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .weights import Item

All = Callable[[bool], bool]
"""Is it so on all ranks?  A number that ranks exchange."""


class Unchanged:
    """Remembers the values of parameters, by a few numbers of each shard.

    Versions of tensors would not do: loops write weights by way of `.data`, which changes none
    (averaged weights, put in place for an evaluation).
    """

    def __init__(self, everywhere: All) -> None:
        self._everywhere = everywhere
        self._prints: Tensor | None = None

    def forget(self) -> None:
        """The parameters are about to change."""
        self._prints = None

    @torch.no_grad()
    def since(self, items: Sequence[Item]) -> bool:
        """Are the parameters of `items` on all ranks what they were when this was asked last?"""
        now = torch.stack([_print(item.source()) for item in items]).cpu()
        same = self._prints is not None and torch.equal(now, self._prints)
        self._prints = now
        return self._everywhere(same)


def _print(x: Tensor) -> Tensor:
    """Numbers (3,) in float64 that other values, or the same at other places, would not have."""
    x = torch.view_as_real(x) if x.is_complex() else x
    rows = x.reshape(-1, max(x.shape[-1], 1)) if x.ndim else x.reshape(1, 1)
    by_row, by_column = (rows.sum(dim, dtype=torch.float64) for dim in (1, 0))
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return torch.stack([norm, _weighed(by_row), _weighed(by_column)])


def _weighed(x: Tensor) -> Tensor:
    return x.dot(torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device).sqrt())


__all__ = ["All", "Unchanged"]
