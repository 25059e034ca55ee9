"""The text of a captured graph and of a generated module, byte for byte.

`pytest --accept` rewrites the files; read the diff.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwright
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph.text import format_graph
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.unfuse import unfuse
from tests.endtoend.families import ROOT, build, example_module, inputs_of
from tests.sharded import builder_of, mesh_of, random_decisions, source_of

Golden = Callable[[str, str], None]


@cache
def llama_module() -> str:
    """The example's code with four layers of a 1B model, planned for one node."""
    example = example_module("llama")
    config = example.LlamaConfig(
        vocab_size=32_000, layers=4, width=2048, heads=32, kv_heads=8, mlp_width=5632
    )
    with torch.device("meta"):
        model = example.Llama(config).bfloat16()
        tokens = torch.zeros(8, 2048, dtype=torch.int64)
    inputs = {"tokens": tokens, "labels": tokens}
    plan = shardwright.plan(model, inputs, gpus=4, mesh="2x2", cluster="h100")
    return plan.module_source()


def test_captured_graph(golden: Golden) -> None:
    graph = fold(capture(build("llama_example"), inputs_of("llama_example"), training=True))
    golden("graph_llama_example.txt", format_graph(graph))


def test_captured_graph_of_a_library_model(golden: Golden) -> None:
    """Without locations: lines of transformers move with its version."""
    graph = fold(capture(build("gpt2"), inputs_of("gpt2"), training=True))
    golden("graph_gpt2.txt", format_graph(graph, locations=False))


def test_graph_with_a_fused_projection_apart(golden: Golden) -> None:
    graph = unfuse(fold(capture(build("gpt"), inputs_of("gpt"), training=True)))
    golden("graph_gpt_apart.txt", format_graph(graph))


def test_generated_module(golden: Golden) -> None:
    golden("llama_2x2.py", llama_module())


# One module for each idea: batch, tokens, heads, key heads, and pins that leave no other, or a
# layout
IDEAS: dict[str, tuple[int, int, int, int, dict[str, str] | str]] = {
    "ddp": (16, 2048, 16, 8, {"*.weight": "R"}),
    "fsdp": (16, 2048, 16, 8, {"*_proj.weight": "S0"}),
    "tp_sp": (2, 4096, 16, 8, "tp=4,sp"),
    "gathered": (1, 131_072, 16, 2, {"*_proj.weight": "R"}),
    "ulysses": (1, 16_384, 16, 16, {"*_proj.weight": "R"}),
    "ring": (1, 32_768, 6, 3, {"*_proj.weight": "R"}),
}  # fmt: skip


@pytest.mark.parametrize("idea", IDEAS)
def test_module_of_an_idea(golden: Golden, idea: str) -> None:
    golden(f"llama_{idea}.py", idea_module(idea))


def idea_module(idea: str) -> str:
    """The example's code on four GPUs, in two layers of a 1B model."""
    batch, tokens, heads, kv_heads, pins = IDEAS[idea]
    example = example_module("llama")
    config = example.LlamaConfig(
        vocab_size=32_000, layers=2, width=128 * heads, heads=heads, kv_heads=kv_heads,
        mlp_width=5632,
    )  # fmt: skip
    with torch.device("meta"):
        model = example.Llama(config).bfloat16()
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
    inputs: dict[str, Any] = {"tokens": ids, "labels": ids}
    how: dict[str, Any] = {"layout": pins}
    if not isinstance(pins, str):
        texts = [f"{pattern}={spec}" for pattern, spec in pins.items()]
        how = {"gpus": 4, "mesh": "4", "pins": texts}
    return shardwright.plan(model, inputs, cluster="h100", precision="own", **how).module_source()


def test_module_with_experts_on_several_ranks(golden: Golden) -> None:
    """Tokens go to their experts by all-to-all, and back."""
    example = example_module("moe")
    config = example.MoEConfig(layers=2, width=1024, heads=16, experts=16, expert_width=2816)
    with torch.device("meta"):
        model = example.MoETransformer(config).bfloat16()
        ids = torch.zeros(16, 2048, dtype=torch.int64)
    pins = ["*.experts.gate_up=S0", "*.experts.down=S0", "*_proj.weight=R"]
    inputs = {"tokens": ids, "labels": ids}
    plan = shardwright.plan(
        model, inputs, gpus=4, mesh="4", cluster="h100", pins=pins, precision="own"
    )
    golden("moe_experts.py", plan.module_source())


def test_module_that_serves(golden: Golden) -> None:
    """A program for prefill and one for decoding, with the same weights."""
    example = example_module("llama")
    config = example.LlamaConfig(
        vocab_size=32_000, layers=2, width=2048, heads=16, kv_heads=8, mlp_width=5632
    )
    with torch.device("meta"):
        model = example.Llama(config).bfloat16()
        ids = torch.zeros(4, 4096, dtype=torch.int64)
    inputs = {"tokens": ids, "position_ids": ids}
    plan = shardwright.plan(
        model, inputs, gpus=4, mesh="4", cluster="h100", phase="serve", output_tokens=512
    )
    golden("llama_served.py", plan.module_source())


@pytest.mark.long
def test_generated_modules_are_formatted(tmp_path: Path) -> None:
    """`ruff format` would leave them as they are, and ruff's rules find nothing."""
    (tmp_path / "planned.py").write_text(llama_module())
    for name in ("gpt", "llama_example", "encoder_decoder"):
        graph = unfuse(fold(capture(build(name), inputs_of(name), training=True)))
        labels = tuple(replace(i, labels=("b", "s")) for i in graph.inputs)
        for sizes in ((2,), (2, 2)):
            made = builder_of(replace(graph, inputs=labels), mesh_of(*sizes))
            for seed in range(3):
                source = source_of(made, random_decisions(made, seed))
                (tmp_path / f"{name}_{len(sizes)}_{seed}.py").write_text(source)
    options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(tmp_path)]
    for command in (["format", "--check", "--diff"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
