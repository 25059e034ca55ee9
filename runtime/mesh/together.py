"""Several tensors in one collective: packed into one buffer, moved, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ...facts.moves import primitive
from .collectives import Axis, join_blocks, split_blocks
from .counter import Phase
from .layout import trim_blocks
from .move import Move
from .transfers import Transfer

_Unpack: TypeAlias = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Together:
    """A collective under way."""

    transfer: Transfer
    unpack: _Unpack

    def finish(self) -> list[Tensor]:
        """Wait for the results: whole tensors in storages of their own, others in one."""
        return self.unpack(self.transfer.finish())


def start_together(
    axis: Axis, xs: Sequence[Tensor], moves: Sequence[Move], phase: Phase, dtype: torch.dtype
) -> Together:
    """Start the collective that takes each of `xs` along its move, in `dtype`.

    The moves are of one kind, along any dims; tensors must not change before it is finished.
    """
    match primitive(moves[0].source, moves[0].target):
        case "all_gather":
            return _start_gather(axis, xs, moves, phase, dtype)
        case "all_reduce":
            return _start_all_reduce(axis, xs, phase, dtype)
        case "reduce_scatter":
            rows, shapes = _packed_rows(axis, xs, moves, dtype)
            return Together(axis.start("reduce_scatter", rows, phase), _apart(shapes))
        case "all_to_all":
            rows, shapes = _packed_rows(axis, xs, moves, dtype)
            transfer = axis.start("all_to_all", rows, phase)
            return Together(transfer, _rows_apart(axis, shapes, moves))
        case _:
            raise ValueError(f"axis `{axis.name}`: {moves[0]} is no collective")


def _start_gather(
    axis: Axis, xs: Sequence[Tensor], moves: Sequence[Move], phase: Phase, dtype: torch.dtype
) -> Together:
    """An all-gather of `xs`, packed where they will lie in its result."""
    shapes = [tuple(x.shape) for x in xs]
    if len(xs) == 1:
        transfer = axis.start("all_gather", xs[0].to(dtype).contiguous(), phase)
    else:
        sizes = [x.numel() for x in xs]
        out = xs[0].new_empty((axis.size, sum(sizes)), dtype=dtype)
        own = out[axis.rank]
        for x, place in zip(xs, own.split(sizes), strict=True):
            place.view(x.shape).copy_(x)
        transfer = axis.start("all_gather", own, phase, out)
    return Together(transfer, _rows_apart(axis, shapes, moves))


def _start_all_reduce(
    axis: Axis, xs: Sequence[Tensor], phase: Phase, dtype: torch.dtype
) -> Together:
    alone = len(xs) == 1
    flat = xs[0].to(dtype) if alone else _flat(xs, dtype)
    transfer = axis.start("all_reduce", flat, phase, None if alone else flat)
    return Together(transfer, _apart([tuple(x.shape) for x in xs]))


def _flat(xs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The numbers of all, one tensor behind the other."""
    sizes = [x.numel() for x in xs]
    flat = xs[0].new_empty(sum(sizes), dtype=dtype)
    for x, place in zip(xs, flat.split(sizes), strict=True):
        place.view(x.shape).copy_(x)
    return flat


def _packed_rows(
    axis: Axis, xs: Sequence[Tensor], moves: Sequence[Move], dtype: torch.dtype
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Row i holds what goes to rank i of each tensor, one behind the other; shapes of that."""
    views = [split_blocks(x, move, axis) for x, move in zip(xs, moves, strict=True)]
    shapes = [tuple(view.shape[1:]) for view in views]
    if len(views) == 1:
        return views[0].to(dtype).contiguous(), shapes
    sizes = [prod(shape) for shape in shapes]
    rows = xs[0].new_empty((axis.size, sum(sizes)), dtype=dtype)
    for view, place in zip(views, rows.split(sizes, dim=1), strict=True):
        place.unflatten(1, view.shape[1:]).copy_(view)
    return rows, shapes


def _apart(shapes: Sequence[tuple[int, ...]]) -> _Unpack:
    """Views of one buffer."""
    sizes = [prod(shape) for shape in shapes]

    def unpack(flat: Tensor) -> list[Tensor]:
        parts = flat.view(-1).split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return unpack


def _rows_apart(axis: Axis, shapes: Sequence[tuple[int, ...]], moves: Sequence[Move]) -> _Unpack:
    """The tensors whose blocks stand in the rows, each joined in a storage of its own."""
    sizes = [prod(shape) for shape in shapes]

    def unpack(rows: Tensor) -> list[Tensor]:
        if len(shapes) == 1:
            # blocks of one column may be joined as a view: a weight that comes alone in backward
            # must lie as it lay when it came with others
            return [join_blocks(rows.view(axis.size, *shapes[0]), moves[0], axis).contiguous()]
        parts = zip(rows.split(sizes, dim=1), shapes, moves, strict=True)
        return [_joined(part.unflatten(1, shape), move, axis) for part, shape, move in parts]

    return unpack


def _joined(rows: Tensor, move: Move, axis: Axis) -> Tensor:
    """`join_blocks` of blocks that lie apart."""
    dim, shape = move.source, list(rows.shape[1:])
    whole = rows.new_empty((*shape[:dim], axis.size * shape[dim], *shape[dim + 1 :]))
    whole.unflatten(dim, (axis.size, shape[dim])).movedim(dim, 0).copy_(rows)
    return whole if move.size is None else trim_blocks(whole, dim, axis.sizes, move.size)
