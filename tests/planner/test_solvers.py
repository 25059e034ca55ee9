"""Every back end against brute force, with and without presolve, and on contest instances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardwright.planner.ilp.heuristic import search
from shardwright.planner.ilp.highs import solve as highs_solve
from shardwright.planner.ilp.presolve import Infeasible
from shardwright.planner.ilp.presolve import presolve as reduce
from shardwright.planner.ilp.problem import (
    Edge,
    ProblemNode,
    ShardingProblem,
    Usage,
    brute_force,
    evaluate,
)
from shardwright.planner.ilp.solve import SOLVERS, Solution, SolverError, solve
from shardwright.planner.iopddl import read_problem
from tests.planner.random_problems import problems

INF = float("inf")
IOPDDL = Path(__file__).parents[3] / "shared" / "data" / "iopddl"
instances = pytest.mark.skipif(not IOPDDL.is_dir(), reason=f"needs the instances in {IOPDDL}")


def check(
    problem: ShardingProblem, found: Solution, want: tuple[tuple[int, ...], float] | None
) -> None:
    if want is None:
        assert (found.status, found.assignment, found.cost) == ("infeasible", None, INF)
        assert found.reason
        return
    assert found.status == "optimal"
    assert found.cost == pytest.approx(want[1], rel=1e-6, abs=1e-9)
    assert found.bound <= found.cost
    assert found.bound == pytest.approx(want[1], rel=2e-6, abs=1e-9)
    assert found.assignment is not None
    priced = evaluate(problem, found.assignment)
    assert priced.feasible and priced.cost == found.cost


@pytest.mark.parametrize("presolve", [True, False])
@pytest.mark.parametrize("solver", ["highs", "cp-sat"])
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_ortools_equals_brute_force(solver: str, presolve: bool, problem: ShardingProblem) -> None:
    found = solve(problem, solver=solver, time_limit_s=60, presolve=presolve)
    check(problem, found, brute_force(problem))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), share=st.sampled_from([0.5, 0.99, 1.0, 1.001, 2.0]))
def test_highs_with_a_ceiling(problem: ShardingProblem, share: float) -> None:
    """What costs less is found; of anything else it may be said that it is dearer."""
    want = brute_force(problem)
    assume(want is not None and want[1] > 0)
    assert want is not None
    found = highs_solve(problem, time_limit_s=60, ceiling=share * want[1])
    if found.status == "dearer":
        assert share <= 1.0 and found.bound == share * want[1]
    else:
        check(problem, found, want)
    assert share <= 1.0 or found.status == "optimal"


@settings(max_examples=8, deadline=None)  # each is a process of its own
@given(problem=problems(), presolve=st.booleans())
def test_pyomo_equals_brute_force(presolve: bool, problem: ShardingProblem) -> None:
    solver = "pyomo"
    found = solve(problem, solver=solver, time_limit_s=60, presolve=presolve)
    check(problem, found, brute_force(problem))


def grid(side: int, seed: int, forbidden: float, limit: float = 30.0) -> ShardingProblem:
    """A grid with memory in every node: presolve cannot eliminate it."""
    rng = np.random.default_rng(seed)
    nodes, edges = [], []
    for k in range(side * side):
        sizes = rng.integers(1, 20, 4).astype(float)
        nodes.append(ProblemNode(f"n{k}", rng.integers(0, 50, 4) * 1.0, (Usage(k, k + 4, sizes),)))
        for other in [k - 1] * (k % side > 0) + [k - side] * (k >= side):
            costs = rng.integers(0, 50, (4, 4)) * 1.0
            costs[rng.random((4, 4)) < forbidden] = INF
            edges.append(Edge(other, k, costs))
    return ShardingProblem(f"grid {side}", tuple(nodes), tuple(edges), limit)


@pytest.mark.parametrize("seed", range(3))
def test_solvers_agree_where_brute_force_cannot_go(seed: int) -> None:
    problem = grid(5, seed, 0.2)
    found = {
        (solver, presolve): solve(problem, solver=solver, presolve=presolve)
        for solver in SOLVERS
        for presolve in (True, False)
    }
    assert {s.status for s in found.values()} in ({"optimal"}, {"infeasible"})
    assert len({s.cost for s in found.values()}) == 1, found


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(solver: str, scale: float) -> None:
    """Microseconds and gigabytes: the same choice as in whole numbers."""
    problem = grid(3, 1, 0.0)
    nodes = tuple(
        ProblemNode(
            n.name,
            n.costs * scale,
            tuple(Usage(u.start, u.end, u.bytes * 2**30) for u in n.usages),
        )
        for n in problem.nodes
    )
    edges = tuple(Edge(e.a, e.b, e.costs * scale) for e in problem.edges)
    scaled = ShardingProblem("scaled", nodes, edges, 30.0 * 2**30)
    want, found = solve(problem, solver=solver), solve(scaled, solver=solver)
    assert found.status == "optimal"
    assert found.cost == pytest.approx(want.cost * scale, rel=1e-6)


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_search_never_claims_too_much(problem: ShardingProblem) -> None:
    reduced = reduce(problem)
    if isinstance(reduced, Infeasible) or not reduced.problem.nodes:
        return
    want, found = brute_force(reduced.problem), search(reduced.problem, time_limit_s=0.2)
    if want is None:
        assert found.assignment is None
        return
    assert found.bound <= want[1] + 1e-9 * max(1.0, abs(want[1]))
    if found.assignment is not None:
        assert found.cost >= want[1] - 1e-12
        assert evaluate(reduced.problem, found.assignment).feasible


@pytest.mark.parametrize("seed", range(3))
def test_search_comes_close(seed: int) -> None:
    """An assignment and a bound near the optimum, one on each side."""
    problem = grid(6, seed, 0.0, limit=45.0)
    want = solve(problem)
    reduced = reduce(problem)
    assert not isinstance(reduced, Infeasible)
    found = search(reduced.problem, time_limit_s=20)
    assert want.cost * 0.85 <= found.bound <= want.cost <= found.cost <= want.cost * 1.1


def test_search_goes_on_until_something_fits() -> None:
    """A tight grid, where the first pass finds nothing feasible."""
    problem = grid(6, 2, 0.3, limit=36.0)
    reduced = reduce(problem)
    assert not isinstance(reduced, Infeasible)
    assert search(reduced.problem, time_limit_s=0).assignment is None
    assert search(reduced.problem, time_limit_s=30).assignment is not None


def test_search_steps_in_where_the_solver_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(problem: ShardingProblem, *, time_limit_s: float, ceiling: float = INF) -> Solution:
        return Solution(None, INF, -INF, "unknown", 0.0)

    monkeypatch.setattr("shardwright.planner.ilp.solve.SOLVERS", {"lazy": lazy})
    found = solve(grid(4, 1, 0.0, limit=45.0), solver="lazy", time_limit_s=10)
    assert found.assignment is not None and found.bound <= found.cost < INF


def test_an_empty_problem_costs_nothing() -> None:
    found = solve(ShardingProblem("empty", (), (), 10.0))
    assert (found.assignment, found.cost, found.status) == ((), 0.0, "optimal")


def test_an_unknown_solver_is_refused() -> None:
    problem = ShardingProblem("p", (ProblemNode("x", np.zeros(1)),), (), None)
    with pytest.raises(ValueError, match="unknown solver `hihgs`; did you mean `highs`?"):
        solve(problem, solver="hihgs")
    with pytest.raises(ValueError, match="time limit must be positive, got 0 s"):
        solve(problem, time_limit_s=0)


def test_a_solver_that_lies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def liar(problem: ShardingProblem, *, time_limit_s: float, ceiling: float = INF) -> Solution:
        wrong = tuple(0 for _ in problem.nodes)
        return Solution(wrong, 0.0, 0.0, "optimal", 0.0)

    monkeypatch.setattr("shardwright.planner.ilp.solve.SOLVERS", {"liar": liar})
    forbidden = Edge(0, 1, np.array([[INF, 1.0], [1.0, 1.0]]))
    nodes = (ProblemNode("x", np.zeros(2)), ProblemNode("y", np.zeros(2)))
    with pytest.raises(SolverError, match="strategy 0 of node `x` with strategy 0 of node `y`"):
        solve(ShardingProblem("p", nodes, (forbidden,), None), solver="liar", presolve=False)


@instances
@pytest.mark.parametrize("solver", ["highs", "pyomo"])
def test_instance_g_reaches_its_proven_optimum(solver: str) -> None:
    problem = read_problem(IOPDDL / "asplos-2025-iopddl-G.json.gz")
    found = solve(problem, solver=solver, time_limit_s=250)
    assert (found.status, found.cost, found.bound) == ("optimal", 217039, 217039)
