"""Serving plans with two cache layouts: chosen where the conversion pays, and only there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import inf

import numpy as np
import pytest
import torch
import transformers

from shardwright.capturing import phase_graph
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.facts.spec import Spec, parse_spec
from shardwright.ir.graph import Graph
from shardwright.loading import Loaded, with_tokens
from shardwright.planner.errors import InfeasibleError
from shardwright.planner.ilp.problem import evaluate
from shardwright.planner.plan.plan import PlanData, Request
from shardwright.planner.plan.recache import Recaching, all_cached
from shardwright.planner.search.serving import _joined, make_serving_plan
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.setting import Restriction, Setting
from tests.sharded import Laid, job_of

GPUS, LAYERS, NEW = 8, 2, 256
LAYOUTS = ("S0", "S1", "S2", "R")


@cache
def graphs(batch: int, seq: int, window: int = 0) -> tuple[Graph, Graph]:
    """Prefill and decode of a model as wide as Llama 3 8B."""
    kind = transformers.MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        sliding_window=window or None,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.bfloat16)
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    names = ("input_ids", "position_ids")
    loaded = Loaded(model.eval(), dict.fromkeys(names, ids), dict.fromkeys(names, ("b", "s")), None)
    prefill = phase_graph(loaded, "append", 0)
    return prefill, phase_graph(with_tokens(loaded, 1), "decode", seq + NEW - 2)


def planned(batch: int, seq: int, limit: Callable[[Graph], Restriction]) -> PlanData:
    prefill, decode = graphs(batch, seq)
    request = Request(
        "", GPUS, "h100", "serve", batch, seq, "bfloat16", "none", 80e9, (), 0, NEW
    )  # fmt: skip
    job = job_of(request, Mesh((("x", GPUS),)), lambda graph, mesh: limit(graph))
    return make_serving_plan(prefill, decode, job)


def seconds(batch: int, seq: int, layout: str) -> float:
    """Of an answer with one layout for both phases."""
    try:
        plan = planned(batch, seq, lambda graph: Laid(layout))
    except InfeasibleError:
        return inf
    assert not plan.recached
    return plan.answer_s


@pytest.mark.slow
def test_it_is_converted_where_that_pays() -> None:
    """Eight long prompts: prefill by sequences, which needs no communication but weights; decode by
    heads, as its matrix products are cut."""
    free = planned(8, 16384, lambda graph: Restriction())
    (conversion,) = free.recached
    assert (conversion.source, conversion.target) == ((0,), (1,)) and conversion.count == LAYERS
    assert free.answer_s < min(seconds(8, 16384, layout) for layout in LAYOUTS)


def test_it_is_left_where_that_does_not_pay() -> None:
    """One prompt: both phases cut heads."""
    free = planned(1, 16384, lambda graph: Restriction())
    assert not free.recached and free.decode is not None
    alone = min(seconds(1, 16384, layout) for layout in LAYOUTS)
    assert free.answer_s == pytest.approx(alone, rel=1e-9)


def test_the_price() -> None:
    """By hand: an all-to-all of 8 x 8 x 16384 x 256 numbers over 8 ranks, and four copies."""
    prefill, _ = graphs(8, 16384)
    network = Network(Mesh((("x", GPUS),)), load_cluster("h100", GPUS))
    (cached,) = all_cached(prefill).values()
    recaching = Recaching(cached, network)
    own = 8 * 8 * 16384 * 256 * 2 // GPUS
    moved = network.seconds("all_to_all", (0,), own)
    copies = 2 * network.traffic_seconds(2.0 * own)
    specs: list[Spec] = [(0,), (1,), (2,), (-1,)]
    prices = recaching.seconds(specs, specs)
    assert np.array_equal(np.diag(prices), np.zeros(4)) and np.isfinite(prices).all()
    assert prices[0, 1] == pytest.approx(LAYERS * (moved + copies), rel=1e-6)
    assert recaching.recache((0,), (1,)).seconds == pytest.approx(prices[0, 1], rel=1e-6)
    (slice_,) = recaching.recache((-1,), (2,)).steps
    assert not slice_.traffic and prices[3, 2] > 0


def test_what_a_window_left_behind_is_not_paid_for() -> None:
    network = Network(Mesh((("x", GPUS),)), load_cluster("h100", GPUS))
    (cached,) = all_cached(graphs(8, 16384, 1024)[0]).values()
    (step,) = Recaching(cached, network).recache((0,), (1,)).steps
    assert step.traffic[0].bytes == 8 * 8 * 1024 * 256 * 2 // GPUS  # 1023 and one for eight ranks


@pytest.mark.parametrize("ours, theirs", [("S0", "S1"), ("R", "S2"), ("S1", "S1")])
def test_memory_has_the_cache_of_the_phase(ours: str, theirs: str) -> None:
    """Prefill's cache, with room for the answer, is there before decode's, and never both."""
    network = Network(Mesh((("x", GPUS),)), load_cluster("h100", GPUS))
    setting = Setting(False, "none", None)
    parts = [
        Builder(graph, network, setting).build(Laid(spec))
        for graph, spec in zip(graphs(8, 16384), (ours, theirs), strict=True)
    ]
    problem = _joined(parts, NEW)
    tokens = 16384 + NEW - 1  # the last token is not cached
    row = LAYERS * 8 * 8 * 256 * 2  # bytes of one token of every sequence
    sizes = {"S0": row * tokens // 8, "S1": row * tokens // 8, "R": row * tokens}
    sizes["S2"] = row * -(-tokens // 8)
    late = parts[0].horizon + 1
    caches = [
        (usage.start, usage.end, usage.bytes[0])
        for node in problem.nodes
        for usage in node.usages
        if usage.bytes[0] in sizes.values()
    ]
    assert caches == [
        (0, late, sizes[ours]),
        (late, late + parts[1].horizon, sizes[theirs]),
    ]
    chosen = [0] * len(problem.nodes)
    assert evaluate(problem, chosen).peak_usage >= max(size for _, _, size in caches)
    assert parse_spec(ours) == parse_spec(theirs) or all(
        np.isfinite(edge.costs).all()
        for edge in problem.edges
        if edge.a in parts[0].region_nodes and edge.b >= len(parts[0].nodes)
    )
