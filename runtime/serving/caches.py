"""The caches of a module that serves, and how far each of its sequences has come."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...facts.given import whole
from ...facts.spec import Spec
from ..cache.cache import CacheFullError, PageTable
from ..cache.declared import TOKENS, Declared, caches_in, specs_of
from ..cache.device import DeviceStates, DeviceTable
from ..cache.pools import Pools, Room, check_memory, highest, owner_of
from ..cache.recache import Path, Recaching
from ..cache.state import StateTable
from ..mesh.mesh import Mesh
from ..mesh.parts import own_part
from .arrange import kept, own_pages
from .program import Served


class Caches:
    """KV caches for `rows` sequences, of which the first `batch` are real and the rest padding.

    `lengths` (batch,) are the tokens that are cached of each, int64 on the CPU; `tokens` is how
    many there may be, `total` how many all may have together (None: all that many).  The caches lie
    as one of the programs wants them; see `lay_out`.
    """

    def __init__(self, served: Served, batch: int, tokens: int, total: int | None) -> None:
        batch, tokens = whole("batch", batch, 1), whole("tokens", tokens, 1)
        total = None if total is None else whole("total_tokens", total, 1)
        if not served.caches:
            raise ValueError(
                f"{served.title} has no KV caches; plan it with --phase prefill, decode, append or"
                " serve"
            )
        self.batch, self.tokens = batch, tokens
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._served = served
        self._mesh = served.mesh
        self._paths = served.paths()
        self.rows = served.padded_rows(batch)
        together = batch * tokens if total is None else total
        self._room = Room(self.rows, tokens, together, total is not None, served.longest_run)
        check_memory(served.caches, self._room, self._mesh)
        self._pools = Pools({}, self._room, self._mesh)
        self._twins: dict[PageTable | StateTable, DeviceTable | DeviceStates] = {}
        self.moves = 0  # how often caches came to lie elsewhere in memory
        self._pools = self._empty(served.caches)

    @property
    def cut_tokens(self) -> bool:
        """Do ranks share the cached tokens of a sequence?"""
        return any(TOKENS in shared.spec for shared in self._pools.tables)

    @property
    def windowed(self) -> bool:
        """Does any of them drop tokens that no query can reach any more?"""
        own = any(shared.table.window for shared in self._pools.tables)
        return own or self._served.windowed_elsewhere

    @property
    def stateful(self) -> bool:
        """Do layers keep states, which take tokens in order and cannot go back?"""
        return bool(self._pools.states) or self._served.stateful_elsewhere

    def of_rows(self, numbers: Tensor) -> Tensor:
        """Numbers of the sequences (batch,), and 0 for each padding row behind."""
        rows = torch.zeros(self.rows, dtype=torch.int64)
        rows[: self.batch] = numbers
        return rows

    def lay_out(self, wanted: Mapping[str, Declared]) -> None:
        """Bring the caches into the layout that a program declares.

        Raises CacheFullError, and leaves them as they are, if a rank has no room there.  If it
        fails half-way otherwise, all tokens are forgotten.
        """
        if wanted is self._pools.declared:
            return
        now, then = specs_of(self._pools.declared), specs_of(wanted)
        if now == then:
            self._pools.declared = wanted
            return
        if not bool(self.lengths.any()):
            self._pools = self._empty(wanted)
            return
        kept = caches_in(wanted)
        paths = {name: self._path(name, now[name], then[name]) for name in kept}
        conversion = Recaching(self._pools, wanted, paths, self.of_rows(self.lengths))
        lengths, self.lengths = self.lengths, torch.zeros_like(self.lengths)
        self._move()
        self._pools = Pools({}, self._room, self._mesh)
        self._pools = conversion.run(self._served.put)
        self.lengths = lengths

    def truncate(self, lengths: Tensor) -> None:
        """Drop the tokens of sequence i at positions >= lengths[i].

        Raises ValueError on every rank if a window or a state of some rank cannot go back so far.
        """
        limits = self.of_rows(lengths)
        own: list[tuple[PageTable | StateTable, Tensor]] = [
            (each.table, own_part(limits, each.spec, self._mesh)) for each in self._pools.tables
        ]
        own += [
            (table, own_part(limits, spec, self._mesh))
            for spec, table in self._pools.state_tables.items()
        ]
        if self.windowed or self.stateful:
            lost = [reason for table, rows in own if (reason := table.lost(rows))]
            if highest(len(lost), self._served.agreeing):
                raise ValueError(lost[0] if lost else "another rank has dropped what is needed")
        for table, rows in own:
            table.truncate(rows)
        for state in self._pools.states.values():
            state.reset(state.table.counts == 0)
        self.lengths = torch.minimum(self.lengths, lengths)

    def fill(self, tokens: int) -> None:
        """Cache `tokens` random keys and values of each sequence in caches that are empty."""
        positions_of: dict[PageTable, Tensor] = {}
        for shared in self._pools.tables:
            window = shared.table.window
            first = max(tokens - window, 0) if window else 0
            positions = torch.arange(first, tokens).repeat(self.rows, 1)
            positions[self.batch :] = -1
            shared.table.begin_after(torch.full((shared.table.batch,), first - 1))
            positions_of[shared.table] = own_pages(positions, shared.spec, self._mesh)
        for cache in self._pools.caches.values():
            positions = positions_of[cache.table]
            values = None if cache.values_in_keys else _random(cache.values, positions)
            cache.append(_random(cache.keys, positions), values, positions)
        for state in self._pools.states.values():
            state.table.begin_after(tokens)
            state.keep(torch.randn_like(state.values))
        self.lengths = torch.full((self.batch,), tokens)

    def clear(self) -> None:
        """Forget all tokens, also after a step that failed half-way."""
        for cache in (self._pools.caches | self._pools.states).values():
            cache.clear()
        self.lengths = torch.zeros_like(self.lengths)

    def check_capacity(self, counts: Tensor) -> None:
        """Raise CacheFullError if a sequence would become too long with `counts` more tokens."""
        after = self.lengths + counts
        over = (after > self.tokens).nonzero().flatten().tolist()
        if over:
            i = over[0]
            raise CacheFullError(
                f"sequence {i} has {int(self.lengths[i])} cached tokens and got {int(counts[i])}"
                f" more, but the cache holds {self.tokens} per sequence; call"
                f" new_cache(batch={self.batch}, tokens={int(after.max())} or more)"
            )

    def check_room(self, positions: Tensor, spec: Spec, counts: Tensor) -> None:
        """Raise CacheFullError on every rank if a pool of some rank has no room for new tokens.

        They stand at `positions` (rows, t), cut as `spec` says, `counts` of each sequence.
        """
        worst = self._shortage(positions, spec) if self._pools.may_run_out else 0
        if worst > 0:
            tables = (each.table for each in self._pools.tables)
            table = max(tables, key=lambda table: table.pages)
            raise CacheFullError(
                f"a rank lacks {worst} pages for these tokens; on this rank:"
                f" {table.full_message(int(counts.sum()))}"
            )

    def _shortage(self, positions: Tensor, spec: Spec) -> int:
        """Pages that some rank lacks for tokens at `positions`, the most of all ranks."""
        own = (
            each.table.shortage(kept(positions, spec, each.spec, self._mesh))
            for each in self._pools.tables
        )
        return highest(max(own, default=0), self._served.agreeing)

    # --- steps that the host does not follow -----------------------------------------------------

    def needs_host(self) -> str:
        """Why steps as the last one was can't run on the device alone, or nothing if they can."""
        found = ((name, cache.needs_host) for name, cache in self._pools.caches.items())
        return next((f"{name}: {why}" for name, why in found if why), "")

    def ahead(self, counts: Tensor) -> Tensor:
        """Positions (rows, t) of the next `counts` (batch,) tokens of each sequence, -1 behind."""
        column = torch.arange(max(int(counts.max()), 1))
        positions = self.of_rows(self.lengths)[:, None] + column
        return positions.where(column < self.of_rows(counts)[:, None], -1)

    def room_ahead(self, active: Tensor, steps: int, spec: Spec) -> int:
        """For how many steps, of `steps`, the `active` (batch,) sequences find room, 1 or more.

        Raises CacheFullError on every rank if there is none for one.
        """
        self.check_capacity(active.to(torch.int64))
        left = (self.tokens - self.lengths)[active]
        steps = min(steps, int(left.min()) if len(left) else 1)
        limited = self._pools.may_run_out or self.windowed
        while limited and steps > 1 and self._shortage(self.ahead(active * steps), spec) > 0:
            steps //= 2
        self.check_room(self.ahead(active * steps), spec, active.to(torch.int64))
        return steps

    @contextmanager
    def round(self, rows: Sequence[int], ahead: Tensor, spec: Spec) -> Generator[Round]:
        """Steps of the sequences `rows`, -1 for none, which get the tokens `ahead` or fewer.

        The tokens that they got are to be told the round.  If it fails they got none; where there
        are states, which do not go back, all tokens are forgotten.
        """
        tables, states = self._pools.tables, self._pools.state_tables
        twins = [(each.spec, self._twin(each.table, each.spec)) for each in tables]
        twins += [(cut, self._twin(table, cut)) for cut, table in states.items()]
        made = Round(self._mesh, twins)
        try:
            for each in tables:
                each.table.reserve(kept(ahead, spec, each.spec, self._mesh))
            for cut, twin in twins:
                twin.upload(self._own_rows(rows, cut))
            yield made
            got = self.ahead(made.got)
            for each in tables:
                each.table.record(kept(got, spec, each.spec, self._mesh))
            for cut, table in states.items():
                table.record(own_part(self.of_rows(made.got), cut, self._mesh))
            self.lengths = self.lengths + made.got
        except BaseException:
            if states:
                self.clear()
            raise
        finally:
            for table in (*(each.table for each in tables), *states.values()):
                table.on_device = None
            for each in tables:
                each.table.give_back()

    def _own_rows(self, rows: Sequence[int], spec: Spec) -> list[int]:
        """Where the rows of a step that this rank computes stand in its tables."""
        first = int(own_part(torch.arange(self.rows), spec, self._mesh)[0])
        own: list[int] = own_part(torch.tensor(rows), spec, self._mesh).tolist()
        return [row - first if row >= 0 else -1 for row in own]

    def _twin(self, table: PageTable | StateTable, spec: Spec) -> DeviceTable | DeviceStates:
        """A table's twin on the device, made when it is first asked for."""
        if table in self._twins:
            return self._twins[table]
        if isinstance(table, StateTable):
            made = DeviceStates(table)
        else:
            axes = [a for a, s in zip(self._mesh.axes, spec, strict=True) if s == TOKENS]
            ranks, rank = owner_of(axes)
            made = DeviceTable(table, self.tokens, ranks=ranks, rank=rank)
        self._twins[table] = made
        return made

    def _empty(self, declared: Mapping[str, Declared]) -> Pools:
        """New caches without tokens, those that were there freed before."""
        self._move()
        for name in (*self._pools.caches, *self._pools.states):
            self._served.put(name, None)
        self._pools = Pools({}, self._room, self._mesh)
        pools = Pools.empty(declared, self._room, self._mesh)
        for name, cache in (pools.caches | pools.states).items():
            self._served.put(name, cache)
        return pools

    def _move(self) -> None:
        self.moves += 1
        self._twins.clear()

    def _path(self, name: str, now: Spec, then: Spec) -> Path:
        """The specs from one layout of a cache to another, there or back."""
        path = self._paths[name]
        if now == then:
            return (now,)
        return path if (now, then) == (path[0], path[-1]) else path[::-1]


class Round:
    """Steps of some sequences on the device; `got` (batch,) is how many tokens each has got."""

    def __init__(
        self, mesh: Mesh, twins: Sequence[tuple[Spec, DeviceTable | DeviceStates]]
    ) -> None:
        self._mesh, self._twins = mesh, twins
        self.got = torch.zeros(0, dtype=torch.int64)

    @property
    def form(self) -> tuple[object, ...]:
        """The shapes of the tables, as a step sees them."""
        return tuple(twin.form for _, twin in self._twins)

    def open(self, positions: Tensor) -> None:
        """Begin a step: new tokens at `positions` (sequences, t) on the device, -1 for padding."""
        for spec, twin in self._twins:
            twin.open(own_part(positions, spec, self._mesh))


def _random(pool: Tensor, positions: Tensor) -> Tensor:
    """Random numbers (b, heads, t, dim) for a pool (slots, heads, dim) at `positions` (b, t)."""
    rows, tokens = positions.shape
    heads, dim = pool.shape[1:]
    return torch.randn(rows, heads, tokens, dim, dtype=pool.dtype, device=pool.device)
