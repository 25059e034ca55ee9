"""The device mesh: named axes, outermost (slowest link) first.

Words: an *axis* belongs to the mesh, a *dim* to a tensor, a *rank* is a process.
"""

from __future__ import annotations

import keyword
from dataclasses import dataclass
from math import prod

MOST_RANKS = 2**20  # ten times the largest cluster that was built


@dataclass(frozen=True, slots=True)
class Mesh:
    """A grid of ranks: `Mesh((("dp", 4), ("tp", 2)))` is 8 ranks, rank = 2 * dp + tp.

    Invariants: at least one axis; names are distinct identifiers; sizes are at least 1.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not self.axes:
            raise ValueError("a mesh needs at least one axis")
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names) or not all(map(can_be_axis, names)):
            raise ValueError(f"mesh axis names must be distinct identifiers, got {names}")
        if any(size < 1 for _, size in self.axes):
            raise ValueError(f"mesh axis sizes must be at least 1, got {self.axes}")

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names, outermost first."""
        return tuple(name for name, _ in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Axis sizes, outermost first."""
        return tuple(size for _, size in self.axes)

    @property
    def ranks(self) -> int:
        """Number of ranks in the mesh."""
        return prod(self.sizes)

    def stride(self, axis: int) -> int:
        """Distance in rank numbers between neighbours along axis number `axis`.

        >>> Mesh((("dp", 4), ("tp", 2))).stride(0)
        2
        """
        return prod(self.sizes[axis + 1 :])

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes)


def can_be_axis(name: str) -> bool:
    """Generated modules call axes by their names."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
