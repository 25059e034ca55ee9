"""Leaving out what a relaxation proves too dear: the proofs hold, and the optimum stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.planner.ilp import solve as solvers
from shardwright.planner.ilp.heuristic import margins
from shardwright.planner.ilp.highs import relax
from shardwright.planner.ilp.presolve import Infeasible
from shardwright.planner.ilp.presolve import presolve as reduce
from shardwright.planner.ilp.problem import (
    Edge,
    ProblemNode,
    ShardingProblem,
    Usage,
    brute_force,
    least_cost,
)
from tests.planner.random_problems import problems


def ring(count: int, seed: int, limit: float | None) -> ShardingProblem:
    """Nodes in a ring with chords, all with memory, so that presolve eliminates none."""
    rng = np.random.default_rng(seed)
    nodes = [
        ProblemNode(
            f"n{k}", rng.random(5), (Usage(0, count, rng.random(5)), Usage(k, k + 2, rng.random(5)))
        )
        for k in range(count)
    ]
    pairs = [(k, (k + step) % count) for k in range(count) for step in (1, 2)]
    edges = [Edge(min(p), max(p), rng.random((5, 5))) for p in dict.fromkeys(pairs)]
    return ShardingProblem("ring", tuple(nodes), tuple(edges), limit)


def fixed(problem: ShardingProblem, node: int, choice: int) -> ShardingProblem:
    """The problem with one node's strategy given."""
    costs = np.full(problem.nodes[node].costs.size, np.inf)
    costs[choice] = problem.nodes[node].costs[choice]
    nodes = list(problem.nodes)
    nodes[node] = replace(nodes[node], costs=costs)
    return replace(problem, nodes=tuple(nodes))


@pytest.mark.parametrize("limit", [3.0, 4.0, None])
@pytest.mark.parametrize("seed", range(3))
def test_margins_are_lower_bounds(seed: int, limit: float | None) -> None:
    """No assignment with a strategy costs less than its margin says, by trying all."""
    problem = ring(6, seed, limit)
    relaxed = relax(problem, time_limit_s=10)
    best = brute_force(problem)
    assert relaxed is not None and best is not None
    found = margins(problem, relaxed.shifts, relaxed.prices, relaxed.rounded)
    assert found.bound <= best[1] <= found.cost + 1e-12
    assert found.bound > 0.8 * best[1]
    for n, above in enumerate(found.above):
        for k, more in enumerate(above.tolist()):
            cheapest = brute_force(fixed(problem, n, k))
            if cheapest is not None:
                assert found.bound + more <= cheapest[1] + 1e-9, (n, k)


def narrowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow problems of any size."""
    monkeypatch.setattr(solvers, "_NARROWED", 0)


@pytest.mark.parametrize("limit", [12.0, 15.0, 20.0, None])
@pytest.mark.some(1)
def test_narrowed_problems_have_the_same_optimum(
    limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = ring(30, 7, limit)
    whole = solvers.solve(problem)
    narrowing(monkeypatch)
    found = solvers.solve(problem)
    assert found.status == whole.status
    assert found.cost == pytest.approx(whole.cost, rel=1e-9)
    assert found.bound <= found.cost


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_narrowing_equals_brute_force(problem: ShardingProblem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        narrowing(patch)
        found = solvers.solve(problem)
    want = brute_force(problem)
    if want is None:
        assert found.status == "infeasible" or isinstance(reduce(problem), Infeasible)
        return
    assert found.status == "optimal"
    assert found.cost == pytest.approx(want[1], rel=1e-6, abs=1e-9)
    assert found.bound <= found.cost


@settings(max_examples=60, deadline=None)
@given(problem=problems(), share=st.floats(0.5, 1.5))
def test_a_ceiling_hides_no_cheaper_answer(problem: ShardingProblem, share: float) -> None:
    """What costs less is found, and proven the optimum; `dearer` is said of nothing else."""
    want = brute_force(problem)
    if want is None:
        return
    ceiling = want[1] * share if want[1] > 0 else want[1] / share
    with pytest.MonkeyPatch.context() as patch:
        narrowing(patch)
        found = solvers.solve(problem, ceiling=ceiling)
    if found.status == "dearer":
        assert want[1] >= ceiling * (1 - 1e-6) - 1e-9
        assert ceiling <= found.bound + 1e-9 and found.bound <= want[1] + 1e-6 * abs(want[1]) + 1e-9
    else:
        assert found.status == "optimal"
        assert found.cost == pytest.approx(want[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("share", [0.9, 0.999, 1.001, 1.1])
def test_a_ceiling_below_the_optimum_ends_the_search(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = ring(30, 7, 15.0)
    whole = solvers.solve(problem)
    narrowing(monkeypatch)
    found = solvers.solve(problem, ceiling=share * whole.cost)
    assert found.status == ("dearer" if share < 1 else "optimal")
    if share < 1:
        assert found.assignment is None and share * whole.cost <= found.bound <= whole.cost


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_each_for_itself_at_its_cheapest_is_a_bound(problem: ShardingProblem) -> None:
    best = brute_force(problem)
    assert best is None or least_cost(problem.nodes, problem.edges) <= best[1]


def test_a_bound_that_needs_no_search_is_told_at_once() -> None:
    problem = ring(30, 7, 15.0)
    least = least_cost(problem.nodes, problem.edges)
    found = solvers.solve(problem, ceiling=0.99 * least)
    assert (found.status, found.bound, found.assignment) == ("dearer", least, None)
