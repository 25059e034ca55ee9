"""Which rank holds which tokens of a sequence, in which order: `Layout`.

A layout is pure data, the same on every rank: nothing here communicates.  It moves tokens to shards
and back (`shard`, `unshard`), and whatever belongs to tokens with them: positions for RoPE, labels,
loss weights.  The attention functions read from it which queries may attend which keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...facts.blocks import block


class Run(NamedTuple):
    """`length` neighbouring tokens: rows from `row` of a shard hold positions from `position`."""

    row: int
    position: int
    length: int
    document: int = 0


_Span = tuple[int, int, int]  # position, length, document


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens of one sequence on `ranks` shards of `rows` rows each.

    `length` tokens have the positions from `start`; `runs[r]` are those of rank r, and a row in
    no run is padding, which nothing attends.  `documents` are the positions at which documents
    begin: a token attends its own document alone.  Made by `contiguous`, `zigzag` and `packed`.
    """

    length: int
    rows: int
    runs: tuple[tuple[Run, ...], ...]
    start: int = 0
    documents: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        held = sorted((run.position, run.length) for runs in self.runs for run in runs)
        stop = self.start
        for position, length in held:
            if position != stop or length < 1:
                raise ValueError(
                    f"layout: every token belongs into one row of one rank; after position"
                    f" {stop - 1} come {length} tokens from {position}"
                )
            stop += length
        if stop != self.start + self.length or self.start < 0:
            raise ValueError(
                f"layout: tokens {self.start} to {stop} are not {self.length} from 0 on"
            )
        for rank, runs in enumerate(self.runs):
            rows = [0, *(x for run in sorted(runs) for x in (run.row, run.row + run.length))]
            if any(a > b for a, b in pairwise([*rows, self.rows])):
                raise ValueError(f"layout: runs of rank {rank} overlap or leave {self.rows} rows")

    # --- making one --------------------------------------------------------------------------

    @staticmethod
    def contiguous(length: int, ranks: int, *, start: int = 0) -> Layout:
        """Rank r holds the r-th block of ceil(length / ranks) tokens.

        >>> Layout.contiguous(7, 2).positions(1)
        tensor([4, 5, 6, 0])
        """
        _check(length, ranks)
        blocks = [block(length, [(ranks, rank)]) for rank in range(ranks)]
        spans = [[(start + b.start, b.stop - b.start, 0)] for b in blocks]
        return _lay(length, spans, -(-length // ranks), start, (start,))

    @staticmethod
    def zigzag(length: int, ranks: int, *, start: int = 0) -> Layout:
        """Rank r holds chunks r and 2 ranks - 1 - r of 2 ranks chunks of equal (ceil) size.

        With a causal mask all ranks then have the same work.

        >>> Layout.zigzag(8, 2).positions(0)
        tensor([0, 1, 6, 7])
        """
        _check(length, ranks)
        spans = _zigzag(length, ranks, start, 0)
        return _lay(length, spans, 2 * -(-length // (2 * ranks)), start, (start,))

    @staticmethod
    def packed(document_lengths: Sequence[int], ranks: int) -> Layout:
        """Documents one after the other in one sequence, each cut zigzag over all ranks.

        The rank with which the zigzag begins moves on by one per document, so that short documents
        do not all land on the first ranks.  All shards have as many rows as the fullest.

        >>> layout = Layout.packed([4, 2], ranks=2)
        >>> layout.positions(0), layout.document_ids(0)
        (tensor([0, 3, 1]), tensor([0, 0, 1]))
        """
        starts = tuple(accumulate(document_lengths, initial=0))
        _check(starts[-1], ranks)
        if min(document_lengths, default=1) < 1:
            raise ValueError(f"layout: documents of at least one token, got {document_lengths}")
        spans: list[list[_Span]] = [[] for _ in range(ranks)]
        for document, (first, stop) in enumerate(pairwise(starts)):
            for rank, parts in enumerate(_zigzag(stop - first, ranks, first, document)):
                spans[(rank + document) % ranks] += parts
        rows = max(sum(length for _, length, _ in parts) for parts in spans)
        return _lay(starts[-1], spans, rows, 0, starts[:-1] or (0,))

    # --- from one to another -----------------------------------------------------------------

    def split(self, ways: int) -> Layout:
        """Each shard cut into `ways` consecutive parts: rank r * ways + i holds part i of rank r.

        For two axes, as `usp_attention` takes it: `Layout.zigzag(length, ring).split(ulysses)`.
        """
        rows = -(-self.rows // ways)
        parts = [_clip(runs, i * rows, (i + 1) * rows) for runs in self.runs for i in range(ways)]
        return Layout(self.length, rows, tuple(parts), self.start, self.documents)

    def join(self, ways: int) -> Layout:
        """The inverse: rank r holds the shards from r * ways to (r + 1) * ways, in this order."""
        if self.ranks % ways:
            raise ValueError(f"layout: {self.ranks} shards do not join {ways} at a time")
        joined = [
            _fuse(
                run._replace(row=run.row + i * self.rows)
                for i in range(ways)
                for run in self.runs[first + i]
            )
            for first in range(0, self.ranks, ways)
        ]
        return Layout(self.length, self.rows * ways, tuple(joined), self.start, self.documents)

    def then(self, more: Layout) -> Layout:
        """Shards of this layout with those of `more` behind them: a cache and new tokens."""
        if more.ranks != self.ranks or more.start != self.start + self.length:
            raise ValueError(
                f"layout: {more.ranks} shards from position {more.start} do not follow"
                f" {self.ranks} shards that end at position {self.start + self.length}"
            )
        if len(self.documents) > 1 or len(more.documents) > 1:
            raise NotImplementedError("layout: packed documents cannot be continued")
        runs = tuple(
            _fuse([*own, *(run._replace(row=run.row + self.rows) for run in others)])
            for own, others in zip(self.runs, more.runs, strict=True)
        )
        return Layout(
            self.length + more.length, self.rows + more.rows, runs, self.start, self.documents
        )

    # --- what a rank holds -------------------------------------------------------------------

    @property
    def ranks(self) -> int:
        """Number of shards."""
        return len(self.runs)

    def clip(self, rank: int, first: int, stop: int) -> tuple[Run, ...]:
        """The runs in rows `first` to `stop` of a shard, rows counted from `first`."""
        return _clip(self.runs[rank], first, stop)

    def tokens(self, rank: int) -> Tensor:
        """Index into the sequence for each row (rows,), int64; -1 for padding."""
        index = torch.full((self.rows,), -1, dtype=torch.int64)
        for row, position, length, _ in self.runs[rank]:
            first = position - self.start
            index[row : row + length] = torch.arange(first, first + length)
        return index

    def valid(self, rank: int) -> Tensor:
        """True where a row holds a token, False for padding (rows,)."""
        return self.tokens(rank) >= 0

    def positions(self, rank: int) -> Tensor:
        """Position of each row's token in its document (rows,), as RoPE needs it; 0 for padding."""
        index = torch.zeros(self.rows, dtype=torch.int64)
        for row, position, length, document in self.runs[rank]:
            first = position - (self.documents[document] if len(self.documents) > 1 else 0)
            index[row : row + length] = torch.arange(first, first + length)
        return index

    def document_ids(self, rank: int) -> Tensor:
        """Number of each row's document (rows,), int64; -1 for padding."""
        ids = torch.full((self.rows,), -1, dtype=torch.int64)
        for row, _, length, document in self.runs[rank]:
            ids[row : row + length] = document
        return ids

    # --- moving tokens -----------------------------------------------------------------------

    def shard(self, x: Tensor, dim: int, rank: int, fill: float = 0) -> Tensor:
        """The rows of `rank`: `x` has `length` tokens along `dim`, the result `rows`.

        Padding rows hold `fill`.  Differentiable; a copy.
        """
        if x.shape[dim] != self.length:
            raise ValueError(
                f"layout: dim {dim} of {tuple(x.shape)} must have {self.length} tokens"
            )
        index = self.tokens(rank)
        shape = [1] * x.ndim
        shape[dim] = self.rows
        padding = (index < 0).to(x.device).view(shape)
        if self.length == 0:
            return x.new_full([*x.shape[:dim], self.rows, *x.shape[dim:][1:]], fill)
        return x.index_select(dim, index.clamp(min=0).to(x.device)).masked_fill(padding, fill)

    def unshard(self, parts: Sequence[Tensor] | Tensor, dim: int) -> Tensor:
        """The sequence from all shards (a list by rank, or stacked along dim 0); undoes `shard`."""
        if len(parts) != self.ranks:
            raise ValueError(f"layout: {len(parts)} shards where there are {self.ranks}")
        sizes = [part.shape[dim] for part in parts]
        if any(size != self.rows for size in sizes):
            raise ValueError(
                f"layout: shards of {sizes} rows along dim {dim}, not {self.rows} each"
            )
        row_of = torch.empty(self.length, dtype=torch.int64)
        for rank, runs in enumerate(self.runs):
            for row, position, length, _ in runs:
                first, at = position - self.start, rank * self.rows + row
                row_of[first : first + length] = torch.arange(at, at + length)
        whole = torch.cat(list(parts), dim)
        return whole.index_select(dim, row_of.to(whole.device))

    def shard_labels(self, tokens: Tensor, dim: int, rank: int, ignore_index: int = -100) -> Tensor:
        """The next token of each of this rank's rows, shifted before it is sharded.

        `tokens` has the whole sequence along `dim`.  The last token of a document and padding rows
        get `ignore_index`.
        """
        return self.shard(self._next_tokens(tokens, dim, ignore_index), dim, rank, ignore_index)

    def shard_loss_weights(
        self,
        tokens: Tensor,
        dim: int,
        rank: int,
        ignore_index: int = -100,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Weights for this rank's `shard_labels`: 1 / (labels that count, over all ranks), or 0.

        The sum over all ranks of weight * loss is then the mean loss of the whole sequence, however
        the labels lie on the ranks.
        """
        labels = self._next_tokens(tokens, dim, ignore_index)
        counted = (labels != ignore_index).to(dtype)
        return self.shard(counted / counted.sum().clamp(min=1), dim, rank)

    def _next_tokens(self, tokens: Tensor, dim: int, ignore_index: int) -> Tensor:
        labels = torch.roll(tokens, -1, dim)
        ends = [*(first - 1 - self.start for first in self.documents[1:]), self.length - 1]
        index = torch.tensor(ends if self.length else [], dtype=torch.int64, device=tokens.device)
        return labels.index_fill(dim, index, ignore_index)


def _check(length: int, ranks: int) -> None:
    if length < 0 or ranks < 1:
        raise ValueError(f"layout: {length} tokens on {ranks} ranks")


def _zigzag(length: int, ranks: int, start: int, document: int) -> list[list[_Span]]:
    chunk = -(-length // (2 * ranks))

    def span(number: int) -> _Span:
        first = min(number * chunk, length)
        return start + first, min(first + chunk, length) - first, document

    return [[span(rank), span(2 * ranks - 1 - rank)] for rank in range(ranks)]


def _lay(
    length: int,
    spans: Sequence[Sequence[_Span]],
    rows: int,
    start: int,
    documents: tuple[int, ...],
) -> Layout:
    """Each rank's spans one after the other from row 0."""
    runs: list[tuple[Run, ...]] = []
    for parts in spans:
        row_starts = accumulate((size for _, size, _ in parts), initial=0)
        runs.append(
            _fuse(
                Run(row, position, size, document)
                for row, (position, size, document) in zip(row_starts, parts, strict=False)
            )
        )
    return Layout(length, rows, tuple(runs), start, documents)


def _clip(runs: Iterable[Run], first: int, stop: int) -> tuple[Run, ...]:
    """What lies in the rows `first` to `stop`, rows counted from `first`."""
    clipped: list[Run] = []
    for run in runs:
        begin, end = max(run.row, first), min(run.row + run.length, stop)
        if begin < end:
            position = run.position + begin - run.row
            clipped.append(Run(begin - first, position, end - begin, run.document))
    return tuple(clipped)


def _fuse(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Without empty runs; neighbours in row and position are one run."""
    fused: list[Run] = []
    for run in runs:
        last = fused[-1] if fused else None
        if last and (run.row, run.position, run.document) == (
            last.row + last.length,
            last.position + last.length,
            last.document,
        ):
            fused[-1] = last._replace(length=last.length + run.length)
        elif run.length:
            fused.append(run)
    return tuple(fused)
