"""Which served pipeline a search finds, beside all that it considers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwright
from examples import llama
from shardwright.asked import Asked, silent
from shardwright.capturing import Captures
from shardwright.facts.mesh import Mesh
from shardwright.facts.schedules import FORWARD
from shardwright.ir.graph import Graph
from shardwright.loading import Loaded
from shardwright.planner.errors import PlanError
from shardwright.planner.plan.plan import PlanData
from shardwright.planner.search.search import Job
from shardwright.planner.search.served_pipelines import GraphsOf, with_served_stages
from shardwright.planner.search.served_stages import served_pipeline
from shardwright.planner.search.serving import make_serving_plan
from shardwright.planner.search.shapes import Shape

from ..endtoend.test_served_pipeline import SLOW_LINKS

MEMORY = 200_000  # bytes: a node of two holds no copy of the model


def _model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = llama.Llama(llama.LlamaConfig(64, 5, 32, 4, 2, 48)).double()
    inputs = {
        "tokens": torch.zeros(4, 8, dtype=torch.int64),
        "position_ids": torch.arange(8).repeat(4, 1),
    }
    return model, inputs


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "slow.toml"
    path.write_text(SLOW_LINKS)
    return str(path)


def _job(cluster: str, memory: int) -> tuple[Job, GraphsOf]:
    """What is asked for, and the graphs of so many micro-batches."""
    asked = Asked(
        4, cluster, "serve", None, 6, None, None, (), memory, None, "highs", 60.0, silent, ()
    )
    job = asked.job("", 4, 8)
    model, inputs = _model()
    loaded = Loaded(model, inputs, {"tokens": ("b", "s"), "position_ids": ("b", "s")}, None)
    captures = Captures(lambda: loaded, job.request.formats, ())

    @cache
    def graphs_of(many: int) -> tuple[Graph, ...]:
        return captures.graphs(replace(job, request=replace(job.request, micro_batches=many)))

    return job, graphs_of


def _all(job: Job, graphs_of: GraphsOf) -> list[PlanData]:
    """Every pipeline of two or four ranks, stages on any mesh, as many micro-batches as divide."""
    found: list[PlanData] = []
    for ranks, mesh in ((2, 2), (4, 1)):
        for many in (1, 2, 4):
            shape = Shape(ranks, 1, FORWARD, Mesh((("x", mesh),)), "a test")
            own = replace(job, request=replace(job.request, micro_batches=many))
            try:
                plan = served_pipeline(graphs_of(many), own, shape).plan
            except PlanError:
                continue
            assert plan is not None
            found.append(plan)
    return found


@pytest.mark.long
def test_the_search_finds_the_fastest_of_all(cluster: str) -> None:
    job, graphs_of = _job(cluster, MEMORY)
    prefill, decode = graphs_of(1)
    without = make_serving_plan(prefill, decode, job)
    plan = with_served_stages(graphs_of, job, without, several=True)
    every = _all(job, graphs_of)
    assert plan.pipeline is not None
    assert plan.whole_s < without.whole_s
    assert plan.whole_s == pytest.approx(min(each.whole_s for each in every), rel=1e-9)
    assert len({each.whole_s for each in every}) > 3  # there was a choice


@pytest.mark.slow
def test_a_plan_without_stages_stays_where_it_is_faster(cluster: str) -> None:
    """With room for copies each node answers for itself; what pipelines would take is told."""
    job, graphs_of = _job(cluster, 10**9)
    prefill, decode = graphs_of(1)
    without = make_serving_plan(prefill, decode, job)
    plan = with_served_stages(graphs_of, job, without, several=True)
    assert plan.pipeline is None
    assert plan.whole_s == without.whole_s < min(each.whole_s for each in _all(job, graphs_of))
    assert "pipelines were considered" in plan.notes[-1]


@pytest.mark.slow
def test_the_ordinary_pipeline_stands_in_the_table(cluster: str) -> None:
    """Tensor parallelism inside of nodes, stages across: as a layout of that name is priced."""
    model, inputs = _model()
    asked: dict[str, Any] = {
        "cluster": cluster, "phase": "serve", "output_tokens": 6, "memory_bytes": MEMORY
    }  # fmt: skip
    plan = shardwright.plan(model, inputs, gpus=4, **asked)
    named = shardwright.plan(model, inputs, layout="pp=2,tp=2", **asked)
    row = next(row for row in plan.baselines if row.name == "PP x TP")
    assert row.seconds == named.whole_s
    assert plan.whole_s < named.whole_s
    assert plan.request.layout == ""
