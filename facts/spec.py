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
in backward (`moves.py` has what runs then).

A spec is written `S0,R`, outermost axis first.  Where slices of a dim are in zigzag order
(`blocks.py`) its state is written `Z1` in the tables of a generated module.
"""

from __future__ import annotations

from functools import cache
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


@cache
def parse_spec(text: str) -> Spec:
    """Inverse of `format_spec`; `Z1` is `S1`, and `zigzag_dims` tells that it was written so.

    >>> parse_spec("S0,Z1") == (S(0), S(1)), format_spec((0, -1))
    (True, 'S0,R')
    """
    return tuple(parse_state(part.strip().replace("Z", "S")) for part in text.split(","))


@cache
def zigzag_dims(text: str) -> tuple[int, ...]:
    """The dims that a written spec cuts in zigzag order.

    >>> zigzag_dims("S0,Z1,Z1")
    (1,)
    """
    found = [int(part.strip()[1:]) for part in text.split(",") if part.strip().startswith("Z")]
    return tuple(sorted(set(found)))
