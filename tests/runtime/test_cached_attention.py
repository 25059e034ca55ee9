"""Attention over a cache against plain attention over the whole sequence, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.ir.ops.algorithms.part import Part
from shardwright.ir.ops.algorithms.quantities import positions_of, traffic_of
from shardwright.runtime import (
    CollectiveCounter,
    KVCache,
    Mesh,
    PageTable,
    RankError,
    RankPool,
    cached_attention,
    count_collectives,
    last_token,
)
from shardwright.runtime.attention.pieces import Piece
from shardwright.runtime.attention.positions import pieces_at, runs_of
from shardwright.runtime.attention.scores import Scores
from shardwright.runtime.serving.arrange import arrange
from tests.parts import declared, volume

Pool = Callable[[int], RankPool]
F64 = torch.float64
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
SHARDED = ["ring", "gather", "pass_q", "tree"]


@dataclass(frozen=True)
class Case:
    """New tokens of each sequence, step by step; a negative number takes so many back."""

    steps: tuple[tuple[int, ...], ...] = (
        (20, 37),
        (5, 0),
        (1, 1),
        (1, 1),
        (-9, -3),
        (18, 2),
        (1, 1),
    )
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (8, 8)
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    sinks: bool = False
    forget: bool = False  # the cache drops what the window leaves behind
    balanced: bool = True
    dtype: torch.dtype = F64
    rank: int = 0  # of latents that are cached, of which heads are made


ROPE = 3  # numbers that the keys made from latents share
PLAIN = Case()
LATENT = replace(PLAIN, heads=(4, 4), dims=(8, 6), rank=7)
CASES = {
    "plain": PLAIN,
    "mqa": replace(PLAIN, heads=(4, 1)),
    "mha, unequal dims": replace(PLAIN, heads=(2, 2), dims=(8, 6)),
    "window": replace(PLAIN, options={"window": 7}),
    "wide window": replace(PLAIN, options={"window": 150}, steps=((200,), (40,), (1,))),
    "forgetting window": replace(
        PLAIN, options={"window": 7}, forget=True, steps=((40, 3), (1, 1), (30, 1), (-1, 0), (1, 1))
    ),
    "softcap": replace(PLAIN, options={"softcap": 2.0, "scale": 0.7}),
    "sinks": replace(PLAIN, sinks=True),
    "not causal": replace(PLAIN, options={"causal": False}, steps=((3, 21), (2, 2))),
    "one sequence": replace(PLAIN, steps=((70,), (1,), (1,), (33,))),
    "equal lengths": replace(PLAIN, steps=((33, 33), (1, 1), (8, 8), (-8, -8), (1, 1))),
    "short": replace(PLAIN, steps=((1, 2), (1, 1), (1, 0))),
    "many sequences": replace(
        PLAIN,
        options={"window": 40},
        steps=((9, 30, 31, 25, 40, 0, 33), (1,) * 7, (1, 1, 1, 0, 1, 1, 1)),
    ),
    "many sequences, sinks, softcap": replace(
        PLAIN, options={"softcap": 2.0}, sinks=True, steps=((20, 30, 31, 25, 40, 28), (1,) * 6)
    ),
    "chunks": replace(PLAIN, options={"chunk": 7}),
    "chunks, not causal": replace(
        PLAIN, options={"causal": False, "chunk": 6}, steps=((3, 21), (2, 2))
    ),
    "many sequences, chunks that are forgotten": replace(
        PLAIN,
        options={"window": 25, "chunk": 25},
        forget=True,
        steps=((9, 30, 24, 25, 40, 0, 33), (1,) * 7, (1, 1, 1, 0, 1, 1, 1), (30, 1, 1, 1, 1, 1, 9)),
    ),
    "latents": LATENT,
    "latents, forgetting window": replace(
        LATENT,
        options={"window": 7},
        forget=True,
        steps=((40, 3), (1, 1), (30, 1), (-1, 0), (1, 1)),
    ),
    "latents, many sequences, sinks, softcap": replace(
        LATENT, options={"softcap": 2.0}, sinks=True, steps=((20, 30, 31, 25, 40, 28), (1,) * 6)
    ),
    "latents, chunks": replace(LATENT, options={"chunk": 7}),
    "in order": replace(PLAIN, balanced=False),
    "in order, window": replace(PLAIN, balanced=False, options={"window": 12}),
}


def inputs(case: Case, number: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (b, h, t, d) of all new tokens of a step; with latents k is these, and v empty."""
    generator = torch.Generator().manual_seed(number)
    (hq, hkv), (d, dv), batch = case.heads, case.dims, len(case.steps[0])
    if case.rank:
        latents = torch.randn(batch, 1, width, case.rank + ROPE, generator=generator, dtype=F64)
        q = torch.randn(batch, hq, width, d, generator=generator, dtype=F64)
        return q.to(case.dtype), latents.to(case.dtype), latents[..., :0]
    shapes = [(batch, hq, width, d), (batch, hkv, width, d), (batch, hkv, width, dv)]
    return tuple(torch.randn(s, generator=generator, dtype=F64).to(case.dtype) for s in shapes)  # pyright: ignore


def sinks_of(case: Case) -> Tensor | None:
    return torch.linspace(-1, 2, case.heads[0], dtype=F64) if case.sinks else None


def up_of(case: Case) -> Tensor | None:
    """What makes keys and values of latents (heads, d_nope + dv, r)."""
    rows = case.dims[0] - ROPE + case.dims[1]
    generator = torch.Generator().manual_seed(99)
    shape = (case.heads[0], rows, case.rank)
    return torch.randn(shape, generator=generator, dtype=F64).to(case.dtype) if case.rank else None


def heads_of(case: Case, latents: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (b, h, t, d) of latents, head by head."""
    c, shared = latents[:, 0].split([case.rank, ROPE], 2)
    nope = case.dims[0] - ROPE
    keys = [torch.cat([c @ weight[:nope].T, shared], 2) for weight in up]
    return torch.stack(keys, 1), torch.stack([c @ weight[nope:].T for weight in up], 1)


def expected(case: Case) -> list[Tensor]:
    """Outputs (b, hq, t, dv) of each step, from the definition, sequence by sequence."""
    batch = len(case.steps[0])
    keys: list[list[Tensor]] = [[] for _ in range(batch)]
    values: list[list[Tensor]] = [[] for _ in range(batch)]
    outputs: list[Tensor] = []
    for number, counts in enumerate(case.steps):
        if min(counts) < 0:
            for i, count in enumerate(counts):
                keys[i], values[i] = (x[: len(x) + count] for x in (keys[i], values[i]))
            continue
        q, k, v = inputs(case, number, max(counts))
        if (up := up_of(case)) is not None:
            k, v = heads_of(case, k, up)
        out = torch.zeros(batch, case.heads[0], max(counts), case.dims[1], dtype=F64)
        for i, count in enumerate(counts):
            keys[i] += k[i, :, :count].double().unbind(1)
            values[i] += v[i, :, :count].double().unbind(1)
            if count:
                out[i, :, :count] = plain_attention(
                    q[i, :, :count].double(),
                    torch.stack(keys[i], 1),
                    torch.stack(values[i], 1),
                    case,
                )
        outputs.append(out)
    return outputs


def plain_attention(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """The last tokens (hq, t, d) over the whole sequence (hkv, s, d)."""
    options = {"scale": q.shape[2] ** -0.5, "window": 0, "softcap": 0.0, "causal": True}
    options |= case.options
    group = case.heads[0] // case.heads[1]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * options["scale"]
    if options["softcap"]:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    at = torch.arange(k.shape[1])
    query = at[-q.shape[1] :, None]
    if options["causal"]:
        scores = scores.masked_fill(at > query, -torch.inf)
    if options["window"]:
        scores = scores.masked_fill(at <= query - options["window"], -torch.inf)
    if chunk := options.get("chunk"):
        scores = scores.masked_fill(at // chunk != query // chunk, -torch.inf)
    sinks = sinks_of(case)
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, q.shape[1], 1)
        return torch.cat([scores, column], 2).softmax(2)[..., :-1] @ v
    return scores.softmax(2) @ v


def attend(case: Case, algorithm: str, ranks: int) -> list[Tensor]:
    """On one rank: the outputs of each step, nan for tokens that another rank has."""
    axis = Mesh.create({"cp": ranks})["cp"] if ranks > 1 else None
    batch = len(case.steps[0])
    window = case.options.get("window", 0) if case.forget else 0
    table = PageTable(batch, 40 * batch, window=window)
    if case.rank:
        sizes: tuple[int, int, int] = (1, case.rank + ROPE, case.rank)
    else:
        sizes = (case.heads[1], *case.dims)
    shared = case.rank > 0
    cache = KVCache(batch, 0, *sizes, dtype=case.dtype, table=table, values_in_keys=shared)
    lengths = torch.zeros(batch, dtype=torch.int64)
    outputs: list[Tensor] = []
    for number, counts in enumerate(case.steps):
        new = torch.tensor(counts)
        lengths += new
        if min(counts) < 0:
            cache.truncate(lengths)
            continue
        width = int(new.max())
        shares = ranks if algorithm in ("ring", "gather", "pass_q") else 1
        order = arrange(lengths - new, new, shares, balanced=case.balanced)
        order = order.unflatten(1, (shares, -1))[:, 0 if axis is None or shares == 1 else axis.rank]
        index = order.clamp(min=0)[:, None, :, None]
        q, k, v = (x.take_along_dim(index, 2) for x in inputs(case, number, width))
        positions = ((lengths - new)[:, None] + order).where(order >= 0, -1)
        for x in (q, k, v):  # what stands in padding must not matter
            x.masked_fill_((order < 0)[:, None, :, None], 1e4)
        local = cached_attention(
            q, k, None if shared else v, cache, positions,
            algorithm=algorithm, axis=axis,
            sinks=sinks_of(case), up=up_of(case), **case.options,
        )  # fmt: skip
        assert local.isfinite().all() and local.dtype == case.dtype
        out = torch.full((*local.shape[:2], width, case.dims[1]), torch.nan, dtype=case.dtype)
        for i in range(batch):
            for column in (order[i] >= 0).nonzero().flatten().tolist():
                out[i, :, order[i, column]] = local[i, :, column]
        outputs.append(out)
    return outputs


def check(results: Sequence[list[Tensor]], case: Case, whole: bool, tolerance: Any) -> None:
    """Every token is computed by one rank (or by all, if `whole`), and right."""
    counts = [step for step in case.steps if min(step) >= 0]
    for number, want in enumerate(expected(case)):
        outs = torch.stack([result[number].double() for result in results])
        done = ~outs[:, :, 0, :, 0].isnan()  # (ranks, b, t)
        for i, count in enumerate(counts[number]):
            assert (done[:, i, :count].sum(0) == (len(results) if whole else 1)).all()
            assert not done[:, i, count:].any()
            for rank, out in enumerate(outs):
                mine = done[rank, i]
                torch.testing.assert_close(out[i][:, mine], want[i][:, mine], **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_local(name: str) -> None:
    check([attend(CASES[name], "local", 1)], CASES[name], True, EXACT)


@pytest.mark.parametrize("algorithm", SHARDED)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.some(30)
def test_sharded_sequence(pool: Pool, name: str, algorithm: str) -> None:
    results = pool(2).run(attend, CASES[name], algorithm, 2)
    check(results, CASES[name], algorithm == "tree", EXACT)


@pytest.mark.parametrize("algorithm", SHARDED)
@pytest.mark.parametrize("name", ["plain", "window", "short", "sinks"])
def test_four_ranks(pool: Pool, name: str, algorithm: str) -> None:
    results = pool(4).run(attend, CASES[name], algorithm, 4)
    check(results, CASES[name], algorithm == "tree", EXACT)


@pytest.mark.parametrize("algorithm", ["local", *SHARDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(pool: Pool, algorithm: str, dtype: torch.dtype) -> None:
    case = replace(PLAIN, dtype=dtype)
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 0, "atol": 8 * eps}  # values are near 1
    if algorithm == "local":
        results = [attend(case, algorithm, 1)]
    else:
        results = pool(2).run(attend, case, algorithm, 2)
    check(results, case, algorithm in ("local", "tree"), tolerance)


def allowed(queries: Tensor, keys: Tensor, causal: bool, window: int) -> Tensor:
    """(b, t, s) from the definition."""
    q, k = queries[:, :, None], keys[:, None]
    pairs = (q >= 0) & (k >= 0)
    if causal:
        pairs &= k <= q
    return pairs & (k > q - window) if window else pairs


def covered(piece: Piece, queries: Tensor, keys: Tensor, causal: bool, window: int) -> Tensor:
    """(t, s) counts of the pairs that a piece computes."""
    pairs = torch.zeros(len(queries), len(keys), dtype=torch.int64)
    rows = slice(piece.q_row, piece.q_row + piece.queries)
    columns = slice(piece.k_row, piece.k_row + piece.keys)
    block = torch.ones(piece.queries, piece.keys, dtype=torch.int64)
    if piece.rule == "causal":
        block = block.tril()
    elif piece.rule == "window":
        block = block.triu()
    elif piece.rule == "band":
        block = allowed(queries[None, rows], keys[None, columns], causal, window)[0].long()
    pairs[rows, columns] = block
    return pairs


@pytest.mark.parametrize("window", [0, 1, 6, 140])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 1.0])
def test_pieces_cover_every_allowed_pair_once(causal: bool, window: int, softcap: float) -> None:
    """Queries in any order with padding anywhere, keys with gaps, whole runs or single tokens."""
    generator = torch.Generator().manual_seed(window)
    scores = Scores(1.0, causal, window, softcap)
    for trial in range(30):
        kept = torch.rand(2, 300, generator=generator) < (0.5, 0.97, 1.0)[trial % 3]
        tokens = torch.arange(300).expand(2, -1)
        keys = tokens.where(kept, 10**6).sort(1).values
        keys = keys.masked_fill(keys == 10**6, -1)
        start = int(torch.randint(0, 280, (), generator=generator))
        queries = torch.arange(start, start + 20).expand(2, -1).clone()
        if trial % 2:
            queries = queries[:, torch.randperm(20, generator=generator)]
        queries[1, : trial % 4] = -1
        want = allowed(queries, keys, causal, window)
        found = torch.zeros_like(want, dtype=torch.int64)
        for batch, pieces in pieces_at(queries, keys, scores).parts:
            for i in range(2)[batch]:
                for piece in pieces:
                    found[i] += covered(piece, queries[i], keys[i], causal, window)
        assert torch.equal(found, want.long())


def test_runs() -> None:
    runs = runs_of(torch.tensor([-1, 0, 1, -1, -1, 7, 8, 3, 4, 6]))
    assert [run[:3] for run in runs] == [(1, 0, 2), (5, 7, 2), (7, 3, 2), (9, 6, 1)]
    assert runs_of(torch.tensor([], dtype=torch.int64)) == runs_of(torch.tensor([-1])) == ()


def count(algorithm: str, layers: int) -> tuple[CollectiveCounter, int]:
    """(what two steps of `layers` layers moved, the longest cached part in the second)."""
    axis = Mesh.create({"cp": 3})["cp"]
    table = PageTable(2, 30)
    caches = [KVCache(2, 0, 2, 8, 6, dtype=torch.float32, table=table) for _ in range(layers)]
    with count_collectives() as counter:
        positions = torch.arange(48)[None].expand(2, -1)
        if algorithm != "tree":
            positions = positions[:, axis.rank * 16 : (axis.rank + 1) * 16]
        for cache in caches:
            q, k, v = (
                torch.randn(2, h, positions.shape[1], d) for h, d in [(4, 8), (2, 8), (2, 6)]
            )
            cached_attention(q, k, v, cache, positions, algorithm=algorithm, axis=axis)
    return counter, int(table.counts.max())


@pytest.mark.parametrize("algorithm", SHARDED)
def test_counts_are_as_documented(pool: Pool, algorithm: str) -> None:
    """Per layer what attention without a cache moves; per step the positions."""
    layers, ranks, t = 3, 3, 48 if algorithm == "tree" else 16
    part = Part(2, 4, 2, t, 16, 8, 6, 4, True, 0, algorithm, 0, ranks, False, 1, cached=True)
    want = {key: (layers * n, layers * m) for key, (n, m) in declared(part).items()}
    for key, (n_bytes, messages) in volume(positions_of(part), ranks).items():
        known = want.get(key, (0.0, 0))
        want[key] = (known[0] + n_bytes, known[1] + messages)
    for counter, s in pool(ranks).run(count, algorithm, layers):
        assert s == part.keys
        counted = {(k.op, k.phase): (c.bytes, c.messages) for k, c in counter.counts.items()}
        assert counted == {key: (pytest.approx(n), messages) for key, (n, messages) in want.items()}


@pytest.mark.parametrize(
    ("algorithm", "n_bytes"),
    [
        # 2 sequences of 16 rows: 2 heads of 8 + 6 numbers of 4 bytes, and 4 bytes of a position
        ("ring", 2 * (2 * 16 * 2 * 14 * 4 + 8 + 2 * 16 * 4)),
        ("gather", 2 * (2 * 16 * 2 * 14 * 4 + 8 + 2 * 16 * 4)),
        # queries, 4 heads of 8; what returns has 6 + 1
        ("pass_q", 2 * (2 * 16 * 4 * (8 + 7) * 4 + 8 + 2 * 16 * 4)),
        # 48 rows on each rank, of each number twice 2/3
        ("tree", 4 / 3 * 2 * 48 * 4 * 8 * 4),
    ],
)
def test_bytes_by_hand(algorithm: str, n_bytes: float) -> None:
    t = 48 if algorithm == "tree" else 16
    part = Part(2, 4, 2, t, 16, 8, 6, 4, True, 0, algorithm, 0, 3, False, 1, cached=True)
    moved = volume((*traffic_of(part, backward=False), *positions_of(part)), 3)
    assert sum(n for n, _ in moved.values()) == pytest.approx(n_bytes)


def test_ring_and_gather_give_the_same_bits(pool: Pool) -> None:
    ring, gather = (pool(3).run(attend, PLAIN, name, 3) for name in ("ring", "gather"))
    for one, other in zip(ring, gather, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_tree_balances_the_cache(pool: Pool) -> None:
    assert pool(4).run(cached_on_a_rank) == [32, 32, 32, 24]


def cached_on_a_rank() -> int:
    axis = Mesh.create({"cp": 4})["cp"]
    cache = KVCache(1, 64, 1, 4)
    for positions in (torch.arange(100)[None], *torch.arange(100, 120)[:, None, None]):
        x = torch.randn(1, 1, positions.shape[1], 4)
        cached_attention(x, x, x, cache, positions, algorithm="tree", axis=axis)
    return int(cache.lengths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"algorithm": "star"},
            "algorithm is one of local, ring, gather, pass_q, tree; got 'star'",
        ),
        ({"algorithm": "ring"}, "`ring` needs the axis"),
        ({"window": 9}, "drops what a window of 8 leaves behind, got window=9"),
        ({"window": 0}, "drops what a window of 8 leaves behind, got window=0"),
        ({"window": 4, "softcap": -1.0}, "window and softcap are 0 or more"),
    ],
)
def test_refuses_options_by_name(options: dict[str, Any], message: str) -> None:
    cache = KVCache(1, 32, 1, 4, window=8)
    x, at = torch.randn(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        cached_attention(x, x, x, cache, at, **options)
    assert not cache.lengths.any()


@pytest.mark.parametrize(
    ("up", "dim", "message"),
    [
        ((2, 9, 5), 6, "sizes do not fit together, with latents of 4"),  # of another rank
        ((3, 9, 4), 6, "sizes do not fit together"),  # of more heads than the queries
        ((2, 4, 4), 6, "sizes do not fit together"),  # no values
        ((2, 9, 4), 2, "sizes do not fit together"),  # queries of what heads share alone
        ((2, 36), 6, "expected q .batch, heads, sequence, head_dim."),
    ],
)
def test_refuses_what_makes_no_heads(up: tuple[int, ...], dim: int, message: str) -> None:
    cache = KVCache(1, 32, 1, 6, 4, values_in_keys=True)
    q, k, at = torch.randn(1, 2, 1, dim), torch.randn(1, 1, 1, 6), torch.zeros(1, 1).long()
    with pytest.raises(ValueError, match=message):
        cached_attention(q, k, None, cache, at, up=torch.randn(up))
    with pytest.raises(ValueError, match="v is None and the cache holds values in its keys"):
        cached_attention(q, k, k, KVCache(1, 32, 1, 6), at, up=torch.randn(2, 9, 4))
    assert not cache.lengths.any()


def test_refuses_gradients() -> None:
    cache = KVCache(1, 32, 1, 4)
    x, at = torch.randn(1, 1, 1, 4, requires_grad=True), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no backward; call it under torch.no_grad"):
        cached_attention(x, x, x, cache, at)
    with torch.no_grad():
        torch.testing.assert_close(cached_attention(x, x, x, cache, at), x.detach())


def mixed_layers() -> list[Tensor]:
    axis = Mesh.create({"cp": 2})["cp"]
    table = PageTable(1, 10)
    names = ["ring", "pass_q", "gather", "ring"]
    caches = [KVCache(1, 0, 2, 4, dtype=F64, table=table) for _ in names]
    generator = torch.Generator().manual_seed(axis.rank)
    x = torch.randn(1, 2, 9, 4, generator=generator, dtype=F64)
    at = torch.arange(9)[None] + 9 * axis.rank
    layers = zip(names, caches, strict=True)
    return [cached_attention(x, x, x, c, at, algorithm=n, axis=axis) for n, c in layers]  # pyright: ignore


def test_layers_may_differ_in_algorithm(pool: Pool) -> None:
    for first, *others in pool(2).run(mixed_layers):
        for other in others:
            torch.testing.assert_close(other, first, **EXACT)


def refuse_mixture() -> None:
    axis, table = Mesh.create({"cp": 2})["cp"], PageTable(1, 10)
    x, at = torch.randn(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    caches = [KVCache(1, 0, 1, 4, table=table) for _ in range(2)]
    cached_attention(x, x, x, caches[0], at, algorithm="tree", axis=axis)
    with pytest.raises(ValueError, match="got axis None after cp"):
        cached_attention(x, x, x, caches[1], at)


def uneven_queries() -> None:
    axis = Mesh.create({"cp": 2})["cp"]
    count = 2 + axis.rank
    x, at = torch.randn(1, 1, count, 4), torch.arange(count)[None] + 2 * axis.rank
    with pytest.raises(ValueError, match=r"ranks of `cp` have \[2, 3\] new tokens; `pass_q` needs"):
        cached_attention(x, x, x, KVCache(1, 32, 1, 4), at, algorithm="pass_q", axis=axis)
    caches = [KVCache(1, 32, 1, 4) for _ in range(2)]
    ring, gather = (
        cached_attention(x, x, x, cache, at, algorithm=name, axis=axis)  # pyright: ignore
        for name, cache in zip(("ring", "gather"), caches, strict=True)
    )
    torch.testing.assert_close(ring, gather)


def test_ranks_with_different_numbers_of_tokens(pool: Pool) -> None:
    pool(2).run(refuse_mixture)
    pool(2).run(uneven_queries)


def test_local_refuses_an_axis(pool: Pool) -> None:
    with pytest.raises(RankError, match="`local` knows no axis"):
        pool(2).run(local_on_an_axis)


def local_on_an_axis() -> None:
    x, at = torch.randn(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    cached_attention(x, x, x, KVCache(1, 32, 1, 4), at, axis=Mesh.create({"cp": 2})["cp"])


def select_last(x: Tensor, positions: Tensor) -> Tensor:
    axis = Mesh.create({"cp": 3})["cp"]
    return axis.all_reduce(last_token(axis.shard(x, 1), axis.shard(positions, 1), axis))


def test_last_token(pool: Pool) -> None:
    x = torch.randn(3, 6, 2, dtype=F64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, -1, 8, -1, -1, -1], [0, 5, 1, 4, 2, 3]])
    want = torch.stack([x[0, 5:], x[1, 2:3], x[2, 1:2]])
    torch.testing.assert_close(last_token(x, positions), want)
    for result in pool(3).run(select_last, x, positions):
        torch.testing.assert_close(result, want)


def test_values_in_keys_give_the_same_bits(pool: Pool) -> None:
    """As a cache of the same values in their own memory, also over ranks and with windows."""
    for algorithm in ("local", "ring", "gather", "pass_q", "tree"):
        ranks = 1 if algorithm == "local" else 2
        for plain, shared in pool(ranks).run(both_kinds_of_cache, algorithm, ranks):
            assert torch.equal(plain, shared), algorithm


def both_kinds_of_cache(algorithm: Any, ranks: int) -> tuple[Tensor, Tensor]:
    """Two steps of sequences of different lengths, values beside the keys and within."""
    axis = Mesh.create({"cp": ranks})["cp"] if ranks > 1 else None
    caches = [KVCache(2, 64, 1, 8, 6, dtype=F64, values_in_keys=kind) for kind in (False, True)]
    generator = torch.Generator().manual_seed(0)
    rank = 0 if axis is None or algorithm == "tree" else axis.rank
    found: list[list[Tensor]] = [[], []]
    for first in (0, 40):
        at = torch.arange(first, first + 20).expand(2, 20).clone()
        at[1, 12:] = -1 if first else at[1, 12:]
        q, k = (torch.randn(2, n, 40, 8, generator=generator, dtype=F64) for n in (4, 1))
        own = slice(20 * rank, 20 * rank + 20)
        at = at.where(at < 0, at + 20 * rank)
        for outs, cache in zip(found, caches, strict=True):
            new = k[:, :, own]
            v = None if cache.values_in_keys else new[..., :6]
            out = cached_attention(
                q[:, :, own], new, v, cache, at, algorithm=algorithm, axis=axis, window=30
            )
            outs.append(out * (at >= 0)[:, None, :, None])
    return torch.cat(found[0], 2), torch.cat(found[1], 2)
