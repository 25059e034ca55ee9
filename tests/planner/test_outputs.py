"""What outputs take in training, and plans of a language model that returns its loss alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright
from shardwright.planner.errors import InfeasibleError

VOCABULARY, TOKENS = 50_000, (8, 256)
LOGITS = 8 * 256 * VOCABULARY * 2  # bytes


class Net(nn.Module):
    """A head on 64 numbers, and its loss in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64, dtype=torch.bfloat16)
        self.head = nn.Linear(64, VOCABULARY, bias=False, dtype=torch.bfloat16)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(tokens))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return {"loss": loss, "logits": logits}


def plan(memory_bytes: int, outputs: tuple[str, ...] = ()) -> shardwright.Plan:
    with torch.device("meta"):
        model, tokens = Net(), torch.zeros(TOKENS, dtype=torch.int64)
    inputs = {"tokens": tokens, "labels": tokens}
    asked: dict[str, Any] = {
        "gpus": 2, "mesh": "2", "memory_bytes": memory_bytes, "micro_batches": 1
    }  # fmt: skip
    return shardwright.plan(model, inputs, outputs=outputs, **asked)


def test_the_report_says_what_logits_take() -> None:
    made = plan(10**9)
    assert "the output `logits` takes 102 MB of each GPU" in str(made)
    alone = plan(10**9, ("loss",))
    assert "the output" not in str(alone)
    # a chunk of them, here all, is there in any case, with a block in a wide format; gradients not
    assert 0.5 < (made.memory.total - alone.memory.total) / (LOGITS / 2) < 1.05
    assert "ops.linear_cross_entropy(" in alone.module_source()


def test_a_plan_that_does_not_fit_says_how_to_do_without() -> None:
    small = 3 * LOGITS // 4
    with pytest.raises(InfeasibleError, match="The output `logits` is 102 MB per GPU") as caught:
        plan(small)
    assert "`--outputs loss` does without it" in str(caught.value)
    with pytest.raises(InfeasibleError) as caught:
        plan(10**7, ("loss",))
    assert "--outputs" not in str(caught.value)
