"""Layouts: every token is on exactly one rank, and everything that belongs to it goes with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from shardwright.facts.blocks import block
from shardwright.runtime import Layout
from shardwright.runtime.attention.tokens import Run

LENGTHS = st.integers(0, 40)
RANKS = st.integers(1, 5)
DOCUMENTS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and bool((x == y).all())


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    ranks, kind = draw(RANKS), draw(st.sampled_from(["contiguous", "zigzag", "packed", "split"]))
    if kind == "packed":
        return Layout.packed(draw(DOCUMENTS), ranks)
    if kind == "contiguous":
        return Layout.contiguous(draw(LENGTHS), ranks, start=draw(st.integers(0, 3)))
    layout = Layout.zigzag(draw(LENGTHS), ranks, start=draw(st.integers(0, 3)))
    return layout.split(draw(st.integers(1, 4))) if kind == "split" else layout


@given(layouts())
def test_shards_hold_every_token_once_and_unshard_undoes_them(layout: Layout) -> None:
    x = torch.randn(2, layout.length, 3, requires_grad=True)
    parts = [layout.shard(x, 1, rank, fill=7) for rank in range(layout.ranks)]
    assert {tuple(part.shape) for part in parts} == {(2, layout.rows, 3)}
    assert same(layout.unshard(parts, 1), x) and same(layout.unshard(torch.stack(parts), 1), x)
    held = torch.cat([layout.tokens(rank) for rank in range(layout.ranks)])
    assert held[held >= 0].sort().values.tolist() == list(range(layout.length))
    for rank, part in enumerate(parts):
        assert (part[:, ~layout.valid(rank)] == 7).all()
        of_rank = layout.positions(rank)[layout.valid(rank)]
        if len(layout.documents) == 1:
            assert same(of_rank, layout.tokens(rank)[layout.valid(rank)] + layout.start)
    (grad,) = torch.autograd.grad(sum((part.sum() for part in parts), x.sum() * 0), x)
    assert same(grad, torch.ones_like(x))


@given(layouts(), st.integers(1, 4))
def test_join_undoes_split(layout: Layout, ways: int) -> None:
    joined = layout.split(ways).join(ways)
    assert joined.runs == layout.runs and joined.rows >= layout.rows
    x = torch.arange(layout.length)
    for rank in range(layout.ranks):
        parts = [layout.split(ways).shard(x, 0, rank * ways + i, -1) for i in range(ways)]
        assert same(torch.cat(parts), joined.shard(x, 0, rank, -1))


def test_by_hand() -> None:
    zigzag = Layout.zigzag(11, 3)  # 6 chunks of 2, the last of them 1
    assert [zigzag.tokens(rank).tolist() for rank in range(3)] == [
        [0, 1, 10, -1], [2, 3, 8, 9], [4, 5, 6, 7]
    ]  # fmt: skip
    packed = Layout.packed([5, 3], 2)  # chunks of 2, from rank 0; chunks of 1, from rank 1
    assert [packed.tokens(rank).tolist() for rank in range(2)] == [
        [0, 1, 6, 7], [2, 3, 4, 5]
    ]  # fmt: skip
    assert packed.documents == (0, 5)


@given(LENGTHS, RANKS)
def test_contiguous_is_how_the_runtime_cuts_a_dim(length: int, ranks: int) -> None:
    layout = Layout.contiguous(length, ranks)
    for rank in range(ranks):
        own = block(length, [(ranks, rank)])
        assert layout.rows == own.rows
        held = layout.tokens(rank)
        assert held[held >= 0].tolist() == list(range(own.start, own.stop))


@given(DOCUMENTS, RANKS)
def test_positions_and_ids_in_packed_documents(lengths: list[int], ranks: int) -> None:
    layout = Layout.packed(lengths, ranks)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    parts = [(layout.document_ids(r), layout.positions(r)) for r in range(ranks)]
    assert same(layout.unshard([a for a, _ in parts], 0), ids)
    assert same(layout.unshard([b for _, b in parts], 0), positions)


@given(DOCUMENTS, RANKS)
def test_causal_work_of_long_documents_is_balanced(lengths: list[int], ranks: int) -> None:
    lengths = [2 * ranks * n for n in lengths]
    layout = Layout.packed(lengths, ranks)
    work = [int((layout.positions(r) + 1)[layout.valid(r)].sum()) for r in range(ranks)]
    assert max(work) == min(work)


@given(DOCUMENTS, RANKS)
def test_labels_and_loss_weights_give_the_loss_of_the_whole(lengths: list[int], ranks: int) -> None:
    layout = Layout.packed(lengths, ranks)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (2, layout.length), generator=generator)
    logits = torch.randn(2, layout.length, 5, generator=generator, dtype=torch.float64)
    whole: list[torch.Tensor] = []
    for b in range(2):  # document by document
        for x, y in zip(tokens[b].split(lengths), logits[b].split(lengths), strict=True):
            whole.append(F.cross_entropy(y[:-1], x[1:], reduction="none"))
    want = torch.cat(whole).mean() if sum(map(len, whole)) else torch.tensor(0.0).double()
    total = torch.tensor(0.0, dtype=torch.float64)
    for rank in range(ranks):
        labels = layout.shard_labels(tokens, 1, rank)
        weights = layout.shard_loss_weights(tokens, 1, rank, dtype=torch.float64)
        own = layout.shard(logits, 1, rank)
        losses = F.cross_entropy(own.transpose(1, 2), labels, reduction="none")
        total += (losses * weights).sum()
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)


@given(RANKS, LENGTHS, st.integers(0, 9))
def test_a_cache_and_new_tokens(ranks: int, cached: int, new: int) -> None:
    old = Layout.contiguous(cached, ranks)
    both = old.then(Layout.zigzag(new, ranks, start=cached))
    x = torch.arange(cached + new)
    parts = [both.shard(x, 0, rank) for rank in range(ranks)]
    assert same(both.unshard(parts, 0), x)
    for rank, part in enumerate(parts):
        assert same(part[: old.rows], old.shard(x[:cached], 0, rank))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([[Run(0, 0, 2)], [Run(0, 1, 2)]], "after position 1 come 2 tokens from 1"),
        ([[Run(0, 0, 2)], [Run(0, 3, 1)]], "after position 1 come 1 tokens from 3"),
        ([[Run(0, 0, 2)], [Run(0, 2, 1)]], "tokens 0 to 3 are not 4"),
        ([[Run(0, 0, 2), Run(1, 2, 1)], [Run(0, 3, 1)]], "runs of rank 0 overlap or leave 2 rows"),
        ([[Run(1, 0, 2)], [Run(0, 2, 2)]], "runs of rank 0 overlap or leave 2 rows"),
        ([[Run(0, 0, 2)], [Run(-1, 2, 2)]], "runs of rank 1 overlap or leave 2 rows"),
    ],
)
def test_refuses_runs_that_are_no_permutation(runs: list[list[Run]], message: str) -> None:
    assert Layout(4, 2, ((Run(0, 2, 2),), (Run(0, 0, 2),))).tokens(0).tolist() == [2, 3]
    with pytest.raises(ValueError, match=message):
        Layout(4, 2, tuple(map(tuple, runs)))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="-1 tokens on 2 ranks"):
        Layout.zigzag(-1, 2)
    with pytest.raises(ValueError, match="documents of at least one token"):
        Layout.packed([3, 0], 2)
    with pytest.raises(ValueError, match=r"dim 1 of \(2, 5\) must have 6 tokens"):
        Layout.zigzag(6, 2).shard(torch.ones(2, 5), 1, 0)
    with pytest.raises(ValueError, match="1 shards where there are 2"):
        Layout.zigzag(6, 2).unshard([torch.ones(4)], 0)
    with pytest.raises(ValueError, match=r"shards of \[4, 3\] rows along dim 0, not 4 each"):
        Layout.zigzag(6, 2).unshard([torch.ones(4), torch.ones(3)], 0)
    with pytest.raises(ValueError, match=r"shards of \[5, 5\] rows along dim 0, not 4 each"):
        Layout.zigzag(6, 2).unshard(torch.ones(2, 5), 0)
    with pytest.raises(ValueError, match="3 shards do not join 2 at a time"):
        Layout.zigzag(6, 3).join(2)
    with pytest.raises(ValueError, match="do not follow 2 shards that end at position 6"):
        Layout.zigzag(6, 2).then(Layout.zigzag(6, 2))
    with pytest.raises(NotImplementedError, match="packed documents cannot be continued"):
        Layout.packed([3, 3], 2).then(Layout.zigzag(6, 2, start=6))
