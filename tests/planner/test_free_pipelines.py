"""Pipelines among the plans that are searched: bounds, cuts, and where they win."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from math import inf
from pathlib import Path

import pytest
import torch

import shardwright
from examples import llama
from shardwright.asked import Asked, silent
from shardwright.costmodel.timeline import StageTimes, played
from shardwright.facts.mesh import Mesh
from shardwright.facts.schedules import PipelineSchedule, refusal, schedule
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from shardwright.planner.errors import PlanError
from shardwright.planner.search.pipeline import plan_cut, plan_pipeline
from shardwright.planner.search.pipelines import least_turns, search_pipelines
from shardwright.planner.search.search import Job
from shardwright.planner.search.shapes import Shape

from ..ir.models import TinyGPT

# Machines of two GPUs, an Ethernet of 40 Gb/s between them.
SLOW_LINKS = """
base = "h100"
device = "two GPUs in a node"
gpus_per_node = 2
[inter_node]
bytes_per_s = 5e9  # 40 Gb/s
"""


def _shape(name: str, ranks: int, per_rank: int = 1, mesh: int = 1) -> Shape:
    return Shape(ranks, per_rank, name, Mesh((("x", mesh),)), "a test")


def _cases() -> Iterator[tuple[str, int, int, int]]:
    for name, ranks, many in product(("1f1b", "gpipe", "interleaved"), (2, 3, 4), (1, 2, 4, 6, 9)):
        for per_rank in (2, 3) if name == "interleaved" else (1,):
            if not refusal(name, ranks, per_rank, many):
                yield name, ranks, per_rank, many


def _descent(table: PipelineSchedule, forward: float, rng: random.Random) -> float:
    """The least seconds found from a random cut of one second of work by moving some of it."""

    def seconds(shares: Sequence[float]) -> float:
        each = [x / sum(shares) for x in shares]
        return played(table, [StageTimes(forward * x, (1 - forward) * x) for x in each]).seconds

    shares = [rng.uniform(0.4, 2.0) for _ in range(table.stages)]
    best = seconds(shares)
    for _ in range(60):
        tried = [x * rng.uniform(0.8, 1.2) for x in shares]
        if (found := seconds(tried)) < best:
            shares, best = tried, found
    return best


@pytest.mark.parametrize("forward", [1 / 3, 0.4, pytest.param(0.25, marks=pytest.mark.slow)])
def test_no_cut_takes_less_than_the_bound_of_a_schedule(forward: float) -> None:
    rng = random.Random(0)
    for name, ranks, per_rank, many in _cases():
        table = schedule(name, ranks, per_rank, many)
        least = least_turns(_shape(name, ranks, per_rank), many)
        for _ in range(3):
            assert _descent(table, forward, rng) >= least * (1 - 1e-9), (name, ranks, many)


def test_the_bound_of_a_schedule_is_that_of_equal_stages() -> None:
    """(m + (p - 1) / v) / p passes of a micro-batch through all stages; 1F1B reaches it."""
    assert least_turns(_shape("1f1b", 4), 12) == pytest.approx((12 + 3) / 4)
    assert least_turns(_shape("1f1b", 4), 1) == 1.0  # a micro-batch goes through all stages
    assert least_turns(_shape("interleaved", 4, 2), 12) == pytest.approx(
        max(3, 0.88 * (12 + 1.5) / 4)
    )


@cache
def _graph() -> Graph:
    """Five layers, and a vocabulary that takes as long as some of them."""
    model = TinyGPT(layers=5, width=32)
    model.head = torch.nn.Linear(32, 2048)
    inputs = {name: torch.zeros(2, 16, dtype=torch.int64) for name in ("ids", "labels")}
    return capture_folded(model, inputs, training=True)


def _job(gpus: int, **options: object) -> Job:
    """Of twelve sequences of 16 tokens in six micro-batches on the CPU."""
    given: dict[str, object] = {"micro_batches": 6, **options}
    asked = Asked(
        gpus, "cpu", "train", None, None, None, None, (), None, None, "highs", 60.0, silent, (),
        **given,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return asked.job("", 12, 16)


@pytest.mark.parametrize(
    ("name", "ranks", "per_rank"),
    [("1f1b", 2, 1), ("1f1b", 3, 1), pytest.param("interleaved", 2, 2, marks=pytest.mark.slow)],
)
def test_the_cut_is_that_of_brute_force(name: str, ranks: int, per_rank: int) -> None:
    """All cuts are planned; the one that is found takes no longer than the best of them."""
    job, shape = _job(ranks), _shape(name, ranks, per_rank)
    ways = product(range(1, 6), repeat=shape.stages)
    every = [plan_cut(_graph(), job, shape, way).seconds for way in ways if sum(way) == 5]
    found = plan_pipeline(_graph(), job, shape).seconds
    assert min(every) <= found <= 1.001 * min(every)
    assert max(every) > 1.1 * min(every)


@pytest.mark.long
def test_the_search_finds_the_best_of_all_pipelines_that_it_considers() -> None:
    """All shapes of four GPUs are planned; none is faster, nor below the bound."""
    job = _job(4)
    found = search_pipelines(lambda many: _graph(), job, inf, several=False)
    every = [
        plan_pipeline(_graph(), job, _shape(name, ranks, per_rank, 4 // ranks)).seconds
        for ranks in (2, 4)
        for name, per_rank in (("1f1b", 1), ("interleaved", 2))
        if ranks * per_rank <= 5
    ]
    assert found.best is not None
    assert found.least <= found.best[0].seconds <= min(every) * (1 + 1e-9)
    assert found.least > 0.3 * found.best[0].seconds


@pytest.mark.slow
def test_stages_stand_across_slow_links(tmp_path: Path) -> None:
    """What passes between stages is little beside the gradients of data parallelism."""
    cluster = tmp_path / "slow.toml"
    cluster.write_text(SLOW_LINKS)
    with torch.device("meta"):
        model = llama.Llama(llama.LlamaConfig(4096, 8, 2048, 16, 16, 8192))
        inputs = {name: torch.zeros(32, 512, dtype=torch.int64) for name in ("tokens", "labels")}
    plan = shardwright.plan(model, inputs, gpus=8, cluster=str(cluster))
    assert plan.pipeline is not None and plan.mesh.sizes[0] >= 4
    text = str(plan)
    assert " on 8 x two GPUs in a node, mesh " in text
    assert "Without stages the fastest plan takes" in text
    assert "pipelines were considered" in text
    assert plan.request.layout == "" and "PipelinedModule" in plan.module_source()


def test_a_plan_without_stages_says_what_pipelines_would_take() -> None:
    model = TinyGPT(layers=4)
    inputs = {name: torch.zeros(8, 8, dtype=torch.int64) for name in ("ids", "labels")}
    plan = shardwright.plan(model, inputs, gpus=2)
    assert plan.pipeline is None
    assert any("pipelines were considered" in note for note in plan.notes)


@pytest.mark.long
def test_a_schedule_without_a_layout_is_kept() -> None:
    model = TinyGPT(layers=4)
    inputs = {name: torch.zeros(8, 8, dtype=torch.int64) for name in ("ids", "labels")}
    plan = shardwright.plan(model, inputs, gpus=2, schedule="gpipe")
    assert plan.pipeline is not None and plan.pipeline.schedule == "gpipe"
    assert plan.request.schedule == "gpipe" and "gap" in str(plan)
    with pytest.raises(PlanError, match="backward passes in two parts"):
        shardwright.plan(model, inputs, gpus=2, schedule="zb-h1")


def test_no_pipelines_of_models_that_draw_random_numbers() -> None:
    """Stages draw apart from one another: no single process has what they draw."""

    class Noisy(TinyGPT):
        def forward(
            self, ids: torch.Tensor, labels: torch.Tensor | None = None
        ) -> dict[str, torch.Tensor | None]:
            loss = super().forward(ids, labels)["loss"]
            return {"loss": None if loss is None else loss * torch.rand(())}

    inputs = {name: torch.zeros(8, 8, dtype=torch.int64) for name in ("ids", "labels")}
    plan = shardwright.plan(Noisy(layers=4), inputs, gpus=2)
    assert plan.pipeline is None
    said = r"No pipelines were considered: .*test_free_pipelines.py:\d+ draws random numbers"
    assert any(re.search(said, note) for note in plan.notes), plan.notes
