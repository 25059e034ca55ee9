"""How a value lies on the mesh: one state per mesh axis.

| state | value on each rank      | gradient on each rank   |
|-------|-------------------------|-------------------------|
| `R`   | whole                   | whole, the same on all  |
| `S(d)`| its slice along dim d   | its slice               |
| `P`   | a summand               | whole                   |
| `V`   | whole                   | a summand               |

A state is one small int so that specs are cheap to hash and compare by the ten thousand:
`R`, `P`, `V` are negative, `S(d)` is `d` itself.  `P` and `V` are each other's dual: the dual of
a state is the state of the gradient, and a conversion a -> b in forward is dual(b) -> dual(a)
in backward.

Several axes on one dim shard it in mesh order, major to minor: with `dp=2, tp=2` and both on
dim 0, rank (i, j) holds block 2 * i + j.  A dim of n rows over p ranks gives each rank
ceil(n / p) rows; where p does not divide n the last rows are padding that no rank reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

State: TypeAlias = int
Spec: TypeAlias = tuple[State, ...]

R: State = -1
P: State = -2
V: State = -3

_LETTER = {R: "R", P: "P", V: "V"}
_STATE = {letter: state for state, letter in _LETTER.items()}


def S(dim: int) -> State:
    """The state "sharded along `dim`"; `dim` counts from the front and is not negative."""
    if dim < 0:
        raise ValueError(f"S({dim}): dims count from 0")
    return dim


def is_shard(state: State) -> bool:
    """Is this state `S(d)` for some d?"""
    return state >= 0


def dual(state: State) -> State:
    """The state of the gradient of a value in `state`."""
    return V if state == P else P if state == V else state


def format_state(state: State) -> str:
    """`R`, `P`, `V` or `S0`, `S1`, ..."""
    return _LETTER.get(state) or f"S{state}"


def parse_state(text: str) -> State:
    """Inverse of `format_state`.

    >>> parse_state("S2"), parse_state("R") == R
    (2, True)
    """
    if text in _STATE:
        return _STATE[text]
    if len(text) > 1 and text[0] == "S" and text[1:].isdigit():
        return int(text[1:])
    raise ValueError(f"`{text}` is not a sharding state; expected R, P, V or S0, S1, ...")


def format_spec(spec: Spec) -> str:
    """`S0,R`: one state per mesh axis, outermost axis first."""
    return ",".join(format_state(state) for state in spec)


def parse_spec(text: str) -> Spec:
    """Inverse of `format_spec`."""
    return tuple(parse_state(part.strip()) for part in text.split(","))


def local_shape(shape: Sequence[int], spec: Spec, sizes: Sequence[int]) -> tuple[int, ...]:
    """Shape of one rank's part, padding rows included.

    >>> local_shape((8, 50257), (0, 1), (2, 4))
    (4, 12565)
    """
    return tuple(
        -(-size // prod(n for state, n in zip(spec, sizes, strict=True) if state == dim))
        for dim, size in enumerate(shape)
    )


def shard_ways(spec: Spec, sizes: Sequence[int]) -> int:
    """How many different slices `spec` cuts a value into."""
    return prod(n for state, n in zip(spec, sizes, strict=True) if is_shard(state))
