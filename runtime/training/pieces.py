"""What this rank holds of the tensors of the original model, as training sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Box: TypeAlias = tuple[slice, ...]  # of a tensor, from start to stop of each dim


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

    @property
    def box(self) -> Box:
        """Where it lies in the original, without padding."""
        pairs = zip(self.offsets, self.sizes, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)

    def is_whole(self, ranks: int) -> bool:
        """Does each of so many ranks hold all of the original?"""
        return self.copies == ranks and self.sizes == self.shape

    def rows(self, x: Tensor) -> Tensor:
        """Of a tensor of the same local shape a view of what is not padding."""
        return x[tuple(slice(0, size) for size in self.sizes)]


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter of the original, of which this rank holds `pieces`, seen by all ranks of a mesh.

    `held[r][i]` is what rank r, which is at `places[r]` of the mesh, holds of the original as its
    piece i; ranks that differ along the axes `copied[i]` alone hold the same.
    """

    pieces: tuple[Piece, ...]
    held: tuple[tuple[Box, ...], ...]
    copied: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]

    @property
    def original(self) -> str:
        """Its name."""
        return self.pieces[0].original

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the original."""
        return self.pieces[0].shape

    def gives(self, number: int, rank: int, to: int) -> bool:
        """Of the ranks that hold the same piece, is it this one that gives it to rank `to`?"""
        here, there = self.places[rank], self.places[to]
        return all(here[axis] == there[axis] for axis in self.copied[number])


def trained(pieces: Sequence[Piece]) -> list[Piece]:
    """Those that get gradients."""
    return [piece for piece in pieces if piece.trained]
