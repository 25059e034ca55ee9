"""What one rank computes of some queries and some keys, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...compat.torch import flash
from .kernels import Queries, attend, attend_backward
from .partial import Partial
from .pieces import Piece
from .scores import Mask, Scores


@dataclass(frozen=True, slots=True)
class Work:
    """Which queries attend which keys; false if none does.

    `parts` are neighbouring sequences of the batch, and the pieces that all of them compute.
    Where each sequence has one query, `attended` (b, s), on the device, may say instead which keys
    it attends; such work has no backward pass.
    """

    parts: tuple[tuple[slice, tuple[Piece, ...]], ...] = ()
    attended: Tensor | None = None

    @staticmethod
    def of(parts: Iterable[tuple[slice, tuple[Piece, ...]]]) -> Work:
        """Without the sequences that compute nothing."""
        return Work(tuple(part for part in parts if part[1]))

    @staticmethod
    def alike(pieces: tuple[Piece, ...]) -> Work:
        """The same pieces for all sequences."""
        return Work.of([(slice(None), pieces)])

    def __bool__(self) -> bool:
        return bool(self.parts) or self.attended is not None

    def attend(self, into: Partial, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> None:
        """Merge attention of `q` (b, hq, sq, d) over `k`, `v` (b, hkv, sk, d or dv) into `into`."""
        if self.attended is not None:
            _attend_marked(into, q, k, v, self.attended, scores)
        for batch, pieces in self.parts:
            attend(into.of_batch(batch), q[batch], k[batch], v[batch], pieces, scores)

    def attend_backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        queries: Queries,
        k: Tensor,
        v: Tensor,
        scores: Scores,
    ) -> None:
        """Add the gradients that it contributes to `grads` (dq, dk, dv), float32 or float64."""
        assert self.attended is None, "marked keys, in a backward pass"
        dq, dk, dv = grads
        for batch, pieces in self.parts:
            into, own = (dq[batch], dk[batch], dv[batch]), queries.of_batch(batch)
            attend_backward(into, own, k[batch], v[batch], pieces, scores)


def _attend_marked(
    into: Partial, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, scores: Scores
) -> None:
    """`Work.attend` of one query (b, hq, 1, d) of each sequence over its keys in `attended`."""
    # The query heads that share a key head stand in for queries: K and V are read once for all.
    heads = (k.shape[1], -1)
    q = q.unflatten(1, heads).squeeze(3)
    grouped = Partial(
        into.out.unflatten(1, heads).squeeze(3), into.lse.unflatten(1, heads).squeeze(3)
    )
    if q.device.type == "cpu" and scores.plain and q.shape[3] == v.shape[3]:
        grouped.add_(*_flash_with_mask(q, k, v, attended, scores.scale), given=True)
        return
    everything = Piece(0, q.shape[2], 0, k.shape[2], 0, 0, "full")
    attend(grouped, q, k, v, (everything,), replace(scores, mask=Mask(keys=attended)))


def _flash_with_mask(
    q: Tensor, k: Tensor, v: Tensor, attended: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) where all queries of a sequence attend the keys (b, s) that are True."""
    mask = torch.zeros(attended.shape, dtype=q.dtype).masked_fill_(~attended, -torch.inf)
    out, lse = flash(q, k, v, False, scale, mask[:, None, None])
    nothing = ~attended.any(1)[:, None, None]  # for which the kernel says 0
    return out, lse.masked_fill(nothing, -torch.inf)
