"""Serving a sharded module: new tokens of a batch in, next-token logits out, and generation.

Everything here has full (unsharded) tensors that are the same on every rank.  A module that can be
served takes `input_ids` and `position_ids` (b, t) int64 and returns logits (b, 1, v) of the last
token of each sequence; its caches remember what came before.  A token is known by its position,
and position -1 is padding, so sequences of different lengths share a batch and the tokens of one
sequence may lie on the ranks in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ...facts.spec import Spec, format_spec, parse_spec
from ..cache.cache import PAGE, CacheFullError, PageTable, owners
from ..cache.pools import BATCH, TOKENS, Pools, Room, highest, own_part, owner_of, specs_of, ways
from ..cache.recache import Path, Recaching, change_between

if TYPE_CHECKING:
    from ..mesh.mesh import Mesh
    from ..module.module import Cache, Input, ShardedModule

ServePhase: TypeAlias = Literal["prefill", "decode", "append"]


class Serving:
    """The caches of a module and how far each of `batch` sequences has come.

    `lengths` (batch,) are the tokens that are cached of each, int64 on the CPU; `tokens` is how
    many there may be.  The caches lie as the program wants them that ran last; before one runs that
    wants them otherwise they are converted (`recache.py`).
    """

    def __init__(
        self, model: ShardedModule, batch: int, tokens: int, total_tokens: int | None
    ) -> None:
        if batch < 1 or tokens < 1 or (total_tokens is not None and total_tokens < 1):
            raise ValueError(
                f"a cache needs at least one sequence of one token, got {batch} sequences of"
                f" {tokens} tokens, {total_tokens} in total"
            )
        if not model.CACHES:
            raise ValueError(
                f"{type(model).__name__} has no KV caches; plan it with --phase prefill, decode,"
                " append or serve"
            )
        self.batch, self.tokens = batch, tokens
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._model = model
        self._paths = _paths(model)
        self._rows = _padded_rows(model, batch, self._paths)
        limited = total_tokens is not None
        total = total_tokens if total_tokens is not None else batch * tokens
        runs = [model.inputs_of(phase)["input_ids"].shape[1] for phase in model.phases()]
        self._room = Room(self._rows, tokens, total, limited, max(runs))
        self._pools = Pools({}, self._room, model.mesh)
        self._pools = self._empty(model.CACHES)

    def step(self, phase: ServePhase, ids: Tensor, counts: Tensor) -> Tensor:
        """Feed the first `counts[i]` of the tokens `ids[i]` to sequence i; logits (b, v).

        Rows without new tokens get meaningless logits.  More tokens than the phase was planned for
        go in several runs.
        """
        self._check_capacity(counts)
        self.lay_out(phase)
        wanted = self._model.inputs_of(phase)["input_ids"]
        limit = self._columns(wanted)
        logits: Tensor | None = None
        for start in range(0, max(int(counts.max()), 1), limit or ids.shape[1]):
            stop = start + (limit or ids.shape[1])
            some = (counts - start).clamp(0, stop - start)
            new = self._run(phase, wanted, ids[:, start:stop], some)
            fresh = (some > 0).to(new.device)[:, None]
            logits = new if logits is None else torch.where(fresh, new, logits)
        assert logits is not None
        return logits

    def truncate(self, lengths: Tensor) -> None:
        """Drop the tokens of sequence i at positions >= lengths[i]."""
        limits = self._of_rows(lengths)
        mesh = self._model.mesh
        own = [(item.table, own_part(limits, item.spec, mesh)) for item in self._pools.tables]
        self._check_windows([table.lost(rows) for table, rows in own])
        for table, rows in own:
            table.truncate(rows)
        self.lengths = torch.minimum(self.lengths, lengths)

    def fill(self, tokens: int, phase: ServePhase = "prefill") -> None:
        """Cache `tokens` random keys and values of each sequence, without a forward pass.

        For measurements: a step of `phase` over a long context can be timed without computing that
        context.
        """
        counts = torch.full((self.batch,), tokens)
        self.clear()
        self._check_capacity(counts)
        self.lay_out(phase)
        kept: dict[PageTable, Tensor] = {}
        for shared in self._pools.tables:
            window = shared.table.window
            first = max(tokens - window, 0) if window else 0
            positions = torch.arange(first, tokens).repeat(self._rows, 1)
            positions[self.batch :] = -1
            shared.table.begin_after(torch.full((shared.table.batch,), first - 1))
            kept[shared.table] = _own_pages(positions, shared.spec, self._model.mesh)
        for cache in self._pools.caches.values():
            own = kept[cache.table]
            values = None if cache.values_in_keys else _random(cache.values, own)
            cache.append(_random(cache.keys, own), values, own)
        self.lengths = counts

    def lay_out(self, phase: ServePhase) -> None:
        """Bring the caches into the layout that the program for `phase` wants, as `step` does.

        Raises CacheFullError, and leaves them as they are, if a rank has no room there.  If it
        fails half-way otherwise, all tokens are forgotten.
        """
        wanted = self._model.caches_of(phase)
        if wanted is self._pools.declared:
            return
        now, then = specs_of(self._pools.declared), specs_of(wanted)
        if now == then:
            self._pools.declared = wanted
            return
        if not bool(self.lengths.any()):
            self._pools = self._empty(wanted)
            return
        paths = {name: self._path(name, now[name], then[name]) for name in wanted}
        conversion = Recaching(self._pools, wanted, paths, self._of_rows(self.lengths))
        lengths, self.lengths = self.lengths, torch.zeros_like(self.lengths)
        self._pools = Pools({}, self._room, self._model.mesh)
        self._pools = conversion.run(self._model.set_cache)
        self.lengths = lengths

    def clear(self) -> None:
        """Forget all tokens, also after a step that failed half-way."""
        for cache in self._pools.caches.values():
            cache.clear()
        self.lengths = torch.zeros_like(self.lengths)

    # --- details -----------------------------------------------------------------------------

    def _empty(self, declared: Mapping[str, Cache]) -> Pools:
        """New caches without tokens, those that were there freed before."""
        for name in self._pools.caches:
            self._model.set_cache(name, None)
        self._pools = Pools({}, self._room, self._model.mesh)
        pools = Pools.empty(declared, self._room, self._model.mesh)
        for name, cache in pools.caches.items():
            self._model.set_cache(name, cache)
        return pools

    def _path(self, name: str, now: Spec, then: Spec) -> Path:
        """The specs from one layout of a cache to another, there or back."""
        path = self._paths[name]
        if now == then:
            return (now,)
        return path if (now, then) == (path[0], path[-1]) else path[::-1]

    def _of_rows(self, numbers: Tensor) -> Tensor:
        """Numbers of the sequences (batch,), and 0 for each padding row behind."""
        rows = torch.zeros(self._rows, dtype=torch.int64)
        rows[: self.batch] = numbers
        return rows

    def _check_capacity(self, counts: Tensor) -> None:
        after = self.lengths + counts
        over = (after > self.tokens).nonzero().flatten().tolist()
        if over:
            i = over[0]
            raise CacheFullError(
                f"sequence {i} has {int(self.lengths[i])} cached tokens and got {int(counts[i])}"
                f" more, but the cache holds {self.tokens} per sequence; call"
                f" new_cache(batch={self.batch}, tokens={int(after.max())} or more)"
            )

    def _columns(self, wanted: Input) -> int:
        """How many tokens of a sequence fit in one run; 0 is any number."""
        windows = any(shared.table.window for shared in self._pools.tables)
        if 1 in wanted.free and not windows:
            return 0
        step = 2 * ways(parse_spec(wanted.spec), self._model.mesh, 1)
        return wanted.shape[1] if step == 2 else max(wanted.shape[1] // step * step, 1)

    def _run(self, phase: ServePhase, wanted: Input, ids: Tensor, counts: Tensor) -> Tensor:
        model, spec = self._model, parse_spec(wanted.spec)
        order = self._arranged(wanted, counts)  # (rows, columns): which new token, or -1
        padding = order < 0
        starts = torch.zeros(self._rows, 1, dtype=torch.int64)
        starts[: self.batch, 0] = self.lengths
        positions = (starts + order).masked_fill(padding, -1)
        padded = torch.zeros(self._rows, max(ids.shape[1], 1), dtype=torch.int64)
        padded[: self.batch, : ids.shape[1]] = ids
        given = padded.gather(1, order.clamp(min=0))
        if self._pools.may_run_out:
            self._check_room(positions, spec, counts)
        local = model.shard_phase(phase, input_ids=given, position_ids=positions)
        with torch.no_grad():
            logits = model.gather_phase(phase, model._run(phase, **local))  # pyright: ignore[reportPrivateUsage]
        self.lengths = self.lengths + counts
        return logits[: self.batch, 0]

    def _arranged(self, wanted: Input, counts: Tensor) -> Tensor:
        mesh, spec = self._model.mesh, parse_spec(wanted.spec)
        sharing = ways(spec, mesh, 1)
        rows, starts = self._of_rows(counts), self._of_rows(self.lengths)
        cut = any(TOKENS in shared.spec for shared in self._pools.tables)
        width = 0 if 1 in wanted.free else wanted.shape[1] // sharing
        step = -(-wanted.step[1] // sharing) if wanted.step else 1
        return arrange(starts, rows, sharing, balanced=cut, width=width, step=step)

    def _check_windows(self, lost: list[str]) -> None:
        """Raise ValueError on every rank if the caches of some rank cannot go back."""
        if not any(shared.table.window for shared in self._pools.tables):
            return
        reasons = [reason for reason in lost if reason]
        if highest(len(reasons), self._model.mesh):
            raise ValueError(reasons[0] if reasons else "another rank has dropped what is needed")

    def _check_room(self, positions: Tensor, spec: Spec, counts: Tensor) -> None:
        """Raise CacheFullError on every rank if a pool of some rank is too small."""
        mesh = self._model.mesh
        tables = self._pools.tables
        short = max(
            shared.table.shortage(_kept(positions, spec, shared.spec, mesh)) for shared in tables
        )
        worst = highest(short, mesh)
        if worst > 0:
            table = max((shared.table for shared in tables), key=lambda table: table.pages)
            raise CacheFullError(
                f"a rank lacks {worst} pages for these tokens; on this rank:"
                f" {table.full_message(int(counts.sum()))}"
            )


def arrange(
    starts: Tensor, counts: Tensor, ways: int, *, balanced: bool, width: int = 0, step: int = 1
) -> Tensor:
    """Which new token stands in each column (b, ways * w): 0 .. counts[i] - 1, or -1 for padding.

    The columns are `ways` blocks, one for each rank that shares the sequence; w is the most that
    one of them holds, in multiples of `step`, or `width`.  `balanced` deals 2 ways chunks of each
    sequence out as zigzag does, so that all ranks cache and compute the same, whatever the
    sequence's length; the rank that begins depends on `starts`, so that single tokens go to the
    ranks page by page in turn, as `owners` says.  Otherwise tokens stay in order.

    >>> arrange(torch.tensor([0, 0]), torch.tensor([8, 3]), 2, balanced=True)
    tensor([[ 0,  1,  6,  7,  2,  3,  4,  5],
            [ 2, -1, -1, -1,  0,  1, -1, -1]])
    """
    rows: list[list[Tensor]] = []
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        if not balanced:
            block = max(-(-int(counts.max()) // ways), 1)
            rows.append([torch.arange(r * block, (r + 1) * block) for r in range(ways)])
            rows[-1] = [part[part < count] for part in rows[-1]]
            continue
        bounds = [count * i // (2 * ways) for i in range(2 * ways + 1)]
        chunks = [torch.arange(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        parts = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(ways)]
        first = start // PAGE
        rows.append([parts[(r - first) % ways] for r in range(ways)])
    longest = max(1, *(len(part) for row in rows for part in row))
    width = width or -(-longest // step) * step
    order = torch.full((len(rows), ways, width), -1, dtype=torch.int64)
    for i, row in enumerate(rows):
        for r, part in enumerate(row):
            order[i, r, : len(part)] = part
    return order.flatten(1)


def _kept(positions: Tensor, spec: Spec, table_spec: Spec, mesh: Mesh) -> Tensor:
    """The positions that a rank's table has to store: its columns, or those it owns."""
    own = own_part(positions, table_spec, mesh)
    axes = [axis for axis, state in zip(mesh.axes, table_spec, strict=True) if state == 2]
    if not axes:
        return own
    if all(state == 1 for state, kept in zip(spec, table_spec, strict=True) if kept == 2):
        columns = tuple({0: 0, 2: 1}.get(state, -1) for state in table_spec)
        return own_part(positions, columns, mesh)
    sharing, rank = owner_of(axes)
    return own.where(owners(own, sharing) == rank, -1)


def _own_pages(positions: Tensor, table_spec: Spec, mesh: Mesh) -> Tensor:
    """Of positions that all rows share, those that `owners` gives a rank, for its own rows."""
    own = own_part(positions, table_spec, mesh)
    cut = [axis for axis, state in zip(mesh.axes, table_spec, strict=True) if state == 2]
    sharing, rank = owner_of(cut)
    return own[:, owners(positions[0], sharing) == rank]


def _random(pool: Tensor, positions: Tensor) -> Tensor:
    """Random numbers (b, heads, t, dim) for a pool (slots, heads, dim) at `positions` (b, t)."""
    rows, tokens = positions.shape
    heads, dim = pool.shape[1:]
    return torch.randn(rows, heads, tokens, dim, dtype=pool.dtype, device=pool.device)


def _paths(model: ShardedModule) -> dict[str, Path]:
    """The specs that each cache takes from the first program's layout to that for decoding.

    Raises ValueError where the module has two layouts of a cache and does not say how to convert.
    """
    decoding = specs_of(model.caches_of("decode"))
    paths: dict[str, Path] = {}
    for name, cache in model.CACHES.items():
        path = tuple(parse_spec(text) for text in (cache.spec, *cache.path))
        if path[-1] != decoding[name]:
            raise ValueError(
                f"cache {name} lies in {cache.spec} and for decoding in"
                f" {format_spec(decoding[name])}, but its `path` is {list(cache.path)}; it must"
                " end with the spec for decoding"
            )
        for before, after in pairwise(path):
            change_between(before, after)
        paths[name] = path
    return paths


def _padded_rows(model: ShardedModule, batch: int, paths: Mapping[str, Path]) -> int:
    """Sequences with padding: a multiple of what all phases and caches cut a batch into."""
    specs = [spec for path in paths.values() for spec in path]
    planned: set[int] = set()
    steps: list[int] = []
    for phase in model.phases():
        wanted = model.inputs_of(phase)["input_ids"]
        specs.append(parse_spec(wanted.spec))
        if 0 not in wanted.free:
            planned.add(wanted.shape[0])
        elif wanted.step:
            steps.append(wanted.step[0])
    step = lcm(*(ways(spec, model.mesh, BATCH) for spec in specs), *steps)
    rows = max([-(-batch // step) * step, *planned])
    if planned and planned != {rows}:
        raise ValueError(
            f"the module was planned for a batch of {', '.join(map(str, sorted(planned)))}, which"
            f" {batch} sequences ({rows} with padding) do not fit; plan it with --batch {batch}"
        )
    return rows


# --- generation ----------------------------------------------------------------------------------


def generate(
    model: ShardedModule,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """See `ShardedModule.generate`."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    prompts, counts = compact(input_ids, lengths, attention_mask)
    if max_new_tokens == 0:
        return input_ids
    stop = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    stops = torch.tensor(stop, dtype=torch.int64)
    randomness = _randomness(model.mesh, seed) if do_sample else None
    serving = model.room_for(len(prompts), int(counts.max()) + max_new_tokens)
    logits = model.prefill(prompts, counts)
    alive = torch.ones(len(prompts), dtype=torch.bool)
    columns: list[Tensor] = []
    while True:
        chosen = next_tokens(logits, randomness, temperature, top_k, top_p)
        chosen = _agreed(chosen, model.mesh).cpu().where(alive, pad_token_id)
        columns.append(chosen)
        alive = alive & ~torch.isin(chosen, stops)
        if len(columns) == max_new_tokens or not bool(alive.any()):
            break
        logits = serving.step("decode", chosen[:, None], alive.to(torch.int64))
    return torch.cat([input_ids, torch.stack(columns, 1).to(input_ids)], 1)


def next_tokens(
    logits: Tensor,
    randomness: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """One token per row of `logits` (b, v): the likeliest, or drawn from `randomness`.

    Drawn as transformers does it: logits / temperature, then the `top_k` highest (0: all), then
    the fewest tokens whose probabilities sum to `top_p` or more.
    """
    if randomness is None:
        return logits.argmax(-1)
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0 (0: no limit), got"
            f" {temperature}, {top_p}, {top_k}"
        )
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if 0 < top_k < scores.shape[-1]:
        lowest = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(descending=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share  # of the likelier tokens; 0 for the first
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        scores = torch.empty_like(scores).scatter_(-1, order, ordered)
    return torch.multinomial(scores.softmax(-1), 1, generator=randomness).squeeze(1)


def compact(
    input_ids: Tensor,
    lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(prompts (b, t) padded on the right, their lengths (b,)), both int64 on the CPU.

    `lengths` (b,) says how many tokens at the start of each row are the prompt; `attention_mask`
    (b, t) marks them with 1, wherever they are.  Without either every token is.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers (batch, tokens), got {input_ids.dtype}"
            f" {tuple(input_ids.shape)}"
        )
    ids = input_ids.detach().to("cpu", torch.int64)
    if attention_mask is None:
        counts = checked_lengths(lengths, ids, least=1)
        return ids, counts
    if lengths is not None or attention_mask.shape != ids.shape:
        raise ValueError(
            f"give either `lengths` or an attention_mask {tuple(ids.shape)}, got"
            f" {'both' if lengths is not None else tuple(attention_mask.shape)}"
        )
    mask = attention_mask.detach().cpu() != 0
    counts = checked_lengths(mask.sum(1), ids, least=1)
    order = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)[:, : int(counts.max())], counts


def checked_lengths(lengths: Tensor | Sequence[int] | None, ids: Tensor, least: int = 0) -> Tensor:
    """`lengths` as int64 (b,) on the CPU, by default all tokens of `ids` (b, t)."""
    batch, width = ids.shape
    if lengths is None:
        return torch.full((batch,), width, dtype=torch.int64)
    counts = torch.as_tensor(lengths).detach().to("cpu", torch.int64)
    if counts.shape != (batch,) or bool(((counts < least) | (counts > width)).any()):
        raise ValueError(
            f"lengths must be {batch} numbers from {least} to {width}, got {counts.tolist()}"
        )
    return counts


def _randomness(mesh: Mesh, seed: int | None) -> torch.Generator:
    """The same on every rank: from `seed`, else the mesh's own."""
    if seed is None:
        return mesh.generator()
    return torch.Generator(mesh.device).manual_seed(seed)


def _agreed(tokens: Tensor, mesh: Mesh) -> Tensor:
    """Rank 0's choice: ranks whose logits differ in the last bit must not part ways."""
    if mesh.size > 1:
        tokens = tokens.to(mesh.device).contiguous()
        dist.broadcast(tokens, 0)
    return tokens
