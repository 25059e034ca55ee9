"""Which rows of a dim a rank holds: blocks, and the zigzag order of a sequence's chunks.

Several axes on one dim cut it one after the other, in mesh order, major to minor, and every cut
rounds up: 10 rows over `dp=2, tp=4` are 2 x 5 rows and then 2 x 4 x 2, so that adding or removing
the minor axis is always a step that the ranks of that axis do among themselves.  A block's tail
beyond the rows that exist is padding whose values mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .spec import Spec, State, is_shard


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start` to `stop` of a dim, held in `rows` rows of which the last may be padding."""

    start: int
    stop: int
    rows: int


def block(size: int, parts: Sequence[tuple[int, int]]) -> Block:
    """The block of a dim of `size` rows for `parts` = (ways, index) of each cut, major to minor.

    >>> block(10, [(2, 1), (4, 0)]), block(10, [(2, 1), (4, 2)])
    (Block(start=5, stop=7, rows=2), Block(start=9, stop=10, rows=2))
    """
    start, stop, rows = 0, size, size
    for ways, index in parts:
        rows = -(-rows // ways)
        start = min(start + index * rows, stop)
        stop = min(start + rows, stop)
    return Block(start, stop, rows)


def blocks(
    shape: Sequence[int], spec: Spec, sizes: Sequence[int], coordinates: Sequence[int]
) -> tuple[Block, ...]:
    """One block per dim for the rank at `coordinates` of a mesh of `sizes`."""
    cuts = list(zip(spec, sizes, coordinates, strict=True))
    return tuple(
        block(size, [(ways, index) for state, ways, index in cuts if state == dim])
        for dim, size in enumerate(shape)
    )


def local_shape(shape: Sequence[int], spec: Spec, sizes: Sequence[int]) -> tuple[int, ...]:
    """Shape of one rank's part, padding rows included.

    >>> local_shape((8, 50257), (0, 1), (2, 4))
    (4, 12565)
    """
    return tuple(
        -(-size // prod(n for state, n in zip(spec, sizes, strict=True) if state == dim))
        for dim, size in enumerate(shape)
    )


def moved_numel(gathered: Sequence[Any], states: tuple[State, State], ways: int) -> Any:
    """How many numbers a collective over `ways` ranks is called with that takes a tensor from one
    state to the other; `gathered` is the shape that a rank holds with its axes gathered.

    A dim that is cut comes in blocks of equal size, the padding of the last one included; an
    all-to-all holds one block of the dim that it cuts, for the other dim is whole only then.
    Sizes are ints, or arrays of them for many tensors at once.

    >>> moved_numel((8, 10), (1, -1), 4)  # 10 rows in blocks of 3 are gathered
    96
    """
    cut = [state for state in states if is_shard(state)]
    shape = [-(-n // ways) * ways if dim in cut else n for dim, n in enumerate(gathered)]
    return prod(shape) // (ways if len(cut) == 2 else 1)


def zigzag_order(sizes: Sequence[int]) -> tuple[int, ...]:
    """Which chunks of a sequence the ranks of axes of `sizes` hold, rank by rank.

    Over p ranks a sequence is cut into 2p chunks and rank r holds chunks r and 2p - 1 - r, so that
    all ranks have the same share of a causal mask.  A further axis cuts what a rank holds in
    the same way.

    >>> zigzag_order([2]), zigzag_order([2, 2])
    ((0, 3, 1, 2), (0, 7, 1, 6, 2, 5, 3, 4))
    """
    return _zigzag(tuple(range(2 * prod(sizes))), sizes)


def _zigzag(chunks: tuple[int, ...], sizes: Sequence[int]) -> tuple[int, ...]:
    if not sizes:
        return chunks
    ways, width = sizes[0], len(chunks) // (2 * sizes[0])
    parts = [chunks[i * width : (i + 1) * width] for i in range(2 * ways)]
    held = [_zigzag(parts[r] + parts[-1 - r], sizes[1:]) for r in range(ways)]
    return tuple(chunk for own in held for chunk in own)
