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
from .captured import Graphs
from .program import Program, Served
from .prompts import checked_lengths
from .sampling import Choice
from .stepping import Stepper


class Serving:
    """A conversation with `batch` sequences of up to `tokens` tokens each.

    The caches lie as the program wants them that ran last; before one runs that wants them
    otherwise they are converted (`recache.py`).
    """

    def __init__(
        self,
        served: Served,
        batch: int,
        tokens: int,
        total_tokens: int | None = None,
        capture: bool | None = None,
    ) -> None:
        graphs = Graphs(capture, served.mesh.device, *served.models)
        self._served, self._graphs = served, graphs
        self._caches = self._empty(batch, tokens, total_tokens)
        self._steppers: dict[str, Stepper] = {}
        self._needs_host: dict[int, str] = {}  # by program, why the host must lead its steps
        self._in_use = torch.zeros(batch, dtype=torch.bool)

    def _empty(self, batch: int, tokens: int, total_tokens: int | None) -> Caches:
        return Caches(self._served, batch, tokens, total_tokens)

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

    def suits(self, batch: int, tokens: int, capture: bool | None) -> bool:
        """Is there room for a batch of sequences, and are steps captured as asked for?"""
        enough = self.batch == batch and self.tokens >= tokens
        return enough and capture in (None, self._graphs.wanted)

    @property
    def stateful(self) -> bool:
        """Do layers keep states, so that no sequence can go back?"""
        return self._caches.stateful

    def clear(self) -> None:
        """Forget all tokens."""
        self._caches.clear()

    @property
    def lengths(self) -> Tensor:
        """Cached tokens of each sequence (batch,), int64 on the CPU."""
        return self._caches.lengths

    # --- what a user calls through the module, which says more -----------------------------------

    def prefill(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Start new sequences with prompts (b, t); logits (b, v)."""
        self._check_batch(input_ids, 2)
        counts = checked_lengths(lengths, input_ids, least=1)
        self.clear()
        self._in_use.fill_(True)
        return self.step(PREFILL, input_ids, counts)

    def decode(self, tokens: Tensor) -> Tensor:
        """Continue every sequence with one token (b,); logits (b, v)."""
        self._check_batch(tokens, 1)
        if not bool(self._in_use.any()):
            self._in_use.fill_(True)
        if self.follows(DECODE):
            return self.step(DECODE, tokens[:, None].cpu(), self._in_use.to(torch.int64))
        counts = self._in_use.to(torch.int64)
        self._caches.check_capacity(counts)
        return self._stepper(DECODE).logits(tokens[:, None], counts)

    def append(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Continue the sequences with several tokens (b, t); logits (b, v)."""
        self._check_batch(input_ids, 2)
        counts = checked_lengths(lengths, input_ids)
        self._in_use |= counts > 0
        return self.step(APPEND, input_ids, counts)

    def admit(
        self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[list[int], Tensor]:
        """Begin sequences with prompts (n, t) beside those that are there.

        Returns which sequences they are, and the logits (n, v) of each.
        """
        check_tensor("input_ids", input_ids)
        counts = checked_lengths(lengths, input_ids, least=1)
        free = (~self._in_use).nonzero().flatten()[: len(counts)]
        if len(free) < len(counts):
            raise ValueError(
                f"{len(counts)} sequences cannot join, as {len(free)} of {self.batch} are free;"
                " `free` those that have ended, or make the cache with a larger batch"
            )
        ids = torch.zeros(self.batch, input_ids.shape[1], dtype=torch.int64)
        ids[free] = input_ids.cpu().to(torch.int64)
        self._check_batch(ids, 2)
        of_all = torch.zeros(self.batch, dtype=torch.int64).index_copy(0, free, counts)
        logits = self.step(PREFILL, ids, of_all)
        self._in_use[free] = True
        return free.tolist(), logits[free.to(logits.device)]

    def free(self, sequence: int) -> None:
        """Forget a sequence, whose place another may take."""
        if not 0 <= sequence < self.batch or not self._in_use[sequence]:
            raise ValueError(
                f"sequence {sequence} is none of {self._in_use.nonzero().flatten().tolist()}, which"
                " are there"
            )
        limits = self.lengths.clone()
        limits[sequence] = 0
        self._caches.truncate(limits)
        self._in_use[sequence] = False

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

    def first(self, logits: Tensor, choice: Choice, generator: torch.Generator | None) -> Tensor:
        """The tokens (b,) that follow `logits` (b, v), on the CPU and the same on all ranks."""
        return self._stepper(DECODE).first(logits, choice, generator)

    def draw(
        self,
        tokens: Tensor,
        alive: Tensor,
        most: int,
        choice: Choice,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The next tokens (n, b), n from 1 to `most`, of sequences that are `alive` (b,).

        `tokens` (b,) are those before them, not cached yet; the last ones that are returned are
        not either.  Sequences that have ended go on with padding; rows end where all have.
        """
        if self.follows(DECODE):
            logits = self.step(DECODE, tokens[:, None], alive.to(torch.int64))
            return self.first(logits, choice, generator).where(alive, choice.pad)[None]
        return self._stepper(DECODE).draw(tokens, alive, most, choice, generator)

    def follows(self, phase: Phase) -> bool:
        """Must the host lead the steps of a phase?  If not, the device does them alone.

        The caches are then as its program wants them.  Known when that has run once.
        """
        self.lay_out(phase)
        program = self._served.programs[phase.name]
        why = self._needs_host.get(id(program), "no step has run")
        if why and id(program) in self._needs_host:
            self._graphs.give_up(why)
        return bool(why)

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
            new = self._run(phase, ids[:, start:stop], some)
            if logits is not None:
                program.wait()
                new = torch.where((some > 0).to(new.device)[:, None], new, logits)
            logits = new
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
        if ids.device.type != "cpu":  # where looking waits for a queue of kernels
            return
        program = next(iter(self._served.programs.values()))
        check_indices("input_ids" if ndim == 2 else "tokens", ids, program.tokens.high)

    def _columns(self, program: Program) -> int:
        """How many tokens of a sequence fit in one run; 0 is any number."""
        wanted = program.tokens
        if 1 in wanted.free and not self._caches.windowed:
            return wanted.most[1] if wanted.most else 0
        step = 2 * ways(parse_spec(wanted.spec), self.mesh, 1)
        return wanted.shape[1] if step == 2 else max(wanted.shape[1] // step * step, 1)

    def _stepper(self, phase: Phase) -> Stepper:
        """Steps of the program for `phase` that the device does alone."""
        if phase.name not in self._steppers:
            program = self._served.programs[phase.name]
            made = Stepper(self._served, program, self._caches, self._graphs)
            self._steppers[phase.name] = made
        return self._steppers[phase.name]

    def _run(self, phase: Phase, ids: Tensor, counts: Tensor) -> Tensor:
        """One run for a phase on the first `counts[i]` of the tokens `ids[i]`; logits (b, v)."""
        caches, program = self._caches, self._served.programs[phase.name]
        if self._needs_host.get(id(program)) == "" and bool((counts > 0).any()):
            stepper = self._stepper(phase)
            if stepper.suits(counts):
                return stepper.logits(ids, counts, capture=phase is not PREFILL)
        order = self._arranged(program, counts)  # (rows, columns): which new token, or -1
        starts = caches.of_rows(caches.lengths)[:, None]
        positions = (starts + order).masked_fill(order < 0, -1)
        padded = torch.zeros(caches.rows, max(ids.shape[1], 1), dtype=torch.int64)
        padded[: self.batch, : ids.shape[1]] = ids
        given = padded.gather(1, order.clamp(min=0))
        caches.check_room(positions, parse_spec(program.tokens.spec), counts)
        logits = program.next_logits(self.mesh, given, positions)
        caches.lengths = caches.lengths + counts
        self._needs_host[id(program)] = program.led_by_host(self.mesh) or caches.needs_host()
        return logits[: self.batch]

    def _arranged(self, program: Program, counts: Tensor) -> Tensor:
        caches, wanted = self._caches, program.tokens
        sharing = ways(parse_spec(wanted.spec), self.mesh, 1)
        width = 0 if 1 in wanted.free else wanted.shape[1] // sharing
        step = -(-wanted.step[1] // sharing) if wanted.step else 1
        rows, starts = caches.of_rows(counts), caches.of_rows(caches.lengths)
        if caches.stateful:
            return arrange_in_order(rows, sharing, width=width, step=step)
        balanced = caches.cut_tokens or program.shares_elsewhere
        return arrange(starts, rows, sharing, balanced=balanced, width=width, step=step)
