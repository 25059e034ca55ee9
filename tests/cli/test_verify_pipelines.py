"""Pipelines are verified as they were planned."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from shardwright.planner.errors import PlanError
from shardwright.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Run

MODEL = """import torch
from torch import nn
from torch.nn import functional as F

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens, labels):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

def build_model():
    return Tied()

def example_inputs(batch, seq):
    ids = torch.randint(32, (batch, seq))
    return {"tokens": ids, "labels": ids.roll(-1, 1)}
"""


@pytest.mark.long
def test_a_pipeline_is_compared_and_a_wrong_one_is_found(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(MODEL)
    out = tmp_path / "out"
    asked = ("--layout", "pp=2,recompute=selective", "--micro-batches", "2", "--batch", "4")
    sizes = ("--seq", "8", "--cluster", "cpu")
    ran = run(str(tmp_path / "tied.py"), *asked, *sizes, "--out", str(out))
    assert ran.code == 0, ran.err
    assert "Pipeline: 2 stages over pp=2, 2 micro-batches of 2 sequences by 1f1b" in ran.out
    found = verify(out)
    assert found.ok and "gradients" in found.comparisons[0].errors, str(found)
    assert len(found.comparisons) == 2  # the graph, and the original
    path = out / "sharded_model.py"
    assert path.read_text().count('keep="products, attention"') == 2
    path.write_text(re.sub(r"torch\.tanh\(", "torch.sin(", path.read_text()))
    assert not verify(out).ok
    with pytest.raises(PlanError, match="on its own 2 ranks"):
        verify(out, 1)
