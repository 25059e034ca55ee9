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
from math import prod
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
    """The spec written `S0,R`: one state per mesh axis, outermost axis first.

    `Z1` is `S1` with slices in zigzag order, which `zigzag_dims` tells.
    """
    return tuple(parse_state(part.strip().replace("Z", "S")) for part in text.split(","))


def format_spec(spec: Spec) -> str:
    """Inverse of `parse_spec`, without the order of tokens.

    >>> format_spec((0, -1))
    'S0,R'
    """
    letters = {state: letter for letter, state in _STATES.items()}
    return ",".join(letters.get(state, f"S{state}") for state in spec)


def zigzag_dims(text: str) -> tuple[int, ...]:
    """The dims that a spec cuts in zigzag order.

    >>> zigzag_dims("S0,Z1,Z1")
    (1,)
    """
    found = [int(part.strip()[1:]) for part in text.split(",") if part.strip().startswith("Z")]
    return tuple(sorted(set(found)))


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


def to_zigzag(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`x` with `dim` permuted so that contiguous blocks are what `zigzag_order` gives each rank.

    Raises ValueError if the dim is not a multiple of twice the number of ranks.
    """
    return _permuted(x, dim, zigzag_order(sizes))


def from_zigzag(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Inverse of `to_zigzag`."""
    order = zigzag_order(sizes)
    return _permuted(x, dim, sorted(range(len(order)), key=order.__getitem__))


def _permuted(x: Tensor, dim: int, order: Sequence[int]) -> Tensor:
    if x.shape[dim] % len(order):
        raise ValueError(
            f"zigzag order cuts a sequence into {len(order)} equal chunks, but dim {dim} of"
            f" {tuple(x.shape)} has {x.shape[dim]} rows; pad it to a multiple"
        )
    chunks = x.unflatten(dim, (len(order), -1))
    index = torch.tensor(order, device=x.device)
    return chunks.index_select(dim, index).flatten(dim, dim + 1)


def trim_blocks(x: Tensor, dim: int, sizes: Sequence[int], size: int) -> Tensor:
    """Inverse of `pad_blocks`: the `size` rows without the padding of each block."""
    if x.shape[dim] == size:
        return x
    ways = sizes[0]
    if len(sizes) > 1:
        outer = x.unflatten(dim, (ways, -1))
        x = trim_blocks(outer, dim + 1, sizes[1:], -(-size // ways)).flatten(dim, dim + 1)
    return x.narrow(dim, 0, size)
