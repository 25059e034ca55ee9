"""KV caches from one layout on the mesh to another, between two programs of a module.

Prefill may leave its caches in another layout than decode reads them in.  A cache then goes from
spec to spec along a path; each step changes the state of one axis, or of several at once, by a
slice, an all-gather or an all-to-all, as any other conversion does.

Batch (0), heads (1) and the numbers of a head (3) are cut into blocks.  Tokens (2) are not: a rank
may hold any of them, and positions say which.  So before a step that cuts tokens they are ordered
by the rank that they go to, and after one that gathers them by their position.  An axis that
begins to cut tokens gives each rank the pages that it owns (`cache.owners`).

A dense cache is (batch, tokens, heads, numbers) here, keys and values one behind the other in the
last dim.  One is converted at a time: its old pool is freed before its new one is made, so that
memory holds no more than the larger of both layouts and a few copies of one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ...facts.blocks import block, blocks
from ...facts.spec import R, Spec, State, format_spec
from ..mesh.mesh import Mesh
from ..mesh.move import Move
from .cache import PAGE, CacheFullError, KVCache, PageTable
from .cache import Step as Stored
from .declared import BATCH, HEADS, TOKENS, Declared, caches_in, without_heads
from .pools import Pools, highest, owner_of

Path: TypeAlias = tuple[Spec, ...]
NUMBERS = 3
_DIM = {R: R, BATCH: 0, TOKENS: 1, HEADS: 2, NUMBERS: 3}  # in a dense cache


@dataclass(frozen=True, slots=True)
class Change:
    """A step of a path: the axes of these numbers go from state `a` to state `b` together."""

    axes: tuple[int, ...]
    a: State
    b: State


def change_between(before: Spec, after: Spec) -> Change:
    """The step from a spec to the next; ValueError if it takes more than one."""
    axes = tuple(i for i, pair in enumerate(zip(before, after, strict=True)) if len(set(pair)) > 1)
    pairs = {(before[i], after[i]) for i in axes}
    if len(pairs) != 1 or not {*before, *after} <= _DIM.keys():
        raise ValueError(
            f"a KV cache cannot go from {format_spec(before)} to {format_spec(after)} in one step:"
            " one axis changes its state, or several alike, and states are R, S0, S1, S2 and S3"
        )
    ((a, b),) = pairs
    return Change(axes, a, b)


class Recaching:
    """The conversion of all caches to the layout that `declared` has; all ranks make it together.

    `paths` leads each cache from its present layout to the new one; a single spec where it stays.
    `lengths` (rows,) says how many tokens of each sequence count.  What a window leaves behind is
    not converted, so that afterwards no sequence can go back further than its window then reaches.

    Making the object changes nothing, and raises on every rank: CacheFullError if a rank has no
    room in the new layout, ValueError if the layers do not store the same tokens.
    """

    def __init__(
        self,
        pools: Pools,
        declared: Mapping[str, Declared],
        paths: Mapping[str, Path],
        lengths: Tensor,
    ) -> None:
        self._old, self._paths, self._lengths = pools, paths, lengths
        self._new = Pools(declared, pools.room, pools.mesh)
        self._new.states, self._new.state_tables = pools.states, pools.state_tables
        self._held: dict[PageTable, _Held] = {}
        self._routes: dict[tuple[PageTable, Path], _Route] = {}
        self._tables: dict[tuple[PageTable, Spec], PageTable] = {}
        self._positions: dict[PageTable, Tensor] = {}  # what each new table is to store
        for name, cache in pools.caches.items():
            cache.check_in_step()
            self._prepare(name, cache.table)
        self._check_room()

    def run(self, put: Callable[[str, KVCache | None], None]) -> Pools:
        """The caches in their new layout; the old pools are gone.

        `put` is told of each new cache, and before that with None that its old one must go.
        Bytes that each rank receives: those of the steps, for each cache (see `Axis`).
        """
        stored: dict[PageTable, Stored] = {}
        for name, declared in caches_in(self._new.declared).items():
            cache, path = self._old.caches.pop(name), self._paths[name]
            if len(path) == 1:
                self._new.caches[name] = cache
                continue
            put(name, None)
            route, table = self._routes[cache.table, path], self._tables[cache.table, _end(path)]
            dense = route.carry(cache.packed(route.columns), declared.heads)
            del cache  # and its pool, before there is another
            if table not in stored:
                stored[table] = table.advance(0, self._positions[table])
            made = self._new.add_cache(name, table)
            made.store(stored[table], dense)
            put(name, made)
        return self._new

    # --- details -----------------------------------------------------------------------------

    def _prepare(self, name: str, table: PageTable) -> None:
        """Make the table and the route of one cache; caches of one layout share them."""
        path, new = self._paths[name], self._new
        shared = next(item for item in self._old.tables if item.table is table)
        if len(path) == 1:
            if shared not in new.tables:
                new.tables.append(shared)
            return
        if table not in self._held:
            self._held[table] = _Held(table, shared.spec, self._lengths, new.mesh)
        held = self._held[table]
        if (table, path) not in self._routes:
            self._routes[table, path] = _Route(path, held, table.positions, new.mesh)
        if (table, _end(path)) not in self._tables:
            made = new.add_table(caches_in(new.declared)[name])
            own = held.rows_of(path[-1])
            made.begin_after(held.forgotten[own])
            self._tables[table, _end(path)] = made
            self._positions[made] = self._routes[table, path].positions

    def _check_room(self) -> None:
        if not self._tables or not self._new.may_run_out:
            return
        short = {table: table.shortage(given) for table, given in self._positions.items()}
        worst = highest(max(short.values()), self._new.mesh)
        if worst > 0:
            table = max(short, key=lambda table: short[table])
            count = int((self._positions[table] >= 0).sum())
            raise CacheFullError(
                f"the next program keeps the KV cache in another layout, for which a rank lacks"
                f" {worst} pages; on this rank: {table.full_message(count)}"
            )


def _end(path: Path) -> Spec:
    return without_heads(path[-1])


class _Held:
    """Which tokens count, and who holds each: the same on every rank.

    `stored` (rows, s) says which positions of each sequence are to be kept, `forgotten` (rows,) up
    to where they are not.  Where the old layout cuts tokens, ranks tell each other which they
    hold: an all-reduce of 4 rows s bytes over each axis that cuts batch or tokens.
    """

    def __init__(self, table: PageTable, spec: Spec, lengths: Tensor, mesh: Mesh) -> None:
        self.mesh = mesh
        self.forgotten = torch.full_like(lengths, -1)
        if table.window:
            self.forgotten = (lengths - table.window).clamp(min=-1)
        at = torch.arange(int(lengths.max()))
        self.stored = (at < lengths[:, None]) & (at > self.forgotten[:, None])
        self._pages = (at // PAGE).expand_as(self.stored)
        self._told: dict[int, Tensor] = {}  # by axis that cut tokens before
        cut = _axes_of(spec, TOKENS)
        if prod(mesh.sizes[i] for i in cut) > 1:
            self._told = self._ask(table, spec, cut)

    def _ask(self, table: PageTable, spec: Spec, cut: tuple[int, ...]) -> dict[int, Tensor]:
        axes, own = self.mesh.axes, table.positions
        holder = torch.full(self.stored.shape, -1, dtype=torch.int32)
        known = (own >= 0) & (own < holder.shape[1])
        row, column = known.nonzero(as_tuple=True)
        _, rank = owner_of([axes[i] for i in cut])
        holder[self.rows_of(spec)][row, own[row, column]] = rank
        holder = holder.to(self.mesh.device)
        for axis, state in zip(axes, spec, strict=True):
            if state in (BATCH, TOKENS):
                holder = axis.reduce(holder, "max")
        joint = holder.to("cpu", torch.int64)
        if bool((joint[self.stored] < 0).any()):
            raise ValueError(
                "the KV caches lack tokens that count; start anew with `prefill` or `new_cache`"
            )
        told: dict[int, Tensor] = {}
        for i in reversed(cut):
            told[i] = joint % self.mesh.sizes[i]
            joint = joint // self.mesh.sizes[i]
        return told

    def rows_of(self, spec: Spec) -> slice:
        """The sequences that this rank has in a layout."""
        mesh = self.mesh
        (own,) = blocks(self.stored.shape[:1], spec, mesh.sizes, mesh.coordinates)
        return slice(own.start, own.stop)

    def place(self, axes: Sequence[int], spec: Spec) -> Tensor:
        """Which rank of `axes` together holds each token (rows, s) while they cut tokens.

        Those that did so before keep what they had; others get the pages that they own, as the
        token axes of `spec`, the layout at the end, share them.
        """
        joint = torch.zeros_like(self._pages)
        for i in axes:
            if i in self._told:
                own = self._told[i]
            else:
                minor = prod(self.mesh.sizes[j] for j in _axes_of(spec, TOKENS) if j > i)
                own = self._pages // minor % self.mesh.sizes[i]
            joint = joint * self.mesh.sizes[i] + own
        return joint


@dataclass(frozen=True, slots=True)
class _Leg:
    """A step of a route; `before` and `after` (rows, columns) reorder the tokens around it."""

    spec: Spec
    change: Change
    before: Tensor | None
    after: Tensor | None


class _Route:
    """The way of caches along a path; all caches in it have their tokens in the same places.

    `columns` (b, n) of the old table are what this rank reads, in the order in which the first
    step wants them; `positions` (b, n) is what it holds at the end, -1 behind.  All ranks have
    tensors of one width, so that short sequences are padded to the longest of the batch.
    """

    def __init__(self, path: Path, held: _Held, cached: Tensor, mesh: Mesh) -> None:
        self._held, self._mesh, self._last = held, mesh, path[-1]
        own = self._tokens(path[0])
        self.columns = _places(cached, own)
        self._legs: list[_Leg] = []
        for spec, following in pairwise(path):
            change = change_between(spec, following)
            before = after = None
            own_after = self._tokens(following)
            if change.b == TOKENS:  # a slice is what this rank takes of its own tokens
                parts = change.a != R
                wanted = self._parts(spec, following, change.axes) if parts else own_after
                before = _places(own, wanted)
            if change.a == TOKENS:
                after = _places(self._parts(following, spec, change.axes), own_after)
            if not self._legs and before is not None:
                self.columns, before = self.columns.gather(1, before), None
            self._legs.append(_Leg(spec, change, before, after))
            own = own_after
        self.positions = own

    def carry(self, x: Tensor, heads: int) -> Tensor:
        """A dense cache, read at `columns`, in the last layout; `heads` counts those of all ranks.

        The numbers of a head must be whole in `x`.
        """
        shape = (len(self._held.stored), heads, 0, x.shape[3])
        for leg in self._legs:
            axis = self._mesh[tuple(self._mesh.names[i] for i in leg.change.axes)]
            if leg.before is not None:
                x = _taken(x, leg.before)
            if axis.size > 1 and (leg.change.a, leg.change.b) != (R, TOKENS):
                size = self._whole_size(leg, shape)
                move = Move(_DIM[leg.change.a], _DIM[leg.change.b], size)
                x = axis.move(x, move, "forward")
            if leg.after is not None:
                x = _taken(x, leg.after)
        return x

    def _whole_size(self, leg: _Leg, shape: tuple[int, ...]) -> int | None:
        """The true size of the dim that a step gathers, where that is cut into blocks."""
        a = leg.change.a
        if a in (R, TOKENS):
            return None
        majors = [(self._mesh.sizes[i], 0) for i in _axes_of(leg.spec, a) if i < leg.change.axes[0]]
        return block(shape[a], majors).rows

    def _mask(self, spec: Spec, rows: slice) -> Tensor:
        """What this rank holds in a layout, of the sequences `rows`."""
        axes = _axes_of(spec, TOKENS)
        _, rank = owner_of([self._mesh.axes[i] for i in axes])
        return (self._held.stored & (self._held.place(axes, self._last) == rank))[rows]

    def _tokens(self, spec: Spec) -> Tensor:
        """The positions that this rank holds in a layout, in order."""
        mask = self._mask(spec, self._held.rows_of(spec))
        return _positions_of(mask, self._width(spec))

    def _parts(self, whole: Spec, cut: Spec, axes: tuple[int, ...]) -> Tensor:
        """What this rank holds in the layout `whole`, part after part as `axes` cut it in `cut`."""
        rows, width = self._held.rows_of(whole), self._width(cut)
        mask, place = self._mask(whole, rows), self._held.place(axes, self._last)[rows]
        ranks = prod(self._mesh.sizes[i] for i in axes)
        return torch.cat([_positions_of(mask & (place == r), width) for r in range(ranks)], 1)

    def _width(self, spec: Spec) -> int:
        """The most tokens that a rank holds of a sequence in a layout."""
        axes = _axes_of(spec, TOKENS)
        place = self._held.place(axes, self._last)
        ranks = prod(self._mesh.sizes[i] for i in axes)
        counts = torch.zeros(len(place), ranks, dtype=torch.int64)
        counts.scatter_add_(1, place.clamp(min=0), self._held.stored.long())
        return max(int(counts.max()), 1)


def _axes_of(spec: Spec, state: State) -> tuple[int, ...]:
    return tuple(i for i, own in enumerate(spec) if own == state)


def _positions_of(mask: Tensor, width: int) -> Tensor:
    """Where the rows of `mask` (b, s) are True, in order (b, width), -1 behind."""
    found = torch.full((len(mask), width), -1, dtype=torch.int64)
    row, position = mask.nonzero(as_tuple=True)
    found[row, mask.cumsum(1)[row, position] - 1] = position
    return found


def _places(have: Tensor, want: Tensor) -> Tensor:
    """In which column of `have` (b, m) each number of `want` (b, n) stands; any column for -1.

    >>> _places(torch.tensor([[4, 2, 7]]), torch.tensor([[2, 7, -1]]))[:, :2]
    tensor([[1, 2]])
    """
    length = int(torch.cat([have, want], 1).max()) + 1
    columns = torch.zeros(len(have), length + 1, dtype=torch.int64)
    at = torch.arange(have.shape[1]).expand_as(have)
    columns.scatter_(1, have.where(have >= 0, length), at)
    return columns.gather(1, want.where(want >= 0, length))


def _taken(x: Tensor, columns: Tensor) -> Tensor:
    """The tokens of `x` (b, s, heads, numbers) at `columns` (b, n)."""
    rows = torch.arange(len(x))[:, None] * x.shape[1]
    return x.flatten(0, 1)[(rows + columns).to(x.device)]
