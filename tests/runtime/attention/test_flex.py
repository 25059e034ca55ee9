"""What goes to `flex_attention`, by a plain kernel in its place, against tiles of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from shardwright.runtime.attention import flex
from shardwright.runtime.attention.kernels import (
    Queries,
    _explicit,  # pyright: ignore[reportPrivateUsage]
    _explicit_backward,  # pyright: ignore[reportPrivateUsage]
)
from shardwright.runtime.attention.pieces import Piece
from shardwright.runtime.attention.scores import Mask, Scores

B, HQ, HKV, D, DV = 2, 4, 2, 8, 6
ROWS, POSITIONS = 300, 700  # rows of queries and keys, and positions there are

PIECES = [
    Piece(0, 200, 40, 200, 300, 300, "causal"),
    Piece(100, 200, 0, 150, 500, 200, "full"),
    Piece(0, 300, 0, 300, 310, 270, "band"),
    Piece(7, 130, 20, 257, 330, 300, "band"),
]
SCORES = {
    "softcap": Scores(0.3, causal=True, softcap=2.0),
    "window": Scores(0.3, causal=True, window=45),
    "wide window": Scores(0.3, causal=True, window=200, softcap=3.0),
    "both sides": Scores(0.3, window=60),
    "alibi": Scores(0.3, causal=True, slopes=torch.linspace(0.1, 0.8, HQ, dtype=torch.float64)),
    "bias": Scores(0.3, causal=True, bias=torch.randn(1, HQ, ROWS, POSITIONS).double()),
    "bias of sequences": Scores(0.3, softcap=2.0, bias=torch.randn(B, 1, ROWS, POSITIONS).double()),
    "padding": Scores(0.3, causal=True, mask=Mask(keys=torch.rand(B, POSITIONS) < 0.7)),
    "documents": Scores(
        0.3, causal=True, mask=Mask(documents=torch.arange(POSITIONS).expand(B, -1) // 75)
    ),
}


def plain_kernel(
    q: Tensor, k: Tensor, v: Tensor, score: Callable[..., Tensor], mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """`flex_attention` with all scores written out; the blocks are believed as a kernel does."""
    (b, heads, n, _), m = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    index = torch.meshgrid(*(torch.arange(size) for size in (b, heads, n, m)), indexing="ij")
    scores = score(q @ k.transpose(-1, -2) * scale, *index)
    allowed = mask.mask_mod(*index)
    some, whole = (
        blocks_of(count, order, n, m)
        for count, order in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not (some & whole).any()
    scores = scores.masked_fill(~((some & allowed) | whole), -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)) @ v, lse


def blocks_of(count: Tensor | None, order: Tensor | None, n: int, m: int) -> Tensor:
    """(n, m): is the pair in one of the blocks?"""
    assert count is not None and order is not None
    dense = torch.zeros(order.shape[2:], dtype=torch.bool)
    for row, number in enumerate(count[0, 0].tolist()):
        dense[row, order[0, 0, row, :number].long()] = True
    return dense.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :m]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "kernel", lambda: plain_kernel)
    yield


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: f"{piece.rule} {piece.queries}")
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_results_and_gradients_equal_those_of_tiles(piece: Piece, scores: Scores) -> None:
    torch.manual_seed(0)
    q = torch.randn(B, HQ, piece.queries, D, dtype=torch.float64)
    k = torch.randn(B, HKV, piece.keys, D, dtype=torch.float64)
    v = torch.randn(B, HKV, piece.keys, DV, dtype=torch.float64)
    want, want_lse = _explicit(q, k, v, piece, scores)
    out, lse = flex.attend_flex(q, k, v, piece, scores)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)

    # The piece is some of the keys of a result, so the final one is another.
    final, grad = lse.masked_fill(lse == -torch.inf, 0) + 0.4, torch.randn_like(out)
    queries = Queries.of(q, torch.randn_like(out), final, grad)
    theirs, ours = (
        replace(scores, dbias=None if scores.bias is None else torch.zeros_like(scores.bias))
        for _ in range(2)
    )
    wanted = _explicit_backward(queries, k, v, piece, theirs)
    saved = queries.q, queries.lse, queries.grad, queries.delta
    found = flex.attend_flex_backward(saved, k, v, piece, ours)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)
    if theirs.dbias is not None and ours.dbias is not None:
        torch.testing.assert_close(ours.dbias, theirs.dbias, atol=1e-11, rtol=0)
        assert theirs.dbias.any()


def test_blocks_out_of_a_window_are_skipped() -> None:
    scores, piece = Scores(1.0, causal=True, window=128), Piece(0, 1024, 0, 1024, 0, 0, "band")
    place = flex._Place.of(piece, scores, torch.device("cpu"))  # pyright: ignore[reportPrivateUsage]
    mask = flex._block_mask(piece, scores, place)  # pyright: ignore[reportPrivateUsage]
    assert mask.kv_num_blocks.sum() == 15  # two for each row of blocks, one for the first
    scores = replace(scores, window=512)
    mask = flex._block_mask(piece, scores, place)  # pyright: ignore[reportPrivateUsage]
    assert mask.full_kv_num_blocks is not None and mask.full_kv_num_blocks.sum() == 3 * 8 - 6


def test_other_places_and_softcaps_make_no_new_kernel() -> None:
    """What Dynamo would recompile for is fixed in a shape: five calls are one graph."""
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    compiled = torch.compile(flex._attend, backend=count)  # pyright: ignore[reportPrivateUsage]
    q, k = torch.randn(1, HQ, 128, D), torch.randn(1, HKV, 128, D)
    for position in (0, 128, 300, 456, 500):
        piece = Piece(0, 128, 0, 128, position, position - position // 3, "band")
        scores = Scores(0.3, causal=True, window=45, slopes=torch.rand(HQ), softcap=2.0)
        place = flex._Place.of(piece, scores, q.device)  # pyright: ignore[reportPrivateUsage]
        score = flex._score(scores, place)  # pyright: ignore[reportPrivateUsage]
        mask = flex._block_mask(piece, scores, place)  # pyright: ignore[reportPrivateUsage]
        out, lse = compiled(q, k, k, score, mask, scores.scale)
        want, want_lse = _explicit(q, k, k, piece, scores)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=0)
    assert len(graphs) == 1
