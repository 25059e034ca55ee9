"""Plans of pipelines: stages, schedules, memory in flight, what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

import shardwright
from examples import llama
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.costmodel.timeline import StageTimes, in_flight, peak_in_flight, played
from shardwright.facts.mesh import Mesh
from shardwright.facts.schedules import schedule
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.passes.stages import cut_into_stages
from shardwright.planner.errors import PlanError
from shardwright.planner.plan.store import plan_from_json
from shardwright.planner.search.cuts import balanced_layers, even_layers
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.setting import Restriction, Setting

from ..ir.models import TinyGPT
from ..sharded import builder_of, mesh_of

_INPUTS = {name: torch.zeros(8, 8, dtype=torch.int64) for name in ("ids", "labels")}


def _asked(layout: str, **options: Any) -> shardwright.Plan:
    model = TinyGPT(layers=4)
    return shardwright.plan(model, _INPUTS, layout=layout, cluster="cpu", **options)


@cache
def _plan() -> shardwright.Plan:
    return _asked("pp=2,ddp=2", micro_batches=4)


def test_layers_are_shared_out_evenly() -> None:
    assert even_layers(8, 4) == [2, 2, 2, 2]
    assert even_layers(10, 4) == [2, 3, 3, 2]
    assert even_layers(11, 4) == [3, 3, 3, 2]


def test_layers_are_balanced_as_by_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(50):
        stages, count = rng.randint(1, 4), rng.randint(4, 9)
        besides = [rng.choice([0.0, 0.5, 2.0, 3.5]) for _ in range(stages)]

        def slowest(layers: Sequence[int], own: Sequence[float] = tuple(besides)) -> float:
            return max(b + n for b, n in zip(own, layers, strict=True))

        ways = product(range(1, count + 1), repeat=stages)
        best = min(slowest(layers) for layers in ways if sum(layers) == count)
        found = balanced_layers([1.0] * count, besides, [1.0] * stages)
        assert sum(found) == count and slowest(found) == best


@pytest.mark.slow
def test_prompts_one_by_one_want_tensor_parallelism_and_many_a_pipeline() -> None:
    """As DistServe found for prefill (2401.09670): TP is sooner for one prompt, PP gives more."""
    with torch.device("meta"):
        model = llama.Llama(llama.LlamaConfig(32000, 16, 4096, 32, 8, 14336)).bfloat16()

    def seconds(layout: str, batch: int) -> float:
        ids = torch.zeros(batch, 2048, dtype=torch.int64, device="meta")
        inputs = {"tokens": ids, "position_ids": ids}
        return shardwright.plan(
            model, inputs, layout=layout, cluster="h100", phase="prefill"
        ).seconds

    assert seconds("tp=8", 1) < 0.5 * seconds("pp=8", 1)
    assert seconds("tp=8", 64) > seconds("pp=8", 64)


def test_a_stage_that_does_more_besides_has_fewer_layers() -> None:
    """The products of a large vocabulary are in the last stage."""
    model = TinyGPT(layers=4, width=16)
    model.head = torch.nn.Linear(16, 4096)
    plan = shardwright.plan(model, _INPUTS, layout="pp=2", cluster="cpu", micro_batches=4)
    assert plan.pipeline is not None
    assert [stage.layers for stage in plan.pipeline.stages] == [3, 1]


def test_a_step_takes_what_its_schedule_takes_played_through() -> None:
    plan = _plan()
    pipeline = plan.pipeline
    assert pipeline is not None and pipeline.schedule == "1f1b"
    assert [stage.layers for stage in pipeline.stages] == [2, 2]
    assert str(plan.mesh) == "pp=2 x dp=2" and plan.request.gpus == 4
    times = [
        StageTimes(s.forward_s, s.backward_s, 0.0, s.send_s, s.send_back_s) for s in pipeline.stages
    ]
    timeline = played(schedule("1f1b", 2, 1, 4), times)
    ends = [timeline.ends(n) + stage.once_s for n, stage in enumerate(pipeline.stages)]
    assert plan.seconds == max(ends)
    assert pipeline.bubble == timeline.bubble_share
    network = Network(Mesh((("pp", 2), ("dp", 2))), load_cluster("cpu", 4))
    half = TinyGPT().tokens.weight.numel() * 4 / 2
    tied = 2 * network.seconds("send_recv", (0,), half)  # two ranks, each the other half twice
    for stage in pipeline.stages:  # the plan of a stage takes as long, without what is tied
        each = 4 * (stage.forward_s + stage.backward_s) + stage.once_s
        assert each == pytest.approx(pipeline.kinds[stage.kind].seconds + tied)


def test_tied_embeddings_are_stored_alike_at_both_ends() -> None:
    pipeline = _plan().pipeline
    assert pipeline is not None
    specs = [
        kind.decisions.specs[p.value.name]
        for kind in pipeline.kinds
        for p in kind.graph.params
        if p.name == "tokens.weight"
    ]
    assert len(specs) == 2 and specs[0] == specs[1]


def test_a_plan_is_read_as_it_was_written_and_says_what_its_stages_do() -> None:
    plan = _plan()
    read = plan_from_json(plan.to_json())
    assert read.pipeline == plan.pipeline and read.seconds == plan.seconds
    text = str(plan)
    assert "Pipeline: 2 stages over pp=2, 4 micro-batches of 2 sequences by 1f1b" in text
    source = plan.module_source()
    assert 'SCHEDULE = "1f1b"' in source and "MICRO_BATCHES = 4" in source
    assert "  0  F0 F1 .  B0 F2" in source  # the picture


def test_a_plan_whose_stages_do_not_follow_one_another_is_refused() -> None:
    data = _plan().to_json()
    data["pipeline"]["stages"][1]["first"] = [["blocks", 1]]
    with pytest.raises(PlanError, match=r"pipeline.stages`: layers of blocks"):
        plan_from_json(data)


def test_a_stage_keeps_what_micro_batches_in_flight_need() -> None:
    """Three in flight keep two more of what one keeps of its layers and its ends."""
    graph = capture_folded(TinyGPT(layers=4), _INPUTS, training=True)
    stage = cut_into_stages(graph, [2, 2])[0].graph
    network = builder_of(stage, mesh_of(1)).network

    def least(in_flight: int) -> float:
        setting = Setting(True, "none", None, micro_batches=4, in_flight=in_flight)
        return Builder(stage, network, setting).build(Restriction()).least_memory()

    one, two, three = map(least, (1, 2, 3))
    assert two - one == three - two > 0


def test_a_rank_of_several_stages_has_one_peak() -> None:
    """Not all of its stages keep most at once, and one operator runs; the rest adds up."""
    plan = _asked("pp=2,vpp=2", micro_batches=8)
    pipeline = plan.pipeline
    assert pipeline is not None
    table = schedule("interleaved", 2, 2, 8)
    parts = [pipeline.kinds[stage.kind].memory for stage in pipeline.stages]
    flying, kinds = in_flight(table), [stage.kind for stage in pipeline.stages]
    kept = [  # a kind is planned for the stage with most in flight
        part.activations / max(n for n, other in zip(flying, kinds, strict=True) if other == kind)
        for part, kind in zip(parts, kinds, strict=True)
    ]
    totals: list[float] = []
    for rank in range(2):
        own = [parts[number] for number in table.stages_of(rank)]
        states = sum(part.parameters + part.gradients + part.optimizer for part in own)
        runs = max(part.transient for part in own)
        totals.append(states + peak_in_flight(table, rank, kept) + runs)
        assert totals[-1] < sum(part.total for part in own)
    assert plan.memory.total == pytest.approx(max(totals))


def test_stages_may_take_more_than_equal_shares_of_memory() -> None:
    """A limit that the stages' own peaks would not keep to, and the rank's does."""
    free = _asked("pp=2,vpp=2", micro_batches=8)
    plan = _asked("pp=2,vpp=2", micro_batches=8, memory_bytes=int(1.06 * free.memory.total))
    for pipeline in (free.pipeline, plan.pipeline):
        assert pipeline is not None
        assert not any(kind.decisions.recompute for kind in pipeline.kinds)
        peaks = sum(pipeline.kinds[pipeline.stages[n].kind].memory.total for n in (0, 2))
        assert peaks > 1.06 * free.memory.total


@pytest.mark.slow
def test_stages_keep_a_part_before_nothing() -> None:
    """With memory for that, all that recompute do so, and the step is shorter than in full."""
    free, part, full = (
        _asked(f"pp=2,recompute={how}", micro_batches=8) for how in ("none", "selective", "full")
    )
    assert full.memory.total < part.memory.total < free.memory.total
    plan = _asked("pp=2", micro_batches=8, memory_bytes=int(1.001 * part.memory.total))
    assert plan.pipeline is not None
    again = [kind.decisions for kind in plan.pipeline.kinds if kind.decisions.recompute]
    assert again and all(made.part_layers for made in again)
    assert free.seconds < plan.seconds <= part.seconds < full.seconds


@pytest.mark.parametrize(
    ("layout", "options", "said"),
    [
        ("pp=8", {"micro_batches": 4}, "4 repeated layers, which 8 stages"),
        ("pp=2", {"micro_batches": 3}, "--micro-batches 3 does not divide the batch of 8"),
        ("pp=2", {"schedule": "zb-h1"}, "backward passes in two parts"),
        ("pp=2", {"schedule": "1f2b"}, "unknown schedule `1f2b`"),
        ("ddp=2", {"schedule": "1f1b"}, "--schedule 1f1b is that of a pipeline"),
        ("pp=2", {"schedule": "gpipe", "layout": "pp=2,vpp=2"}, "gpipe has one stage on each rank"),
        ("pp=2", {"phase": "prefill"}, "has no caches in phase prefill"),
        ("pp=2,vpp=2", {"phase": "prefill"}, "each rank of a pipeline has one stage"),
    ],
)
def test_what_is_no_pipeline_is_refused(layout: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        _asked(**{"layout": layout, **options})
