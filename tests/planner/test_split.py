"""What the seconds of a plan are said to be spent on adds up to them, by another count."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import shardwright
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.ir.graph import Node
from shardwright.ir.ops.moe import exchanges, layer_of
from shardwright.ir.ops.registry import local_of, operator_of
from shardwright.planner.plan.plan import PlanData
from shardwright.planner.report.report import hidden_seconds, split_seconds
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.regions import scopes

LAYERS = 2


@cache
def mixture(phase: str, batch: int, seq: int) -> Any:
    """Two layers of small experts on eight GPUs."""
    import transformers as t

    config = t.Qwen3MoeConfig(
        num_hidden_layers=LAYERS, hidden_size=1024, num_attention_heads=8, num_key_value_heads=4,
        num_experts=32, num_experts_per_tok=4, moe_intermediate_size=512, vocab_size=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = t.Qwen3MoeForCausalLM(config).bfloat16()
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids} if phase == "train" else {"input_ids": ids}
    pins = ("*.experts.gate_up_proj=S0",) if phase == "train" else ()
    return shardwright.plan(model, inputs, gpus=8, mesh="8", phase=phase, pins=pins)


def layer_of_experts(plan: PlanData) -> Node:
    (node,) = (n for s in scopes(plan.graph) for n in s.nodes if operator_of(n).experts)
    return node


@pytest.mark.parametrize(("phase", "batch", "seq"), [("train", 8, 512), ("prefill", 1, 65536)])
@pytest.mark.slow
def test_shares_add_up_to_the_time_of_the_solver(phase: str, batch: int, seq: int) -> None:
    """Compute and communication are summed over ops and statements, `seconds` by the problem."""
    plan = mixture(phase, batch, seq)
    compute, communication = split_seconds(plan)
    total = compute + sum(communication.values()) + plan.optimizer_s + plan.casts_s
    hidden = hidden_seconds(plan)
    assert total - hidden == pytest.approx(plan.seconds, rel=1e-6)
    weights = sum(s.seconds * n for w, n in plan.program.brought() for s in w.way)
    assert 0 <= hidden <= (1 - load_cluster("h100").contention) * weights * (1 + 1e-9)
    assert compute > 0 and sum(communication.values()) > 0


def test_exchanges_of_experts_are_communication() -> None:
    """What is counted over the axis is no less than the layers' all-to-alls, priced by hand."""
    plan = mixture("train", 8, 512)
    node = layer_of_experts(plan)
    choices = plan.decisions.choices[node.name]
    assert choices[0].startswith("dispatch"), choices
    layer = layer_of(local_of(node, choices, plan.mesh.sizes))
    network = Network(plan.mesh, load_cluster("h100", 8))
    moved = exchanges(layer, backward=True)
    forward, backward = (
        sum(network.seconds("all_to_all", (0,), t.bytes) for t in moved if t.backward == back)
        for back in (False, True)
    )
    work = plan.work[node.name]
    assert (work.forward_moving_s, work.backward_moving_s) == (forward, backward)
    assert work.axes == (0,) and 0 < work.moving_s < work.seconds
    runs = LAYERS * (2 if plan.decisions.recompute else 1)
    in_layers = runs * forward + LAYERS * backward
    name = plan.mesh.names[0]
    assert split_seconds(plan)[1][name] > in_layers
    assert f"{name} inside" in str(plan)


def test_a_plan_keeps_its_shares_in_a_file(tmp_path: Any) -> None:
    plan = mixture("train", 8, 512)
    plan.save(tmp_path / "plan.json")
    again = shardwright.load_plan(tmp_path / "plan.json")
    assert again.work == plan.work and again.baselines == plan.baselines
    assert split_seconds(again) == split_seconds(plan)


def test_what_ordinary_plans_spend_adds_up() -> None:
    plan = mixture("train", 8, 512)
    fitting = [row for row in plan.baselines if row.seconds is not None]
    assert fitting
    for row in fitting:
        assert sum(s for _, s in row.spent) == pytest.approx(row.seconds, rel=1e-9)
        assert all(s > 0 for _, s in row.spent)
