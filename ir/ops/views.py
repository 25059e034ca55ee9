"""Reshapes as a reader would write them: `unflatten`, `flatten`, `unsqueeze`, `squeeze`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Dim: TypeAlias = tuple[int, tuple[int, ...]]  # its size, and the mesh axes that cut it


def reshaped(
    before: Sequence[Dim], after: Sequence[Dim], numbers: Sequence[int | None]
) -> str | None:
    """The method that makes dims `after` of dims `before`, or None if it takes a `reshape`.

    `numbers` has this rank's size of each dim of `after`, None where it must not be written.

    >>> b, s = (2, (0,)), (9, ())
    >>> reshaped([b, s, (64, (1,))], [b, s, (4, (1,)), (16, ())], [None, None, 2, 16])
    '.unflatten(-1, (-1, 16))'
    >>> reshaped([b, s, (4, ()), (16, ())], [b, s, (64, ())], [None, None, 64])
    '.flatten(2)'
    >>> reshaped([b, s], [b, (1, ()), s], [None, 1, None]), reshaped([b, (1, ()), s], [b, s], [])
    ('.unsqueeze(1)', '.squeeze(1)')
    >>> reshaped([b, (1, ()), s], [b, (1, ()), (1, ()), s], [])  # the first of several
    '.unsqueeze(1)'
    >>> reshaped([b, (1, ()), s, (64, ())], [b, s, (4, ()), (16, ())], [None, None, 4, 16])
    '.squeeze(1).unflatten(-1, (-1, 16))'
    """
    shorter = min(len(before), len(after))
    first = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    shorter -= first
    last = next((i for i in range(shorter) if before[-1 - i] != after[-1 - i]), shorter)
    old, new = before[first : len(before) - last], after[first : len(after) - last]
    dim = first if last else -1
    if not old and not new:
        return ""
    if last and [*old, *new] == [(1, ())]:
        dim = next(i for i in reversed(range(first + 1)) if not i or before[i - 1] != (1, ()))
    if not old and len(new) == 1:
        return f".unsqueeze({dim})"
    if old == [(1, ())] and not new:
        return f".squeeze({dim})"
    if len(new) == 1 and len(old) > 1:
        return f".flatten({first})" if not last else f".flatten({first}, {first + len(old) - 1})"
    if len(old) == 1 and len(new) > 1:
        sizes = numbers[first + 1 : first + len(new)]
        if None not in sizes:
            return f".unflatten({dim}, (-1, {', '.join(map(str, sizes))}))"
    return _squeezed(before, after, numbers)


def _squeezed(
    before: Sequence[Dim], after: Sequence[Dim], numbers: Sequence[int | None]
) -> str | None:
    """As `reshaped`, where first a dim of size 1 goes."""
    ones = [i for i, dim in enumerate(before) if dim == (1, ())]
    if len(ones) != 1 or (1, ()) in after:
        return None
    rest = reshaped([*before[: ones[0]], *before[ones[0] + 1 :]], after, numbers)
    return None if rest is None else f".squeeze({ones[0]}){rest}"


__all__ = ["Dim", "reshaped"]
