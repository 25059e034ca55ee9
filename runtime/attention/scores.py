"""How a score is made from a query and a key, and who may attend whom: `Scores` and `Mask`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pieces import Piece, cut, fuse
from .tokens import Layout, Run


@dataclass(frozen=True, slots=True)
class Mask:
    """What a layout does not know, as it differs between the sequences of a batch.

    Every tensor has one column per position of the whole sequence and is the same on all ranks.

    keys       (b, S) bool: False for keys that nobody attends (key padding)
    documents  (b, S) int: a query attends the keys of its own document only
    prefix     the first `prefix` positions are attended by all queries, even if causal
    """

    keys: Tensor | None = None
    documents: Tensor | None = None
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """softcap(q k^T scale) + bias, where the rules allow it.  Tensors as in `Mask`.

    causal, window  key <= query; key > query - window where window > 0
    chunk           key // chunk = query // chunk where chunk > 0; only over a cache
    bias            (b or 1, hq or 1, rows of q, S): columns are positions of keys
    slopes          (hq,): ALiBi, slopes * (key - query) is added, with |key - query| unless causal
    dbias           like bias: what backward adds its gradient to; None where nobody wants it
    bands           the device's kernels know positions: windows need not be cut into triangles
    """

    scale: float
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    bias: Tensor | None = None
    slopes: Tensor | None = None
    mask: Mask = Mask()
    dbias: Tensor | None = None
    chunk: int = 0
    bands: bool = False

    @property
    def plain(self) -> bool:
        """Whether fused kernels can do it: no more than scale, causal, window and prefix."""
        mask = (self.bias, self.slopes, self.mask.keys, self.mask.documents)
        return not self.softcap and all(x is None for x in mask)

    def attended(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys the queries attend by causal, window and chunk, from the positions of both,
        which broadcast; -1 is padding."""
        attended = (keys >= 0) & (queries >= 0)
        if self.causal:
            attended &= keys <= queries
        if self.window:
            attended &= keys > queries - self.window
        if self.chunk:
            attended &= keys // self.chunk == queries // self.chunk
        return attended

    def pieces(self, queries: Layout, q_rank: int, keys: Layout, k_rank: int) -> tuple[Piece, ...]:
        """What the queries of one shard attend of the keys of another."""
        return self.pieces_of(queries.runs[q_rank], keys.runs[k_rank])

    def pieces_of(self, q_runs: tuple[Run, ...], k_runs: tuple[Run, ...]) -> tuple[Piece, ...]:
        """What some runs of queries attend of some runs of keys."""
        bands = self.bands and (self.window > 0 or not self.plain)
        found = cut(q_runs, k_runs, self.causal, self.window, self.mask.prefix, bands)
        return fuse(found) if self.plain else found

    def of_heads(self, first: int, count: int) -> Scores:
        """The same for the query heads `first` to `first + count`."""
        slopes = None if self.slopes is None else self.slopes.narrow(0, first, count)
        bias, dbias = (
            x if x is None or x.shape[1] == 1 else x.narrow(1, first, count)
            for x in (self.bias, self.dbias)
        )
        return replace(self, slopes=slopes, bias=bias, dbias=dbias)

    def addend(self, piece: Piece, groups: tuple[int, int]) -> Tensor | None:
        """What is added to the scores of a piece, broadcastable to (b, hkv, group, sq, sk)."""
        total: Tensor | None = None
        if self.bias is not None:
            rows = self.bias.narrow(2, piece.q_row, piece.queries)
            total = rows.narrow(3, piece.k_position, piece.keys)
            total = total.unflatten(1, groups) if total.shape[1] > 1 else total.unsqueeze(1)
        if self.slopes is not None:
            distance = _distances(piece, self.slopes.device).to(self.slopes.dtype)
            if not self.causal:
                distance = -distance.abs()
            alibi = self.slopes.view(1, *groups, 1, 1) * distance
            total = alibi if total is None else total + alibi
        return total

    def add_bias_gradient(self, piece: Piece, grad: Tensor) -> None:
        """Add the gradient of a piece's scores (b, hkv, group, sq, sk) to `dbias`, if there is one.

        `grad` is that of the sum of scores and bias: softcap and scale come before the bias.
        """
        if self.dbias is None:
            return
        summand = grad.flatten(1, 2)
        for dim in (0, 1):
            if self.dbias.shape[dim] == 1:
                summand = summand.sum(dim, keepdim=True)
        rows = self.dbias.narrow(2, piece.q_row, piece.queries)
        rows.narrow(3, piece.k_position, piece.keys).add_(summand)

    def blocked(self, piece: Piece, device: torch.device) -> Tensor | None:
        """True where a pair of a piece must not attend, broadcastable to (b, 1, 1, sq, sk)."""
        blocked: Tensor | None = None
        if piece.rule != "full":
            ahead = _distances(piece, device)
            blocked = torch.zeros_like(ahead, dtype=torch.bool)
            if self.causal:
                blocked |= ahead > 0
            if self.window:
                blocked |= ahead <= -self.window
            blocked = blocked[None, None, None]
        if self.mask.keys is not None:
            padding = ~self.mask.keys.narrow(1, piece.k_position, piece.keys)
            padding = padding[:, None, None, None]
            blocked = padding if blocked is None else blocked | padding
        if self.mask.documents is not None:
            of_queries = self.mask.documents.narrow(1, piece.q_position, piece.queries)
            of_keys = self.mask.documents.narrow(1, piece.k_position, piece.keys)
            others = of_queries[:, None, None, :, None] != of_keys[:, None, None, None]
            blocked = others if blocked is None else blocked | others
        return blocked


def _distances(piece: Piece, device: torch.device) -> Tensor:
    """Position of the key less that of the query (sq, sk), int64."""
    q = torch.arange(piece.q_position, piece.q_position + piece.queries, device=device)
    k = torch.arange(piece.k_position, piece.k_position + piece.keys, device=device)
    return k - q[:, None]
