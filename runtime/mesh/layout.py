"""Tensors put into the blocks and the order in which ranks hold them (`facts/blocks.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...facts.blocks import zigzag_order


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
