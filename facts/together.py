"""Which tensors of a block move together: in one collective, one behind the other in one buffer.

Planner and runtime both ask here, so that messages are counted as they are sent.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

# A collective takes tensors together until they have so many bytes.  Twice as many are live beside
# the tensors, packed and on their way.  At 25 GB/s, between nodes, they take 10 ms; 512 ranks in a
# ring have a latency of 2.5 ms, so that larger groups would save little.
GROUP_BYTES = 256 * 10**6

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Round(Generic[Key]):
    """One collective: its `key` (kind, axes, dtype), the tensors that it moves, by number, and its
    bytes."""

    key: Key
    members: tuple[int, ...]
    nbytes: float


def rounds(
    ways: Sequence[Sequence[tuple[Key, float]]], limit: float | None = None
) -> tuple[Round[Key], ...]:
    """The collectives that take each tensor along its way: (key, bytes) of one after another.

    Those with one key are one collective where ways allow it; of more than `limit` bytes
    together (`GROUP_BYTES` if it is None), several.

    >>> dp, tp = "all_gather dp", "all_gather tp"
    >>> [each.members for each in rounds([[(dp, 8)], [(tp, 8), (dp, 8)], [(tp, 8)]])]
    [(1, 2), (0, 1)]
    """
    at = [0] * len(ways)
    found: list[Round[Key]] = []
    while heads := _heads(ways, at):
        later = {key for i, way in enumerate(ways) for key, _ in way[at[i] + 1 :]}
        key = next((head for head in heads if head not in later), heads[0])
        members = [i for i, way in enumerate(ways) if at[i] < len(way) and way[at[i]][0] == key]
        sizes = {i: ways[i][at[i]][1] for i in members}
        for group in _bounded(sizes, GROUP_BYTES if limit is None else limit):
            found.append(Round(key, group, sum(sizes[i] for i in group)))
        for i in members:
            at[i] += 1
    return tuple(found)


def _heads(ways: Sequence[Sequence[tuple[Key, float]]], at: Sequence[int]) -> list[Key]:
    """What comes next on each way."""
    return list(dict.fromkeys(way[n][0] for way, n in zip(ways, at, strict=True) if n < len(way)))


def _bounded(sizes: Mapping[int, float], limit: float) -> list[tuple[int, ...]]:
    """The members in order, cut where a group would have more than `limit` bytes."""
    groups: list[list[int]] = []
    full = 0.0
    for member, size in sizes.items():
        if not groups or full + size > limit:
            groups.append([])
            full = 0.0
        groups[-1].append(member)
        full += size
    return [tuple(group) for group in groups]
