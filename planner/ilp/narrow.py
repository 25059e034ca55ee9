"""Large problems: what a linear relaxation proves too dear is left out before the rest is solved.

1. The relaxation gives a bound, and a price for each of its equations and memory rows.
2. Its answer is a mixture of a few strategies of each node.  The best assignment of these, or one
   that is rounded and improved by local search, has cost U.
3. The edges' costs, shifted by the prices, make the bound a sum of minima.  By what a strategy is
   above its node's minimum, at least, every assignment with it is above the bound.  Strategies
   that are so above U are in no better assignment.  A bound above the ceiling ends it.
4. What is left is presolved, which now goes much further, and solved exactly: first with the
   memory rows alone that have a price, then with those too that the answer violates.

The bound is worked out again from the shifted costs, so that no tolerance of the solver of the
relaxation enters into what is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from time import perf_counter
from typing import TypeAlias

import numpy as np

from .heuristic import Margins, margins
from .highs import Relaxed, relax
from .problem import Edge, IntArray, ProblemNode, ShardingProblem, Usage, evaluate
from .solution import LEAST_S, Solution, conclude

# Solves a problem in the seconds given, if it has an answer below the ceiling.
Exact: TypeAlias = Callable[[ShardingProblem, float, float], Solution]
# The share of the time that the relaxation may take.
_RELAXING = 0.4
# Rounds in which memory rows are added before all are.
_ROUNDS = 6
# Rounding in a sum of thousands of costs, relative to the sum.
_ROUNDING = 1e-9


def narrowed(
    problem: ShardingProblem,
    exact: Exact,
    *,
    time_limit_s: float,
    ceiling: float = inf,
) -> Solution | None:
    """Solve a presolved problem; `exact` solves what is left in the seconds given, if it has an
    answer below a ceiling.

    Answers that cost `ceiling` or more are left out, too.  None where the relaxation takes too
    long, or rounding its answer does not fit the memory.
    """
    started = perf_counter()

    def left() -> float:
        return max(LEAST_S, time_limit_s - (perf_counter() - started))

    relaxed = relax(problem, time_limit_s=_RELAXING * time_limit_s)
    if relaxed is None:
        return None
    found = margins(problem, relaxed.shifts, relaxed.prices, relaxed.rounded)
    if found.bound >= ceiling:
        return Solution(None, inf, found.bound, "dearer", perf_counter() - started)
    found = _mixed(problem, found, relaxed, exact, left)
    if found.assignment is None:
        return None
    limit = min(found.cost, ceiling)
    keep = _within(found, limit)
    rest = _row_by_row(_restricted(problem, keep), relaxed.binding, exact, left, limit)
    bound = max(found.bound, min(rest.bound, limit))
    best = found.assignment
    if rest.assignment is not None and rest.cost <= found.cost:
        best = tuple(int(k[choice]) for k, choice in zip(keep, rest.assignment, strict=True))
    if bound >= ceiling:
        return Solution(None, inf, bound, "dearer", perf_counter() - started)
    return conclude(problem, best, bound, perf_counter() - started)


def _mixed(
    problem: ShardingProblem,
    found: Margins,
    relaxed: Relaxed,
    exact: Exact,
    left: Callable[[], float],
) -> Margins:
    """With the best assignment of the strategies in the relaxation's answer, if it is better."""
    keep = relaxed.support
    if found.assignment is not None:
        keep = [np.union1d(k, [own]) for k, own in zip(keep, found.assignment, strict=True)]
    rest = _row_by_row(_restricted(problem, keep), relaxed.binding, exact, left, found.cost)
    if rest.assignment is None or rest.cost >= found.cost:
        return found
    best = tuple(int(k[choice]) for k, choice in zip(keep, rest.assignment, strict=True))
    if not evaluate(problem, best).feasible:  # the time was too short for all rows
        return found
    return replace(found, cost=rest.cost, assignment=best)


def _row_by_row(
    problem: ShardingProblem,
    times: IntArray,
    exact: Exact,
    left: Callable[[], float],
    ceiling: float,
) -> Solution:
    """Solve with memory counted at some `times` only, and at more while the answer exceeds it.

    Fewer rows are a relaxation, so an answer that fits at all times is optimal if it is there.
    """
    for _ in range(_ROUNDS):
        found = exact(_at(problem, times), left(), ceiling)
        if found.assignment is None:
            return found
        whole = evaluate(problem, found.assignment)
        if whole.feasible or whole.peak_time is None:
            return found
        times = np.union1d(times, [whole.peak_time])
    return exact(problem, left(), ceiling)


def _at(problem: ShardingProblem, times: IntArray) -> ShardingProblem:
    """The problem with memory counted at `times` (ascending) only."""
    nodes: list[ProblemNode] = []
    for node in problem.nodes:
        usages: list[Usage] = []
        for usage in node.usages:
            start, end = (int(np.searchsorted(times, t)) for t in (usage.start, usage.end))
            if start < end:
                usages.append(Usage(start, end, usage.bytes))
        nodes.append(replace(node, usages=tuple(usages)))
    return replace(problem, nodes=tuple(nodes))


def _within(found: Margins, limit: float) -> list[IntArray]:
    """The strategies of each node that an assignment cheaper than `limit` may have, and those of
    the known one."""
    room = limit - found.bound + _ROUNDING * abs(limit)
    keep = [np.nonzero(above <= room)[0] for above in found.above]
    assert found.assignment is not None
    return [np.union1d(k, [own]) for k, own in zip(keep, found.assignment, strict=True)]


def _restricted(problem: ShardingProblem, keep: list[IntArray]) -> ShardingProblem:
    """The problem with some of each node's strategies."""
    nodes = tuple(
        replace(
            node,
            costs=node.costs[k],
            usages=tuple(replace(usage, bytes=usage.bytes[k]) for usage in node.usages),
        )
        for node, k in zip(problem.nodes, keep, strict=True)
    )
    edges = tuple(
        Edge(edge.a, edge.b, edge.costs[np.ix_(keep[edge.a], keep[edge.b])])
        for edge in problem.edges
    )
    return replace(problem, nodes=nodes, edges=edges)


__all__ = ["narrowed"]
