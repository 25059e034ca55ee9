"""Random layers: copies of a tensor get equal numbers, its parts different ones, in any layout."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.draws import Drawn, Recorder, Replayed, draws_of
from shardwright.ir.capture.capture import CaptureError, capture, capture_folded
from shardwright.ir.graph import Graph
from shardwright.ir.reference.widen import widened
from shardwright.planner.strategies.build import Restriction
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.runtime import RankPool
from tests.sharded import (
    any_of,
    builder_of,
    check,
    import_source,
    mesh_of,
    program_of,
    random_decisions,
    reference,
    run_module,
    source_of,
)

Pool = Callable[[int], RankPool]
BATCH, TOKENS, WIDTH = 4, 8, 8


class Layer(nn.Module):
    """A layer that is left out for some samples, with noise of all kinds in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        h = h + 0.1 * torch.randn_like(h) * torch.bernoulli(torch.full_like(h, 0.5))
        h = h * torch.empty_like(h).uniform_(0.5, 1.5)
        keep = torch.rand(x.shape[0], 1, 1) < 0.7
        signs = 2 * torch.randint(0, 2, (x.shape[1], 1)) - 1
        return x + torch.where(keep, self.down(h), 0.0) * signs


class Net(nn.Module):
    """Two such layers, and a gate of a Gumbel softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.embed, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x * F.gumbel_softmax(self.gate(x))


def own_draws(
    source: str, params: Mapping[str, Tensor], inputs: Mapping[str, Tensor], planned: list[Drawn]
) -> tuple[list[Tensor], list[Tensor]]:
    """In one rank: what it draws, and what all ranks draw together."""
    model = import_source(source).ShardedModel.from_state_dict(params)
    model.mesh.manual_seed(1)
    with torch.no_grad(), Recorder() as recorder:
        model(**model.shard_inputs(**inputs))
    return recorder.draws, recorder.whole(planned, model.mesh)


def run_seeded(source: str, *args: Any) -> Any:
    """In one rank: `run_module`, drawing what `own_draws` drew."""
    text = source.replace(
        "class ShardedModel(ShardedModule):",
        "class ShardedModel(ShardedModule):\n"
        "    def shard_inputs(self, **batch):\n"
        "        self.mesh.manual_seed(1)\n"
        "        return super().shard_inputs(**batch)\n",
    )
    return run_module(text, *args)


def example() -> tuple[Graph, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Net().double()
    inputs = {"x": torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)}
    params = {name: p.detach() for name, p in model.named_parameters()}
    return widened(capture_folded(model, inputs, training=True)), params, inputs


class Cut(Restriction):
    """Everything is cut along one dim of activations where that can be, or nothing is."""

    def __init__(self, dim: str) -> None:
        self.dim = dim

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """Does the strategy cut no other dim of what is drawn?"""
        pairs = zip(region.nodes, strategy.choices, strict=True)
        draws = [choice for node, choices in pairs if "rand" in node.op for choice in choices]
        return all(choice in ("R", self.dim) for choice in draws)


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)])
@pytest.mark.parametrize("cut", ["d0", "d1", "d2", "R"])
@pytest.mark.some(6)
def test_ranks_draw_as_one(pool: Pool, sizes: tuple[int, ...], cut: str) -> None:
    """Cut by samples, by tokens, by channels, and replicated: equal to one process that draws so.

    Copies that differ would make outputs differ; parts must not be each other's copies.
    """
    graph, params, inputs = example()
    mesh = mesh_of(*sizes)
    builder = builder_of(graph, mesh, recompute=len(sizes) == 2)
    decisions = any_of(builder.build(Cut(cut)), random.Random(1))
    planned = draws_of(program_of(builder, decisions))
    ranks = pool(mesh.ranks)
    found = ranks.run(own_draws, source_of(builder, decisions), params, inputs, planned)
    whole = found[0][1]
    assert len(whole) == 11
    for number, (shape, spec, _) in enumerate(planned):
        assert whole[number].shape == shape
        parts = [rank[0][number] for rank in found]
        copies = all(state < 0 for state in spec)
        assert all(torch.equal(parts[0], part) for part in parts[1:]) is copies or shape[-1] == 1
    with Replayed(whole):
        want = reference(graph, params, inputs)
    check(ranks, builder, decisions, params, inputs, want, tolerance=1e-9, run=run_seeded)


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_draws_as_one(pool: Pool, seed: int) -> None:
    graph, params, inputs = example()
    builder = builder_of(graph, mesh_of(2, 2))
    decisions = random_decisions(builder, seed)
    planned = draws_of(program_of(builder, decisions))
    source = source_of(builder, decisions)
    whole = pool(4).run(own_draws, source, params, inputs, planned)[0][1]
    with Replayed(whole):
        want = reference(graph, params, inputs)
    check(pool(4), builder, decisions, params, inputs, want, tolerance=1e-9, run=run_seeded)


class Noisy(nn.Module):
    """A linear layer with `noise` on its result."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.noise = nn.Linear(4, 4), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.up(x))


@pytest.mark.parametrize(
    "noise, said",
    [
        (lambda x: F.alpha_dropout(x, 0.3, training=True), "`aten.alpha_dropout.default` draws"),
        (lambda x: F.rrelu(x, training=True), "`aten.rrelu.default` draws"),
        (lambda x: x if random.random() < 0.5 else 2 * x, "with Python's `random`"),
    ],
)
def test_other_draws_are_refused_by_name(noise: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        capture(Noisy(noise), {"x": torch.randn(2, 4)}, training=True)


def test_what_draws_nothing_in_eval_mode_is_captured() -> None:
    capture(Noisy(lambda x: F.rrelu(x)), {"x": torch.randn(2, 4)}, training=False)
