"""Some layers of a loop keep what they have made, the others run forward again in backward."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest

from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.ir.graph import Graph
from shardwright.planner.errors import PlanError
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.decide import Solved, decide
from shardwright.planner.plan.plan import PlanData, Request
from shardwright.planner.plan.store import plan_from_json, plan_to_json
from shardwright.planner.report.report import format_plan
from shardwright.planner.search.variants import make_plan
from shardwright.planner.strategies.build import Builder, Built
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Restriction, Setting
from shardwright.runtime import RankPool
from tests.endtoend.test_families import Parallel, builder, case, planned, run
from tests.endtoend.test_memory import SIZES, graph, measured
from tests.sharded import job_of, mesh_of, random_decisions, source_of

Pool = Callable[[int], RankPool]
LAYERS = SIZES["layers"]


@pytest.mark.parametrize(
    ("name", "kept", "role"),
    [
        ("gpt2", 1, ""), ("gpt2", 2, "fsdp"), ("gemma3", 4, ""), ("gemma3", 2, "fsdp"),
        ("encoder_decoder", 1, ""), ("encoder_decoder", 1, "fsdp"), ("llama", 1, "fsdp"),
    ],
)  # fmt: skip
@pytest.mark.some(1)
def test_outputs_gradients_and_messages(pool: Pool, name: str, kept: int, role: str) -> None:
    """As in one process; and messages are those that are counted for both kinds of layers."""
    made = builder(name, (2, 2)).recomputed(kept)
    if role:
        every = [planned(made, Roles((role, "ddp"), made.graph, made.network.mesh))]
    else:
        every = [planned(made, Parallel()), random_decisions(made, 3)]
    for decisions in every:
        assert decisions.kept_layers == kept
        run(pool, made, decisions, case(name))


def decided(of: Graph, role: str, kept: int | None, part: int = 0) -> Solved | None:
    """An ordinary plan of two GPUs whose last `kept` layers are not recomputed, and of the others
    the last `part` in part; None: all are kept."""
    mesh, cluster = mesh_of(2), replace(load_cluster("cpu"), contention=1.0)
    built = Builder(of, Network(mesh, cluster), Setting(True, "adamw", None)).build(Restriction())
    made = built.builder if kept is None else built.builder.recomputed(kept, part)
    return solved(made.build(Roles([role], of, mesh)))


def solved(built: Built) -> Solved | None:
    problem = built.problem()
    found = solve(problem)
    if found.assignment is None:
        return None
    return decide(built, problem, found.assignment, found)


@pytest.mark.parametrize("role", ["ddp", "fsdp", "tp"])
def test_seconds_lie_between_those_of_all_and_none(role: str) -> None:
    """Each layer that is kept saves the same, to what none recomputed takes."""
    of = graph(4)
    made = [decided(of, role, kept) for kept in (*range(LAYERS + 1), None)]
    seconds = [each.seconds if each else inf for each in made]
    steps = [a - b for a, b in zip(seconds, seconds[1:-1], strict=False)]
    assert min(steps) > 0 and max(steps) == pytest.approx(min(steps), rel=1e-6)
    assert seconds[-2] == pytest.approx(seconds[-1], rel=1e-12)
    for each in made:
        assert each is not None and each.cost == pytest.approx(each.seconds, rel=1e-3)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_weights_that_come_again_for_different_reasons(kept: int) -> None:
    """Backward needs matrices again, and forward that is run again biases, too: in one message."""
    made = builder("gpt2", (2,)).recomputed(kept)
    built = made.build(Roles(["fsdp"], made.graph, made.network.mesh))
    found = solved(built)
    assert found is not None and found.cost == pytest.approx(found.seconds, rel=5e-3)
    assert found.cost <= found.seconds * (1 + 1e-3)


@pytest.mark.parametrize(("role", "kept"), [("ddp", 3), ("fsdp", 4), ("tp", 3)])
@pytest.mark.some(2)
def test_peak_memory(pool: Pool, role: str, kept: int) -> None:
    of, batch = graph(16), 16
    made = decided(of, role, kept)
    assert made is not None
    for taken in pool(2).run(measured, source_of(made.builder, made.decisions), batch):
        assert made.peak_bytes == pytest.approx(taken, rel=0.08)


@pytest.mark.long
def test_as_few_as_fit_are_recomputed() -> None:
    """The plan is the fastest that fits of all with layers in two modes beside each other, and not
    much slower than the fastest of all three."""
    of, mesh = graph(16), mesh_of(2)

    def limit(of: Graph, mesh: object) -> Restriction:
        return Roles(["ddp"], of, mesh_of(2))

    every = [(k, p) for k in range(LAYERS + 1) for p in range(LAYERS + 1 - k)]
    made = {one: found for one in every if (found := decided(of, "ddp", *one))}
    assert len(made) == len(every)
    ladder = [*((0, p) for p in range(LAYERS + 1)), *((k, LAYERS - k) for k in range(LAYERS + 1))]
    for wanted in [(0, 2), (0, LAYERS), (4, LAYERS - 4)]:
        memory = made[wanted].peak_bytes * 1.001
        fitting = {one: each.seconds for one, each in made.items() if each.peak_bytes <= memory}
        request = Request("", 2, "cpu", "train", 16, 128, "float32", "adamw", memory)
        plan = make_plan(of, job_of(request, mesh, limit))
        taken = plan.decisions.kept_layers, plan.decisions.part_layers
        assert plan.memory.total <= memory and plan.decisions.recompute
        assert taken == min((one for one in ladder if one in fitting), key=lambda one: fitting[one])
        assert fitting[taken] <= 1.03 * min(fitting.values())
        _check_text_and_file(plan)


def _check_text_and_file(plan: PlanData) -> None:
    kept, part = plan.decisions.kept_layers, plan.decisions.part_layers
    text = " ".join(format_plan(plan).split())
    said = {
        (True, False): f"the last {part} of {LAYERS} layers",
        (False, True): f"The first {part} of {LAYERS} layers",
        (False, False): "Layers keep their inputs and the results of products and attention",
    }[kept + part < LAYERS, kept > 0]
    assert said in text
    data = json.loads(json.dumps(plan_to_json(plan)))
    assert plan_from_json(data) == plan
    with pytest.raises(PlanError, match="plan field `kept_layers`: "):
        plan_from_json(data | {"kept_layers": LAYERS})
    for wrong in ({"part_layers": LAYERS + 1 - kept}, {"recompute": False, "kept_layers": 0}):
        with pytest.raises(PlanError, match="plan field `part_layers`: "):
            plan_from_json(data | wrong)
