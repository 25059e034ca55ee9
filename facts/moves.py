"""What a conversion between two states takes: one table for planner and runtime, both passes.

Only three things can lie on the ranks of an axis: the whole (W), slices (S) or summands (P).  A
state says which of them the value is and which the gradient is, so a conversion a -> b is two
look-ups in one table: forward moves the value from a to b, backward the gradient from b to a.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from .spec import P, State, dual, is_shard

Holding: TypeAlias = Literal["W", "S", "P"]
Primitive: TypeAlias = Literal[
    "nothing", "slice", "mask", "all_gather", "all_to_all", "pad", "all_reduce", "reduce_scatter"
]

MOVES: dict[tuple[Holding, Holding], Primitive] = {
    ("W", "W"): "nothing",
    ("W", "S"): "slice",
    ("W", "P"): "mask",  # one rank keeps it, the others get zeros
    ("S", "W"): "all_gather",
    ("S", "S"): "all_to_all",
    ("S", "P"): "pad",  # with zeros where the other slices are
    ("P", "W"): "all_reduce",
    ("P", "S"): "reduce_scatter",
    ("P", "P"): "nothing",
}
# For these ranks talk, by one of the collectives of `collectives.py`
BETWEEN_RANKS: frozenset[Primitive] = frozenset(
    {"all_gather", "all_to_all", "all_reduce", "reduce_scatter"}
)
# Where a layer keeps the results of products for backward: of these moves of one the result is kept
# in its place, while what is gathered is gathered again
KEPT_MOVES: frozenset[Primitive] = frozenset({"all_to_all", "all_reduce", "reduce_scatter"})


def holding(state: State) -> Holding:
    """What a rank holds of a value in `state`; of its gradient: `holding(dual(state))`."""
    return "S" if is_shard(state) else "P" if state == P else "W"


def primitive(a: State, b: State) -> Primitive:
    """What moves a value from state `a` to `b` in forward; `nothing` between equal states.

    >>> from .spec import S, V
    >>> primitive(S(0), V), backward_primitive(S(0), V)  # FSDP
    ('all_gather', 'reduce_scatter')
    """
    return "nothing" if a == b else MOVES[holding(a), holding(b)]


def backward_primitive(a: State, b: State) -> Primitive:
    """What moves the gradient in backward of a conversion from state `a` to `b`."""
    return primitive(dual(b), dual(a))
