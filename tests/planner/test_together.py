"""Weights that move together: what the problem counts for them, in seconds and in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import capture_graph
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts import together
from shardwright.facts.mesh import Mesh
from shardwright.ir.graph import Graph
from shardwright.ir.ops.local import local_bytes
from shardwright.loading import Loaded
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.decide import Solved, decide, plan_of
from shardwright.planner.plan.plan import Request, Search
from shardwright.planner.plan.program import LoopCall, Program, Weight
from shardwright.planner.strategies.build import Builder, Built
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Restriction, Setting
from tests.sharded import mesh_of, program_of

WIDTH = 512


class Block(nn.Module):
    """Three matrices and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Blocks between a table and a head, which may be the same tensor."""

    def __init__(self, layers: int, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(4 * WIDTH, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@cache
def graph(layers: int, batch: int, tied: bool = False, training: bool = True) -> Graph:
    with torch.device("meta"):
        ids = torch.zeros(batch, 128, dtype=torch.int64)
        model = Stack(layers, tied=tied)
    inputs = {"ids": ids, "labels": ids}
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(inputs, ("b", "s"))
    return capture_graph(Loaded(model, inputs, dims, None), training=training)


def built_for(
    of: Graph,
    mesh: Mesh,
    restriction: Callable[[Graph, Mesh], Restriction] = lambda graph, mesh: Restriction(),
    memory: float | None = None,
    *,
    recompute: bool = False,
    training: bool = True,
) -> Built:
    setting = Setting(training, "adamw" if training else "none", memory, recompute)
    cluster = replace(load_cluster("h100"), contention=1.0)  # computing hides nothing
    builder = Builder(of, Network(mesh, cluster), setting)
    return builder.build(restriction(of, mesh))


def solved(built: Built) -> tuple[Solved, tuple[int, ...]] | None:
    problem = built.problem()
    solution = solve(problem)
    if solution.assignment is None:
        return None
    return decide(built, problem, solution.assignment, solution), solution.assignment


def test_a_layer_pays_once_for_what_it_starts() -> None:
    """FSDP on eight GPUs: each unit of weights gathers twice and scatters once.

    All of a unit's weights move, so that the problem counts what their messages take, and beside
    that of each only the share of `GROUP_BYTES` that its weights fill.
    """
    built = built_for(graph(4, 8), Mesh((("x", 8),)), lambda g, mesh: Roles(["fsdp"], g, mesh))
    found = solved(built)
    assert found is not None
    plan, assignment = found
    network = built.builder.network
    matrix, vector, table = (4 * n for n in (2 * WIDTH * WIDTH, WIDTH, 4 * WIDTH * WIDTH))
    layer = 3 * matrix + vector
    # a lookup keeps no table: it is not gathered again
    units = [(1, table, 1), (4, layer, 2), (1, table, 2)]  # layers, bytes, gathers
    whole = filled = 0.0
    for layers, n_bytes, gathers in units:
        for kind, times in (("all_gather", gathers), ("reduce_scatter", 1)):
            whole += layers * times * network.seconds(kind, (0,), n_bytes)
            start, _ = network.line(kind, (0,), n_bytes)
            filled += layers * times * start * n_bytes / together.GROUP_BYTES
    assert built.bringing_s(assignment) == pytest.approx(whole + filled, rel=1e-6)
    assert plan.cost - plan.seconds == pytest.approx(filled, rel=1e-6)


def test_latency_that_is_shared_changes_the_plan() -> None:
    """One node decides for all weights of a block: alone each would rather stay whole."""
    built = built_for(graph(4, 8), Mesh((("x", 8),)))
    nodes = [n for n in built.nodes if n.name.startswith("layers 0: ")]
    assert nodes and all(n.costs.tolist()[0] == 0.0 < n.costs.tolist()[1] for n in nodes)
    # every way of a weight that runs a collective has an edge to the node of the collective
    names = {n.name for n in nodes}
    assert "layers 0: gradient all_reduce (0,)" in names


@pytest.mark.long
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    sizes=st.sampled_from([(2,), (8,), (2, 4), (4, 2)]),
    layers=st.sampled_from([1, 2, 3, 5]),
    batch=st.sampled_from([8, 32]),
    tied=st.booleans(),
    recompute=st.booleans(),
    training=st.booleans(),
    share=st.floats(0.0, 1.0),
)
def test_no_plan_takes_more_than_its_limit(
    sizes: tuple[int, ...],
    layers: int,
    batch: int,
    tied: bool,
    recompute: bool,
    training: bool,
    share: float,
) -> None:
    of, mesh = graph(layers, batch, tied, training), mesh_of(*sizes)
    recompute = recompute and training
    free = built_for(of, mesh, recompute=recompute, training=training)
    found = solved(free)
    assert found is not None
    least, most = free.least_memory(), found[0].peak_bytes
    limit = least + share * (most - least)
    built = built_for(of, mesh, memory=limit, recompute=recompute, training=training)
    tight = solved(built)
    if tight is None:
        return
    plan = tight[0]
    assert plan.peak_bytes <= limit * (1 + 1e-9)
    request = Request("", mesh.ranks, "h100", "train", batch, 128, "float32", "adamw", limit)
    whole = plan_of(plan, request, Search("highs", "optimal", 0.0, 1, ()), ())
    assert whole.memory.total == pytest.approx(plan.peak_bytes, rel=1e-9)
    program = program_of(built.builder, plan.decisions)
    assert states(built, plan) + brought(built, program) <= plan.peak_bytes * (1 + 1e-9)


def states(built: Built, plan: Solved) -> float:
    """Bytes of parameters and the optimizer's states."""
    found = 0.0
    for name, flow in built.flows.items():
        if name in built.builder.params:
            spec = plan.decisions.specs[name]
            found += float(built.nodes[flow.node].usages[0].bytes[flow.specs.index(spec)])
    return found


def brought(built: Built, program: Program) -> float:
    """Most bytes of whole weights in forward, run by run as the runtime brings them: those of a
    unit and of the next one, less the largest, which is counted with the op that runs."""
    sizes = built.builder.sizes
    units: list[list[float]] = []
    stages = program.stages()
    loops = [item for item in program.statements if isinstance(item, LoopCall)]

    def add(weights: Iterable[Weight]) -> None:
        moved = [w for w in weights if w.forward]
        units.append([float(local_bytes(w.param.value, w.used, sizes)) for w in moved])

    for stage in range(len(loops) + 1):
        add(w for w in program.weights if stages.get(w.item, (0, 0))[0] == stage)
        for kind in loops[stage].loop.order if stage < len(loops) else ():
            add(loops[stage].bodies[kind].weights)
    pairs = zip(units, [*units[1:], []], strict=True)
    return max(sum(one) - max(one, default=0.0) + sum(after) for one, after in pairs)
