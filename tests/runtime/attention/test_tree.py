"""Tree attention: replicated queries over keys that are sharded by sequence."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.ir.ops.algorithms.part import Part
from shardwright.runtime import Layout, Mesh, RankError, count_collectives, tree_attention
from tests.parts import declared
from tests.runtime.attention.reference import Case, Inputs, make, reference
from tests.runtime.attention.sharded import Counts, Pool


def tree_on_rank(case: Case, new: int) -> tuple[list[Tensor], Counts]:
    """(result and gradients for the last `new` queries on this rank's keys, what was counted)."""
    mesh, inputs, layout = Mesh.create({"cp": case.ranks}), make(case), case.make_layout()
    leaves = [
        inputs.q[:, :, case.length - new :].clone().requires_grad_(),
        *(layout.shard(x, 2, mesh.rank).requires_grad_() for x in (inputs.k, inputs.v)),
    ]
    if inputs.sinks is not None:
        leaves.append(inputs.sinks.clone().requires_grad_())
    with count_collectives() as counter:
        out = tree_attention(
            *leaves[:3],
            group=mesh["cp"],
            causal=case.causal,
            window=case.window,
            softcap=case.softcap,
            layout=layout,
            sinks=leaves[3] if case.sinks else None,
            slopes=inputs.slopes,
            mask=inputs.mask,
        )
        out.backward(inputs.grad[:, :, case.length - new :])
    counts: Counts = {key: (row.bytes, row.messages) for key, row in counter.counts.items()}  # pyright: ignore
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)], counts


def only_last(case: Case, inputs: Inputs, new: int) -> list[Tensor]:
    """The reference for the last `new` queries."""
    grad = inputs.grad.clone()
    grad[:, :, : case.length - new] = 0
    last = Inputs(
        inputs.q, inputs.k, inputs.v, grad, inputs.sinks, inputs.slopes, inputs.bias, inputs.mask
    )
    out, dq, *others = reference(case, last, torch.float64)
    return [out[:, :, case.length - new :], dq[:, :, case.length - new :], *others]


CASES = [
    Case(),
    Case(length=29, layout="zigzag", heads=(8, 1)),
    Case(length=200, window=150, heads=(8, 8), batch=1),
    Case(length=40, window=9, sinks=True),
    Case(length=3, layout="zigzag", sinks=True, softcap=2.0),
    Case(length=31, causal=False, slopes=True, padded=True, head_dims=(8, 12)),
]


def check(pool: Pool, case: Case, new: int, tolerance: float = 1e-10) -> None:
    """Result and gradients of the last `new` queries are those of one process."""

    def close(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)

    results = [shards for shards, _ in pool(case.ranks).run(tree_on_rank, case, new)]
    want, layout = only_last(case, make(case), new), case.make_layout()
    for i in (0, 1, 4)[: len(want) - 2]:  # whole on every rank, with the same bits
        close(results[0][i], want[i])
        assert all(torch.equal(r[i], results[0][i]) for r in results)
    for i in (2, 3):
        close(layout.unshard([r[i] for r in results], 2), want[i])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_one_process(pool: Pool, ranks: int) -> None:
    for case in CASES:
        for new in (1, 3):
            check(pool, case.but(ranks=ranks), new)


def test_float32(pool: Pool) -> None:
    case = Case(4, 403, (8, 4), (64, 64), 1, "zigzag", dtype=torch.float32, sinks=True)
    check(pool, case, 2, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_full_product(pool: Pool, ranks: int) -> None:
    for heads, head_dim in product([(8, 8), (8, 2), (8, 1)], [32, 64, 80, 128]):
        case = Case(ranks, 203, heads, (head_dim, head_dim), 2, padded=True)
        for layout, causal, window in product(["contiguous", "zigzag"], [True, False], [0, 50]):
            check(pool, case.but(layout=layout, causal=causal, window=window), 1)


def by_lengths(held: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(result, own k, own v): sequence b has `held[rank][b]` rows here, of as many as fit."""
    axis = Mesh.create({"cp": len(held)})["cp"]
    lengths = held[axis.rank]
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + axis.rank)
    q = torch.randn(len(lengths), 8, 1, 16, generator=shared, dtype=torch.float64).to(dtype)
    rows = max(lengths) + axis.rank  # another number on each rank
    k, v = torch.randn(2, len(lengths), 2, rows, 16, generator=own, dtype=torch.float64).to(dtype)
    rubbish = torch.arange(rows) >= torch.tensor(lengths)[:, None]
    k, v = (x.masked_fill(rubbish[:, None, :, None], 1e4) for x in (k, v))
    out = tree_attention(q, k, v, group=axis, lengths=torch.tensor(lengths))
    return out, k, v


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sequences_of_different_lengths(pool: Pool, dtype: torch.dtype) -> None:
    held = [[4, 4, 0, 1], [4, 7, 0, 0], [4, 0, 5, 0]]
    results = pool(3).run(by_lengths, held, dtype)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 8, 1, 16, generator=generator, dtype=torch.float64).to(dtype)
    for b in range(4):
        k, v = (
            torch.cat([results[r][i][b : b + 1, :, : held[r][b]] for r in range(3)], 2).double()
            for i in (1, 2)
        )
        want = F.scaled_dot_product_attention(q[b : b + 1].double(), k, v, enable_gqa=True)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-2
        for out, _, _ in results:
            close = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(out[b : b + 1].double(), want, **close)
            assert torch.equal(out, results[0][0])


def test_counted_bytes_and_messages_are_the_predicted(pool: Pool) -> None:
    case = Case(4, 40, (8, 2), (16, 8), dtype=torch.float32)
    part = Part(2, 8, 2, 1, 10, 16, 8, 4, True, 0, "tree", 0, 4, False, 1, cached=True)
    want = {(op, "cp", phase): row for (op, phase), row in declared(part).items()}
    want["all_reduce", "cp", "backward"] = (6 * 16 * 16, 6)  # gradients of the queries
    assert all(counts == want for _, counts in pool(4).run(tree_on_rank, case, 1))
    # 2 sequences x 8 heads: 16 lse, then 16 x (8 + 1) numbers; each number twice 3/4 of 4 bytes.
    assert want["all_reduce", "cp", "forward"] == (6 * (16 + 144), 12)


def refuse(what: str) -> None:
    axis = Mesh.create({"cp": 2})["cp"]
    x = torch.ones(2, 4, 6, 8)
    if what == "layout":
        tree_attention(x, x, x, group=axis, layout=Layout.zigzag(16, 2))
    if what == "lengths":
        tree_attention(x, x, x, group=axis, lengths=[3, 7])
    if what == "both":
        tree_attention(x, x, x, group=axis, lengths=[3, 6], causal=True)
    if what == "start":
        tree_attention(torch.ones(2, 4, 13, 8), x, x, group=axis)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layout", "does not fit the layout of 2 shards of 8 rows"),
        ("lengths", r"lengths must be 2 numbers from 0 to 6, got \[3, 7\]"),
        ("both", "with `lengths` the keys have no positions"),
        ("start", "must be a run of positions from 0 on"),
    ],
)
def test_refusals(pool: Pool, what: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        pool(2).run(refuse, what)
