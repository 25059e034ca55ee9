"""What is made of an object once, and forgotten with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import ref

Of = TypeVar("Of")
Made = TypeVar("Made")


def once_for_each(make: Callable[[Of], Made]) -> Callable[[Of], Made]:
    """`make`, which is called once for each object, as long as that lives.

    Objects are told apart by identity: hashing a graph or a node means hashing all that is in it,
    dearer than most that is made of them.
    """
    known: dict[int, tuple[ref[Of], Made]] = {}

    @wraps(make)
    def remembered(one: Of) -> Made:
        key = id(one)
        there = known.get(key)
        if there is not None and there[0]() is one:
            return there[1]
        made = make(one)
        known[key] = (ref(one, lambda _: known.pop(key, None)), made)
        return made

    return remembered


__all__ = ["once_for_each"]
