"""What this rank holds of the tensors of the original model, as training sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of `original`, a tensor of `shape`, that a rank holds in `tensor`.

    Rows beyond `sizes` are padding; the others begin at `offsets` of the original.  `copies` ranks
    hold the same, those along the axes `copied`, of which this is number `copy`.  What is not
    `trained` is a buffer, or frozen.
    """

    original: str
    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: int
    copy: int
    copied: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Is it a parameter that gets a gradient?"""
        return self.tensor.requires_grad

    def is_whole(self, ranks: int) -> bool:
        """Does each of so many ranks hold all of the original?"""
        return self.copies == ranks and self.sizes == self.shape

    def rows(self, x: Tensor) -> Tensor:
        """Of a tensor of the same local shape a view of what is not padding."""
        return x[tuple(slice(0, size) for size in self.sizes)]


def trained(pieces: Sequence[Piece]) -> list[Piece]:
    """Those that get gradients."""
    return [piece for piece in pieces if piece.trained]
