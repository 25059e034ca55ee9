"""The step that is played through is the one that is priced, and so are its bytes."""

from __future__ import annotations

from itertools import groupby, pairwise

import pytest

from shardwright.api import Plan
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.planner.plan.moments import Moments, by_unit, moments_of
from shardwright.planner.report.report import split_seconds
from shardwright.planner.search.ways import ways_of_plan
from shardwright.planner.strategies.prices import network_for
from shardwright.planner.strategies.regions import scopes
from shardwright.questions import Change
from tests.planner.test_named import planned


def moments(plan: Plan) -> Moments:
    machine = load_cluster(plan.request.cluster, plan.request.gpus)
    return moments_of(plan, network_for(plan.graph, plan.mesh, machine))


LAYOUTS = [
    ("llama.py", "fsdp=4", None), ("llama.py", "fsdp=2,tp=2,sp", None), ("llama.py", "ddp=2", None),
    ("llama.py", "zero1=4", 2), ("llama.py", "cp=2", None), ("moe.py", "ep=4", None),
    ("llama.py", "fsdp=2,recompute=full", None), ("gpt.py", "ulysses=2", None),
    ("llama.py", "fsdp=2,tp=2,sp,recompute=selective", None),
]  # fmt: skip


@pytest.mark.some(2)
@pytest.mark.parametrize(("model", "layout", "micro_batches"), LAYOUTS)
def test_it_takes_what_is_priced(model: str, layout: str, micro_batches: int | None) -> None:
    plan = planned(model, layout, micro_batches=micro_batches)
    found = moments(plan)
    assert found.seconds == pytest.approx(plan.seconds, rel=0.01)
    for stream in ("compute", "communication", "weights"):
        mine = sorted((m for m in found.moments if m.stream == stream), key=lambda m: m.start)
        assert all(a.end <= b.start * (1 + 1e-9) + 1e-12 for a, b in pairwise(mine))
    compute, _ = split_seconds(plan)
    alone = sum(
        m.seconds
        for m in found.moments
        if m.stream == "compute" and m.phase in ("forward", "backward", "again")
    )
    assert alone * found.times >= compute * (1 - 1e-6)
    if not any(m.stream == "weights" and m.phase == "forward" for m in found.moments):
        first = sum(m.seconds for m in found.moments if m.phase == "forward")
        waits = sum(
            m.seconds for m in found.moments if m.phase == "forward" and m.stream == "communication"
        )
        ahead = sum(
            scope.weight * (plan.work[n.name].forward_s - plan.work[n.name].forward_moving_s)
            for scope in scopes(plan.graph)
            for n in scope.nodes
        )
        assert first - waits == pytest.approx(ahead)  # nothing moves beside it
    units = [m.unit for m in by_unit(found.moments) if m.stream == "compute" and m.unit]
    layers = [unit for unit, _ in groupby(units)]
    count = len(plan.graph.loops[0].order)
    path = plan.graph.loops[0].path
    ahead_and_back = [*range(count), *reversed(range(count))]
    assert layers in ([f"{path}.{i}" for i in order] for order in (
        ahead_and_back, [*range(count), *reversed(range(count - 1))]
    ))  # fmt: skip


def test_a_pipelines_ranks_run_their_schedule() -> None:
    plan = planned("llama.py", "pp=2,ddp=2")
    found = moments(plan)
    assert {m.rank for m in found.moments} == {0, 1}
    assert max(m.end for m in found.moments) == pytest.approx(plan.seconds)


def test_memory_of_each_kind_of_stages_peaks_where_its_plan_says() -> None:
    programs = ways_of_plan(Change().again(planned("llama.py", "pp=2,vpp=2,ddp=2")))
    assert [program.name for program in programs] == ["stage 0", "stages 1, 2", "stage 3"]
    for program in programs:
        peak = max(sum(each.bytes.values()) for each in program.again.memory())
        assert peak == pytest.approx(program.plan.memory.total)


@pytest.mark.some(1)
@pytest.mark.parametrize("layout", ["fsdp=4", "fsdp=2,recompute=full"])
def test_memory_over_a_step_peaks_where_the_plan_says(layout: str) -> None:
    plan = planned("llama.py", layout)
    found = Change().again(plan).memory()
    assert max(sum(each.bytes.values()) for each in found) == pytest.approx(plan.memory.total)
    phases = [each.phase for each in found]
    assert phases == sorted(phases, reverse=True)  # forward, then backward
    assert {"layers.0", "layers.3", ""} <= {each.place for each in found}
    kept = [each.bytes["kept"] for each in found]
    assert kept[0] < max(kept)
    assert kept[-1] < max(kept)
