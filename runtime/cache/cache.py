"""Keys and values of earlier tokens: paged memory in which sequences of any length share a pool.

Every token is known by its position in its own sequence, and the cache keeps the positions, so that
any cut of a sequence over ranks is right: contiguous, zigzag, page by page.  Position -1 is padding
and is never stored.

A `PageTable` says which page of the pool holds which tokens of which sequence.  All layers cache
the same tokens, so the layers of a module share one table; each has a `KVCache` with its own
numbers.  The bookkeeping is done on the CPU once per step, by the first layer of the step, or for
several steps together around them (`device.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..mesh.collectives import Axis
from .handles import handle_of

PAGE = 16  # tokens of a page

_T = TypeVar("_T")


class CacheFullError(RuntimeError):
    """There are not enough free pages; nothing was stored."""


@dataclass(slots=True)
class Step:
    """New tokens, as they were given and where they were stored.

    `given` is the tensor that the caller passed, `whole` (b, t) the same on the CPU, `positions`
    (b, t) that with -1 for what this rank does not keep.  Token `rows[i]` of the flattened (b, t)
    goes to `slots[i]` of the pool.  `owner` is the axis whose ranks keep the pages they own, if the
    tokens were given to all of them.  `memory` keeps what the layers of the step share.
    """

    number: int
    given: Tensor
    whole: Tensor
    positions: Tensor
    rows: Tensor
    slots: Tensor
    owner: str | None = None
    memory: dict[object, Any] = field(default_factory=dict[object, Any])

    def once(self, key: object, make: Callable[[], _T]) -> _T:
        """`make()`, made by the first layer that asks."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """New tokens of b sequences and all that is cached of them, the new ones included.

    blocks     (b, pages) int32: the pages of each sequence, in order
    counts     (b,) int64: its cached tokens
    positions  (b, pages * 16) int32 of its tokens, by slot of the sequence; meaningless behind them
    queries    (b, t) int64: positions of the new tokens, -1 for padding
    slots      (b * t,) int64: where in the pool each is stored; behind it what is not kept here
    in_place   sequence i has the slots from i * in_place on; 0 if pages must be looked up
    memory     what the layers of the step share
    """

    blocks: Tensor
    counts: Tensor
    positions: Tensor
    queries: Tensor
    slots: Tensor
    in_place: int
    memory: dict[object, Any] = field(default_factory=dict[object, Any])

    def once(self, key: object, make: Callable[[], _T]) -> _T:
        """`make()`, made by the first layer that asks."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]


class PageTable:
    """Which pages of a pool hold which tokens of `batch` sequences.

    The tokens of a sequence lie in its pages in the order of their positions.  A sequence first
    takes the pages of its own part of the pool, so that while it has no others its keys can be read
    in place.  With `window` > 0, pages that no later query can reach are given back.
    """

    def __init__(
        self, batch: int, pages: int, *, window: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if batch < 1 or pages < 1 or window < 0:
            raise ValueError(
                f"a cache needs sequences and pages and a window of 0 (none) or more, got {batch}"
                f" sequences, {pages} pages, window {window}"
            )
        self.batch, self.pages, self.window = batch, pages, window
        self.device = torch.device(device)
        self.home = pages // batch  # pages of each sequence's own part
        self.step: Step | None = None
        self.on_device: DeviceStep | None = None  # while the host does not follow the steps
        self.steps = 0
        self.changes = 0  # how often tokens were stored by a step of the host, or moved
        self.counts = torch.zeros(batch, dtype=torch.int64)
        self._free = set(range(pages))
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._positions = torch.full((batch, 0), -1, dtype=torch.int64)  # by slot of the sequence
        self._forgotten = [-1] * batch  # last position that the window gave back
        self._index: Tensor | None = None  # these two: kept until the next change
        self._in_place: bool | None = None

    def __repr__(self) -> str:
        used = self.pages - len(self._free)
        return f"PageTable({self.batch} sequences, {used} of {self.pages} pages used)"

    @property
    def positions(self) -> Tensor:
        """Positions of the stored tokens (b, s) on the CPU, -1 behind the last of a sequence."""
        return self._positions[:, : int(self.counts.max())]

    @property
    def in_place(self) -> bool:
        """Whether every sequence lies in its own part of the pool, from the first slot on."""
        if self._in_place is None:
            self._in_place = self.home > 0 and all(
                len(pages) <= self.home
                and pages == list(range(i * self.home, i * self.home + len(pages)))
                for i, pages in enumerate(self._pages)
            )
        return self._in_place

    def pages_of(self, sequence: int) -> list[int]:
        """Pages that a sequence has, in the order of its tokens; the last ones may be empty."""
        return list(self._pages[sequence])

    def slots(self) -> Tensor:
        """Slot in the pool of each stored token (b, s), 0 behind the last; on the device."""
        if self._index is None:
            width = self.positions.shape[1]
            index = torch.zeros(self.batch, width, dtype=torch.int64)
            for i, pages in enumerate(self._pages):
                own = _slots(pages)[: int(self.counts[i])]
                index[i, : len(own)] = own
            self._index = index.to(self.device)
        return self._index

    # --- storing -----------------------------------------------------------------------------

    def shortage(self, positions: Tensor) -> int:
        """Pages that are missing to store `positions` (b, t); 0 or less if it fits.

        Those that the window then gives back count as free.
        """
        free = len(self._free) + sum(self._out_of_reach())
        return sum(self._missing((positions.cpu() >= 0).sum(1))) - free

    def advance(self, number: int, positions: Tensor, axis: Axis | None = None) -> Step:
        """The step in which a layer stores its `number`-th tokens; the first layer opens it.

        `positions` (b, t) int64.  With `axis`, all its ranks have the same tokens and each keeps
        its own.  Raises ValueError for positions that do not follow what is stored or differ
        between layers, CacheFullError if pages are missing.
        """
        if number == self.steps:
            self.step = self._open(positions, axis)
            self.steps += 1
        step = self.step
        if step is None or step.number != number:
            raise ValueError(
                f"KV cache: a layer stores step {number}, the others are at step {self.steps - 1};"
                " every layer must store every step once, before the next begins and before"
                " anything is dropped"
            )
        if step.owner != (None if axis is None else axis.name):
            raise ValueError(
                "KV cache: layers that share a table must all keep what they are given, or all keep"
                f" the pages that they own on one axis; got axis {axis} after {step.owner}"
            )
        if positions is not step.given and not torch.equal(positions, step.given):
            raise ValueError("KV cache: the positions differ from those of the first layer")
        return step

    def begin_after(self, positions: Tensor) -> None:
        """Say of an empty table that a window has left `positions` (b,) and all before behind."""
        self._forgotten = positions.tolist()

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Drop all tokens of sequence i at positions >= lengths[i].

        Raises ValueError where that would need tokens which a window gave back.
        """
        limits = torch.as_tensor(lengths, dtype=torch.int64).cpu()
        if limits.shape != (self.batch,) or bool((limits < 0).any()):
            raise ValueError(
                f"truncate takes a length of 0 or more for each of {self.batch} sequences, got"
                f" {limits.tolist()}"
            )
        lost = self.lost(limits)
        if lost:
            raise ValueError(lost)
        kept = (self.positions >= 0) & (self.positions < limits[:, None])
        self.counts = kept.sum(1)
        self._positions[:, : kept.shape[1]].masked_fill_(~kept, -1)
        for i, limit in enumerate(limits.tolist()):
            if not limit:
                self._forgotten[i] = -1
        self.step = None
        self.give_back()

    def lost(self, lengths: Tensor) -> str:
        """Why sequences cannot go back to `lengths` (b,), or nothing if they can."""
        for i, limit in enumerate(lengths.tolist()):
            last = self._forgotten[i]
            if limit and last >= 0 and last > limit - self.window:
                return (
                    f"sequence {i} cannot go back to {limit} tokens: its next token attends from"
                    f" position {limit - self.window + 1}, and a window of {self.window} has"
                    f" already dropped positions up to {last}"
                )
        return ""

    # --- storing several steps at once, around them -----------------------------------------------

    def reserve(self, positions: Tensor) -> None:
        """Take the pages for tokens that will be stored at `positions` (b, t), -1 for none.

        Raises CacheFullError if pages are missing.
        """
        if self.window:
            self._forget()
        self._take_pages((positions >= 0).sum(1))
        self._changed()

    def record(self, positions: Tensor) -> None:
        """Tokens at `positions` (b, t) were stored behind the others, in pages that were taken.

        Those of a sequence go up; -1 is none.
        """
        new = positions >= 0
        self._write_positions(positions, new, self.counts[:, None] + new.cumsum(1) - 1)
        self.counts = self.counts + new.sum(1)
        self._changed()

    def give_back(self) -> None:
        """Free the pages that hold no token."""
        for pages, count in zip(self._pages, self.counts.tolist(), strict=True):
            used = _pages_for(count)
            self._free.update(pages[used:])
            del pages[used:]
        self._changed()

    # --- details -----------------------------------------------------------------------------

    def _open(self, positions: Tensor, axis: Axis | None) -> Step:
        if (
            positions.shape[0] != self.batch
            or positions.ndim != 2
            or positions.dtype != torch.int64
        ):
            raise ValueError(
                f"KV cache: positions must be int64 ({self.batch}, tokens), got {positions.dtype}"
                f" {tuple(positions.shape)}"
            )
        host = positions.detach().cpu()
        kept = host
        if axis is not None:
            kept = host.where(owners(host, axis.size) == axis.rank, -1)
        # Row by row in the order of positions, padding in front.
        ordered, order = torch.sort(kept, dim=1)
        new = ordered >= 0
        self._check_order(ordered, new)
        added = new.sum(1)
        if self.window:
            self._forget()
        self._take_pages(added)
        places = self.counts[:, None] + new.cumsum(1) - 1  # slot in the sequence
        self._write_positions(ordered, new, places)
        sequence, column = new.nonzero(as_tuple=True)
        rows = sequence * host.shape[1] + order[sequence, column]
        slots = self._slots_of(sequence, places[sequence, column])
        self.counts = self.counts + added
        self.changes += 1
        self._changed()
        return Step(
            self.steps,
            positions,
            host,
            kept,
            rows.to(self.device),
            slots.to(self.device),
            None if axis is None else axis.name,
        )

    def _check_order(self, ordered: Tensor, new: Tensor) -> None:
        last = self._last()[:, None]
        before = torch.maximum(torch.cat([last, ordered], 1)[:, :-1], last)
        wrong = new & (ordered <= before)
        if bool(wrong.any()):
            i, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"KV cache: position {int(ordered[i, column])} of sequence {i} does not follow"
                f" position {int(before[i, column])}, which is stored or given already; use"
                " `truncate` to go back"
            )

    def _last(self) -> Tensor:
        """Last position that was stored of each sequence (b,), -1 if none."""
        forgotten = torch.tensor(self._forgotten)
        if not self._positions.shape[1]:
            return forgotten
        last = self._positions.gather(1, (self.counts - 1).clamp(min=0)[:, None]).squeeze(1)
        return torch.maximum(last, forgotten)

    def _changed(self) -> None:
        self._index, self._in_place = None, None

    def _missing(self, added: Tensor) -> list[int]:
        """Pages that each sequence needs besides its own for `added` (b,) tokens."""
        held = self.counts.tolist()
        return [
            _pages_for(held[i] + more) - len(self._pages[i])
            for i, more in enumerate(added.tolist())
        ]

    def _take_pages(self, added: Tensor) -> None:
        missing = self._missing(added)
        if sum(missing) > len(self._free):
            raise CacheFullError(self.full_message(int(added.sum())))
        for i, count in enumerate(missing):
            pages = self._pages[i]
            for _ in range(count):
                own = i * self.home + len(pages)
                page = own if own in self._free and len(pages) < self.home else max(self._free)
                self._free.remove(page)
                pages.append(page)

    def full_message(self, wanted: int) -> str:
        """The message of an error where `wanted` more tokens do not fit."""
        free = len(self._free)
        open_slots = sum(len(pages) * PAGE for pages in self._pages) - int(self.counts.sum())
        return (
            f"the KV cache is full: {wanted} new tokens do not fit on this rank, where"
            f" {self.batch} sequences hold {int(self.counts.sum())} tokens; {free} of {self.pages}"
            f" pages of {PAGE} tokens are free, which is {free * PAGE} tokens, and {open_slots}"
            " slots in pages that sequences have begun (a page belongs to one sequence); truncate"
            " sequences, or make the cache with more tokens or pages"
        )

    def _write_positions(self, ordered: Tensor, new: Tensor, places: Tensor) -> None:
        needed = int(places.max()) + 1 if places.numel() else 0
        if needed > self._positions.shape[1]:
            wider = torch.full((self.batch, needed + needed // 4 + PAGE), -1, dtype=torch.int64)
            wider[:, : self._positions.shape[1]] = self._positions
            self._positions = wider
        sequence, column = new.nonzero(as_tuple=True)
        self._positions[sequence, places[sequence, column]] = ordered[sequence, column]

    def _slots_of(self, sequence: Tensor, places: Tensor) -> Tensor:
        longest = max(len(pages) for pages in self._pages)
        table = torch.zeros(self.batch, max(longest, 1), dtype=torch.int64)
        for i, pages in enumerate(self._pages):
            table[i, : len(pages)] = torch.tensor(pages, dtype=torch.int64)
        return table[sequence, places // PAGE] * PAGE + places % PAGE

    def _out_of_reach(self) -> list[int]:
        """Full pages at the front of each sequence that no query after its tokens can reach."""
        if not self.window:
            return [0] * self.batch
        reach = self._last() + 1 - self.window  # the last position out of reach
        gone = (self._positions >= 0) & (self._positions <= reach[:, None])
        return (gone.sum(1) // PAGE).tolist()

    def _forget(self) -> None:
        """Give back the pages that are out of reach."""
        for i, (pages, out) in enumerate(zip(self._pages, self._out_of_reach(), strict=True)):
            if out:
                self.changes += 1
                gone = out * PAGE
                self._forgotten[i] = int(self._positions[i, gone - 1])
                self._positions[i] = self._positions[i].roll(-gone)
                self._positions[i, -gone:] = -1
                self.counts[i] -= gone
                self._free.update(pages[:out])
                del pages[:out]


class KVCache:
    """Keys and values of one layer on this rank.

    keys    pages * 16 slots of (heads, key_dim)
    values  pages * 16 slots of (heads, value_dim)

    With `values_in_keys` the values are the first `value_dim` numbers of the keys, a view of them.

    `tokens` is the capacity of each of `batch` sequences; sequences share all `pages` (default:
    enough for that capacity), so a few may be longer while others are short.  Layers that store the
    same tokens share `table`.  Bytes: pages * 16 * heads * (key_dim + value_dim) * itemsize; those
    of keys alone with `values_in_keys`.
    """

    def __init__(
        self,
        batch: int,
        tokens: int,
        heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pages: int | None = None,
        window: int = 0,
        table: PageTable | None = None,
        values_in_keys: bool = False,
    ) -> None:
        if table is None:
            pages = batch * _pages_for(tokens) if pages is None else pages
            table = PageTable(batch, pages, window=window, device=device)
        self.table = table
        value_dim = key_dim if value_dim is None else value_dim
        if values_in_keys and value_dim > key_dim:
            raise ValueError(f"KV cache: {key_dim} numbers of a key hold no {value_dim} of a value")
        self.values_in_keys = values_in_keys
        # Behind the pool is a slot for what a step on the device does not keep.
        slots = table.pages * PAGE
        self._pools = [
            torch.zeros(slots + 1, heads, dim, dtype=dtype, device=table.device)
            for dim in ([key_dim] if values_in_keys else [key_dim, value_dim])
        ]
        self.keys = self._pools[0][:slots]
        self.values = self._pools[-1][:slots, :, :value_dim]
        self._ordered: tuple[tuple[int, int, int], Tensor, Tensor] | None = None  # last views
        self._steps = table.steps
        self.needs_host = "no step has run yet"  # why its steps can't run on the device alone
        self.handle = handle_of(self)

    def __repr__(self) -> str:
        _, heads, key_dim = self.keys.shape
        return f"KVCache({heads} heads of {key_dim}, {self.keys.dtype}, {self.table})"

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's pool."""
        return self.keys.nbytes + (0 if self.values_in_keys else self.values.nbytes)

    def values_of(self, k: Tensor) -> Tensor:
        """The values that keys (..., key_dim) hold, as a view."""
        return k[..., : self.values.shape[2]]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence that this rank holds (b,), int64 on the CPU."""
        return self.table.counts.clone()

    def append(
        self, k: Tensor, v: Tensor | None, positions: Tensor, *, axis: Axis | None = None
    ) -> Step:
        """Store keys (b, heads, t, key_dim) and values of new tokens at `positions` (b, t) int64.

        `v` is None if, and only if, the keys hold the values.

        Tokens at position -1 are padding.  Positions of a sequence may come in any order but must
        follow what is stored.  With `axis`, all its ranks give the same tokens, and each keeps the
        pages that are its own (`owners`).

        Raises CacheFullError, which says how many tokens fit, and ValueError for tensors or
        positions that do not fit; nothing is stored then.
        """
        self._check(k, v, positions)
        step = self.table.advance(self._steps, positions, axis)
        self._steps += 1
        for x, pool in zip((k, v), self._pools, strict=False):
            assert x is not None
            pool[step.slots] = x.detach().transpose(1, 2).flatten(0, 1)[step.rows]
        return step

    def put(self, k: Tensor, v: Tensor | None, step: DeviceStep) -> None:
        """Store keys and values of new tokens, as in `append`, where a step on the device says.

        They are known to fit.
        """
        for x, pool in zip((k, v), self._pools, strict=False):
            assert x is not None
            rows = x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)
            pool.index_copy_(0, step.slots, rows)

    def _check(self, k: Tensor, v: Tensor | None, positions: Tensor) -> None:
        """Refuse keys and values of new tokens that do not fit the pool."""
        if (v is None) != self.values_in_keys:
            held = "holds values in its keys" if self.values_in_keys else "stores values"
            raise ValueError(f"KV cache: v is {'None' if v is None else 'given'}; the cache {held}")
        b, t = positions.shape
        for title, x, pool in zip("kv", (k, v), self._pools, strict=False):
            assert x is not None
            wanted = (b, pool.shape[1], t, pool.shape[2])
            if x.shape != wanted or x.dtype != pool.dtype or x.device != pool.device:
                raise ValueError(
                    f"KV cache: {title} is {x.dtype} {tuple(x.shape)} on {x.device}, expected"
                    f" {pool.dtype} {tuple(wanted)} on {pool.device}"
                )

    def gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (b, heads, s, key_dim), values (b, heads, s, value_dim), positions (b, s).

        s is the longest local sequence; behind the end of a shorter one positions are -1 and keys
        and values meaningless, but finite.  Positions of a sequence go up and are on the CPU.
        Views of the pool where every sequence lies in one piece, otherwise copies.
        """
        table, positions = self.table, self.table.positions
        if table.in_place:
            k, v = self.in_order(table.home * PAGE, *positions.shape)
            return k, v, positions
        k = self.keys[table.slots()].transpose(1, 2)
        if self.values_in_keys:
            return k, self.values_of(k), positions
        return k, self.values[table.slots()].transpose(1, 2), positions

    def in_order(self, size: int, batch: int, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values (b, heads, width, dim) of sequences whose slots begin at 0, size, ..."""
        if self._ordered is None or self._ordered[0] != (size, batch, width):
            own = (
                pool[: batch * size].unflatten(0, (batch, size))[:, :width].transpose(1, 2)
                for pool in (self.keys, self.values)
            )
            k, v = own
            self._ordered = (size, batch, width), k, v
        return self._ordered[1:]

    # --- to another layout, see `recache.py` ---------------------------------------------------

    def check_in_step(self) -> None:
        """Raise ValueError if this layer has not stored what the others of its table have."""
        if self._steps != self.table.steps:
            raise ValueError(
                f"KV cache: a layer stored {self._steps} steps, the others {self.table.steps}; a"
                " step failed half-way, so start anew with `prefill`"
            )

    def packed(self, columns: Tensor) -> Tensor:
        """Stored tokens by their column in `table.positions` (b, n): (b, n, heads, numbers).

        A head's numbers are its key and behind it its value, or the key that holds the value.
        Where this rank stores nothing, columns are 0 and the numbers mean nothing.
        """
        slots = self.table.slots()
        if not slots.shape[1]:  # nothing is stored here, and any slot will do
            slots = slots.new_zeros(len(slots), 1)
        slots = slots.gather(1, columns.to(slots.device))
        k = self.keys[slots]
        return k if self.values_in_keys else torch.cat([k, self.values[slots]], -1)

    def store(self, step: Step, packed: Tensor) -> None:
        """Store the tokens of a step that the table has opened, (b, t, heads, numbers)."""
        rows = packed.flatten(0, 1)[step.rows]
        width = self.keys.shape[2]
        self.keys[step.slots] = rows[..., :width]
        if not self.values_in_keys:
            self.values[step.slots] = rows[..., width:]

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Drop the tokens of sequence i at positions >= lengths[i], in all layers of the table."""
        self.table.truncate(lengths)

    def clear(self) -> None:
        """Forget all tokens, in all layers of the table, also after a step that failed half-way."""
        self.table.truncate([0] * self.table.batch)
        self._steps = self.table.steps


def owners(positions: Tensor, ranks: int) -> Tensor:
    """Which of `ranks` keeps the token at each position: page by page in turn.

    >>> owners(torch.tensor([0, 15, 16, 40]), 2)
    tensor([0, 0, 1, 0])
    """
    return positions.div(PAGE, rounding_mode="floor") % ranks


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def _slots(pages: Sequence[int]) -> Tensor:
    """Slots of the pages, in order."""
    first = torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE
    return (first + torch.arange(PAGE)).flatten()
