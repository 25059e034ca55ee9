"""Solvers of the sharding problem behind one door.

`solve` presolves, splits the problem into independent parts, gives each to the chosen back end, and
has the evaluator price the answer in the problem as it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import fsum, inf
from time import perf_counter
from types import MappingProxyType

from .heuristic import search
from .presolve import Infeasible, Part, clash, split
from .presolve import presolve as reduce
from .problem import ShardingProblem, least_cost
from .solution import LEAST_S, RELATIVE_GAP, Solution, Solver, SolverError, Status, conclude

# What summing in another order may change, relative to the larger of cost and offset.
_SAME_COST = 1e-9
# More strategies than this after presolve: exact solvers may find nothing in a minute.
_LARGE = 5000
# More strategies than this, and no more pairs across edges than that: HiGHS first solves the linear
# relaxation, and then what it leaves.
_NARROWED = 500
_RELAXABLE = 20_000_000
# The share of the time kept for search where the exact solver finds nothing.
_RESERVED = 0.15


# Each back end is imported when first used: their modelling layers take a second to load.


def _highs(problem: ShardingProblem, *, time_limit_s: float, ceiling: float = inf) -> Solution:
    from .highs import solve

    return solve(problem, time_limit_s=time_limit_s, ceiling=ceiling)


def _cp_sat(problem: ShardingProblem, *, time_limit_s: float, ceiling: float = inf) -> Solution:
    from .cpsat import solve

    return solve(problem, time_limit_s=time_limit_s)


def _pyomo(problem: ShardingProblem, *, time_limit_s: float, ceiling: float = inf) -> Solution:
    from .pyomo_highs import solve

    return solve(problem, time_limit_s=time_limit_s)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {"highs": _highs, "cp-sat": _cp_sat, "pyomo": _pyomo}
)


def solve(
    problem: ShardingProblem,
    solver: str = "highs",
    time_limit_s: float = 60.0,
    presolve: bool = True,
    ceiling: float = inf,
) -> Solution:
    """Solve `problem` with the back end `solver` (a key of `SOLVERS`).

    No answer that costs `ceiling` or more is wanted: where it is soon proven that there is no
    other, the status is `dearer`.  The answer's cost is the evaluator's for `problem` itself.
    Raises `ValueError` for an unknown solver or a time limit that is not positive, `SolverError` if
    a solver's answer is wrong.
    """
    if solver not in SOLVERS:
        near = get_close_matches(solver, SOLVERS, n=1)
        tip = f"; did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"unknown solver `{solver}`{tip} There are {', '.join(SOLVERS)}.")
    if not time_limit_s > 0:
        raise ValueError(f"the time limit must be positive, got {time_limit_s} s")
    least = least_cost(problem.nodes, problem.edges)
    if inf > ceiling <= least:
        return Solution(None, inf, least, "dearer", 0.0)
    return _solve_reduced(
        problem, SOLVERS[solver], time_limit_s, presolve=presolve, searchable=presolve,
        ceiling=ceiling,
    )  # fmt: skip


def _solve_reduced(
    problem: ShardingProblem,
    solver: Solver,
    time_limit_s: float,
    *,
    presolve: bool,
    searchable: bool,
    ceiling: float = inf,
) -> Solution:
    """Presolve if asked for, solve each part, and price the answer in the problem as given."""
    started = perf_counter()
    reduced = reduce(problem) if presolve else None
    if isinstance(reduced, Infeasible):
        seconds = perf_counter() - started
        where = reduced.node and clash(problem)
        return Solution(None, inf, inf, "infeasible", seconds, reduced.reason, where)
    if reduced is None:
        inner, parts = problem, (Part(problem, tuple(range(len(problem.nodes)))),)
    else:
        inner, parts = reduced.problem, split(reduced.problem)
    found = _solve_parts(inner, parts, solver, started, time_limit_s, searchable, ceiling)
    if found.assignment is None:
        return replace(found, seconds=perf_counter() - started)
    assignment = found.assignment if reduced is None else reduced.restore(found.assignment)
    checked = conclude(problem, assignment, found.bound, perf_counter() - started)
    if abs(checked.cost - found.cost) > _SAME_COST * max(abs(checked.cost), abs(found.cost)):
        raise SolverError(
            f"`{problem.name}`: the solver says {found.cost!r}, the evaluator {checked.cost!r}"
        )
    return checked


def _solve_parts(
    problem: ShardingProblem,
    parts: Sequence[Part],
    solver: Solver,
    started: float,
    time_limit_s: float,
    searchable: bool,
    ceiling: float,
) -> Solution:
    """Solve each independent part in the time that is left; `seconds` is not filled in."""
    full = [0] * len(problem.nodes)
    inside = {n for part in parts for n in part.nodes}
    bounds = [float(n.costs[0]) for k, n in enumerate(problem.nodes) if k not in inside]
    complete = True
    # What is left of the ceiling for a part is known where there is no other.
    room = ceiling - fsum(bounds) if sum(bool(part.nodes) for part in parts) == 1 else inf
    for part in parts:
        if not part.nodes:
            continue
        left = max(LEAST_S, time_limit_s - (perf_counter() - started))
        found = _solve_part(part.problem, solver, left, searchable, room)
        if found.status == "infeasible":
            return found
        if found.status == "dearer":
            return replace(found, bound=fsum([*bounds, found.bound]))
        bounds.append(found.bound)
        if found.assignment is None:
            complete = False
            continue
        for n, choice in zip(part.nodes, found.assignment, strict=False):
            full[n] = choice
    bound = fsum(bounds) if -inf not in bounds else -inf
    if not complete:
        return Solution(None, inf, bound, "unknown", 0.0)
    return conclude(problem, tuple(full), bound, 0.0)


def _solve_part(
    problem: ShardingProblem,
    solver: Solver,
    time_limit_s: float,
    searchable: bool,
    ceiling: float,
) -> Solution:
    """Solve one part: a large one by search first, a small one by search only if all else fails.

    `searchable` says that the problem is presolved, as search needs it.
    """
    if not searchable:
        return solver(problem, time_limit_s=time_limit_s, ceiling=ceiling)
    started = perf_counter()
    strategies = sum(node.costs.size for node in problem.nodes)
    pairs = sum(edge.costs.size for edge in problem.edges)
    if solver is _highs and strategies > _NARROWED and pairs <= _RELAXABLE:
        found = _narrowed(problem, time_limit_s, ceiling)
        if found is not None:
            return found
        time_limit_s = max(LEAST_S, time_limit_s - (perf_counter() - started))
        started = perf_counter()
    if strategies > _LARGE:
        first = search(problem, time_limit_s=time_limit_s / 2)
        if first.status == "optimal":
            return first
        left = max(LEAST_S, time_limit_s - (perf_counter() - started))
        return _better(first, solver(problem, time_limit_s=left))
    found = solver(problem, time_limit_s=(1 - _RESERVED) * time_limit_s, ceiling=ceiling)
    if found.assignment is not None or found.status in ("infeasible", "dearer"):
        return found
    return _better(found, search(problem, time_limit_s=_RESERVED * time_limit_s))


def _narrowed(problem: ShardingProblem, time_limit_s: float, ceiling: float) -> Solution | None:
    """Solve one part by HiGHS, strategies that are proven too dear left out first."""
    from .narrow import narrowed

    def exact(rest: ShardingProblem, seconds: float, ceiling: float) -> Solution:
        return _solve_reduced(
            rest, _highs, seconds, presolve=True, searchable=False, ceiling=ceiling
        )

    return narrowed(problem, exact, time_limit_s=time_limit_s, ceiling=ceiling)


def _better(one: Solution, other: Solution) -> Solution:
    """The cheaper assignment with the better bound of two solutions of one problem."""
    if "infeasible" in (one.status, other.status):
        return one if one.status == "infeasible" else other
    best, bound = min(one, other, key=lambda s: s.cost), max(one.bound, other.bound)
    status = "optimal" if "optimal" in (one.status, other.status) else best.status
    return replace(best, bound=bound, status=status)


__all__ = [
    "RELATIVE_GAP", "SOLVERS", "Solution", "Solver", "SolverError", "Status", "solve",
]  # fmt: skip
