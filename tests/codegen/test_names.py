"""Names of the user's inputs and variables hide nothing that the generated functions use."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardwright.codegen.source import statement
from shardwright.ir.capture.capture import capture_folded
from shardwright.runtime import RankPool
from tests.sharded import (
    builder_of,
    check,
    mesh_of,
    random_decisions,
    reference,
    source_of,
    widened,
)

# ruff: noqa: A001, A002


class Hiding(nn.Module):
    """Its inputs and variables have the worst names that one can give."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(
        self, torch: Tensor, F: Tensor, ops: Tensor, float: Tensor, input: Tensor
    ) -> Tensor:  # noqa: N803
        slice = self.proj(torch)
        sum = slice.softmax(-1) + F
        pow = sum.masked_fill(ops > 0, -1.5) * float
        max = pow.relu() - input
        type = max.square()
        return type.sum()


def test_inputs_and_variables_with_names_in_use(pool: Callable[[int], RankPool]) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("torch", "F", "ops", "float", "input")
    inputs = {
        name: torch.randn(4, 6, 8, dtype=torch.float64, generator=generator) for name in names
    }
    model = Hiding().double()
    graph = widened(capture_folded(model, inputs, training=True))
    params = {name: p.detach() for name, p in model.named_parameters()}
    expected = reference(graph, params, inputs)
    made = builder_of(graph, mesh_of(2))
    for seed in range(3):
        decisions = random_decisions(made, seed)
        source = source_of(made, decisions)
        assert _assigned(source).isdisjoint(dir(builtins))
        assert {"slice_", "sum_", "pow_", "max_"} & _assigned(source)
        check(pool(2), made, decisions, params, inputs, expected, tolerance=1e-9)


def _assigned(source: str) -> set[str]:
    """Names that the functions of a module assign to."""
    tree = ast.walk(ast.parse(source))
    return {n.id for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def test_names_do_not_depend_on_how_python_was_started() -> None:
    """Python puts `exit` and `license` among the built-ins, but not with -S."""
    code = "import builtins; print(*sorted(n for n in dir(builtins) if n.islower()))"
    plain = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    from shardwright.codegen import names

    assert set(plain.stdout.split()) - {"_"} == set(names._BUILTIN)  # pyright: ignore


def test_long_comments_are_broken_after_semicolons() -> None:
    parts = [f"all-gather {n} MB, backward reduce-scatter, {n} us" for n in range(1000, 1009)]
    lines = statement("x = f(y)", 2, "; ".join(parts) + "  model.py:3")
    assert all(len(line) <= 100 for line in lines) and lines[-1] == "        x = f(y)"
    text = " ".join(line.strip().removeprefix("# ") for line in lines[:-1])
    assert text == "; ".join(parts) + "  model.py:3"
