"""What a program moves is what was priced, and what the report says."""

from __future__ import annotations

import re
from functools import cache
from math import isclose

import torch

import shardwright
from shardwright.costmodel.collective import wire_bytes
from shardwright.facts.moves import primitive
from shardwright.facts.units import format_bytes
from shardwright.planner.plan.plan import PlanData
from shardwright.planner.plan.traffic import predicted_bytes
from shardwright.planner.report.report import format_plan
from tests.endtoend.families import example_module


@cache
def fsdp_plan() -> PlanData:
    """The example's Llama with every parameter stored in slices."""
    example = example_module("llama")
    config = example.LlamaConfig(
        vocab_size=8192, layers=4, width=512, heads=8, kv_heads=4, mlp_width=1408
    )
    with torch.device("meta"):
        model = example.Llama(config)
        tokens = torch.zeros(32, 2048, dtype=torch.int64)
    inputs = {"tokens": tokens, "labels": tokens}
    return shardwright.plan(model, inputs, gpus=4, mesh="4", cluster="h100", pins=["*.weight=S0"])


def test_gathering_again_is_priced_as_it_is_done() -> None:
    plan = fsdp_plan()
    priced = 0.0
    for step, times in plan.program.moves():
        for t in step.traffic:
            if t.backward and t.kind == "all_gather" == primitive(step.step.a, step.step.b):
                priced += times * float(wire_bytes(t.kind, float(t.bytes), 4))
    moved = predicted_bytes(plan.program, plan.mesh)
    done = sum(n for key, n in moved.items() if (key.op, key.phase) == ("all_gather", "backward"))
    assert priced > 0 and isclose(priced, done, rel_tol=1e-12)


def test_the_report_says_what_each_axis_moves() -> None:
    plan = fsdp_plan()
    (line,) = [x for x in format_plan(plan).splitlines() if x.startswith("Each GPU receives")]
    total = sum(predicted_bytes(plan.program, plan.mesh).values())
    found = re.fullmatch(r"Each GPU receives per step: (\S+) ([\d.]+ \w+) \((.*)\)\.", line)
    assert found is not None and found[1] == plan.mesh.names[0]
    assert found[2] == format_bytes(total)
    assert "all-gather" in found[3] and "reduce-scatter" in found[3]
