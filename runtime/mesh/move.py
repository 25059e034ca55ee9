"""A move of a value between the ranks of an axis: from place to place, whatever its gradient is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ...facts.spec import R, State, V, dual

Place: TypeAlias = State


@dataclass(frozen=True, slots=True)
class Move:
    """A primitive: from place to place; `size` is the true size of a source slice's dim.

    Slices of the dims in `zigzag` hold two chunks each, see `facts.blocks.zigzag_order`.
    """

    source: Place
    target: Place
    size: int | None = None
    zigzag: tuple[int, ...] = ()


def moves_between(
    source: State,
    target: State,
    source_size: int | None,
    target_size: int | None,
    zigzag: tuple[int, ...] = (),
) -> tuple[Move, Move]:
    """What the value takes from state `source` to `target`, and what its gradient takes back.

    The sizes are true sizes of the dims that the states name, where they name dims.
    """
    forward = Move(_place(source), _place(target), source_size, zigzag)
    return forward, Move(_place(dual(target)), _place(dual(source)), target_size, zigzag)


def _place(state: State) -> Place:
    return R if state == V else state


__all__ = ["Move", "Place", "moves_between"]
