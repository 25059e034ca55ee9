"""Which queries attend which keys, cut into pieces that a fused kernel can do without a mask.

The allowed pairs of a run of queries and a run of keys are bounded by two diagonals: key <= query
(causal) and key > query - window.  Between cuts at the right positions every diagonal crosses
whole squares, so the area is rectangles in which everything is allowed and squares of which
one triangle is:

    full      everything
    causal    key i of the square for queries i, i + 1, ...
    window    key i of the square for queries ..., i - 1, i: a causal one with both sides reversed
    band      whatever the positions say: for windows too narrow to be worth triangles, and for
              kernels that know positions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

from .tokens import Run

Rule: TypeAlias = Literal["full", "causal", "window", "band"]

# A window of up to so many keys is computed with masks, in blocks of `_BAND_QUERIES`: triangles
# would be many small kernel calls.  On one CPU thread (1024 queries, 8 heads of 64) both take the
# same time at 17 to 33 keys, and blocks of 64 queries take half the time of 256.
_NARROW = 32
_BAND_QUERIES = 64


class Piece(NamedTuple):
    """Rows `q_row`.. of the queries against rows `k_row`.. of the keys, under one rule.

    Positions are those of the first row; rows and positions go up together except in pieces
    that `fuse` made, which only kernels that need no positions may take.
    """

    q_row: int
    queries: int
    k_row: int
    keys: int
    q_position: int
    k_position: int
    rule: Rule


@lru_cache(maxsize=4096)
def cut(
    q_runs: tuple[Run, ...],
    k_runs: tuple[Run, ...],
    causal: bool,
    window: int,
    prefix: int,
    bands: bool = False,
) -> tuple[Piece, ...]:
    """All pairs that may attend, each in exactly one piece; none empty.

    Keys before position `prefix` are attended by every query of their document.  With `bands` what
    two runs have of one another is one piece, however many diagonals cross it.
    """
    of_document: dict[int, list[Run]] = {}
    for k in k_runs:
        of_document.setdefault(k.document, []).append(k)
    return tuple(
        piece
        for q in q_runs
        for k in of_document.get(q.document, ())
        for piece in _cut_with_prefix(q, k, causal, window, prefix, _band if bands else _cut)
    )


@lru_cache(maxsize=4096)
def fuse(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The same pairs in fewer pieces, where the rows are neighbours though positions are not."""
    full = [piece for piece in pieces if piece.rule == "full"]
    full = _fuse_keys(full)
    full = _fuse_queries(full)
    causal = [piece for piece in pieces if piece.rule == "causal"]
    causal, full = _fuse_triangles(causal, full)
    rest = [piece for piece in pieces if piece.rule in ("window", "band")]
    return (*full, *causal, *rest)


def _cut_with_prefix(
    q: Run, k: Run, causal: bool, window: int, prefix: int, cut_run: Callable[..., Iterator[Piece]]
) -> Iterator[Piece]:
    common = min(max(prefix - k.position, 0), k.length)
    if common:
        yield Piece(q.row, q.length, k.row, common, q.position, k.position, "full")
    if common < k.length:
        rest = Run(k.row + common, k.position + common, k.length - common)
        yield from cut_run(q, rest, causal, window)


def _band(q: Run, k: Run, causal: bool, window: int) -> Iterator[Piece]:
    """One piece of the queries and keys that have anything of one another."""
    start, end = q.position, q.position + q.length
    low, high = k.position, k.position + k.length
    if causal:
        start, high = max(start, low), min(high, end)
    if window:
        end, low = min(end, high + window - 1), max(low, start - window + 1)
    if start >= end or low >= high:
        return
    crossed = causal and high - 1 > start, window > 0 and low <= end - 1 - window
    rule: Rule = "band" if any(crossed) else "full"
    if crossed == (True, False) and (start, end) == (low, high):
        rule = "causal"
    q_row, k_row = q.row + start - q.position, k.row + low - k.position
    yield Piece(q_row, end - start, k_row, high - low, start, low, rule)


def _cut(q: Run, k: Run, causal: bool, window: int) -> Iterator[Piece]:
    first, stop = k.position, k.position + k.length
    cuts = {q.position, q.position + q.length}
    if causal:
        cuts |= {first, stop}
    if window:
        cuts |= {first + window - 1, stop + window - 1}
    inside = sorted(x for x in cuts if q.position <= x <= q.position + q.length)
    for start, end in _steps(inside, window):
        for low, high, rule in _keys_of(start, end, causal, window):
            low = first if low is None else max(low, first)
            high = stop if high is None else min(high, stop)
            if low < high:
                q_row, k_row = q.row + start - q.position, k.row + low - first
                yield Piece(q_row, end - start, k_row, high - low, start, low, rule)


def _steps(cuts: list[int], window: int) -> Iterator[tuple[int, int]]:
    step = 0 if not window else window - 1 if window > _NARROW else _BAND_QUERIES
    for start, end in pairwise(cuts):
        if not step:
            yield start, end
        for at in range(start, end, step) if step else ():
            yield at, min(at + step, end)


def _keys_of(
    start: int, end: int, causal: bool, window: int
) -> Iterator[tuple[int | None, int | None, Rule]]:
    """Ranges of key positions for the queries `start` to `end`; None is unbounded."""
    if end - start == 1:  # one query: no diagonal to care for
        yield start - window + 1 if window else None, start + 1 if causal else None, "full"
        return
    if window and window <= _NARROW:
        yield start - window + 1, end, "band"
        if not causal:
            yield end, None, "full"
        return
    if window:
        yield start - window + 1, end - window + 1, "window"
    yield end - window + 1 if window else None, start if causal else None, "full"
    if causal:
        yield start, end, "causal"


def _fuse_keys(pieces: list[Piece]) -> list[Piece]:
    """Full pieces of the same queries whose keys are neighbours become one."""
    fused: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.q_row, p.queries, p.k_row)):
        last = fused[-1] if fused else None
        if last and (last.q_row, last.queries, last.k_row + last.keys) == piece[:3]:
            fused[-1] = last._replace(keys=last.keys + piece.keys)
        else:
            fused.append(piece)
    return fused


def _fuse_queries(pieces: list[Piece]) -> list[Piece]:
    """Full pieces of the same keys whose queries are neighbours become one."""
    turned = [_turned(piece) for piece in pieces]
    return [_turned(piece) for piece in _fuse_keys(turned)]


def _turned(piece: Piece) -> Piece:
    q_row, queries, k_row, keys, q_position, k_position, rule = piece
    return Piece(k_row, keys, q_row, queries, k_position, q_position, rule)


def _fuse_triangles(causal: list[Piece], full: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Two triangles on one diagonal and the rectangle between them become one triangle."""
    rectangles = {piece[:4]: piece for piece in full}
    fused: list[Piece] = []
    for piece in sorted(causal, key=lambda p: p.q_row):
        last = fused[-1] if fused else None
        if last and (last.q_row + last.queries, last.k_row + last.keys) == piece[0:3:2]:
            between = (piece.q_row, piece.queries, last.k_row, last.keys)
            if rectangles.pop(between, None):
                size = last.queries + piece.queries
                fused[-1] = last._replace(queries=size, keys=size)
                continue
        fused.append(piece)
    return fused, list(rectangles.values())
