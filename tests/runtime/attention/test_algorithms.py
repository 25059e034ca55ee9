"""Every algorithm against attention in one process, forward and backward; what it moves."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from shardwright import runtime
from shardwright.ir.ops.algorithms.part import Part
from shardwright.ir.ops.algorithms.quantities import traffic_of
from shardwright.ir.ops.algorithms.registry import ALGORITHMS
from shardwright.runtime import (
    Layout,
    Mask,
    Mesh,
    RankError,
    RankPool,
    count_collectives,
    pass_q_attention,
    ring_attention,
)
from shardwright.runtime.attention.algorithms import OVER_A_CACHE, OVER_SHARDS
from shardwright.runtime.attention.ulysses import Heads
from tests.parts import Volume, declared, volume
from tests.runtime.attention.reference import ROPE, Case, heads_of, make, reference
from tests.runtime.attention.sharded import (
    GATHER,
    PASS_Q,
    RING,
    TREE,
    ULYSSES,
    USP,
    WINDOW,
    Call,
    Pool,
    check,
    mesh_group,
    on_rank,
    run,
)

ANY_LAYOUT = (RING, GATHER, PASS_Q, ULYSSES)

# One of everything; lengths that no number of ranks divides, several documents, empty shards.
CASES = {
    "causal": Case(),
    "zigzag": Case(layout="zigzag", length=29),
    "full": Case(causal=False, length=25),
    "one head": Case(layout="zigzag", length=13, heads=(12, 1), head_dims=(16, 16)),
    "all heads": Case(length=17, heads=(12, 12)),
    "narrow window": Case(layout="zigzag", length=41, window=7),
    "wide window": Case(layout="zigzag", length=600, window=150, batch=1),
    "window to the left only": Case(causal=False, length=33, window=5),
    "value heads of another size": Case(layout="zigzag", length=21, head_dims=(12, 8)),
    "wider values": Case(length=21, head_dims=(8, 12), scale=0.2),
    "packed": Case(layout="packed", length=32, documents=(5, 17, 1, 9)),
    "documents of each sequence": Case(layout="zigzag", documents=(10, 14)),
    "key padding": Case(layout="zigzag", padded=True, causal=False),
    "prefix": Case(layout="zigzag", length=27, prefix=10),
    "softcap": Case(layout="zigzag", length=22, softcap=2.0),
    "sinks": Case(layout="zigzag", length=22, sinks=True),
    "ALiBi": Case(layout="zigzag", length=22, slopes=True),
    "ALiBi both ways": Case(length=22, slopes=True, causal=False),
    "empty shards": Case(layout="zigzag", length=2),
    "one token": Case(length=1, sinks=True),
    "no token": Case(length=0),
    "no sequence": Case(batch=0),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ANY_LAYOUT)
@pytest.mark.some(8)
def test_equals_one_process(pool: Pool, name: str, ranks: int) -> None:
    for title, case in CASES.items():
        heads = case.heads if case.heads != (4, 2) else (12, 3 if ranks == 3 else 2)
        try:
            check(pool, name, case.but(ranks=ranks, heads=heads))
        except Exception as error:
            raise AssertionError(f"{name} on {ranks} ranks, {title}") from error


LATENTS = Case(length=25, heads=(4, 4), head_dims=(8, 6), rank=7)
LATENT_CASES = {
    "causal": LATENTS,
    "full": LATENTS.but(causal=False),
    "zigzag": LATENTS.but(layout="zigzag", length=29),
    "window, sinks": LATENTS.but(layout="zigzag", length=33, window=5, sinks=True),
    "bias, softcap, scale": LATENTS.but(bias=(1, 4), softcap=2.0, scale=0.2, sinks=True),
    "key padding": LATENTS.but(causal=False, padded=True, head_dims=(8, 8)),
    "packed": LATENTS.but(layout="packed", length=32, documents=(5, 17, 1, 9)),
    "empty shards": LATENTS.but(layout="zigzag", length=2),
    "no token": LATENTS.but(length=0),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", [RING, GATHER])
def test_latents_equal_one_process(pool: Pool, name: str, ranks: int) -> None:
    """Keys and values that are made from latents: gradients of the latents and of the weight."""
    for title, case in LATENT_CASES.items():
        try:
            check(pool, name, case.but(ranks=ranks))
        except Exception as error:
            raise AssertionError(f"{name} on {ranks} ranks, {title}") from error
    check(pool, name, LATENTS.but(ranks=ranks, dtype=torch.float32, length=61), tolerance=1e-4)


@pytest.mark.parametrize("name", [RING, GATHER])
def test_latents_in_bfloat16_are_as_exact_as_heads(pool: Pool, name: str) -> None:
    """Gradients of latents, and of what makes heads of them, as autograd's of one process."""
    case = Case(2, 203, (8, 8), (64, 64), 1, "zigzag", rank=32, dtype=torch.bfloat16)
    inputs = make(case)
    assert inputs.up is not None
    exact = reference(case, inputs, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.up)]
    k, v = heads_of(case, leaves[1], leaves[2])
    out = F.scaled_dot_product_attention(leaves[0], k, v, is_causal=True)
    single = [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)]
    for got, one, want in zip(run(pool, Call(name, case)), single, exact, strict=True):
        error, allowed = ((x.double() - want).pow(2).mean().sqrt() for x in (got, one))
        assert error <= 2 * allowed


def test_usp_equals_one_process(pool: Pool) -> None:
    for title, case in CASES.items():
        try:
            check(pool, USP, case.but(ranks=4))
        except Exception as error:
            raise AssertionError(f"{USP}, {title}") from error


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_window_equals_one_process(pool: Pool, ranks: int) -> None:
    for length, window in product([1, 2, 24, 31], [1, 2, 7, 9, 30, 100]):
        check(pool, WINDOW, Case(ranks=ranks, length=length, window=window))
    check(pool, WINDOW, Case(ranks=ranks, length=600, window=150, batch=1))
    check(pool, WINDOW, Case(ranks=ranks, window=9, softcap=1.0, sinks=True, bias=(1, 4)))
    check(pool, WINDOW, Case(ranks=ranks, window=60, length=90, bias=(2, 1)))


@pytest.mark.parametrize("name", [RING, GATHER])
def test_bias_and_its_gradient(pool: Pool, name: str) -> None:
    for bias in product([1, 2], [1, 4]):
        check(pool, name, Case(ranks=3, layout="zigzag", length=23, bias=bias, sinks=True))
    check(pool, name, Case(ranks=1, causal=False, padded=True, prefix=4, bias=(2, 4)))
    check(pool, name, Case(ranks=3, layout="packed", length=23, documents=(9, 14), bias=(1, 4)))
    check(pool, name, Case(ranks=3, layout="zigzag", length=2, bias=(1, 4)))
    # More than one tile of queries, and of keys.
    check(pool, name, Case(2, 700, bias=(1, 4), softcap=1.0, slopes=True, batch=1))
    check(pool, name, Case(1, 1100, (2, 1), bias=(1, 1), batch=1))
    check(pool, name, Case(2, 60, bias=(2, 1), dtype=torch.float32), tolerance=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gather_by_strides_of_heads(pool: Pool, stride: int) -> None:
    case = Case(ranks=2, layout="zigzag", heads=(6, 3), slopes=True, sinks=True)
    for bias in ((1, 6), (2, 1)):
        check(pool, GATHER, case.but(bias=bias), stride=stride)


@pytest.mark.parametrize("heads", [(12, 3), (6, 3), (4, 1), (12, 2), (8, 8)], ids=str)
def test_ulysses_with_any_key_heads(pool: Pool, heads: tuple[int, int]) -> None:
    ranks = 2 if heads == (6, 3) else 4
    check(pool, ULYSSES, Case(ranks=ranks, heads=heads, length=26, layout="zigzag", slopes=True))


FULL_PRODUCT = list(product([(8, 8), (8, 2), (8, 1)], [32, 64, 80, 128], [True, False], [0, 50]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", [*ANY_LAYOUT, USP])
def test_full_product(pool: Pool, name: str, ranks: int) -> None:
    if name == ULYSSES and ranks == 3 or name == USP and ranks in (2, 3):
        pytest.skip("8 heads do not divide; a product of two needs 4 ranks")
    for heads, head_dim, causal, window in FULL_PRODUCT:
        case = Case(ranks, 203, heads, (head_dim, head_dim), 1, "zigzag", causal, window)
        check(pool, name, case)
        check(pool, name, case.but(layout="packed", documents=(64, 100, 39)))
        if window == 0:
            check(pool, name, case.but(layout="contiguous", padded=True))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_full_product_of_halos(pool: Pool, ranks: int) -> None:
    for heads, head_dim, causal, window in FULL_PRODUCT:
        if causal and window:
            case = Case(ranks, 203, heads, (head_dim, head_dim), 1, window=window)
            check(pool, WINDOW, case)
            check(pool, WINDOW, case.but(batch=2, padded=True, documents=(64, 100, 39)))


@pytest.mark.parametrize("name", [*ANY_LAYOUT, USP, WINDOW])
@pytest.mark.parametrize("window", [0, 150])
def test_float32(pool: Pool, name: str, window: int) -> None:
    case = Case(
        4, 403, (8, 4), (64, 64), 1, "zigzag", window=window, dtype=torch.float32, sinks=True
    )
    if name == WINDOW:
        case = case.but(layout="contiguous", window=window or 20)
    check(pool, name, case, tolerance=1e-5)


@pytest.mark.parametrize("name", [*ANY_LAYOUT, USP, WINDOW])
def test_bfloat16_is_as_exact_as_one_process(pool: Pool, name: str) -> None:
    case = Case(4, 403, (8, 4), (64, 64), 1, "zigzag", dtype=torch.bfloat16)
    if name == WINDOW:  # over everything before a query
        case = case.but(layout="contiguous", window=403)
    inputs = make(case)
    exact = reference(case, inputs, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    single = [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)]
    for got, one, want in zip(run(pool, Call(name, case)), single, exact, strict=True):
        error, allowed = ((x.double() - want).pow(2).mean().sqrt() for x in (got, one))
        assert error <= 2 * allowed


@pytest.mark.parametrize("name", [*ANY_LAYOUT, USP, WINDOW])
def test_the_same_bits_whenever_messages_arrive(pool: Pool, name: str) -> None:
    layout, window = ("contiguous", 9) if name == WINDOW else ("zigzag", 0)
    case = Case(4, 61, (8, 4), layout=layout, window=window, dtype=torch.float32)
    once = run(pool, Call(name, case))
    for delays in ((0.0, 0.03, 0.0, 0.01), (0.02, 0.0, 0.01, 0.0)):
        late = run(pool, Call(name, case, delays=delays))
        assert all(torch.equal(a, b) for a, b in zip(once, late, strict=True))


# --- what is moved -------------------------------------------------------------------------------


NAMES = {RING: "ring", GATHER: "gather", PASS_Q: "pass_q", ULYSSES: "ulysses", WINDOW: "window"}


def part_of(call: Call) -> Part:
    """What the planner knows of a rank's part."""
    case, rows = call.case, call.layout().rows
    heads = (case.heads[0], 1) if case.rank else case.heads
    return Part(
        case.batch, *heads, rows, rows, *case.head_dims, case.dtype.itemsize, case.causal,
        case.window, NAMES.get(call.name, ""), 0, case.ranks, case.layout == "zigzag", 1, False,
        latent=(case.rank, ROPE) if case.rank else None,
    )  # fmt: skip


def predicted(call: Call, rank: int) -> dict[str, Volume]:
    """By axis, from the declarations of the algorithms."""
    part = part_of(call)
    if call.name == USP:
        u = call.ulysses
        inner = replace(part, algorithm="ulysses", ranks=u)
        outer = replace(
            part, algorithm="ring", ranks=part.ranks // u, heads=part.heads // u,
            kv_heads=max(1, part.kv_heads // u), queries=part.queries * u, keys=part.keys * u,
        )  # fmt: skip
        return {"ulysses": declared(inner, backward=True), "ring": declared(outer, backward=True)}
    found = declared(part, backward=True)
    if call.name == GATHER and call.stride:
        strides = -(-part.kv_heads // call.stride)
        found = {key: (n_bytes, n * strides) for key, (n_bytes, n) in found.items()}
    if call.name == PASS_Q:  # which planners choose without gradients: backward is the ring's
        ring = declared(replace(part, algorithm="ring"), backward=True)
        found |= {key: row for key, row in ring.items() if key[1] == "backward"}
    if call.name == WINDOW:
        found = of_window(part, rank)
    if call.name == ULYSSES and part.kv_heads % part.ranks and part.ranks % part.kv_heads:
        found = of_unequal_heads(part, rank)
    return {"cp": found}


def of_window(part: Part, rank: int) -> Volume:
    """The first ranks have fewer neighbours to hear from, the last fewer that give back."""
    traffic = traffic_of(part, backward=True)
    forward, backward = ([t for t in traffic if t.backward == back] for back in (False, True))
    return volume([*forward[:rank], *backward[: part.ranks - 1 - rank]], part.ranks)


def of_unequal_heads(part: Part, rank: int) -> Volume:
    """Of Ulysses where ranks need different numbers of key heads, which planners do not choose."""
    keys = [Heads(part.heads, part.kv_heads, part.ranks).keys(peer) for peer in range(part.ranks)]
    heads = [own.stop - own.start for own in keys]
    others, per_head = part.ranks - 1, part.kv_bytes // part.kv_heads
    queries = others * part.rows * (part.key_dim + part.value_dim) * part.itemsize // part.ranks
    there = queries + others * heads[rank] * per_head
    back = queries + (sum(heads) - heads[rank]) * per_head
    return {
        ("all_to_all", "forward"): (there, 2 * others),
        ("all_to_all", "backward"): (back, 2 * others),
    }


MOVES = [
    *(Call(name, Case(3, 31, (6, 2), (16, 8), layout="zigzag", dtype=dtype))
      for name in ANY_LAYOUT for dtype in (torch.float32, torch.bfloat16)),
    *(Call(name, Case(3, 31, (6, 6), (16, 8), layout="zigzag", rank=5, dtype=dtype))
      for name in (RING, GATHER) for dtype in (torch.float32, torch.bfloat16)),
    Call(GATHER, Case(3, 31, (6, 2)), stride=1),
    Call(ULYSSES, Case(4, 31, (12, 3))),
    Call(USP, Case(4, 31, (12, 2), layout="zigzag")),
    Call(USP, Case(4, 31, (12, 1), layout="zigzag")),
    Call(USP, Case(4, 31, (12, 4), layout="zigzag", dtype=torch.float32), ulysses=4),
    *(Call(WINDOW, Case(4, 31, window=window, dtype=torch.float32)) for window in (1, 5, 12, 40)),
    *(Call(name, Case(1)) for name in ANY_LAYOUT),
]  # fmt: skip


@pytest.mark.parametrize("call", MOVES, ids=lambda call: f"{call.name} {call.case.ranks}")
def test_counted_bytes_and_messages_are_the_predicted(pool: Pool, call: Call) -> None:
    for rank, (_, counts) in enumerate(pool(call.case.ranks).run(on_rank, call)):
        want = {
            (op, axis, phase): (round(nbytes), messages)
            for axis, volume in predicted(call, rank).items()
            for (op, phase), (nbytes, messages) in volume.items()
        }
        rounded = {key: (round(nbytes), messages) for key, (nbytes, messages) in counts.items()}
        assert rounded == want


def test_every_algorithm_is_declared() -> None:
    """What the planner knows of and what ranks run, over shards and over a cache, agree."""
    assert {n for n, d in ALGORITHMS.items() if d.over_shards} == OVER_SHARDS.keys() - {"pass_q"}
    assert {n for n, d in ALGORITHMS.items() if d.over_cache} == OVER_A_CACHE.keys()
    for name, way in OVER_A_CACHE.items():
        assert (way.travels, way.whole) == (ALGORITHMS[name].tells, ALGORITHMS[name].whole)


# --- new tokens over a cache ---------------------------------------------------------------------


def append(name: str, cached: int, new: int) -> torch.Tensor:
    """The result of the last `new` tokens of a sequence whose first ones are cached, this shard."""
    mesh = Mesh.create({"cp": 3})
    inputs = make(Case(length=cached + new))
    old, tail = Layout.contiguous(cached, 3), Layout.zigzag(new, 3, start=cached)
    k, v = (
        torch.cat(
            [old.shard(x[:, :, :cached], 2, mesh.rank), tail.shard(x[:, :, cached:], 2, mesh.rank)],
            2,
        )
        for x in (inputs.k, inputs.v)
    )
    q = tail.shard(inputs.q[:, :, cached:], 2, mesh.rank)
    attention = {RING: ring_attention, PASS_Q: pass_q_attention}[name]
    return attention(
        q, k, v, group=mesh["cp"], causal=True, layout=old.then(tail), query_layout=tail
    )


@pytest.mark.parametrize("name", [RING, PASS_Q])
@pytest.mark.parametrize(("cached", "new"), [(20, 7), (2, 9), (15, 1)])
def test_new_tokens_over_a_cache(pool: Pool, name: str, cached: int, new: int) -> None:
    case = Case(length=cached + new)
    want = reference(case, make(case), torch.float64)[0][:, :, cached:]
    got = Layout.zigzag(new, 3, start=cached).unshard(pool(3).run(append, name, cached, new), 2)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# --- refusals ------------------------------------------------------------------------------------


def refuse_latents(name: str, up: tuple[int, ...], dim: int, value: bool) -> None:
    axis, k = Mesh.create({"cp": 2})["cp"], torch.ones(1, 1, 6, 6)
    v = k if value else None
    getattr(runtime, name)(torch.ones(1, 2, 6, dim), k, v, group=axis, up=torch.ones(up))


BAD_LATENTS = [
    ((3, 9, 4), 6, False, "sizes do not fit together"),  # of more heads than the queries
    ((2, 4, 4), 6, False, "sizes do not fit together"),  # no values
    ((2, 9, 4), 2, False, "sizes do not fit together"),  # queries of what heads share alone
    ((2, 36), 6, False, "expected q .batch, heads, sequence, head_dim."),
    ((2, 9, 4), 6, True, "v is None with `up`"),
]


@pytest.mark.parametrize("name", [RING, GATHER])
def test_refuses_latents_that_make_no_heads(pool: Pool, name: str) -> None:
    for *given, message in BAD_LATENTS:
        with pytest.raises(RankError, match=message):
            pool(2).run(refuse_latents, name, *given)


def other_latents(name: str) -> str:
    """What a rank is told where rank 1 has latents of another rank."""
    mesh = Mesh.create({"cp": 2})
    rank = 4 + mesh.rank
    q, k, up = torch.ones(1, 2, 6, 5), torch.ones(1, 1, 6, rank + 2), torch.ones(2, 7, rank)
    try:
        getattr(runtime, name)(q, k, None, group=mesh["cp"], up=up)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", [RING, GATHER])
def test_every_rank_refuses_latents_that_differ(pool: Pool, name: str) -> None:
    told = pool(2).run(other_latents, name)
    assert told == [f"{name}: the ranks of `cp` differ in options: rank 1 from rank 0"] * 2


def refuse(name: str, options: dict[str, object], shapes: list[tuple[int, ...]]) -> None:
    axis = Mesh.create({"cp": 2})["cp"]
    q, k, v = (torch.ones(shape) for shape in shapes)
    getattr(runtime, name)(q, k, v, **{"group": axis, **options})


SHAPE = (1, 4, 6, 8)
BAD = [
    (RING, {"window": -1}, [SHAPE] * 3, "window and softcap are 0 or more, got -1"),
    (RING, {"scale": float("nan")}, [SHAPE] * 3, "scale must be finite"),
    (RING, {}, [SHAPE, (1, 3, 6, 8), (1, 3, 6, 8)], "4 query heads over 3 key heads"),
    (RING, {}, [SHAPE, (1, 4, 6, 4), SHAPE], "sizes do not fit together"),
    (RING, {}, [SHAPE, SHAPE, (4, 6, 8)], r"expected \(batch, heads, sequence, head_dim\)"),
    (RING, {"layout": Layout.zigzag(12, 3)}, [SHAPE] * 3, "3 shards where there are 2 ranks"),
    (RING, {"layout": Layout.zigzag(16, 2)}, [SHAPE] * 3, "has 6 rows, its layout has 8"),
    (RING, {"mask": torch.ones(6, 6)}, [SHAPE] * 3, "mask is a `Mask`"),
    (RING, {"mask": Mask(keys=torch.ones(1, 5) > 0)}, [SHAPE] * 3, "5 columns for 12 positions"),
    (RING, {"mask": Mask(keys=torch.ones(1, 12))}, [SHAPE] * 3, "mask.keys must be bool"),
    (RING, {"mask": Mask(prefix=2), "window": 3}, [SHAPE] * 3, "a prefix together with a window"),
    (RING, {"sinks": torch.ones(3)}, [SHAPE] * 3, "sinks must have one number for each of 4"),
    (RING, {"bias": torch.ones(6, 12)}, [SHAPE] * 3, r"bias must be a float tensor \(1 or 1, 4"),
    (RING, {"slopes": torch.ones(4, requires_grad=True)}, [SHAPE] * 3, "no gradient is computed"),
    (TREE, {"bias": torch.ones(1, 4, 6, 12, requires_grad=True)}, [SHAPE] * 3,
     "tree_attention: no gradient is computed for bias"),
    *((name, {"group": None, **({"window": 3} if name == WINDOW else {})}, [SHAPE] * 3,
       rf"{name}: a group is a ProcessGroup .* or an Axis of a Mesh, got None")
      for name in (*ANY_LAYOUT, WINDOW, TREE)),
    (GATHER, {"stride": -1}, [SHAPE] * 3, "stride is a number of key heads"),
    (ULYSSES, {}, [(1, 3, 6, 8)] * 3, "3 query heads do not divide by 2 ranks of `cp`"),
    (WINDOW, {"window": 0}, [SHAPE] * 3, "window is the number of keys"),
    (WINDOW, {"window": 2, "causal": False}, [SHAPE] * 3, "bounds the keys before a query and not"),
    (WINDOW, {"window": 2, "layout": Layout.zigzag(12, 2)}, [SHAPE] * 3, "needs the contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "shapes", "message"), BAD)
def test_refusals(
    pool: Pool,
    name: str,
    options: dict[str, object],
    shapes: list[tuple[int, ...]],
    message: str,
) -> None:
    with pytest.raises(RankError, match=message):
        pool(2).run(refuse, name, options, shapes)


def disagree(name: str, what: str, given: bool) -> str:
    """What a rank is told where rank 1 is another in `what`; with or without a layout."""
    mesh = Mesh.create({"ring": 2, "ulysses": 2} if name == USP else {"cp": 3})
    groups = {name: mesh[name] for name in mesh.names} if name == USP else mesh_group(mesh)
    ranks = 4 if name == USP else 3

    def here(title: str, usual: Any, other: Any) -> Any:
        return other if title == what and mesh.rank == 1 else usual

    dtype = here("dtype", torch.float32, torch.float64)
    q = torch.ones(here("batch", 1, 2), 6, here("rows", 6, 7), 8, dtype=dtype)
    k = torch.ones(q.shape[0], 6, here("keys", q.shape[2], 7), 8, dtype=dtype)
    options: dict[str, Any] = {"scale": here("scale", 0.5, 0.6)}
    if given:
        options["layout"] = Layout.contiguous(6 * ranks - here("length", 0, 1), ranks)
    if name == WINDOW:
        options["window"] = 3
    try:
        getattr(runtime, name)(q, k, k, **groups, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


DIFFERENCES = [
    ("rows", False, "differ in rows of q: [6, 7, 6]"),
    ("rows", True, "differ in rows of q: [6, 7, 6]"),
    ("keys", False, "differ in rows of k: [6, 7, 6]"),
    ("keys", True, "differ in rows of k: [6, 7, 6]"),
    ("dtype", False, "differ in dtype: [float32, float64, float32]"),
    ("batch", True, "differ in batch: [1, 2, 1]"),
    ("dtype", True, "differ in dtype: [float32, float64, float32]"),
    ("scale", True, "differ in options: rank 1 from rank 0"),
    ("length", True, "differ in layout: rank 1 from rank 0"),
]


@pytest.mark.parametrize("name", [*ANY_LAYOUT, WINDOW, TREE])
def test_every_rank_refuses_shards_that_differ(pool: Pool, name: str) -> None:
    """Where messages of unequal sizes would end the process."""
    for what, given, message in DIFFERENCES:
        if (name, what) == (TREE, "length"):
            continue  # its messages do not depend on the keys
        if (name, what, given) == (TREE, "keys", True):
            message = "differ in rows of k: [0, 7, 0]"  # 0 is as the layout says
        for told in pool(3).run(disagree, name, what, given):
            assert told.startswith(f"{name}: the ranks of `cp` ") and told.endswith(message)


def test_usp_tells_ranks_that_share_no_group(pool: Pool) -> None:
    """Ranks 0 and 1 are Ulysses of the first node; a ring joins 1 and 3, another 0 and 2."""
    for what, given in (("rows", False), ("batch", True)):
        told = pool(4).run(disagree, USP, what, given)
        assert all(f"the ranks of `ulysses` differ in {what}" in told[rank] for rank in (0, 1))
        assert "rank 0 of `ring` differs from others; see its message" in told[2]
        assert f"the ranks of `ring` differ in {what}" in told[3]


def count_calls() -> list[int]:
    """Messages of three calls with a layout, and of two without."""
    axis = Mesh.create({"cp": 2})["cp"]
    q = torch.ones(1, 2, 6, 8)
    counts: list[int] = []
    for length in (12, 12, 11, 0, 0):
        with count_collectives() as counter:
            layout = Layout.contiguous(length, 2) if length else None
            ring_attention(q, q, q, group=axis, layout=layout)
        counts.append(counter.messages())
    return counts


def test_calls_without_a_layout_count_what_compares_them(pool: Pool) -> None:
    assert pool(2).run(count_calls) == [[1, 1, 1, 2, 2]] * 2


def lose_a_peer(name: str, timeout_s: float, how: str) -> str:
    """What a rank is told when rank 1 leaves between two calls, or does nothing for long."""
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    options: dict[str, Any] = {"group": group, "layout": Layout.contiguous(600, 3)}
    if name == WINDOW:
        options["window"] = 250
    q = torch.ones(1, 3, 200, 64)
    getattr(runtime, name)(q, q, q, **options)
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "leaves":
            dist.destroy_process_group(group)
        else:
            time.sleep(2 * timeout_s)
        return ""
    try:
        getattr(runtime, name)(q, q, q, **options)
    except RuntimeError as error:
        return str(error)
    return "nothing"


LOST = [
    *((name, 20.0, "leaves") for name in (*ANY_LAYOUT, WINDOW, TREE)),
    *((name, 1.5, "is late") for name in (RING, WINDOW, TREE)),
]


@pytest.mark.parametrize(("name", "timeout_s", "how"), LOST)
@pytest.mark.some(2)
def test_every_rank_is_told_of_a_lost_peer(name: str, timeout_s: float, how: str) -> None:
    """At once if a peer leaves, otherwise after the time limit of the group."""
    with RankPool(3) as pool:  # its own: a group is lost with the test
        told = pool.run(lose_a_peer, name, timeout_s, how, timeout_s=60.0)
    for rank in (0, 2):
        assert f"attention: rank {rank} of 3 on `group` lost the other ranks" in told[rank]


def mix_dtypes() -> None:
    axis = Mesh.create({"cp": 2})["cp"]
    q = torch.ones(SHAPE)
    ring_attention(q, q.bfloat16(), q, group=axis)


def unequal_groups() -> None:
    mesh = Mesh.create({"ring": 2, "ulysses": 2})
    q, k = torch.ones(1, 6, 4, 8), torch.ones(1, 3, 4, 8)
    runtime.usp_attention(q, k, k, ulysses=mesh["ulysses"], ring=mesh["ring"])


def test_usp_refuses_unequal_groups(pool: Pool) -> None:
    with pytest.raises(RankError, match="6 query heads over 3 key heads .* leave unequal groups"):
        pool(4).run(unequal_groups)


def test_refuses_mixed_dtypes(pool: Pool) -> None:
    with pytest.raises(RankError, match="one float dtype expected, got torch.float32"):
        pool(2).run(mix_dtypes)
