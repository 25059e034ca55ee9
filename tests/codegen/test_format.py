"""Generated modules read as if `ruff format` had written them; every op has a readable name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwright.codegen.source import statement
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from tests.ir.models import batch, huggingface_configs, huggingface_model
from tests.sharded import builder_of, mesh_of, random_decisions, source_of

ROOT = Path(__file__).parents[2]


def formatted(source: str) -> str:
    """What ruff makes of `source`, with the line length that generated modules have."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "-"]
    done = subprocess.run(
        command, input=source, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def example(name: str) -> Graph:
    """The folded graph of one of the examples."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"format_{name}", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return capture_folded(module.build_model(), module.example_inputs(4, 16), training=False)


def sources(graph: Graph, seeds: int) -> list[str]:
    """Modules under random decisions: long lines, many conversions."""
    made: list[str] = []
    for sizes in ((2,), (2, 2)):
        builder = builder_of(graph, mesh_of(*sizes))
        made += [source_of(builder, random_decisions(builder, seed)) for seed in range(seeds)]
    return made


@pytest.mark.parametrize("name", ["gpt", "llama", "encoder_decoder"])
@pytest.mark.some(1)
def test_the_formatter_changes_nothing(name: str) -> None:
    for source in sources(example(name), 2):
        assert formatted(source) == source
        assert "torch.ops." not in source


LONG = "a_long_name_of_a_tensor_in_a_model"
STATEMENTS = [  # each too long for a line
    f"x = self.encoder.block[0].layer[0].attention.bias({LONG}{LONG})",
    f"x = self.encoder.block[0].layer[0].SelfAttention.relative_bias({LONG}{LONG})",
    f"x = self.encoder.block[0].layer.SelfAttention.relative_attention({LONG}{LONG})",
    f"x = f({LONG})[0].b + g({LONG})[1].c({LONG})",
    f'x = ("{LONG}", "{LONG}", "{LONG}")',
    f'x = f(("{LONG}", "{LONG}", "{LONG}"))',
    f'x = f(a, ["{LONG}", "{LONG}", "{LONG}"])',
    f'x = ("{LONG}{LONG}{LONG}",)',
    f'"{LONG}": Param((6,), torch.float64, "R", aliases=("{LONG}", "{LONG}")),',
]


def test_long_statements() -> None:
    source = ""
    for text in STATEMENTS:
        row = text.endswith(",")  # of a table
        lines = statement(text, 1)
        assert len(lines) > 1, text
        source += "\n".join(["x = {" if row else "if x:", *lines, *["}"] * row]) + "\n"
    assert formatted(source) == source


@pytest.mark.slow
def test_families_have_no_bare_operator_calls() -> None:
    pytest.importorskip("transformers")
    for name, config in huggingface_configs().items():
        model = huggingface_model(name, config)
        graph = capture_folded(model, batch(4, 16, "input_ids", "labels"), training=False)
        for source in sources(graph, 1):
            assert formatted(source) == source, name
            assert "torch.ops." not in source, name
