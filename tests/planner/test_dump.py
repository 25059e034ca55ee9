"""The text of each stage of planning: strategies, problem, plan."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from shardwright.facts.spec import format_spec
from shardwright.planner.errors import PlanError
from shardwright.planner.ilp.problem import Edge, ProblemNode, ShardingProblem, Usage
from shardwright.planner.strategies.regions import Strategy
from tests.planner.test_model_graph import llama


def test_a_problem_by_hand() -> None:
    nodes = (
        ProblemNode("x", np.array([0.5, 2.0]), (Usage(0, 3, np.array([8.0, 4.0])),)),
        ProblemNode("y", np.array([1e-6])),
    )
    problem = ShardingProblem("two", nodes, (Edge(0, 1, np.array([[0.25], [inf]])),), 16.0)
    assert str(problem).splitlines() == [
        "two: 2 nodes, 1 edges, limit 16",
        "node 0 x",
        "  costs 0.5 2",
        "  live [0, 3) 8 4",
        "node 1 y",
        "  costs 1e-06",
        "edge 0 1",
        "  0.25",
        "  inf",
    ]


def test_a_strategy_by_hand() -> None:
    linear = Strategy((("b", "k"),), (((0, 2),), ((-3, 1), (-1, 1))), ((0, -2),))
    assert linear.line(0) == "b,k: S0,S2 V,S1|R,S1 -> S0,P"


def test_stages_of_a_plan() -> None:
    plan = llama("train", ())
    strategies = plan.dump("strategies").splitlines()
    nodes = {node.name: node for node in plan.graph.nodes}
    named = [line.partition(":")[0] for line in strategies if not line.startswith(" ")]
    assert set(named) <= set(nodes) and len(named) > 10
    # what was chosen of a product is one of the lines that were there to choose from
    head = next(node for node in nodes.values() if node.loc.module == "head")
    chosen = plan.decisions.choices[head.name]
    first = strategies.index(next(line for line in strategies if line.startswith(f"{head.name}:")))
    ways = [line.partition(":")[0] for line in strategies[first + 1 :]]
    assert f"  {','.join(chosen)}" in ways
    taken = plan.dump("plan").splitlines()
    assert f"node {head.name} {','.join(chosen)}" in taken
    for name, spec in plan.decisions.specs.items():
        assert f"spec {name} {format_spec(spec)}" in taken
    problem = plan.dump("problem").splitlines()
    assert sum(line.startswith("node ") for line in problem) > len(named)


def test_no_other_stage() -> None:
    with pytest.raises(PlanError, match="unknown stage `graph`; expected one of strategies, prob"):
        llama("train", ()).dump("graph")
