"""The examples under random decisions on gloo ranks equal one process, outputs and gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.ir.capture import capture
from shardwright.ir.fold import fold
from shardwright.runtime import RankPool
from tests.sharded import builder_of, check, mesh_of, random_decisions, reference, widened

ROOT = Path(__file__).parents[2]


def _example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    import sys

    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gpt", "llama", "encoder_decoder"])
@pytest.mark.parametrize("sizes", [(2,), (2, 2)], ids=str)
def test_examples_under_random_decisions(name: str, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    example = _example(name)
    model = example.build_model()
    inputs = example.example_inputs(4, 16)
    graph = widened(fold(capture(model, inputs, training=False)))
    params = {n: t.double() for n, t in model.state_dict().items()}
    expected = reference(graph, params, inputs)
    mesh = mesh_of(*sizes)
    builder = builder_of(graph, mesh)
    with RankPool(mesh.ranks) as pool:
        for seed in range(3):
            decisions = random_decisions(builder, seed)
            check(pool, builder, decisions, params, inputs, expected, tolerance=1e-9)
