"""Who attends whom, by the positions of the tokens: for keys of a cache, in any order.

Positions of queries are (b, t) and those of keys (b, s), int64 on the CPU; -1 is padding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .pieces import Piece, cut, fuse
from .scores import Scores
from .tokens import Run
from .work import Work

# One query each of more than so many sequences of different lengths is computed at once, under a
# mask, if at most half of the keys are masked: a kernel call per sequence would take longer.
_MANY = 4


def work_at(queries: Tensor, keys: Tensor, scores: Scores, device: torch.device) -> Work:
    """What to compute, in as few kernel calls as may be."""
    single = queries.shape[1] == 1 and len(queries) > _MANY
    if single and not (_all_rows_equal(queries) and _all_rows_equal(keys)):
        attended = scores.attended(queries, keys)
        if 2 * int(attended.sum()) >= attended.numel():
            return Work(attended=attended.to(device))
    return pieces_at(queries, keys, scores)


def pieces_at(queries: Tensor, keys: Tensor, scores: Scores) -> Work:
    """What to compute for queries at positions (b, t) over keys at positions (b, s), on the CPU.

    Keys go up and padding (-1) is behind them; queries may stand in any order.  Neighbouring
    sequences that need the same go together.
    """
    if len(queries) > 1 and _all_rows_equal(queries) and _all_rows_equal(keys):
        return Work.alike(_pieces(queries[0], keys[0], scores))
    parts: list[tuple[slice, tuple[Piece, ...]]] = []
    for i in range(len(queries)):
        pieces = _pieces(queries[i], keys[i], scores)
        if parts and parts[-1][1] == pieces:
            parts[-1] = (slice(parts[-1][0].start, i + 1), pieces)
        else:
            parts.append((slice(i, i + 1), pieces))
    return Work.of(parts)


def _all_rows_equal(x: Tensor) -> bool:
    return bool((x == x[:1]).all())


def _pieces(queries: Tensor, keys: Tensor, scores: Scores) -> tuple[Piece, ...]:
    """All allowed pairs of one sequence, queries (t,) and keys (s,)."""
    stored = keys[: int((keys >= 0).sum())]
    found: list[Piece] = []
    for run in _within_chunks(runs_of(queries), scores.chunk):
        found += _pieces_of_run(run, stored, scores)
    return fuse(tuple(found)) if scores.plain else tuple(found)


def _within_chunks(runs: Iterable[Run], chunk: int) -> Iterable[Run]:
    """The runs, cut where a chunk ends.

    >>> [(run.row, run.position, run.length) for run in _within_chunks([Run(0, 2, 7)], 4)]
    [(0, 2, 2), (2, 4, 4), (6, 8, 1)]
    """
    if not chunk:
        yield from runs
        return
    for run in runs:
        at, stop = run.position, run.position + run.length
        while at < stop:
            end = min(at - at % chunk + chunk, stop)
            yield Run(run.row + at - run.position, at, end - at, run.document)
            at = end


def _pieces_of_run(run: Run, keys: Tensor, scores: Scores) -> Iterable[Piece]:
    """One piece for the keys that every query of the run attends; the borders are cut exactly."""
    first, last = run.position, run.position + run.length - 1
    marks = torch.tensor([first - scores.window, last - scores.window, first, last])
    low, low_end, high_end, high = torch.searchsorted(keys, marks, right=True).tolist()
    if not scores.window:
        low = low_end = 0
    if not scores.causal:
        high_end = high = len(keys)
    if scores.chunk:  # all queries of a run are in one
        opening = first - first % scores.chunk
        own = torch.searchsorted(keys, torch.tensor([opening, opening + scores.chunk])).tolist()
        low, low_end = max(low, own[0]), max(low_end, own[0])
        high_end, high = min(high_end, own[1]), min(high, own[1])
    if low_end < high_end:
        start = int(keys[low_end])
        count = high_end - low_end
        yield Piece(run.row, run.length, low_end, count, first, start, "full")
        borders = [(low, low_end), (high_end, high)]
    else:
        borders = [(low, high)]
    for begin, end in borders:
        shifted = [r._replace(row=r.row + begin) for r in runs_of(keys[begin:end])]
        yield from cut((run,), tuple(shifted), scores.causal, scores.window, 0)


def runs_of(positions: Tensor) -> tuple[Run, ...]:
    """Neighbouring rows of `positions` (n,) that hold neighbouring tokens; -1 is in no run.

    >>> runs_of(torch.tensor([4, 5, -1, 0, 1, 7]))
    (Run(row=0, position=4, length=2, document=0), Run(row=3, position=0, length=2, document=0), \
Run(row=5, position=7, length=1, document=0))
    """
    if not len(positions):
        return ()
    before, after = positions[:-1], positions[1:]
    broken = (after != before + 1) | (before < 0)
    starts = [0, *(broken.nonzero().flatten() + 1).tolist()]
    ends = [*starts[1:], len(positions)]
    firsts = positions[starts].tolist()
    return tuple(
        Run(row, position, end - row)
        for row, end, position in zip(starts, ends, firsts, strict=True)
        if position >= 0
    )
