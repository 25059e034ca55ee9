"""Which rows of a cache a step computes: those that get a token, in a few sizes of batch."""

from __future__ import annotations

from collections.abc import Sequence


def bucket(active: Sequence[int], rows: int, parts: int, step: int = 1) -> list[int]:
    """The rows of a step in which the `active` ones of `rows` get a token, -1 for padding.

    Ranks have `parts` equal parts of the rows, and of the step's the like: each part has its own
    active rows first.  Parts have 1, 2, 4, ... rows, and all together a multiple of `step`; where
    that is no less, all rows in order.

    >>> bucket([1, 3, 6], 16, 2)
    [1, 3, 6, -1, -1, -1, -1, -1]
    >>> bucket([1, 3], 3, 1)
    [0, 1, 2]
    """
    size = rows // parts
    own = [[row for row in active if row // size == part] for part in range(parts)]
    most = max(1, *map(len, own))
    width = 1 << (most - 1).bit_length()
    while width * parts % step and width < size:
        width += 1
    if width >= size:
        return list(range(rows))
    return [row for part in own for row in [*part, *[-1] * (width - len(part))]]
