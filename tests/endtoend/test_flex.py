"""`flex_attention` on ranks, against every single score computed by itself: outputs, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from shardwright.ir.capture.capture import CaptureError, capture
from shardwright.ir.capture.flex import written_out_flex
from shardwright.ir.graph import Graph
from shardwright.ir.ops.registry import operator_of
from shardwright.ir.passes.fold import fold
from shardwright.runtime import RankPool
from tests.sharded import builder_of, check, combine, mesh_of, random_decisions

Score = Callable[..., Any]


class Flex(nn.Module):
    """Four query heads over two key heads; `kind` says by which functions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 16)
        self.slopes = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, 2, 4).permute(2, 0, 3, 1, 4)

        def document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (documents[b, i] == documents[b, j]) & (i >= j)

        def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < 3)

        def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + self.slopes[h] * (j - i)

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, 2 * torch.tanh(score / 2), -float("inf"))

        def by_head(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.sin(score * self.slopes[h]) - (i - j).abs()

        def branch(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score if i > j else -score

        def row(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + documents[b].sum()

        masks: dict[str, Score] = {"document": document, "window": window, "alibi": document}
        masks["by_head"] = document
        scores: dict[str, Score] = {
            "alibi": alibi, "capped": capped, "by_head": by_head, "branch": branch, "row": row,
        }  # fmt: skip
        mask = masks.get(self.kind)
        block = None if mask is None else create_block_mask(mask, b, None, s, s, device=x.device)
        attend: Any = torch.compile(flex_attention) if self.kind == "window" else flex_attention
        out = attend(q, k, v, scores.get(self.kind), block, enable_gqa=True, scale=0.7)
        return out.transpose(1, 2).flatten(2)


def case(kind: str) -> tuple[Flex, dict[str, Tensor], Graph]:
    torch.manual_seed(0)
    model = Flex(kind).double()
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3]] * 2)
    inputs = {"x": torch.randn(4, 8, 16, dtype=torch.float64), "documents": documents}
    return model, inputs, capture(model, inputs, training=True)


# what attention is told in numbers, and whether it has a mask; None: scores are written out
KINDS = {
    "document": (False, 0, 0.0, True),
    "window": (True, 3, 0.0, False),
    "alibi": (False, 0, 0.0, True),
    "capped": (True, 0, 2.0, False),
    "by_head": None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.some(2)
def test_flex_attention(pool: Callable[[int], RankPool], kind: str) -> None:
    model, inputs, graph = case(kind)
    found = [n for n in fold(graph).nodes if operator_of(n).attends]
    names = ("causal", "window", "softcap")
    told = [(*(n.arg(name) for name in names), n.arg("mask") is not None) for n in found]
    assert told == ([] if KINDS[kind] is None else [KINDS[kind]])
    with written_out_flex() as calls:
        out = model(**inputs)
    assert calls == ["flex_attention"]
    (name,) = (str(o.path) for o in graph.outputs)
    combine({name: out}).backward()
    params = {n: p.detach() for n, p in model.named_parameters()}
    expected = {name: out.detach()}, {n: p.grad for n, p in model.named_parameters()}
    for sizes, seed in (((2,), 0), ((2, 2), 1), ((2, 2), 2)):
        made = builder_of(fold(graph), mesh_of(*sizes))
        ranks = pool(made.network.mesh.ranks)
        check(ranks, made, random_decisions(made, seed), params, inputs, expected, tolerance=1e-9)


@pytest.mark.parametrize(("kind", "said"), [("branch", "decides by the value"), ("row", "a part")])
def test_functions_that_are_not_of_one_score_are_refused(kind: str, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        case(kind)
