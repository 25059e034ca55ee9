"""Pyomo with HiGHS: the tight formulation written down once more, plainly.

Nothing is shared with the default solver but the problem and HiGHS itself: no grouping of equal
rows, no lazy memory rows, HiGHS' own presolve, another modelling layer.  It is slower and meant for
checking.

It runs as a program of its own (`python -m`, a pickled call on stdin, the pickled answer on
stdout): Pyomo takes long to load, and changes where a process prints to while it solves.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from math import inf
from time import perf_counter
from typing import Any, cast

import numpy as np
import pyomo.environ as pyo

from .problem import ShardingProblem, whole_costs
from .solution import LEAST_S, RELATIVE_GAP, Solution, SolverError, conclude

_START_S = 30.0  # what starting Python and importing Pyomo may take on a busy machine


def solve(problem: ShardingProblem, *, time_limit_s: float) -> Solution:
    """Solve by Pyomo and HiGHS; see `planner.solvers.solve` for presolve and checks.

    Building the model counts towards the time limit, starting the process does not.
    """
    started = perf_counter()
    call = [sys.executable, "-P", "-m", __name__]  # -P: nothing from the current folder
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            call,
            input=pickle.dumps((problem, time_limit_s)),
            capture_output=True,
            env=environment,
            timeout=2 * time_limit_s + _START_S,
        )
    except subprocess.TimeoutExpired:
        return Solution(None, inf, -inf, "unknown", perf_counter() - started)
    if done.returncode:
        raise SolverError(f"the Pyomo process failed: {done.stderr.decode(errors='replace')}")
    found = cast(Solution, pickle.loads(done.stdout))
    return replace(found, seconds=perf_counter() - started)


def solve_here(problem: ShardingProblem, time_limit_s: float) -> Solution:
    """What `solve` does, in this process."""
    from pyomo.contrib.appsi.base import TerminationCondition
    from pyomo.contrib.appsi.solvers.highs import Highs

    started = perf_counter()
    # costs per unit, bytes per limit: tolerances are absolute, 1e-7 or so
    unit = _middle_cost(problem)
    model: Any = _model(problem, unit)
    solver: Any = Highs()
    solver.config.load_solution = False
    solver.config.time_limit = max(LEAST_S, time_limit_s - (perf_counter() - started))
    whole = whole_costs(problem)
    solver.highs_options = {
        "mip_rel_gap": 0.0 if whole else RELATIVE_GAP / 2,
        "mip_abs_gap": 0.999 / unit if whole else 0.0,
    }
    found = solver.solve(model)
    seconds, why = perf_counter() - started, found.termination_condition
    # every variable is bounded, so "infeasible or unbounded" is infeasible
    if why in (TerminationCondition.infeasible, TerminationCondition.infeasibleOrUnbounded):
        reason = "no assignment satisfies all edges and memory rows"
        return Solution(None, inf, inf, "infeasible", seconds, reason)
    if why not in (TerminationCondition.optimal, TerminationCondition.maxTimeLimit):
        raise SolverError(f"Pyomo's HiGHS stopped with {why.name}")
    bound = -inf if found.best_objective_bound is None else found.best_objective_bound * unit
    if found.best_feasible_objective is None:
        return Solution(None, inf, bound, "unknown", seconds)
    found.solution_loader.load_vars()
    assignment = tuple(
        max(range(node.costs.size), key=lambda k, n=n: model.s[n, k].value or 0.0)
        for n, node in enumerate(problem.nodes)
    )
    return conclude(problem, assignment, bound, perf_counter() - started)


def _middle_cost(problem: ShardingProblem) -> float:
    """The median size of a nonzero cost over 100; 1 where all are zero."""
    costs = np.concatenate([x.costs.reshape(-1) for x in (*problem.nodes, *problem.edges)])
    sizes = np.abs(costs[np.isfinite(costs) & (costs != 0)])
    return float(np.median(sizes)) / 100 if sizes.size else 1.0


def _model(problem: ShardingProblem, unit: float) -> Any:
    nodes, edges = problem.nodes, problem.edges
    pairs = [
        (k, i, j)
        for k, edge in enumerate(edges)
        for i, j in np.argwhere(np.isfinite(edge.costs)).tolist()
    ]
    choices = [(n, k) for n, node in enumerate(nodes) for k in range(node.costs.size)]
    allowed = [(n, k) for n, k in choices if nodes[n].costs[k] < inf]
    model = cast(Any, pyo.ConcreteModel())
    model.s = s = cast(Any, pyo.Var(choices, domain=pyo.Binary))
    model.e = e = cast(Any, pyo.Var(pairs, domain=pyo.NonNegativeReals))
    model.rows = rows = cast(Any, pyo.ConstraintList())
    for n, k in set(choices) - set(allowed):
        s[n, k].fix(0)
    model.cost = pyo.Objective(
        expr=sum(float(nodes[n].costs[k]) / unit * s[n, k] for n, k in allowed)
        + sum(float(edges[k].costs[i, j]) / unit * e[k, i, j] for k, i, j in pairs)
    )
    for n, node in enumerate(nodes):
        rows.add(sum(s[n, k] for k in range(node.costs.size)) == 1)
    by_row: dict[tuple[int, int], list[Any]] = {}
    by_col: dict[tuple[int, int], list[Any]] = {}
    for k, i, j in pairs:
        by_row.setdefault((k, i), []).append(e[k, i, j])
        by_col.setdefault((k, j), []).append(e[k, i, j])
    for k, edge in enumerate(edges):
        for i in range(edge.costs.shape[0]):
            rows.add(sum(by_row.get((k, i), [])) - s[edge.a, i] == 0)
        for j in range(edge.costs.shape[1]):
            rows.add(sum(by_col.get((k, j), [])) - s[edge.b, j] == 0)
    _add_memory(model, problem)
    return model


def _add_memory(model: Any, problem: ShardingProblem) -> None:
    """One row for each time at which something starts: the live sum only grows then."""
    if problem.usage_limit is None:
        return
    scale = 1e6 / problem.capacity if problem.capacity > 0 else 1.0
    usages = [(n, usage) for n, node in enumerate(problem.nodes) for usage in node.usages]
    for time in sorted({usage.start for _, usage in usages if usage.start < usage.end}):
        live = [(n, usage.bytes) for n, usage in usages if usage.start <= time < usage.end]
        if sum(float(sizes.max()) for _, sizes in live) > problem.capacity:
            total = sum(
                size * scale * model.s[n, k]
                for n, sizes in live
                for k, size in enumerate(sizes.tolist())
                if size
            )
            model.rows.add(total <= problem.capacity * scale)


def _main() -> None:
    """Answer one call: what HiGHS prints goes to stderr, stdout holds the answer alone."""
    answer = os.dup(1)
    os.dup2(2, 1)
    problem, time_limit_s = cast("tuple[ShardingProblem, float]", pickle.load(sys.stdin.buffer))
    with os.fdopen(answer, "wb") as out:
        pickle.dump(solve_here(problem, time_limit_s), out)


if __name__ == "__main__":
    _main()

__all__ = ["solve", "solve_here"]
