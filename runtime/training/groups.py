"""Groups of parameters that an optimizer gives options of their own, by patterns of names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from .pieces import Piece

Groups: TypeAlias = Mapping[str, Mapping[str, Any]]  # options by pattern
Key: TypeAlias = tuple[str, str]  # the pattern of a group, "" for none, and its kind


def grouped(
    pieces: Sequence[Piece],
    groups: Groups,
    names: Collection[str],
    kind: Callable[[str], str] = lambda name: "",
) -> dict[Key, list[Any]]:
    """The parameters of each pattern and kind, and those of no pattern; groups of no name are left
    out.

    `names` are those of all trained originals, where other ranks hold other ones; `kind` says it of
    a name.  Raises ValueError for a pattern that matches nothing.
    """
    every = sorted({*names, *(piece.original for piece in pieces)})
    if unused := [p for p in groups if not any(fnmatchcase(name, p) for name in every)]:
        raise ValueError(
            f"no trained parameter matches {', '.join(unused)}; names are"
            f" {', '.join(every[:5])}, ..."
        )
    order = ["", *groups]
    used = {(pattern(name, groups), kind(name)) for name in every}
    members: dict[Key, list[Any]] = {
        key: [] for key in sorted(used, key=lambda key: (order.index(key[0]), key[1]))
    }
    for piece in pieces:
        members[pattern(piece.original, groups), kind(piece.original)].append(piece.tensor)
    return members


def pattern(name: str, patterns: Collection[str]) -> str:
    """The first pattern that a name matches; "" for none."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), "")


__all__ = ["Groups", "grouped", "pattern"]
