"""Where a rank's slice of a tensor lies: specs, blocks, local shapes.

A spec has one state per mesh axis, outermost axis first, written `S0,R`: `R` whole, `S1` sharded
along dim 1, `P` summand of the value, `V` whole with a summand of the gradient.

Several axes on one dim cut it one after the other, major to minor, and every cut rounds up: 10
rows over `dp=2, tp=4` are 2 x 5 rows and then 2 x 4 x 2, so that adding or removing the minor axis
is always a step that the ranks of that axis do among themselves.  A block's tail beyond the
rows that exist is padding whose values mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

State: TypeAlias = int
Spec: TypeAlias = tuple[State, ...]

R: State = -1
P: State = -2
V: State = -3

_STATES = {"R": R, "P": P, "V": V}


def parse_state(text: str) -> State:
    """The state written `R`, `P`, `V` or `S0`, `S1`, ...; `S(d)` is `d` itself.

    >>> parse_state("S2"), parse_state("V") == V
    (2, True)
    """
    if text in _STATES:
        return _STATES[text]
    if len(text) > 1 and text[0] == "S" and text[1:].isdigit():
        return int(text[1:])
    raise ValueError(f"`{text}` is not a sharding state; expected R, P, V or S0, S1, ...")


def parse_spec(text: str) -> Spec:
    """The spec written `S0,R`: one state per mesh axis, outermost axis first."""
    return tuple(parse_state(part.strip()) for part in text.split(","))


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
    return tuple(part.rows for part in blocks(shape, spec, sizes, [0] * len(sizes)))


def pad_tail(x: Tensor, dim: int, rows: int) -> Tensor:
    """`x` with zeros appended along `dim` until it has `rows` rows; `x` itself if it has."""
    missing = rows - x.shape[dim]
    if missing == 0:
        return x
    if x.dtype == torch.bool:  # constant_pad_nd has no bool kernel for every layout
        return pad_tail(x.view(torch.uint8), dim, rows).view(torch.bool)
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])


def pad_blocks(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`x` with the padding of every block written out, ready to be cut into equal blocks."""
    ways = sizes[0]
    rows = -(-x.shape[dim] // ways)
    x = pad_tail(x, dim, ways * rows)
    if len(sizes) == 1:
        return x
    inner = pad_blocks(x.unflatten(dim, (ways, rows)), dim + 1, sizes[1:])
    return inner.flatten(dim, dim + 1)


def trim_blocks(x: Tensor, dim: int, sizes: Sequence[int], size: int) -> Tensor:
    """Inverse of `pad_blocks`: the `size` rows without the padding of each block."""
    if x.shape[dim] == size:
        return x
    ways = sizes[0]
    if len(sizes) > 1:
        outer = x.unflatten(dim, (ways, -1))
        x = trim_blocks(outer, dim + 1, sizes[1:], -(-size // ways)).flatten(dim, dim + 1)
    return x.narrow(dim, 0, size)
