"""Moves as an operator that a compiler does not look into: how compiled layers run them.

What `torch.compile` traces has no process groups: an axis is known by a name of its own (numbers
would become variables of the graph), and a move by its places, the true size of its source (-1: as
it is) and the dims in zigzag order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...facts.blocks import Block
from ...facts.moves import KEPT_MOVES, primitive
from .counter import Phase
from .move import Move

_F = TypeVar("_F", bound=Callable[..., Any])

breaks: dict[str, str] = {}
"""What no graph holds: names of functions, and for what they stand."""

_numbers = count()
_axes: weakref.WeakValueDictionary[str, Mover] = weakref.WeakValueDictionary()


class Mover(Protocol):
    """An axis, as moves need it."""

    @property
    def size(self) -> int:
        """Ranks."""
        ...

    def block(self, size: int) -> Block:
        """The rows of a dim of `size` that this rank holds."""
        ...

    def move(self, x: Tensor, move: Move, phase: Phase) -> Tensor:
        """Run one move."""
        ...


def known_as(axis: Mover, name: str) -> str:
    """A name by which operators find `axis`, as long as it lives: `name` and a number."""
    unique = f"{name} {next(_numbers)}"
    _axes[unique] = axis
    return unique


def axis_known_as(name: str) -> Any:
    """The axis that is known by this name."""
    return _axes[name]


def move_opaquely(x: Tensor, axis: str, forward: Move, backward: Move) -> Tensor:
    """`forward` over the axis that is `known_as` this, whose gradient takes `backward`."""
    return _move(x, axis, _words(forward), _words(backward), False)


def not_compiled(what: str) -> Callable[[_F], _F]:
    """Of a function: compiled layers are cut in graphs where they call it, because of `what`."""

    def mark(function: _F) -> _F:
        breaks[function.__name__] = what
        outside: Any = torch.compiler.disable(function, reason=what)
        return outside

    return mark


def is_kept(words: Sequence[int]) -> bool:
    """Is the result of a move kept where what it moves is (see `KEPT_MOVES`)?"""
    return primitive(*words[:2]) in KEPT_MOVES


def _words(move: Move) -> list[int]:
    return [move.source, move.target, -1 if move.size is None else move.size, *move.zigzag]


def _read(words: Sequence[int]) -> Move:
    source, target, size, *zigzag = words
    return Move(source, target, None if size < 0 else size, tuple(zigzag))


@torch.library.custom_op("shardwright::move", mutates_args=())
def _move(x: Tensor, axis: str, there: list[int], back: list[int], in_backward: bool) -> Tensor:
    moved = _axes[axis].move(x, _read(there), "backward" if in_backward else "forward")
    return moved.clone() if moved is x else moved.contiguous()


@_move.register_fake
def _(x: Tensor, axis: str, there: list[int], back: list[int], in_backward: bool) -> Tensor:
    move, over = _read(there), _axes[axis]
    shape = list(x.shape)
    if move.source >= 0:
        whole = shape[move.source] * over.size
        shape[move.source] = whole if move.size is None else move.size
    if move.target >= 0:
        shape[move.target] = over.block(shape[move.target]).rows
    return x.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.axis, ctx.there, ctx.back, ctx.in_backward = inputs


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    moved = _move(grad, ctx.axis, ctx.back, ctx.there, not ctx.in_backward)
    return moved, None, None, None, None


_move.register_autograd(_gradient, setup_context=_keep)


__all__ = ["axis_known_as", "breaks", "is_kept", "known_as", "move_opaquely", "not_compiled"]
