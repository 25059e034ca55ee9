"""Steps of generated modules are those of one process, though labels that count fall unevenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture_folded
from shardwright.runtime import RankPool
from tests.sharded import builder_of, import_source, mesh_of, random_decisions, source_of

Pool = Callable[[int], RankPool]
ROWS, LENGTH, WIDTH, WORDS, MANY = 4, 6, 8, 10, 3


class Tokens(nn.Module):
    """A loss over the next tokens, padded as those of transformers, and another term."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(ids)))
        wanted = F.pad(labels, (0, 1), value=-100)[..., 1:]
        loss = F.cross_entropy(self.head(h).flatten(0, 1), wanted.flatten())
        return loss + 0.1 * h.square().mean()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (MANY * ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:ROWS] = -100  # none counts in the first micro-batch
    labels[ROWS + 1 :, 2:] = -100
    return {"ids": ids, "labels": labels}


def take_step(source: str, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    rows = {name: model.data_shard.of(x) for name, x in batch().items()}
    loss = model.step(**rows, micro_batches=MANY)
    return loss, model.full_gradients()


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_the_mean_over_labels_that_count(pool: Pool, seed: int) -> None:
    model = Tokens().double()
    parts = [dict(zip(batch(), each, strict=True)) for each in zip(*(
        x.chunk(MANY) for x in batch().values()
    ), strict=True)]  # fmt: skip
    graph = capture_folded(model, parts[0], training=True)
    builder = builder_of(graph, mesh_of(2))
    source = source_of(builder, random_decisions(builder, seed))
    assert 'LABELS = Labels("labels", first=1)' in source
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    want = torch.zeros((), dtype=torch.float64)
    for part in parts:
        h = torch.tanh(model.mix(model.embed(part["ids"])))
        logits, wanted = model.head(h)[:, :-1], part["labels"][:, 1:]
        sums = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        want = want + sums / sum(counts) + 0.1 * h.square().mean() / MANY
    assert counts[0] == 0 < counts[2] < counts[1]
    want.backward()
    for loss, gradients in pool(2).run(take_step, source, model.state_dict()):
        torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=0)
        for name, x in model.named_parameters():
            torch.testing.assert_close(gradients[name], x.grad, rtol=1e-9, atol=1e-12, msg=name)
