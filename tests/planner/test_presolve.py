"""Presolve keeps the optimum, and its answers can be carried back."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.planner.ilp.presolve import (
    FIXED,
    Infeasible,
    clash,
    group_rows,
    presolve,
    split,
)
from shardwright.planner.ilp.problem import (
    Edge,
    ProblemNode,
    ShardingProblem,
    Usage,
    brute_force,
    evaluate,
)
from tests.planner.random_problems import problems

INF = float("inf")


@settings(max_examples=400, deadline=None)
@given(problems())
def test_the_reduced_problem_has_the_same_optimum(problem: ShardingProblem) -> None:
    want, reduced = brute_force(problem), presolve(problem)
    if isinstance(reduced, Infeasible):
        assert want is None and reduced.reason
        return
    found = brute_force(reduced.problem)
    if want is None:
        assert found is None
        return
    assert found is not None
    restored = evaluate(problem, reduced.restore(found[0]))
    assert restored.feasible, restored.reason
    assert found[1] == pytest.approx(want[1], rel=1e-9, abs=1e-12)
    assert restored.cost == pytest.approx(want[1], rel=1e-9, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_any_assignment_is_carried_back(problem: ShardingProblem, random: Random) -> None:
    reduced = presolve(problem)
    if isinstance(reduced, Infeasible):
        return
    choice = [random.randrange(n.costs.size) for n in reduced.problem.nodes]
    small = evaluate(reduced.problem, choice)
    full = evaluate(problem, reduced.restore(choice))
    assert small.feasible == full.feasible
    if small.feasible:
        assert full.cost == pytest.approx(small.cost, rel=1e-9, abs=1e-12)


# --- one reduction at a time, by hand ----------------------------------------------------------


def node(name: str, *costs: float, usage: tuple[float, ...] | None = None) -> ProblemNode:
    live = () if usage is None else (Usage(0, 1, np.array(usage)),)
    return ProblemNode(name, np.array(costs), live)


def reduce(
    *nodes: ProblemNode, edges: tuple[Edge, ...] = (), limit: float | None = None
) -> list[str]:
    """Names of the nodes that are left, with the number of strategies."""
    reduced = presolve(ShardingProblem("p", nodes, edges, limit))
    assert not isinstance(reduced, Infeasible), reduced.reason
    return [f"{n.name}:{n.costs.size}" for n in reduced.problem.nodes]


def test_a_chain_without_memory_is_eliminated() -> None:
    chain = [node(f"n{k}", 1.0, 2.0, 3.0) for k in range(4)]
    costs = np.array([[5.0, 1.0, 7.0], [2.0, 8.0, 1.0], [4.0, 4.0, 9.0]])
    edges = tuple(Edge(k, k + 1, costs) for k in range(3))
    assert reduce(*chain, edges=edges) == [f"{FIXED}:1"]


def test_a_follower_is_merged_with_its_memory() -> None:
    same = np.array([[0.0, INF], [INF, 0.0]])
    a = node("a", 0.0, 5.0, usage=(6.0, 1.0))
    b = node("b", 0.0, 1.0, usage=(6.0, 1.0))
    # both small (cost 6, 2 bytes) or both large (cost 0, 12 bytes)
    assert reduce(a, b, edges=(Edge(0, 1, same),), limit=20) == []
    assert reduce(a, b, edges=(Edge(0, 1, same),), limit=11) == [f"{FIXED}:1"]


def test_a_row_that_cannot_bind_is_dropped() -> None:
    a, b = node("a", 0.0, 1.0, usage=(6.0, 1.0)), node("b", 0.0, 1.0, usage=(6.0, 1.0))
    assert reduce(a, b, limit=11) == ["a:2", "b:2", f"{FIXED}:1"]
    assert reduce(a, b, limit=12) == []


def test_dominated_strategies_go_only_if_they_are_no_smaller() -> None:
    b = node("b", 0.0, 9.0, usage=(6.0, 1.0))
    # a's strategy 1 is dearer and larger than 0; 2 is dearer but smaller
    a = node("a", 1.0, 2.0, 3.0, usage=(5.0, 5.0, 1.0))
    assert reduce(a, b, limit=8) == ["a:2", "b:2", f"{FIXED}:1"]


def test_infeasible_problems_say_why() -> None:
    never = presolve(
        ShardingProblem(
            "p", (node("a", 0.0), node("b", 0.0)), (Edge(0, 1, np.array([[INF]])),), None
        )
    )
    assert never == Infeasible("no strategy of node `b` is left", "b")
    problem = ShardingProblem("p", (node("a", 0.0, 0.0, usage=(7.0, 9.0)),), (), 5.0)
    full = presolve(problem)
    assert clash(problem) == ""
    assert full == Infeasible(
        "at time 0 at least 7 bytes are live, whatever is chosen; the limit is 5.0"
    )


def test_unequal_rows_are_never_grouped() -> None:
    first, group = group_rows(np.array([[1.0, INF], [0.0, 2.0], [1.0, INF], [-0.0, 2.0]]))
    assert group[0] == group[2] != group[1] == group[3]
    assert sorted(first.tolist()) == [0, 1]


def test_parts_do_not_touch() -> None:
    a, b = node("a", 0.0, 1.0, usage=(6.0, 1.0)), node("b", 0.0, 1.0, usage=(6.0, 1.0))
    later = ProblemNode("c", np.array([0.0, 1.0]), (Usage(1, 2, np.array([1.0, 0.0])),))
    alone = node("d", 4.0, usage=(2.0,))
    parts = split(ShardingProblem("p", (a, b, later, alone), (), 9.0))
    assert [part.nodes for part in parts] == [(2,), (0, 1)]
    assert [n.name for n in parts[1].problem.nodes] == ["a", "b", FIXED]


def test_a_large_problem_keeps_its_optimum_by_a_known_answer() -> None:
    """150 strategies and dense edges: strategy 7 is free everywhere, all else costs."""
    rng = np.random.default_rng(0)
    nodes, edges = [], []
    for k in range(40):
        costs = rng.random(150) + 0.5
        costs[7] = 0.0
        nodes.append(ProblemNode(f"n{k}", costs, (Usage(0, 1, rng.random(150)),)))
    for k in range(39):
        costs = rng.random((150, 150))
        costs[7, 7] = 0.0
        edges.append(Edge(k, k + 1, costs))
    problem = ShardingProblem("large", tuple(nodes), tuple(edges), 1000.0)
    reduced = presolve(problem)
    assert not isinstance(reduced, Infeasible)
    assert evaluate(problem, reduced.restore([0] * len(reduced.problem.nodes))).cost == 0.0
