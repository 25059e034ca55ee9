"""CP-SAT: an exact second opinion by a very different method (lazy clause generation)."""

from __future__ import annotations

import os
from math import inf
from time import perf_counter

import numpy as np
from ortools.sat.python import cp_model

from .formulation import Memory
from .presolve import group_rows
from .problem import FloatArray, ShardingProblem, whole_costs
from .solution import Solution, SolverError, conclude

# CP-SAT needs integers; sums of objective terms and of a memory row must fit in 64 bits with room
# for its own arithmetic.
_LARGEST_SUM = 2.0**52


def solve(problem: ShardingProblem, *, time_limit_s: float) -> Solution:
    """Solve by CP-SAT; see `planner.solvers.solve` for presolve and checks.

    Costs that are not whole are scaled by a power of two to integers so that the sum of the
    largest of each node and edge is about 2**52: rounding moves a total by at most half a unit for
    each node and edge, which is 1e-13 of that sum for a thousand of them.
    """
    started = perf_counter()
    scale = _scale(problem)
    model = cp_model.CpModel()
    chosen = [[model.new_bool_var("") for _ in node.costs] for node in problem.nodes]
    terms: list[cp_model.IntVar] = []
    prices: list[int] = []
    for variables, node in zip(chosen, problem.nodes, strict=True):
        model.add_exactly_one(variables)
        _charge(model, variables, node.costs * scale, terms, prices)
    for edge in problem.edges:
        if edge.a == edge.b:
            _charge(model, chosen[edge.a], np.diagonal(edge.costs) * scale, terms, prices)
        else:
            _add_edge(model, chosen[edge.a], chosen[edge.b], edge.costs * scale, terms, prices)
    _add_memory(model, problem, [x for variables in chosen for x in variables])
    model.minimize(cp_model.LinearExpr.weighted_sum(terms, prices))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.01, time_limit_s - (perf_counter() - started))
    solver.parameters.num_workers = max(1, os.cpu_count() or 1)
    status = solver.solve(model)
    seconds = perf_counter() - started
    if status == cp_model.INFEASIBLE:
        reason = "no assignment satisfies all edges and memory rows"
        return Solution(None, inf, inf, "infeasible", seconds, reason)
    if status == cp_model.MODEL_INVALID:
        raise SolverError(f"CP-SAT refuses its model of `{problem.name}`: {model.validate()}")
    # every term may have been rounded by half a unit
    rounding = 0.0 if whole_costs(problem) else (len(problem.nodes) + len(problem.edges)) / 2
    bound = (solver.best_objective_bound - rounding) / scale
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Solution(None, inf, bound, "unknown", seconds)
    values = tuple(
        next(k for k, x in enumerate(variables) if solver.boolean_value(x)) for variables in chosen
    )
    return conclude(problem, values, bound, seconds)


def _scale(problem: ShardingProblem) -> float:
    """1 for whole costs, else the power of two that brings the sum of the largest near 2**52."""
    if whole_costs(problem):
        return 1.0
    total = sum(
        float(np.abs(item.costs[np.isfinite(item.costs)]).max(initial=0.0))
        for item in (*problem.nodes, *problem.edges)
    )
    return float(2.0 ** np.floor(np.log2(_LARGEST_SUM / total)))


def _charge(
    model: cp_model.CpModel,
    variables: list[cp_model.IntVar],
    costs: FloatArray,
    terms: list[cp_model.IntVar],
    prices: list[int],
) -> None:
    """Charge `costs[k]` for `variables[k]`; an infinite one forbids."""
    for x, cost in zip(variables, costs.tolist(), strict=True):
        if cost == inf:
            model.add(x == 0)
        elif cost:
            terms.append(x)
            prices.append(round(cost))


def _add_edge(
    model: cp_model.CpModel,
    a: list[cp_model.IntVar],
    b: list[cp_model.IntVar],
    costs: FloatArray,
    terms: list[cp_model.IntVar],
    prices: list[int],
) -> None:
    """One literal for each allowed pair of row group and column group (see `formulation`)."""
    row_first, row_group = group_rows(costs)
    col_first, col_group = group_rows(costs.T)
    grouped = costs[np.ix_(row_first, col_first)]
    by_row: list[list[cp_model.IntVar]] = [[] for _ in row_first]
    by_col: list[list[cp_model.IntVar]] = [[] for _ in col_first]
    for r, c in np.argwhere(np.isfinite(grouped)).tolist():
        pair = model.new_bool_var("")
        by_row[r].append(pair)
        by_col[c].append(pair)
        _charge(model, [pair], grouped[r, c : c + 1], terms, prices)
    for ends, group, pairs_of in ((a, row_group, by_row), (b, col_group, by_col)):
        for g, pairs in enumerate(pairs_of):
            members = [ends[k] for k in np.nonzero(group == g)[0]]
            model.add(cp_model.LinearExpr.sum(pairs) == cp_model.LinearExpr.sum(members))


def _add_memory(
    model: cp_model.CpModel, problem: ShardingProblem, strategies: list[cp_model.IntVar]
) -> None:
    """Memory rows in whole units: bytes, or where bytes are not whole 2**-46 of the limit.

    In the second case sizes are rounded up, which can lose only assignments that leave less than
    1e-14 of the limit free for each node.
    """
    if problem.usage_limit is None:
        return
    sizes = [node.costs.size for node in problem.nodes]
    memory = Memory(problem, np.concatenate([[0], np.cumsum(sizes)]))
    for position in range(memory.rows.size):
        used, size = memory.row(position)
        whole = bool((size == np.rint(size)).all())
        scale = 1.0 if whole or not problem.usage_limit else 2.0**46 / abs(problem.usage_limit)
        model.add(
            cp_model.LinearExpr.weighted_sum(
                [strategies[k] for k in used.tolist()], np.ceil(size * scale).astype(int).tolist()
            )
            <= int(np.floor(problem.capacity * scale))
        )


__all__ = ["solve"]
