"""`plan` and `plan verify` of every mixture of experts, from its config.json, in both phases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.ir.test_moe import FAMILIES, config_of

if TYPE_CHECKING:
    from .conftest import Run

CLASSES = {
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "llama4": "Llama4ForCausalLM",
}  # fmt: skip
PHASES = {
    "train": "--phase train --batch 4 --seq 16",
    "serve": "--phase serve --batch 2 --seq 16 --output-tokens 8",
}
QUICK = (("deepseek_v3", "train"), ("gpt_oss", "serve"))
SLOW = [(name, phase) for name in FAMILIES for phase in PHASES if (name, phase) not in QUICK]


@pytest.mark.parametrize(
    ("family", "phase"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
@pytest.mark.slow
def test_planned_and_verified(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, phase: str
) -> None:
    """Against the graph and the model itself to 1e-9, though it names float32 in its forward."""
    monkeypatch.chdir(tmp_path)
    config = config_of(family)
    config.architectures = [CLASSES[family]]
    config.to_json_file("config.json", use_diff=False)
    words = f"--gpus 2 --cluster cpu --dtype float32 --out out {PHASES[phase]}"
    ran = run("config.json", *words.split())
    assert ran.code == 0, ran.err
    assert "ops.moe(" in Path("out/sharded_model.py").read_text()
    ran = run("verify", "out")
    assert ran.code == 0 and ran.out.startswith("PASS: "), ran.out + ran.err
    found = re.findall(r"(loss|outputs|gradients) +(\S+)  ", ran.out)
    kinds = ["loss", "outputs", "gradients"] if phase == "train" else ["outputs"]
    assert [kind for kind, _ in found] == 2 * kinds, ran.out
    errors = [float(error) for _, error in found]
    assert max(errors) < 1e-9, ran.out
    assert f"{CLASSES[family]} itself from config.json" in ran.out
