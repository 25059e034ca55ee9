"""Serving a sharded module: new tokens of a batch in, next-token logits out, and generation.

Everything here has full (unsharded) tensors that are the same on every rank.  A module that can be
served takes `input_ids` and `position_ids` (b, t) int64 and returns logits (b, 1, v) of the last
token of each sequence; its caches remember what came before.  A token is known by its position,
and position -1 is padding, so sequences of different lengths share a batch and the tokens of one
sequence may lie on the ranks in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .cache import PAGE, CacheFullError, KVCache, PageTable, owners
from .layout import Spec, blocks, local_shape, parse_spec

if TYPE_CHECKING:
    from .collectives import Axis
    from .mesh import Mesh
    from .module import Cache, Input, ShardedModule

ServePhase: TypeAlias = Literal["prefill", "decode", "append"]


class Serving:
    """The caches of a module and how far each of `batch` sequences has come.

    `lengths` (batch,) are the tokens that are cached of each, int64 on the CPU; `tokens` is how
    many there may be.
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
        self._rows = _padded_rows(model, batch)
        self._tables: dict[tuple[Spec, int], PageTable] = {}
        self._caches: list[KVCache] = []
        # Pools that are large enough for every sequence at full length cannot run out.
        self._may_run_out = total_tokens is not None
        total = batch * tokens if total_tokens is None else total_tokens
        for name, cache in model.CACHES.items():
            self._caches.append(self._make_cache(cache, tokens, total))
            model.set_cache(name, self._caches[-1])

    def step(self, phase: ServePhase, ids: Tensor, counts: Tensor) -> Tensor:
        """Feed the first `counts[i]` of the tokens `ids[i]` to sequence i; logits (b, v).

        Rows without new tokens get meaningless logits.  More tokens than the phase was planned for
        go in several runs.
        """
        self._check_capacity(counts)
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
        limits = torch.zeros(self._rows, dtype=torch.int64)
        limits[: self.batch] = lengths
        own = [
            (table, _part(limits[:, None], _batch_only(spec), self._model.mesh)[:, 0])
            for (spec, _), table in self._tables.items()
        ]
        self._check_windows([table.lost(rows) for table, rows in own])
        for table, rows in own:
            table.truncate(rows)
        self.lengths = torch.minimum(self.lengths, lengths)

    def fill(self, tokens: int) -> None:
        """Cache `tokens` random keys and values of each sequence, without a forward pass.

        For measurements: a step over a long context can be timed without computing that context.
        """
        mesh = self._model.mesh
        counts = torch.full((self.batch,), tokens)
        self.clear()
        self._check_capacity(counts)
        positions = torch.arange(tokens).repeat(self._rows, 1)
        positions[self.batch :] = -1
        kept: dict[tuple[Spec, int], Tensor] = {}
        for cache, declared in zip(self._caches, self._model.CACHES.values(), strict=True):
            key = self._key(declared)
            if key not in kept:
                kept[key] = _own_pages(positions, key[0], mesh)
            own = kept[key]
            cache.append(_random(cache.keys, own), _random(cache.values, own), own)
        self.lengths = counts

    def clear(self) -> None:
        """Forget all tokens, also after a step that failed half-way."""
        for cache in self._caches:
            cache.clear()
        self.lengths = torch.zeros_like(self.lengths)

    # --- details -----------------------------------------------------------------------------

    def _make_cache(self, cache: Cache, tokens: int, total: int) -> KVCache:
        mesh, spec = self._model.mesh, parse_spec(cache.spec)
        rows, heads, local = local_shape((self._rows, cache.heads, tokens), spec, mesh.sizes)
        key = self._key(cache)
        if key not in self._tables:
            ways = _ways(spec, mesh, 2)
            self._may_run_out |= ways > 1
            # Of every sequence a page may be half empty; where ranks share a sequence, two.
            pages = -(-total // (_ways(spec, mesh, 0) * ways * PAGE)) + rows * (1 + (ways > 1))
            pages = min(pages, rows * (-(-local // PAGE) + 2 * (ways > 1)))
            self._tables[key] = PageTable(rows, pages, window=cache.window, device=mesh.device)
        return KVCache(
            rows, local, heads, cache.key_dim, cache.value_dim,
            dtype=cache.dtype, table=self._tables[key], values_in_keys=cache.values_in_keys,
        )  # fmt: skip

    def _key(self, cache: Cache) -> tuple[Spec, int]:
        """Caches with the same key keep the same tokens and share a page table."""
        spec = parse_spec(cache.spec)
        return tuple(state if state != 1 else -1 for state in spec), cache.window

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
        if 1 in wanted.free:
            return 0
        step = 2 * _ways(parse_spec(wanted.spec), self._model.mesh, 1)
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
        if self._may_run_out:
            self._check_room(positions, spec, counts)
        local = model.shard_phase(phase, input_ids=given, position_ids=positions)
        with torch.no_grad():
            logits = model.gather_phase(phase, model._run(phase, **local))  # pyright: ignore[reportPrivateUsage]
        self.lengths = self.lengths + counts
        return logits[: self.batch, 0]

    def _arranged(self, wanted: Input, counts: Tensor) -> Tensor:
        mesh, spec = self._model.mesh, parse_spec(wanted.spec)
        ways = _ways(spec, mesh, 1)
        rows = torch.zeros(self._rows, dtype=torch.int64)
        rows[: self.batch] = counts
        starts = torch.zeros_like(rows)
        starts[: self.batch] = self.lengths
        cut = any(2 in table_spec for table_spec, _ in self._tables)
        width = 0 if 1 in wanted.free else wanted.shape[1] // ways
        step = -(-wanted.step[1] // ways) if wanted.step else 1
        return arrange(starts, rows, ways, balanced=cut, width=width, step=step)

    def _check_windows(self, lost: list[str]) -> None:
        """Raise ValueError on every rank if the caches of some rank cannot go back."""
        if not any(window for _, window in self._tables):
            return
        reasons = [reason for reason in lost if reason]
        if _highest(len(reasons), self._model.mesh):
            raise ValueError(reasons[0] if reasons else "another rank has dropped what is needed")

    def _check_room(self, positions: Tensor, spec: Spec, counts: Tensor) -> None:
        """Raise CacheFullError on every rank if a pool of some rank is too small."""
        mesh = self._model.mesh
        short = max(
            table.shortage(_kept(positions, spec, table_spec, mesh))
            for (table_spec, _), table in self._tables.items()
        )
        worst = _highest(short, mesh)
        if worst > 0:
            table = max(self._tables.values(), key=lambda table: table.pages)
            raise CacheFullError(
                f"a rank lacks {worst} pages for these tokens; on this rank:"
                f" {table.full_message(int(counts.sum()))}"
            )


def _highest(number: int, mesh: Mesh) -> int:
    """The highest of all ranks' numbers."""
    highest = torch.tensor([number], device=mesh.device)
    for axis in mesh.axes:
        highest = axis.reduce(highest, "max")
    return int(highest)


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
    own = _part(positions, _batch_only(table_spec), mesh)
    axes = [axis for axis, state in zip(mesh.axes, table_spec, strict=True) if state == 2]
    if not axes:
        return own
    if all(state == 1 for state, kept in zip(spec, table_spec, strict=True) if kept == 2):
        columns = tuple({0: 0, 2: 1}.get(state, -1) for state in table_spec)
        return _part(positions, columns, mesh)
    ways, rank = _owner_of(axes)
    return own.where(owners(own, ways) == rank, -1)


def _own_pages(positions: Tensor, table_spec: Spec, mesh: Mesh) -> Tensor:
    """Of positions that all rows share, those that `owners` gives a rank, for its own rows."""
    own = _part(positions, _batch_only(table_spec), mesh)
    cut = [axis for axis, state in zip(mesh.axes, table_spec, strict=True) if state == 2]
    ways, rank = _owner_of(cut)
    return own[:, owners(positions[0], ways) == rank]


def _random(pool: Tensor, positions: Tensor) -> Tensor:
    """Random numbers (b, heads, t, dim) for a pool (slots, heads, dim) at `positions` (b, t)."""
    rows, tokens = positions.shape
    heads, dim = pool.shape[1:]
    return torch.randn(rows, heads, tokens, dim, dtype=pool.dtype, device=pool.device)


def _owner_of(axes: Sequence[Axis]) -> tuple[int, int]:
    """(how many ranks share a sequence over `axes`, which of them this is)."""
    rank = 0
    for axis in axes:
        rank = rank * axis.size + axis.rank
    return prod(axis.size for axis in axes), rank


def _part(x: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    own = blocks(x.shape, spec, mesh.sizes, mesh.coordinates)
    return x[tuple(slice(part.start, part.stop) for part in own)]


def _batch_only(spec: Spec) -> Spec:
    return tuple(0 if state == 0 else -1 for state in spec)


def _ways(spec: Spec, mesh: Mesh, dim: int) -> int:
    return prod(size for state, size in zip(spec, mesh.sizes, strict=True) if state == dim)


def _padded_rows(model: ShardedModule, batch: int) -> int:
    """Sequences with padding: a multiple of what all phases and caches cut a batch into."""
    specs = [parse_spec(cache.spec) for cache in model.CACHES.values()]
    planned: set[int] = set()
    steps: list[int] = []
    for phase in model.phases():
        wanted = model.inputs_of(phase)["input_ids"]
        specs.append(parse_spec(wanted.spec))
        if 0 not in wanted.free:
            planned.add(wanted.shape[0])
        elif wanted.step:
            steps.append(wanted.step[0])
    step = lcm(*(_ways(spec, model.mesh, 0) for spec in specs), *steps)
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
