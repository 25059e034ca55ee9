"""Functions of the user's run with their own backward, whole or cut as `shardwright.rule` says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.facts.users import Import, import_user
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from shardwright.ir.ops.users import FUNCTION, imports_in
from shardwright.ir.reference.widen import widened
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool
from tests.sharded import any_of, builder_of, check, mesh_of, random_decisions, reference, source_of

Pool = Callable[[int], RankPool]
# No gradient is that of the forward, and that of `Rounding` is no linear one
MODEL = """
import torch
from torch import nn
from torch.autograd import Function

import shardwright

class Rounding(Function):
    "Numbers and texts beside the tensor."
    @staticmethod
    def forward(ctx, x, step, how="even", shape=None):
        ctx.most = 0.02
        return (x / step).round() * step

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad.clamp(-ctx.most, ctx.most), None, None, None

class Gate(Function):
    "The newer form: several tensors in and out, one of them without a gradient."
    @staticmethod
    def forward(x, weight, power=1):
        y = x * weight
        return y, y > 0, y.sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.power = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, output[1])

    @staticmethod
    def backward(ctx, grad, _, of_sum):
        x, weight, above = ctx.saved_tensors
        grad = (grad + 2 * of_sum[..., None]) * above
        of_weight = None if x is None else 5 * (grad * x).flatten(0, -2).sum(0)
        return grad * weight, of_weight, None

class Reverse(Function):
    "The gradient alone differs."
    @staticmethod
    def forward(ctx, x, unused):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -0.5 * grad, None

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.weight, self.fixed = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.fixed.requires_grad_(False)

    def forward(self, x):
        y, above, total = Gate.apply(x, self.weight)
        y = y + Gate.apply(x, self.fixed, 2)[0] + above + total[..., None]
        y = Reverse.apply(y, self.fixed)
        return x + self.down(Rounding.apply(self.up(y), 0.25, "even", (2, (3,))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

class Detached(nn.Module):
    "The same idea without a function: what is cut off has no gradient."
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.up(x)
        y = y + ((4 * y).round() / 4 - y).detach()
        z = self.down(y * y.detach())
        return z + (z.sign() - z).data
"""
RULES = """
shardwright.rule(Rounding, "b s h -> b s h")
shardwright.rule(Gate.apply, "b s [h], [h] -> b s [h], b s [h], b s")
shardwright.rule(Reverse, "b s h, [k] -> b s h")
"""


@pytest.fixture(params=["replicated", "ruled"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A user's file with its model, and with rules or without."""
    path = tmp_path / f"functions_{request.param}.py"
    path.write_text(MODEL + (RULES if request.param == "ruled" else ""))
    return path


class Cut(Restriction):
    """Every function is cut by the first of `factors` that it has over every axis."""

    def __init__(self, factors: str) -> None:
        self.factors = factors.split()

    def allows(self, region: Region, strategy: Strategy) -> bool:
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            if node.op == FUNCTION:
                known = {choice for one in region.strategies for choice in one.choices[0]}
                wanted = next((f for f in self.factors if f in known), "R")
                if set(choices) != {wanted}:
                    return False
        return True


def decided(builder: Builder, factors: str) -> Decisions:
    """Functions cut so, all else at random."""
    rng = random.Random(0)
    built = builder.build(Cut(factors))
    return any_of(built, rng)


def cuts(builder: Builder, decisions: Decisions) -> set[str]:
    """What cuts the functions."""
    nodes = (node for node in builder.graph.nodes if node.op == FUNCTION)
    return {choice for node in nodes for choice in decisions.choices[node.name]}


def captured(file: Path, name: str) -> tuple[Graph, dict[str, Tensor], dict[str, Tensor], Any]:
    """The graph, its parameters and inputs, and what the user's own model makes of them."""
    torch.manual_seed(0)
    model = getattr(import_user(str(file)), name)().double()
    inputs = {"x": torch.randn(4, 8, 8, dtype=torch.float64)}
    graph = widened(capture_folded(model, inputs, training=True))
    params = {name: p.detach() for name, p in model.named_parameters()}
    want = reference(graph, params, inputs)
    own = model(**inputs)
    weights = torch.sin(torch.arange(own.numel(), dtype=own.dtype).reshape(own.shape) * 12.9898)
    (own * weights).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in trained.items():
        assert grad is not None and torch.allclose(grad, want[1][name], rtol=1e-12), name
    return graph, params, inputs, (want[0], trained)


@pytest.mark.parametrize(
    "sizes", [(2,), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((4,), (2, 2)))]
)
@pytest.mark.some(1)
def test_gradients_are_the_functions_own(pool: Pool, file: Path, sizes: tuple[int, ...]) -> None:
    """Random layouts, in values and gradients, against the user's own model in one process."""
    graph, params, inputs, want = captured(file, "Net")
    names = ("Gate", "Reverse", "Rounding")
    assert imports_in(graph) == tuple(Import(str(file), name) for name in names)
    builder = builder_of(graph, mesh_of(*sizes), recompute=sizes == (4,))
    layouts = [random_decisions(builder, seed) for seed in range(3)]
    if "ruled" in file.stem:
        named = {factors: decided(builder, factors) for factors in ("b", "s", "h b", "R")}
        assert [cuts(builder, one) for one in named.values()] == [{"b"}, {"s"}, {"h", "b"}, {"R"}]
        layouts += named.values()
    ranks = pool(builder.network.mesh.ranks)
    for decisions in layouts:
        source = source_of(builder, decisions)
        assert f'Gate = ops.import_user("{file}", "Gate")' in source.splitlines()
        check(ranks, builder, decisions, params, inputs, want, tolerance=1e-9)


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_what_is_detached_has_no_gradient(
    pool: Pool, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """Straight-through estimates written with `detach` and `.data`, in any layout."""
    file = tmp_path / "detached.py"
    file.write_text(MODEL)
    graph, params, inputs, want = captured(file, "Detached")
    builder = builder_of(graph, mesh_of(*sizes))
    for seed in range(4):
        decisions = random_decisions(builder, seed)
        ranks = pool(builder.network.mesh.ranks)
        check(ranks, builder, decisions, params, inputs, want, tolerance=1e-9)
