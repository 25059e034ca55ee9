"""MLIR of plans: parsed and verified by LLVM's mlir-opt and by jaxlib's bindings of Shardy."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardwright as sw
from shardwright.exporting import export
from tests.codegen.export.test_targets import planned
from tests.targets.tools import parsed, program


def accepted(text: str) -> str:
    """What mlir-opt makes of it, which is the same text in its own form."""
    opt = program("mlir-opt-22", "mlir-opt")
    ran = subprocess.run(
        [opt, "--allow-unregistered-dialect"],
        input=text, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[:2000]
    return ran.stdout


CASES = [
    ("llama.py", "fsdp=2,tp=2", "train"),
    pytest.param("llama.py", "tp=4,sp", "train", marks=pytest.mark.slow),
    pytest.param("moe.py", "fsdp=2,ep=2", "train", marks=pytest.mark.slow),
    pytest.param("gpt.py", "zero1=2", "train", marks=pytest.mark.slow),
    pytest.param("encoder_decoder.py", "ddp=2", "train", marks=pytest.mark.slow),
    pytest.param("llama.py", "tp=2", "serve", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "layout", "phase"), CASES)
def test_both_dialects_are_accepted(model: str, layout: str, phase: str, tmp_path: Path) -> None:
    plan = planned(model, layout=layout, phase=phase)
    text = accepted(export(plan, "mlir").text)
    sizes = "x".join(map(str, plan.mesh.sizes))
    assert f"shard.grid @mesh(shape = {sizes})" in text
    found = parsed("sdy", export(plan, "sdy").text, tmp_path)
    assert found["verified"] is True
    axes = ", ".join(f'"{name}"={size}' for name, size in plan.mesh.axes)
    assert f"sdy.mesh @mesh = <[{axes}]>" in found["text"]


def test_values_lie_as_the_plan_has_them(tmp_path: Path) -> None:
    """Rows of the MLP's second product are cut: ranks have summands of what it gives."""
    plan = planned(layout="fsdp=2,tp=2")
    text = parsed("sdy", export(plan, "sdy").text, tmp_path)["text"]
    lines = text.splitlines()
    made = [line for line in lines if '"aten.linear.default"' in line]
    summed = [line for line in made if 'unreduced={"tp"}' in line]
    assert len(made) == 8  # of a layer 7, and the head
    assert len(summed) == 2  # o_proj and down_proj
    assert all('[{"dp"}, {}, {}], unreduced' in line for line in summed)
    name = re.search(r"(%\d+) = ", summed[1])
    assert name is not None
    after = next(line for line in lines if f"sdy.sharding_constraint {name[1]} " in line)
    assert '<@mesh, [{"dp"}, {}, {}]>' in after
    calls = [line for line in lines if "call @main_layers_0" in line]
    assert len(calls) == 4
    weights = re.findall(r'"layers\.2\.mlp\.up_proj\.weight"', text)
    assert len(weights) == 1


def test_summands_are_attributes_where_the_dialect_has_none() -> None:
    exported = export(planned(layout="fsdp=2,tp=2"), "mlir")
    assert any("partial sums have no place" in each for each in exported.differences)
    assert accepted(exported.text).count("shardwright.partial = [1]") >= 2


def test_names_in_any_letters_are_accepted() -> None:
    """MLIR has no `\\u00f6`, which JSON would write."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.größe = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.größe(x).sum()

    inputs = {"x": torch.zeros(4, 2, 8, device="meta")}
    with torch.device("meta"):
        plan = sw.plan(Named(), inputs, gpus=2, cluster="cpu", layout="ddp=2")
    text = export(plan, "mlir").text
    assert 'shardwright.name = "größe.weight"' in text
    accepted(text)
