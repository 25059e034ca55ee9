"""Serving a sharded module: new tokens of a batch in, next-token logits out.

Everything here has full (unsharded) tensors that are the same on every rank.  A module that can be
served takes `input_ids` and `position_ids` (b, t) int64 and returns logits (b, 1, v) of the last
token of each sequence; its caches remember what came before.  A token is known by its position,
and position -1 is padding, so sequences of different lengths share a batch and the tokens of one
sequence may lie on the ranks in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...facts.phases import APPEND, DECODE, PREFILL, Phase
from ...facts.spec import parse_spec
from ..mesh.batches import check_indices
from ..mesh.given import check_tensor
from ..mesh.mesh import Mesh
from ..mesh.parts import ways
from .arrange import arrange, arrange_in_order
from .caches import Caches
from .program import Program, Served
from .prompts import checked_lengths


class Serving:
    """A conversation with `batch` sequences of up to `tokens` tokens each.

    The caches lie as the program wants them that ran last; before one runs that wants them
    otherwise they are converted (`recache.py`).
    """

    def __init__(
        self, served: Served, batch: int, tokens: int, total_tokens: int | None = None
    ) -> None:
        self._served = served
        self._caches = Caches(served, batch, tokens, total_tokens)

    @property
    def mesh(self) -> Mesh:
        """The ranks that serve."""
        return self._served.mesh

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self._caches.batch

    @property
    def tokens(self) -> int:
        """How many tokens of a sequence there may be."""
        return self._caches.tokens

    @property
    def stateful(self) -> bool:
        """Do layers keep states, so that no sequence can go back?"""
        return self._caches.stateful

    @property
    def lengths(self) -> Tensor:
        """Cached tokens of each sequence (batch,), int64 on the CPU."""
        return self._caches.lengths

    # --- what a user calls through the module, which says more -----------------------------------

    def prefill(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Start new sequences with prompts (b, t); logits (b, v)."""
        self._check_batch(input_ids, 2)
        counts = checked_lengths(lengths, input_ids, least=1)
        self._caches.clear()
        return self.step(PREFILL, input_ids, counts)

    def decode(self, tokens: Tensor) -> Tensor:
        """Continue every sequence with one token (b,); logits (b, v)."""
        self._check_batch(tokens, 1)
        return self.step(DECODE, tokens[:, None], torch.ones(self.batch, dtype=torch.int64))

    def append(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Continue the sequences with several tokens (b, t); logits (b, v)."""
        self._check_batch(input_ids, 2)
        return self.step(APPEND, input_ids, checked_lengths(lengths, input_ids))

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Keep only the first `lengths[i]` cached tokens of sequence i (b,)."""
        limits = torch.as_tensor(lengths).to("cpu", torch.int64)
        if limits.shape != (self.batch,) or bool((limits < 0).any()):
            raise ValueError(
                f"truncate takes a length of 0 or more for each of {self.batch} sequences, got"
                f" {limits.tolist()}"
            )
        self._caches.truncate(limits)

    # --- steps -----------------------------------------------------------------------------------

    def step(self, phase: Phase, ids: Tensor, counts: Tensor) -> Tensor:
        """Feed the first `counts[i]` of the tokens `ids[i]` to sequence i; logits (b, v).

        Rows without new tokens get meaningless logits.  More tokens than the phase was planned for
        go in several runs.  Raises CacheFullError if they do not fit.
        """
        self._caches.check_capacity(counts)
        self.lay_out(phase)
        program = self._served.programs[phase.name]
        limit = self._columns(program) or max(ids.shape[1], 1)
        logits: Tensor | None = None
        for start in range(0, max(int(counts.max()), 1), limit):
            stop = start + limit
            some = (counts - start).clamp(0, limit)
            new = self._run(program, ids[:, start:stop], some)
            fresh = (some > 0).to(new.device)[:, None]
            logits = new if logits is None else torch.where(fresh, new, logits)
        assert logits is not None
        return logits

    def lay_out(self, phase: Phase) -> None:
        """Bring the caches into the layout of the program for `phase`; see `Caches.lay_out`."""
        self._caches.lay_out(self._served.programs[phase.name].caches)

    def fill(self, tokens: int, phase: Phase = PREFILL) -> None:
        """Cache `tokens` random keys and values of each sequence, without a forward pass.

        For measurements: a step of `phase` over a long context can be timed without computing that
        context.
        """
        self._caches.clear()
        self._caches.check_capacity(torch.full((self.batch,), tokens))
        self.lay_out(phase)
        self._caches.fill(tokens)

    def _check_batch(self, ids: Tensor, ndim: int) -> None:
        check_tensor("input_ids" if ndim == 2 else "tokens", ids)
        if ids.ndim != ndim or ids.shape[0] != self.batch or ids.is_floating_point():
            raise ValueError(
                f"expected integer tokens ({self.batch}{', t' if ndim == 2 else ''}) for the"
                f" {self.batch} sequences of the cache, got {ids.dtype} {tuple(ids.shape)}"
            )
        program = next(iter(self._served.programs.values()))
        check_indices("input_ids" if ndim == 2 else "tokens", ids, program.tokens.high)

    def _columns(self, program: Program) -> int:
        """How many tokens of a sequence fit in one run; 0 is any number."""
        wanted = program.tokens
        if 1 in wanted.free and not self._caches.windowed:
            return 0
        step = 2 * ways(parse_spec(wanted.spec), self.mesh, 1)
        return wanted.shape[1] if step == 2 else max(wanted.shape[1] // step * step, 1)

    def _run(self, program: Program, ids: Tensor, counts: Tensor) -> Tensor:
        """One run of a program on the first `counts[i]` of the tokens `ids[i]`; logits (b, v)."""
        caches = self._caches
        order = self._arranged(program, counts)  # (rows, columns): which new token, or -1
        starts = caches.of_rows(caches.lengths)[:, None]
        positions = (starts + order).masked_fill(order < 0, -1)
        padded = torch.zeros(caches.rows, max(ids.shape[1], 1), dtype=torch.int64)
        padded[: self.batch, : ids.shape[1]] = ids
        given = padded.gather(1, order.clamp(min=0))
        caches.check_room(positions, parse_spec(program.tokens.spec), counts)
        logits = program.next_logits(self.mesh, given, positions)
        caches.lengths = caches.lengths + counts
        return logits[: self.batch]

    def _arranged(self, program: Program, counts: Tensor) -> Tensor:
        caches, wanted = self._caches, program.tokens
        sharing = ways(parse_spec(wanted.spec), self.mesh, 1)
        width = 0 if 1 in wanted.free else wanted.shape[1] // sharing
        step = -(-wanted.step[1] // sharing) if wanted.step else 1
        rows, starts = caches.of_rows(counts), caches.of_rows(caches.lengths)
        if caches.stateful:
            return arrange_in_order(rows, sharing, width=width, step=step)
        return arrange(starts, rows, sharing, balanced=caches.cut_tokens, width=width, step=step)
