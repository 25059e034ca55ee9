"""What the report's tables say, as data."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardwright
from shardwright.planner.errors import PlanError


class Layer(nn.Module):
    """Two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Three layers, and a product behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_ops_are_the_rows_of_the_report() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.zeros(8, 16, 64)
    plan = shardwright.plan(model, {"x": x}, gpus=2, cluster="cpu", mesh="2", optimizer="none")
    found = [(op.within, op.count, op.name) for op in plan.ops]
    assert found == [("layers", 3, "up"), ("layers", 3, "down"), ("", 1, "head")]
    rows = [re.split(r" {2,}", line.strip()) for line in str(plan).splitlines()]
    for op in plan.ops:
        assert any(row[:3] == [op.name, op.strategy, op.result] for row in rows), op
    computed = sum(op.count * op.compute_s for op in plan.ops)
    assert 0 < computed <= plan.seconds


def test_outputs_that_are_cut_are_named() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.zeros(8, 16, 64)
    asked: dict[str, Any] = {"gpus": 2, "cluster": "cpu", "mesh": "2", "optimizer": "none"}
    cut = shardwright.plan(model, {"x": x}, pins=["head=S0"], **asked)
    assert re.search("Each rank returns .*its part of .* .S0.; .model.gather_outputs", str(cut))
    whole = shardwright.plan(model, {"x": x}, pins=["head=R"], **asked)
    assert "Each rank returns all of" in str(whole) and "its part of" not in str(whole)


def test_outputs_that_shall_be_whole_are() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.zeros(8, 16, 64)
    asked: dict[str, Any] = {"gpus": 2, "cluster": "cpu", "mesh": "2", "pins": ["head=S0"]}
    made = shardwright.plan(model, {"x": x}, output_layout="replicated", **asked)
    assert made.request.output_layout == "replicated"
    assert 'OUTPUTS = (Output((), "R", (8, 16, 8)),)' in made.module_source()
    assert "Each rank returns all of its result." in made.module_source()
    with pytest.raises(PlanError, match="expected one of sharded, replicated"):
        shardwright.plan(model, {"x": x}, output_layout="whole", **asked)
    with pytest.raises(PlanError, match="--output-layout is for training"):
        shardwright.plan(model, {"x": x}, output_layout="replicated", phase="prefill", **asked)
