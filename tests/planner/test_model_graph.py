"""The model as a networkx graph: its seconds are those of the plan, by another count."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import networkx as nx
import pytest

import shardwright
from shardwright.planner.report.report import split_seconds
from tests.endtoend.families import example_module

LAYERS = 4


@cache
def llama(phase: str, pins: tuple[str, ...]) -> shardwright.Plan:
    module: Any = example_module("llama")
    model, inputs = module.build_model(), module.example_inputs(8, 64)
    if phase != "train":
        inputs = {name: x for name, x in inputs.items() if name != "labels"}
    return shardwright.plan(
        model, inputs, gpus=4, cluster="cpu", mesh="2x2", phase=phase, pins=pins
    )


PLANS = [
    ("train", ()),
    ("train", ("*.weight=S0,R",)),  # gathered for use, gradients reduced
    ("prefill", ()),
]


@pytest.mark.parametrize(("phase", "pins"), PLANS)
@pytest.mark.some(1)
def test_seconds_are_those_of_the_plan(phase: str, pins: tuple[str, ...]) -> None:
    plan = llama(phase, pins)
    graph = plan.graph.to_networkx()
    compute, communication = split_seconds(plan)
    inside = sum(s for _, s in graph.nodes(data="communication_s"))
    on_nodes = sum(s for _, s in graph.nodes(data="seconds"))
    on_edges = sum(s for *_, s in graph.edges(data="seconds"))
    assert on_nodes - inside == pytest.approx(compute, rel=1e-9)
    assert on_edges + inside == pytest.approx(sum(communication.values()), rel=1e-9)
    total = on_nodes + on_edges + graph.graph["optimizer_s"]
    assert total == pytest.approx(graph.graph["seconds"], rel=1e-6)
    assert on_edges > 0


@pytest.mark.parametrize(("phase", "pins"), PLANS)
def test_graph_is_acyclic_and_plain_data(phase: str, pins: tuple[str, ...]) -> None:
    plan = llama(phase, pins)
    graph = plan.graph.to_networkx()
    assert nx.is_directed_acyclic_graph(graph) and nx.is_weakly_connected(graph)
    again = nx.node_link_graph(json.loads(json.dumps(nx.node_link_data(graph))))
    assert dict(again.nodes) == dict(graph.nodes) and dict(again.edges) == dict(graph.edges)
    ops = [name for name, kind in graph.nodes(data="kind") if kind == "op"]
    loop = plan.graph.loops[0]
    inside = sum(len(loop.blocks[kind].nodes) for kind in loop.order)
    outside = sum(1 for item in plan.graph.body if item is not loop)
    assert len(loop.order) == LAYERS and len(ops) == inside + outside


def test_a_gathered_weight_by_hand() -> None:
    """The head, (vocabulary, width) in float32, of which each of two ranks stores half the rows."""
    graph = llama("train", ("*.weight=S0,R",)).graph.to_networkx()
    weight = graph.nodes["parameter:head.weight"]
    assert weight["spec"] == "S0,R" and weight["kind"] == "parameter"
    assert weight["bytes"] == weight["shape"][0] * weight["shape"][1] * 4 // 2
    ((_, _, edge),) = graph.out_edges("parameter:head.weight", data=True)
    assert edge["made"] == ["S0,R"] and len(edge["steps"]) >= 1


def test_plans_of_a_file_have_it_too(tmp_path: Any) -> None:
    plan = llama("train", ())
    plan.save(tmp_path / "plan.json")
    again = shardwright.load_plan(tmp_path / "plan.json")
    assert again == plan
    ours, theirs = plan.graph.to_networkx(), again.graph.to_networkx()
    assert nx.utils.graphs_equal(ours, theirs)
