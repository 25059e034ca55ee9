"""What computing hides of the weights' collectives: beside a clock that runs both streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import capture_graph
from shardwright.costmodel.machines.cluster import Link, load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.ir.graph import Graph
from shardwright.loading import Loaded
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.decide import Solved, decide
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.regions import scopes
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Setting

WIDTH, LAYERS = 256, 6


class Block(nn.Module):
    """Two matrices; nothing else has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Stack(nn.Module):
    """Blocks, and no weight before or after them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def stack() -> Graph:
    with torch.device("meta"):
        x = torch.zeros(8, 4096, WIDTH)
        return capture_graph(Loaded(Stack(), {"x": x}, {"x": ("b", "s", "")}, None), training=True)


def sharded(stack: Graph, contention: float, rate: float, *, recompute: bool = False) -> Solved:
    """FSDP on eight GPUs whose links carry `rate` bytes/s, as plainly as can be."""
    link = Link(bytes_per_s=rate, efficiency=1.0, launch_s=0.0, hop_s=0.0)
    cluster = replace(load_cluster("h100"), contention=contention, intra_node=link)
    mesh = Mesh((("x", 8),))
    builder = Builder(stack, Network(mesh, cluster), Setting(True, "adamw", None, recompute))
    built = builder.build(Roles(["fsdp"], stack, mesh))
    problem = built.problem()
    solution = solve(problem)
    assert solution.assignment is not None
    return decide(built, problem, solution.assignment, solution)


def clock(windows: Sequence[tuple[float, float]], contention: float) -> float:
    """Seconds of (compute, communication) pairs that start together, each after the one before."""
    total = 0.0
    for compute, communication in windows:
        beside = communication * (1 - contention)  # computed by the time all has moved
        total += communication + max(compute - beside, 0.0)
    return total


@pytest.mark.parametrize("rate", [1e9, 2e11, 1e13])
@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_is_what_a_clock_of_two_streams_saves(
    stack: Graph, rate: float, recompute: bool
) -> None:
    contention = 0.25
    side_by_side = sharded(stack, contention, rate, recompute=recompute)
    in_turn = sharded(stack, 1.0, rate, recompute=recompute)
    builder, decisions = side_by_side.builder, side_by_side.decisions
    (layer,) = (scope for scope in scopes(stack) if scope.loop is not None)
    work = [builder.work(node, decisions.choices[node.name]) for node in layer.nodes]
    forward, backward = (
        sum(getattr(w, side) for w in work) for side in ("forward_s", "backward_s")
    )
    backward += forward * recompute
    once = 2 * 4 * WIDTH * WIDTH * 4 * 7 / 8 / rate  # all of a layer's weights, gathered or reduced
    windows = [(forward, once)] * (LAYERS - 1) + [(backward, 2 * once)] * (LAYERS - 1)
    ends = [(0.0, once), (forward, 0.0), (0.0, 2 * once), (backward, 0.0)]  # wait for each other
    saved = clock([*windows, *ends], 1.0) - clock([*windows, *ends], contention)
    assert in_turn.seconds - side_by_side.seconds == pytest.approx(saved, rel=1e-3)
    assert 0 < saved
    assert side_by_side.cost <= side_by_side.seconds * (1 + 1e-9)  # a bound


def test_a_cpu_hides_nothing() -> None:
    assert load_cluster("cpu").contention == 1.0
