"""Pieces hold exactly the pairs that may attend, each once, in shapes that kernels can do."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwright.runtime import Layout
from shardwright.runtime.attention import pieces as module
from shardwright.runtime.attention.pieces import Piece, cut, fuse


def inside(piece: Piece, causal: bool, window: int) -> Tensor:
    """Who may attend whom in a piece (queries, keys), by its rule."""
    i, j = torch.arange(piece.queries)[:, None], torch.arange(piece.keys)
    if piece.rule == "full":
        return torch.ones(piece.queries, piece.keys, dtype=torch.bool)
    if piece.rule == "band":
        ahead = piece.k_position + j - piece.q_position - i
        return (ahead > -window) & ((ahead <= 0) | (not causal))
    assert piece.queries == piece.keys
    return j <= i if piece.rule == "causal" else j >= i


def count(pieces: tuple[Piece, ...], rows: int, causal: bool, window: int) -> Tensor:
    """How often each pair of rows is in a piece."""
    times = torch.zeros(rows, rows, dtype=torch.int64)
    for piece in pieces:
        area = times[
            piece.q_row : piece.q_row + piece.queries, piece.k_row : piece.k_row + piece.keys
        ]
        assert area.shape == (piece.queries, piece.keys) and area.numel()
        area += inside(piece, causal, window)
    return times


def wanted(layout: Layout, q: int, k: int, causal: bool, window: int, prefix: int) -> Tensor:
    """The pairs of rows of shards q and k, from the definition."""
    query, key = layout.tokens(q)[:, None], layout.tokens(k)
    pairs = torch.ones(layout.rows, layout.rows, dtype=torch.bool)
    if causal:
        pairs &= key <= query
    if window:
        pairs &= key > query - window
    pairs |= key < prefix
    same = layout.document_ids(q)[:, None] == layout.document_ids(k)
    return pairs & same & (query >= 0) & (key >= 0)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 40),
    st.integers(0, 12),
    st.booleans(),
    st.booleans(),
)
def test_pieces_hold_each_allowed_pair_once(
    lengths: list[int],
    ranks: int,
    causal: bool,
    window: int,
    prefix: int,
    narrow: bool,
    bands: bool,
) -> None:
    narrowest, module._NARROW = module._NARROW, 128 if narrow else 1  # pyright: ignore
    cut.cache_clear()
    try:
        layout = Layout.packed(lengths, ranks)
        prefix = 0 if window else prefix
        for q in range(ranks):
            for k in range(ranks):
                found = cut(layout.runs[q], layout.runs[k], causal, window, prefix, bands)
                want = wanted(layout, q, k, causal, window, prefix).to(torch.int64)
                assert torch.equal(count(found, layout.rows, causal, window), want)
                fused = fuse(found)
                assert len(fused) <= len(found)
                assert torch.equal(count(fused, layout.rows, causal, window), want)
    finally:
        module._NARROW = narrowest  # pyright: ignore
        cut.cache_clear()


def test_zigzag_is_one_kernel_call_per_block() -> None:
    layout = Layout.zigzag(48, 3)
    for q in range(3):
        for k in range(3):
            (piece,) = fuse(cut(layout.runs[q], layout.runs[k], True, 0, 0))
            shape = (piece.rule, piece.queries, piece.keys)
            assert shape == (
                ("causal", 16, 16) if q == k else ("full", 16, 8) if k < q else ("full", 8, 16)
            )


def test_wide_windows_need_no_masks() -> None:
    layout = Layout.contiguous(4096, 1)
    found = cut(layout.runs[0], layout.runs[0], True, 513, 0)
    assert {piece.rule for piece in found} == {"causal", "window"} and len(found) == 15
    assert sum(piece.keys for piece in found) == 8 * 512 + 7 * 512


def test_a_query_far_behind_its_keys_is_one_piece() -> None:
    keys, query = Layout.contiguous(1000, 1), Layout.contiguous(1, 1, start=999)
    (piece,) = fuse(cut(query.runs[0], keys.runs[0], True, 100, 0))
    assert piece == (0, 1, 900, 100, 999, 900, "full")
