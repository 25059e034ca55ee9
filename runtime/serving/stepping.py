"""Steps that the device does alone: forward pass, choice of tokens, ends of sequences.

The host gives the tokens of the first step and takes those of all steps after some of them; see
`cache/device.py` for what is cached meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ...facts.spec import parse_spec
from ..cache.device import copy_in
from ..mesh.mesh import Mesh
from .buckets import bucket
from .caches import Caches, Round
from .captured import Graphs
from .program import Program, Served
from .sampling import Choice

_FEW = 16  # so many tokens of a sequence at once make a step that is captured
_MANY = 1024  # for more, a CPU computes padding rather than hold a mask of tokens x tokens
_LOOK = 8  # steps after which the host looks whether all sequences have ended
_ROUND = 64  # steps for which it takes pages ahead, where nothing ends a sequence


class Stepper:
    """Steps of `program` over caches that lie as it wants them.

    The tensors that a step reads and changes stay where they are, so that it can be captured: of
    each sequence the token to feed, its position, and whether it goes on.
    """

    def __init__(self, served: Served, program: Program, caches: Caches, graphs: Graphs) -> None:
        self._mesh, self._program, self._caches, self._graphs = (
            served.mesh, program, caches, graphs,
        )  # fmt: skip
        self._parts, self._spec = served.row_parts(), parse_spec(program.tokens.spec)
        device = self._mesh.device
        self._tokens = torch.zeros(caches.rows, dtype=torch.int64, device=device)
        self._positions, self._rows = self._tokens.clone(), self._tokens.clone()
        self._alive = self._tokens > 0
        self._inputs: dict[tuple[int, int, int], Tensor] = {}
        self._stops: dict[tuple[int, ...], Tensor] = {}
        self._numbers = torch.empty(0, device=device)

    def suits(self, counts: Tensor) -> bool:
        """Is this the way for `counts` (b,) new tokens: are they few, or of some sequences only?"""
        some = len(self._bucket(counts > 0)) < self._caches.rows
        most = _MANY if some else _FEW
        return int(counts.max()) <= most or (some and self._mesh.device.type == "cuda")

    def logits(self, ids: Tensor, counts: Tensor, *, capture: bool = True) -> Tensor:
        """Logits (b, v) after the first `counts` (b,) of the tokens `ids` (b, t) of each sequence.

        `ids` may be on the device.  Captured, unless the tokens are many or `capture` is false.
        """
        caches, ahead = self._caches, self._caches.ahead(counts)
        caches.check_room(ahead, self._spec, counts)
        rows = self._bucket(counts > 0)
        with caches.round(rows, ahead, self._spec) as steps:
            given = self._given(rows, ids[:, : ahead.shape[1]], ahead)

            def step() -> Tensor:
                tokens, positions = given
                steps.open(positions)
                return self._program.next_logits_on_device(self._mesh, tokens, positions)

            few = capture and given.shape[2] <= _FEW
            out = self._run((tuple(given.shape), steps.form), step) if few else step()
            steps.got = counts
        return self._in_order(out, len(rows))

    def _given(self, rows: Sequence[int], ids: Tensor, ahead: Tensor) -> Tensor:
        """Tokens and positions (2, size, t) of a step of `rows`, where it finds them each time."""
        self._load_rows(rows)
        shape = 2, len(rows), self._width(ids.shape[1])
        if shape not in self._inputs:
            made = torch.zeros(shape, dtype=torch.int64, device=self._mesh.device)
            self._inputs[shape] = made  # with any tokens where padding is
        tokens, positions = self._inputs[shape]
        self._take_rows(tokens[:, : ids.shape[1]], ids, rows)
        wanted = torch.tensor(rows)
        new = ahead[wanted.clamp(min=0)].where(wanted[:, None] >= 0, -1)
        copy_in(positions, F.pad(new, (0, shape[2] - new.shape[1]), value=-1))
        return self._inputs[shape]

    def _width(self, columns: int) -> int:
        """With how many columns, padding behind, the program takes so many tokens."""
        wanted = self._program.tokens
        if 1 not in wanted.free:
            return wanted.shape[1]
        step = wanted.step[1] if wanted.step else 1
        return -(-columns // step) * step

    def first(self, logits: Tensor, choice: Choice, generator: torch.Generator | None) -> Tensor:
        """The tokens (b,) after `logits` (b, v), the same on all ranks; on the CPU."""
        self._draw_numbers(logits, choice, generator)
        return agreed(choice.of(logits, self._numbers), self._mesh).cpu()

    def draw(
        self,
        tokens: Tensor,
        alive: Tensor,
        most: int,
        choice: Choice,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The next tokens (n, b) of each sequence that is `alive` (b,), on the CPU.

        `tokens` (b,) are fed first, and all that are returned but the last.  n is `most` or less;
        the last ones may be those with which all sequences have ended.
        """
        caches = self._caches
        steps = min(most, _LOOK if choice.stops else _ROUND)
        steps = caches.room_ahead(alive, steps, self._spec)
        rows = self._bucket(alive)
        with caches.round(rows, caches.ahead(alive * steps), self._spec) as round:
            self._load(rows, tokens, alive)
            drawn = self._tokens.new_empty(steps, len(rows))
            self._stops_of(choice)
            key = choice, len(rows), round.form, self._numbers.data_ptr()
            for column in drawn:
                self._draw_numbers(self._numbers, choice, generator)
                column.copy_(self._run(key, lambda: self._drawn(len(rows), round, choice)))
            out = self._in_order(drawn.T, len(rows), choice.pad).T.cpu()
            taken, round.got = self._taken(out, alive, choice)
        return out[:taken]

    def _taken(self, drawn: Tensor, alive: Tensor, choice: Choice) -> tuple[int, Tensor]:
        """How many steps of `drawn` (n, b) count until all have ended; tokens fed of each (b,)."""
        stops, got = torch.tensor(choice.stops), torch.zeros_like(alive, dtype=torch.int64)
        for number, tokens in enumerate(drawn):
            got += alive
            alive = choice.go_on(alive, tokens, stops)
            if not bool(alive.any()):
                return number + 1, got
        return len(drawn), got

    def _run(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        self._graphs.keep(self._caches.moves)  # captured steps read caches where they were
        return self._graphs.run((id(self), key), step)

    # --- a step, in operators on the device alone ------------------------------------------------

    def _forward(self, size: int, steps: Round) -> Tensor:
        """Feed the token of each sequence that goes on; logits (size, v)."""
        at, alive = self._positions[:size], self._alive[:size]
        ids, positions = self._columns(self._tokens[:size], at.where(alive, -1))
        steps.open(positions)
        at += alive
        return self._program.next_logits_on_device(self._mesh, ids, positions)

    def _columns(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (size, t), with as many columns of padding behind as the program wants."""
        padding = 0, self._width(1) - 1
        if padding == (0, 0):
            return tokens[:, None], positions[:, None]
        return F.pad(tokens[:, None], padding), F.pad(positions[:, None], padding, value=-1)

    def _drawn(self, size: int, steps: Round, choice: Choice) -> Tensor:
        """A step whose tokens are those of the next; (size,)."""
        logits = self._forward(size, steps)
        numbers = self._numbers
        if choice.sampling is not None:
            last = self._caches.batch - 1
            numbers = numbers.index_select(0, self._rows[:size].clamp(max=last))
        alive, stops = self._alive[:size], self._stops_of(choice)
        chosen = agreed(choice.of(logits, numbers), self._mesh).where(alive, choice.pad)
        self._tokens[:size] = chosen
        alive.copy_(choice.go_on(alive, chosen, stops))
        return self._tokens[:size]

    # --- between steps ---------------------------------------------------------------------------

    def _bucket(self, active: Tensor) -> list[int]:
        wanted = self._program.tokens
        rows = self._caches.rows
        step = (wanted.step[0] if wanted.step else 1) if 0 in wanted.free else rows
        return bucket(active.nonzero().flatten().tolist(), rows, self._parts, step)

    def _load(self, rows: Sequence[int], tokens: Tensor, alive: Tensor) -> None:
        """What the first step of the sequences `rows` reads; `tokens` (b,) may be on the device."""
        caches, size, wanted = self._caches, len(rows), torch.tensor(rows)
        index = wanted.clamp(0, caches.batch - 1)
        self._load_rows(rows)
        self._take_rows(self._tokens[:size], tokens, rows)
        copy_in(self._positions[:size], caches.lengths[index])
        copy_in(self._alive[:size], alive[index] & (wanted == index))

    def _load_rows(self, rows: Sequence[int]) -> None:
        """Where the sequences of a step stand in a batch; padding behind all."""
        batch, wanted = self._caches.batch, torch.tensor(rows)
        real = (wanted >= 0) & (wanted < batch)
        copy_in(self._rows[: len(rows)], wanted.where(real, batch))

    def _take_rows(self, into: Tensor, x: Tensor, rows: Sequence[int]) -> None:
        """`x` (b, ...) of the sequences of a step, any for padding; it may be on the device."""
        last = self._caches.batch - 1
        if x.device.type == "cpu":
            copy_in(into, x[torch.tensor(rows).clamp(0, last)])
        else:
            into.copy_(x.index_select(0, self._rows[: len(rows)].clamp(max=last)))

    def _in_order(self, x: Tensor, size: int, fill: int = 0) -> Tensor:
        """What a step made (size, n), by sequence (b, n); `fill` where it made nothing."""
        out = x.new_full((self._caches.batch + 1, x.shape[1]), fill)
        return out.index_copy_(0, self._rows[:size], x)[:-1]

    def _draw_numbers(
        self, like: Tensor, choice: Choice, generator: torch.Generator | None
    ) -> None:
        """New random numbers (b, v) in the tensor that is there, if it is `like` what is needed."""
        if choice.sampling is None:
            return
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self._numbers.shape != like.shape or self._numbers.dtype != dtype:
            self._numbers = torch.empty_like(like, dtype=dtype)
        self._numbers.exponential_(generator=generator)

    def _stops_of(self, choice: Choice) -> Tensor:
        if choice.stops not in self._stops:
            self._stops[choice.stops] = torch.tensor(
                choice.stops, dtype=torch.int64, device=self._mesh.device
            )
        return self._stops[choice.stops]


def agreed(tokens: Tensor, mesh: Mesh) -> Tensor:
    """Rank 0's choice: ranks whose logits differ in the last bit must not part ways."""
    if mesh.size > 1:
        tokens = tokens.to(mesh.device).contiguous()
        dist.broadcast(tokens, 0)
    return tokens
