"""Fused projections are planned whole and in parts; the better plan is kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import shardwright
from shardwright.planner.errors import PlanError
from tests.endtoend.families import example_module


def planned(
    batch: int, width: int, *pins: str, seq: int = 4096, layers: int = 2, memory: int | None = None
) -> Any:
    """Layers of a GPT on eight GPUs of one node, with `memory` bytes each."""
    example = example_module("gpt")
    with torch.device("meta"):
        config = example.GPTConfig(2048, seq, layers=layers, heads=width // 128, width=width)
        model = example.GPT(config).bfloat16()
        tokens = torch.zeros(batch, seq, dtype=torch.int64)
    inputs = {"tokens": tokens, "labels": tokens}
    return shardwright.plan(
        model,
        inputs,
        gpus=8,
        mesh="8",
        cluster="h100",
        pins=pins,
        memory_bytes=memory,
        precision="own",
    )


@cache
def one_sequence() -> Any:
    """One sequence for eight GPUs: attention can only be cut by heads or by sequence."""
    return planned(1, 4096)


def choices(plan: Any, op: str) -> list[str]:
    """What is cut in the nodes of that op, in the first kind of layer."""
    nodes = plan.graph.loops[0].blocks[0].nodes
    return [plan.decisions.choices[node.name][0] for node in nodes if op in node.op]


def parts(plan: Any) -> list[str]:
    params = plan.graph.loops[0].blocks[0].params
    return [param.name for param in params if param.part is not None]


@pytest.mark.slow
def test_tensor_parallelism_is_found() -> None:
    plan = one_sequence()
    assert len(parts(plan)) == 6
    q, k, v, _, up, down = choices(plan, "linear")  # behind attention an exchange may be cheaper
    assert (q, k, v, up, down) == ("o", "o", "o", "o", "k")
    assert choices(plan, "attention") == ["n"]
    layer = plan.module_source().partition("class ShardedModel")[0]
    assert "self.up(" in layer
    (note,) = plan.notes
    assert note.startswith(
        "Fused projections (blocks.*.attention.qkv.weight) are computed in parts; whole: "
    )
    assert "proven within" in str(plan)  # what computing hides is not in the problem


def test_one_product_where_parts_gain_nothing() -> None:
    plan = planned(8, 1024)
    assert not parts(plan) and choices(plan, "attention") == ["b"]
    (note,) = plan.notes
    assert "are computed whole; in parts: " in note


@pytest.mark.slow
def test_ordinary_plans_are_the_better_of_both() -> None:
    faster: dict[int, dict[str, float]] = {}
    for batch, width in ((1, 4096), (8, 1024)):
        plan = planned(batch, width)
        assert plan.seconds <= min(row.seconds for row in plan.baselines if row.seconds)
        only_parts = planned(batch, width, "*.weight_q=S0")  # a pin that only parts can have
        rows = zip(plan.baselines, only_parts.baselines, strict=True)
        faster[batch] = {
            ours.name: ours.seconds / theirs.seconds
            for ours, theirs in rows
            if ours.seconds and theirs.seconds
        }
        assert max(faster[batch].values()) <= 1.0
    assert faster[1]["TP+SP"] == 1.0 and faster[8]["DDP"] < 1.0


@pytest.mark.slow
def test_both_are_planned_with_layers_recomputed() -> None:
    """Whole, recomputed layers leave much of the memory free; in parts they are needed, too."""
    plan = planned(2, 4096, layers=12, memory=2_800_000_000)
    assert plan.decisions.recompute and len(parts(plan)) == 6
    assert plan.seconds <= min(row.seconds for row in plan.baselines if row.seconds)
    some = planned(2, 4096, layers=12, memory=3_000_000_000)  # whole, with some kept: 65.7 ms
    decided = some.decisions
    assert decided.kept_layers + decided.part_layers > 0 and len(parts(some)) == 6


@pytest.mark.parametrize("pattern", ["*.qkv.weight", "blocks.*.qkv.*", "*.weight_k"])
@pytest.mark.some(1)
def test_a_pin_of_the_original_holds_for_its_parts(pattern: str) -> None:
    spec = "R" if pattern == "*.weight_k" else "S0"
    plan = planned(1, 4096, f"{pattern}={spec}")
    assert len(parts(plan)) == 6
    specs = plan.decisions.specs
    pinned = {"*.qkv.weight": ("weight_q", "weight_k", "weight_v"), "*.weight_k": ("weight_k",)}
    leaves = pinned.get(pattern, [name.rpartition(".")[2] for name in parts(plan)])
    for leaf in leaves:
        (found,) = (spec for name, spec in specs.items() if name.endswith(f".qkv.{leaf}"))
        assert found == ((-1,) if spec == "R" else (0,))


def test_a_pin_that_no_way_knows() -> None:
    with pytest.raises(PlanError, match=r"--pin \*\.weight_x: no parameter or module has such"):
        planned(1, 4096, "*.weight_x=R")
