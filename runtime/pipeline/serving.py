"""Serving in stages: sequences pass them in groups, each with caches of its own.

Every rank of a pipeline leads the same conversation.  A run of a group takes what the stage before
has made of its tokens, runs this rank's stage, and sends on; the last stage sends the logits to all
others.  No one waits for logits before the group's next tokens are fed, so that other groups are in
the stages meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...facts.blocks import local_shape
from ...facts.phases import DECODE, PREFILL, Phase
from ...facts.spec import parse_spec
from ..cache.cache import KVCache
from ..cache.state import StateCache
from ..mesh.batches import Input, gather_output, look_up, shard_inputs
from ..mesh.mesh import Mesh
from ..serving.caches import Caches
from ..serving.program import Program, Served
from ..serving.sampling import Choice
from ..serving.serving import Serving
from ..serving.stepping import agreed
from .messages import Form, Links
from .stages import Stage

_ROUND = 64  # tokens of each sequence that follow one another without a gap
_LOGITS = 63  # the tag of logits, behind those of what stages give
# what logits may be; ranks that make none are told which of these
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Line:
    """The messages of runs through the stages, for this rank."""

    def __init__(self, links: Links, last: int) -> None:
        """`last`: the rank of the pipeline that has the last stage."""
        self._links, self._last = links, last
        self._dtype: torch.dtype | None = None
        self._coming: list[tuple[Any, Tensor]] = []  # logits that were asked for
        self._sent: list[tuple[Any, Tensor]] = []

    def receive(self, forms: Sequence[Form]) -> list[Tensor]:
        """What the stage before has made."""
        found: list[Tensor] = []
        for number, form in enumerate(forms):
            x, before = self._links.empty(form), self._links.rank - 1
            self._links.begin(x, kind="F", peer=before, tag=number, sends=False).wait()
            self._links.count("F", x)
            found.append(x)
        return found

    def send(self, tensors: Sequence[Tensor]) -> None:
        """To the next stage, and go on."""
        for number, x in enumerate(tensors):
            self._begin_send(x, "F", self._links.rank + 1, number)

    def answer(self, logits: Tensor) -> None:
        """Send the logits of a run to all other stages, and go on."""
        others = [rank for rank in range(self._links.ranks) if rank != self._last]
        for peer in others:
            if self._dtype is None:
                which = torch.tensor([_DTYPES.index(logits.dtype)], device=logits.device)
                self._begin_send(which, "B", peer, _LOGITS)
            self._begin_send(logits, "B", peer, _LOGITS)
        self._dtype = logits.dtype

    def expect(self, shape: tuple[int, ...]) -> Tensor:
        """Logits of a run, which are there after `wait`."""
        if self._dtype is None:
            which = torch.zeros(1, dtype=torch.int64, device=self._links.device)
            self._ask(which).wait()
            self._dtype = _DTYPES[int(which)]
        x = self._links.empty(Form(shape, self._dtype))
        self._coming.append((self._ask(x), x))
        return x

    def wait(self) -> None:
        """Until all logits that were asked for are there."""
        self.finish(self.pending())

    def pending(self) -> list[tuple[Any, Tensor]]:
        """What has been asked for since, for `finish`."""
        coming, self._coming = self._coming, []
        return coming

    def finish(self, coming: Sequence[tuple[Any, Tensor]]) -> None:
        """Until these logits are there."""
        for work, x in coming:
            work.wait()
            self._links.count("F", x)

    def _ask(self, x: Tensor) -> Any:
        return self._links.begin(x, kind="B", peer=self._last, tag=_LOGITS, sends=False)

    def _begin_send(self, x: Tensor, kind: str, peer: int, tag: int) -> None:
        self._sent = [(work, held) for work, held in self._sent if not work.is_completed()]
        own = x.detach().contiguous()
        self._sent.append((self._links.begin(own, kind=kind, peer=peer, tag=tag, sends=True), own))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram(Program):
    """A forward pass of which this rank runs one stage, `row`; the rest comes and goes by `line`.

    `inputs` are tokens and positions as all stages have them, `outputs` those of the last.
    """

    row: Stage
    taken: Mapping[str, Input]
    own: Sequence[str]
    line: Line

    def led_by_host(self, mesh: Mesh) -> str:
        """Why the host must lead its steps."""
        return "stages of a pipeline wait for one another"

    def wait(self) -> None:
        """Until all logits that `next_logits` gave are there."""
        self.line.wait()

    @torch.no_grad()
    def next_logits(self, mesh: Mesh, ids: Tensor, positions: Tensor) -> Tensor:
        """As that of any program; but on stages before the last they come later, see `wait`."""
        given = {"input_ids": ids, "position_ids": positions}
        local = shard_inputs(self.inputs, given, mesh)
        names = list(self.taken)
        before = self.line.receive([_form(self.taken[name], ids, mesh) for name in names])
        inputs = dict(zip(names, before, strict=True))
        out = self.run(**inputs, **{name: local[name] for name in self.own})
        if self.row.given:
            self.line.send([look_up(out, (name,)) for name in self.row.given])
            return self.line.expect((ids.shape[0], self.logits.shape[-1]))
        logits = gather_output(self.logits, out, mesh)[:, 0].contiguous()
        self.line.answer(logits)
        return logits


def _form(wanted: Input, ids: Tensor, mesh: Mesh) -> Form:
    """What is taken of tokens (b, t), on this rank."""
    shape = (*ids.shape, *wanted.shape[2:])
    return Form(local_shape(shape, parse_spec(wanted.spec), mesh.sizes), wanted.dtype)


def alike(rows: Sequence[Input]) -> Input:
    """An input (b, t) as all stages take it that have these rows.

    Raises ValueError where stages cut it differently.
    """
    first = rows[0]
    if len({(row.spec, row.shape) for row in rows}) > 1:
        raise ValueError(f"stages cut tokens differently: {sorted({row.spec for row in rows})}")
    free = tuple(dim for dim in first.free if all(dim in row.free for row in rows))
    steps = [row.step or (1, 1) for row in rows]
    step = tuple(lcm(*sizes) for sizes in zip(*steps, strict=True))
    least = tuple(max(sizes) for sizes in zip(*(row.least or (1, 1) for row in rows), strict=True))
    mosts = zip(*(row.most or (0, 0) for row in rows), strict=True)
    most = tuple(min((n for n in sizes if n), default=0) for sizes in mosts)
    high = min((row.high for row in rows if row.high), default=0)
    return replace(first, free=free, step=step, least=least, most=most, high=high)


class _Together(Caches):
    """The caches of several groups of sequences, one behind the other."""

    def __init__(self, parts: Sequence[Serving]) -> None:
        self._parts = parts
        self.tokens = parts[0].tokens
        self.batch = sum(part.batch for part in parts)
        self.refresh()

    def refresh(self) -> None:
        """Take over how far sequences have come."""
        self.lengths = torch.cat([part.lengths for part in self._parts])

    @property
    def stateful(self) -> bool:
        """Do layers keep states?"""
        return self._parts[0].stateful

    def clear(self) -> None:
        """Forget all tokens."""
        for part in self._parts:
            part.clear()
        self.refresh()

    def truncate(self, lengths: Tensor) -> None:
        """Keep the first `lengths` (b,) tokens."""
        sizes = [part.batch for part in self._parts]
        for part, own in zip(self._parts, lengths.split(sizes), strict=True):
            part.truncate(own)
        self.refresh()


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that pass the stages together: how serving sees this rank's stage, and the caches
    of theirs by name, which `set_cache` puts where the stage's module looks for them."""

    served: Served
    caches: dict[str, KVCache | StateCache | None]
    set_cache: Callable[[str, KVCache | StateCache | None], None]

    def enter(self) -> None:
        """The module's next run is one of this group."""
        for name, cache in self.caches.items():
            self.set_cache(name, cache)


_Pending: TypeAlias = tuple[Tensor, Sequence[tuple[Any, Tensor]]]  # logits, and what is to come


class StagedServing(Serving):
    """A conversation in stages, of as many groups of sequences as are in flight."""

    def __init__(
        self,
        groups: Sequence[Group],
        line: Line,
        batch: int,
        tokens: int,
        total_tokens: int | None,
        capture: bool | None,
    ) -> None:
        """`line` is that of the groups' programs; of more groups than sequences some are empty."""
        each = -(-batch // len(groups))
        sizes = [min(each, batch - first) for first in range(0, batch, each)]
        total = None if total_tokens is None else -(-total_tokens // len(sizes))
        self._line, self._groups = line, groups[: len(sizes)]
        self._parts = [
            Serving(group.served, size, tokens, total, False)
            for group, size in zip(self._groups, sizes, strict=True)
        ]
        self._together = _Together(self._parts)
        super().__init__(groups[0].served, batch, tokens, total_tokens, capture)

    def _empty(self, batch: int, tokens: int, total_tokens: int | None) -> Caches:
        return self._together

    @property
    def mesh(self) -> Mesh:
        """The ranks that serve, those of all stages."""
        return self._served.agreeing

    def follows(self, phase: Phase) -> bool:
        """The host leads all steps."""
        self._graphs.give_up(self._served.programs[phase.name].led_by_host(self.mesh))
        return True

    def lay_out(self, phase: Phase) -> None:
        """Bring the caches of all groups into the layout of the program for `phase`."""
        for part in self._parts:
            part.lay_out(phase)

    def fill(self, tokens: int, phase: Phase = PREFILL) -> None:
        """Cache `tokens` random keys and values of each sequence."""
        for part in self._parts:
            part.fill(tokens, phase)
        self._together.refresh()

    def step(self, phase: Phase, ids: Tensor, counts: Tensor) -> Tensor:
        """Feed the first `counts[i]` of the tokens `ids[i]` to sequence i; logits (b, v)."""
        self._together.check_capacity(counts)
        own = zip(self._split(ids), self._split(counts), strict=True)
        pending = [self._begin(number, phase, *each) for number, each in enumerate(own)]
        self._together.refresh()
        return torch.cat([self._end(each) for each in pending])

    def first(self, logits: Tensor, choice: Choice, generator: torch.Generator | None) -> Tensor:
        """The tokens (b,) that follow `logits` (b, v), on the CPU and the same on all ranks."""
        numbers = choice.numbers(logits, len(logits), generator)
        return agreed(choice.of(logits, numbers), self._served.mesh).cpu()

    def draw(
        self,
        tokens: Tensor,
        alive: Tensor,
        most: int,
        choice: Choice,
        generator: torch.Generator | None,
    ) -> Tensor:
        """As that of `Serving`; the next step of a group begins as soon as its tokens are chosen,
        while others are in the stages."""
        self._together.check_capacity(alive.to(torch.int64))
        steps = min(most, _ROUND, int((self.tokens - self.lengths)[alive].min()))
        stops, drawn = torch.tensor(choice.stops), list[Tensor]()
        now, going = list(self._split(tokens.cpu())), list(self._split(alive))
        pending = [self._fed(n, *each) for n, each in enumerate(zip(now, going, strict=True))]
        while True:
            numbers: Sequence[Tensor] = ()
            for n, each in enumerate(pending):
                now[n] = torch.full_like(now[n], choice.pad)
                if each is not None:
                    logits = self._end(each)
                    numbers = numbers or self._split(choice.numbers(logits, len(tokens), generator))
                    chosen = agreed(choice.of(logits, numbers[n]), self._served.mesh).cpu()
                    now[n] = chosen.where(going[n], choice.pad)
                    going[n] = choice.go_on(going[n], now[n], stops)
                more = len(drawn) + 1 < steps
                pending[n] = self._fed(n, now[n], going[n]) if more else None
            drawn.append(torch.cat(now))
            if len(drawn) == steps or not any(bool(each.any()) for each in going):
                self._together.refresh()
                return torch.stack(drawn)

    # --- groups ----------------------------------------------------------------------------------

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is of each group."""
        return x.split([part.batch for part in self._parts])

    def _fed(self, number: int, tokens: Tensor, alive: Tensor) -> _Pending | None:
        """Begin a step of those sequences of a group that are `alive`; None if none is."""
        if not bool(alive.any()):
            return None
        return self._begin(number, DECODE, tokens[:, None], alive.to(torch.int64))

    def _begin(self, number: int, phase: Phase, ids: Tensor, counts: Tensor) -> _Pending:
        self._groups[number].enter()
        logits = self._parts[number].step(phase, ids, counts)
        return logits, self._line.pending()

    def _end(self, pending: _Pending) -> Tensor:
        logits, coming = pending
        self._line.finish(coming)
        return logits


__all__ = ["Group", "Line", "StageProgram", "StagedServing", "alike"]
