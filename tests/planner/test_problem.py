"""The evaluator against sums done by hand, and what a problem refuses."""

from __future__ import annotations

import numpy as np
import pytest

from shardwright.planner.ilp.problem import (
    Edge,
    Evaluation,
    ProblemNode,
    ShardingProblem,
    Usage,
    brute_force,
    evaluate,
)

INF = float("inf")

# Two layers, each stored whole (1 s, 8 bytes) or in halves (2 s, 4 bytes); unequal layouts cost
# 5 s.  a lives in [0, 10), b in [5, 15), and b has a transient of 1 byte at 12.
A = ProblemNode("a", np.array([1.0, 2.0]), (Usage(0, 10, np.array([8.0, 4.0])),))
B = ProblemNode(
    "b",
    np.array([1.0, 2.0]),
    (Usage(5, 15, np.array([8.0, 4.0])), Usage(12, 13, np.array([1.0, 1.0]))),
)
AB = Edge(0, 1, np.array([[0.0, 5.0], [5.0, 0.0]]))


def two(limit: float | None) -> ShardingProblem:
    return ShardingProblem("two", (A, B), (AB,), limit)


@pytest.mark.parametrize(
    "assignment, cost, peak, when",
    [
        ((0, 0), 2.0, 16.0, 5),  # both whole: 8 + 8 bytes where they overlap
        ((0, 1), 8.0, 12.0, 5),  # 1 + 2 + 5 seconds
        ((1, 1), 4.0, 8.0, 5),
    ],
)
def test_costs_and_peaks_by_hand(
    assignment: tuple[int, int], cost: float, peak: float, when: int
) -> None:
    assert evaluate(two(None), assignment) == Evaluation(cost, peak, when, True)


def test_the_limit_may_be_reached_but_not_passed() -> None:
    assert evaluate(two(12), (0, 1)).feasible
    over = evaluate(two(11), (0, 1))
    assert (over.cost, over.feasible) == (8.0, False)
    assert over.reason == "12 bytes are live at time 5, the limit is 11"


def test_an_interval_ends_before_the_next_begins() -> None:
    first = ProblemNode("first", np.zeros(1), (Usage(0, 5, np.array([7.0])),))
    then = ProblemNode("then", np.zeros(1), (Usage(5, 9, np.array([6.0])),))
    never = ProblemNode("never", np.zeros(1), (Usage(5, 5, np.array([99.0])),))
    found = evaluate(ShardingProblem("p", (first, then, never), (), 7), (0, 0, 0))
    assert found == Evaluation(0.0, 7.0, 0, True)


def test_forbidden_choices_are_named() -> None:
    x = ProblemNode("x", np.array([INF, 0.0]))
    y = ProblemNode("y", np.array([0.0, 0.0]))
    problem = ShardingProblem("p", (x, y), (Edge(1, 0, np.array([[0, 1], [0, INF]])),), None)
    assert evaluate(problem, (0, 0)).reason == "strategy 0 of node `x` is forbidden"
    pair = evaluate(problem, (1, 1))
    assert pair.reason == "strategy 1 of node `y` with strategy 1 of node `x` is forbidden"
    assert (pair.cost, pair.peak_time, pair.feasible) == (INF, None, False)
    assert evaluate(problem, (1, 0)).cost == 1.0


def test_parallel_edges_add_up_and_loops_charge_the_diagonal() -> None:
    loop = Edge(1, 1, np.array([[0.5, 9.0], [9.0, 0.25]]))
    problem = ShardingProblem("p", (A, B), (AB, AB, loop), None)
    assert evaluate(problem, (0, 1)).cost == 1 + 2 + 5 + 5 + 0.25


@pytest.mark.parametrize(
    "limit, want",
    [
        (None, ((0, 0), 2.0)),
        (16, ((0, 0), 2.0)),
        (15, ((1, 1), 4.0)),
        (8, ((1, 1), 4.0)),
        (7, None),
    ],
)
def test_brute_force_by_hand(limit: float | None, want: object) -> None:
    assert brute_force(two(limit)) == want


def test_brute_force_refuses_what_it_cannot_finish() -> None:
    nodes = tuple(ProblemNode(f"n{k}", np.zeros(100)) for k in range(4))
    with pytest.raises(ValueError, match=r"`p` has 1e\+08 assignments, brute force stops at"):
        brute_force(ShardingProblem("p", nodes, (), None))


@pytest.mark.parametrize(
    "assignment, message",
    [((0,), "has 2 nodes, the assignment 1"), ((0, 2), "`b` has strategies 0..1, got 2")],
)
def test_a_wrong_assignment_is_refused(assignment: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(two(None), assignment)


def test_malformed_problems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"interval \[3, 2\) ends before it starts"):
        Usage(3, 2, np.zeros(1))
    with pytest.raises(ValueError, match="bytes must be finite and at least 0"):
        Usage(0, 1, np.array([-1.0]))
    with pytest.raises(ValueError, match="node `x`: a cost is NaN or -inf"):
        ProblemNode("x", np.array([float("nan")]))
    with pytest.raises(ValueError, match="node `x`: costs must be a vector with at least one"):
        ProblemNode("x", np.zeros(0))
    with pytest.raises(ValueError, match="`x` has 2 strategies, but a usage with 1 entries"):
        ProblemNode("x", np.zeros(2), (Usage(0, 1, np.zeros(1)),))
    with pytest.raises(ValueError, match=r"edge \(0, 1\): costs must be a matrix"):
        Edge(0, 1, np.zeros(4))
    with pytest.raises(ValueError, match=r"edge \(0, 2\) names a node outside 0..1"):
        ShardingProblem("p", (A, B), (Edge(0, 2, np.zeros((2, 2))),), None)
    with pytest.raises(ValueError, match=r"with 2 and 2 strategies.*shape \(2, 3\)"):
        ShardingProblem("p", (A, B), (Edge(0, 1, np.zeros((2, 3))),), None)
    with pytest.raises(ValueError, match="usage_limit must be at least 0, or None, got -1"):
        two(-1)
