"""Operators of torch that nothing here knows run whole, whatever they take and give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.facts.spec import R
from shardwright.ir.capture.capture import capture
from shardwright.ir.ops.typed import check_nodes
from shardwright.ir.reference.widen import widened
from shardwright.runtime import RankPool
from tests.sharded import builder_of, check, mesh_of, random_decisions, reference


class Bags(nn.Module):
    """`embedding_bag` must be told that there are no weights per sample (None, without a default),
    and one of its four results has another shape where there will be gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(32, 16), nn.EmbeddingBag(32, 16, mode="mean")
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.bag(tokens).unsqueeze(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, 1).flatten())


def test_bags_of_rows(pool: Callable[[int], RankPool]) -> None:
    torch.manual_seed(0)
    model, inputs = Bags().double(), {"tokens": torch.randint(32, (4, 8))}
    graph = capture(model, inputs, training=True)
    check_nodes(graph)
    params = dict(model.state_dict())
    want = reference(widened(graph), params, inputs)
    builder = builder_of(graph, mesh_of(2))
    tried = (random_decisions(builder, seed) for seed in range(8))
    # what autograd keeps of an unknown operator's weight is not known, so it is not gathered here
    whole = [made for made in tried if made.specs["bag.weight"] == (R,)]
    assert len(whole) > 1
    for decisions in whole[:2]:
        check(pool(2), builder, decisions, params, inputs, want, tolerance=1e-9)
