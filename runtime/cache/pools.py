"""The KV caches and states of one program on this rank, and the tables that layers share.

The layout of a cache is its spec over batch 0, heads 1 and tokens 2.  Caches that keep the same
tokens on a rank share a page table, whatever they hold of the heads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ...facts.blocks import local_shape
from ...facts.spec import R, Spec, parse_spec
from ..mesh.collectives import Axis
from ..mesh.mesh import Mesh
from ..mesh.parts import ways
from .cache import PAGE, KVCache, PageTable
from .declared import BATCH, TOKENS, Cache, Declared, caches_in, states_in, without_heads
from .state import StateCache, StateTable


@dataclass(frozen=True, slots=True)
class Room:
    """Sequences, padding included, the tokens of each, and what all may hold together; `limited`
    says that this is less than each may.  `run` is the most that each gets at once: a window keeps
    no more than its own tokens and those."""

    rows: int
    tokens: int
    total: int
    limited: bool
    run: int


@dataclass(frozen=True, slots=True)
class Shared:
    """A page table, and how its tokens lie: a spec without heads."""

    spec: Spec
    table: PageTable


class Pools:
    """The caches and states that a program declares, by name, and the tables that they share.

    It begins without pools; `Pools.empty` makes all of them.
    """

    def __init__(self, declared: Mapping[str, Declared], room: Room, mesh: Mesh) -> None:
        self.declared, self.room, self.mesh = declared, room, mesh
        self.caches: dict[str, KVCache] = {}
        self.tables: list[Shared] = []
        self.states: dict[str, StateCache] = {}
        self.state_tables: dict[Spec, StateTable] = {}  # by how the batch is cut

    @staticmethod
    def empty(declared: Mapping[str, Declared], room: Room, mesh: Mesh) -> Pools:
        """Pools with nothing in them."""
        pools = Pools(declared, room, mesh)
        tables: dict[tuple[Spec, int, int], PageTable] = {}
        for name in states_in(declared):
            pools.add_state(name)
        for name, cache in caches_in(declared).items():
            key = without_heads(parse_spec(cache.spec)), cache.window, cache.table
            if key not in tables:
                tables[key] = pools.add_table(cache)
            pools.add_cache(name, tables[key])
        return pools

    @property
    def may_run_out(self) -> bool:
        """Can tokens be too many for a pool although no sequence is too long?

        Not where every sequence has room for all of its tokens and lies on one rank.
        """
        cut = any(ways(shared.spec, self.mesh, TOKENS) > 1 for shared in self.tables)
        return self.room.limited or cut

    def add_table(self, cache: Cache) -> PageTable:
        """A new table for caches that lie as `cache` does."""
        spec, room = without_heads(parse_spec(cache.spec)), self.room
        rows, _, tokens = local_shape((room.rows, 1, room.tokens), spec, self.mesh.sizes)
        sharing = ways(spec, self.mesh, TOKENS)
        # Of every sequence a page may be half empty; where ranks share a sequence, two.
        pages = -(-room.total // (ways(spec, self.mesh, BATCH) * sharing * PAGE))
        pages += rows * (1 + (sharing > 1))
        most = -(-tokens // PAGE)
        if cache.window:  # one page may be half out of reach
            most = min(most, -(-(cache.window - (-room.run // sharing)) // PAGE) + 1)
        pages = min(pages, rows * (most + 2 * (sharing > 1)))
        table = PageTable(rows, pages, window=cache.window, device=self.mesh.device)
        self.tables.append(Shared(spec, table))
        return table

    def add_cache(self, name: str, table: PageTable) -> KVCache:
        """The pool of the cache declared as `name`, over `table`."""
        cache, room = caches_in(self.declared)[name], self.room
        shape = (room.rows, cache.heads, room.tokens)
        rows, heads, tokens = local_shape(shape, parse_spec(cache.spec), self.mesh.sizes)
        self.caches[name] = KVCache(
            rows, tokens, heads, cache.key_dim, cache.value_dim,
            dtype=cache.dtype, table=table, values_in_keys=cache.values_in_keys,
        )  # fmt: skip
        return self.caches[name]

    def add_state(self, name: str) -> StateCache:
        """The states declared as `name`."""
        state = states_in(self.declared)[name]
        spec = parse_spec(state.spec)
        rows, *shape = local_shape((self.room.rows, *state.shape), spec, self.mesh.sizes)
        cut = tuple(BATCH if own == BATCH else R for own in spec)
        if cut not in self.state_tables:
            self.state_tables[cut] = StateTable(rows, device=self.mesh.device)
        table = self.state_tables[cut]
        self.states[name] = StateCache(rows, shape, dtype=state.dtype, table=table)
        return self.states[name]


def check_memory(declared: Mapping[str, Declared], room: Room, mesh: Mesh) -> None:
    """Raises ValueError if this rank's caches would not fit on an empty device.

    A process that asks for more than the machine has may be killed without a word.
    """
    n_bytes = 0
    for state in states_in(declared).values():
        shape = local_shape((room.rows, *state.shape), parse_spec(state.spec), mesh.sizes)
        n_bytes += prod(shape) * state.dtype.itemsize
    for cache in caches_in(declared).values():
        spec = parse_spec(cache.spec)
        held = min(room.tokens, cache.window + room.run) if cache.window else room.tokens
        rows, heads, tokens = local_shape((room.rows, cache.heads, held), spec, mesh.sizes)
        shared = -(-room.total // (ways(spec, mesh, BATCH) * ways(spec, mesh, TOKENS)))
        numbers = cache.key_dim + (0 if cache.values_in_keys else cache.value_dim)
        n_bytes += min(rows * tokens, shared) * heads * numbers * cache.dtype.itemsize
    limit = _memory(mesh.device)
    if n_bytes > limit:
        raise ValueError(
            f"caches for {room.rows} sequences of {room.tokens} tokens, {room.total} together, take"
            f" {n_bytes / 1e9:.4g} GB on this rank, whose device has {limit / 1e9:.4g} GB"
        )


def _memory(device: torch.device) -> float:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return math.inf


def owner_of(axes: Sequence[Axis]) -> tuple[int, int]:
    """(how many ranks share a sequence over `axes`, which of them this is)."""
    rank = 0
    for axis in axes:
        rank = rank * axis.size + axis.rank
    return prod(axis.size for axis in axes), rank


def highest(number: int, mesh: Mesh) -> int:
    """The highest of all ranks' numbers; an all-reduce of 8 bytes over each axis."""
    found = torch.tensor([number], device=mesh.device)
    for axis in mesh.axes:
        found = axis.reduce(found, "max")
    return int(found)
