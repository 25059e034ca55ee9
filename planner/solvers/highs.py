"""The default solver: HiGHS through OR-tools' MathOpt, on the tight formulation.

The model is handed over as a protocol buffer of arrays, which takes milliseconds where building
it expression by expression takes seconds.  Where the memory rows are few they are all in the
model; else only those that a solution violates are added, and it is solved again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from time import perf_counter

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from ..problem import FloatArray, IntArray, ShardingProblem, whole_costs
from .base import LEAST_S, RELATIVE_GAP, Solution, SolverError, conclude
from .formulation import Formulation, formulate

# Above this many nonzeros memory rows are added only when violated, so many at a time.
_ALL_ROWS = 300_000
_ROWS_PER_ROUND = 20
# Memory rows are scaled to this limit (or to whole units below it): HiGHS accepts a row that is
# violated by 1e-7, which is then 1e-13 of the limit.
_ROW_LIMIT = 1e6

_PROVEN_EMPTY = (
    mathopt.TerminationReason.INFEASIBLE,
    mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED,  # every variable is bounded
)
_ANSWERED = (
    mathopt.TerminationReason.OPTIMAL,
    mathopt.TerminationReason.FEASIBLE,
    mathopt.TerminationReason.NO_SOLUTION_FOUND,
)


def solve(problem: ShardingProblem, *, time_limit_s: float) -> Solution:
    """Solve by HiGHS; see `planner.solvers.solve` for presolve and checks."""
    started = perf_counter()
    formulation = formulate(problem)
    model = _Model(formulation)
    lazy = formulation.memory.entries() > _ALL_ROWS
    if not lazy:
        model.add_rows(range(formulation.memory.rows.size))
    bound, best = -inf, _Result(None, -inf, False)
    for relaxed in (True, False) if lazy else (False,):
        while True:
            left = time_limit_s - (perf_counter() - started)
            if left < LEAST_S:
                return Solution(None, inf, bound, "unknown", perf_counter() - started)
            best = model.solve(left, relaxed)
            bound = max(bound, best.bound)
            if best.x is None or not model.add_violated(best.x):
                break
        if best.infeasible:
            reason = "no assignment satisfies all edges and memory rows"
            return Solution(None, inf, inf, "infeasible", perf_counter() - started, reason)
    if best.x is None:
        return Solution(None, inf, bound, "unknown", perf_counter() - started)
    return conclude(problem, formulation.assignment(best.x), bound, perf_counter() - started)


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """Values of all variables (None if none were found), a proven bound in the problem's units."""

    x: FloatArray | None
    bound: float
    infeasible: bool


class _Model:
    """The formulation as a MathOpt protocol buffer, with the memory rows added so far."""

    def __init__(self, formulation: Formulation) -> None:
        self.formulation = formulation
        self.scale = _objective_scale(formulation.objective)
        self.added: set[int] = set()
        self.proto = model_pb2.ModelProto()
        objective = formulation.objective * self.scale
        count, strategies = objective.size, formulation.strategies
        variables = self.proto.variables
        variables.ids.extend(range(count))
        variables.lower_bounds.extend(np.zeros(count))
        # the equations bound e; a bound of its own would only slow the simplex down
        variables.upper_bounds.extend(
            np.where(np.arange(count) < strategies, formulation.upper, inf)
        )
        used = np.nonzero(objective)[0]
        self.proto.objective.linear_coefficients.ids.extend(used)
        self.proto.objective.linear_coefficients.values.extend(objective[used])
        self._add_constraints(formulation.rhs, formulation.rhs)
        matrix = formulation.matrix
        self._add_terms(matrix.rows, matrix.cols, matrix.values)

    def _add_constraints(self, lower: FloatArray, upper: FloatArray) -> int:
        rows = self.proto.linear_constraints
        first = len(rows.ids)
        rows.ids.extend(range(first, first + lower.size))
        rows.lower_bounds.extend(lower)
        rows.upper_bounds.extend(upper)
        return first

    def _add_terms(self, rows: IntArray, cols: IntArray, values: FloatArray) -> None:
        matrix = self.proto.linear_constraint_matrix
        matrix.row_ids.extend(rows)
        matrix.column_ids.extend(cols)
        matrix.coefficients.extend(values)

    def add_rows(self, positions: Iterable[int]) -> None:
        """Add memory rows by their position in `formulation.memory.rows`."""
        memory = self.formulation.memory
        for position in positions:
            cols, size = memory.row(position)
            room = self.formulation.problem.capacity
            unit = _unit(size)
            scale = min(1 / unit, _ROW_LIMIT / room) if room else 1 / unit
            row = self._add_constraints(np.array([-inf]), np.array([room * scale]))
            self._add_terms(np.full(cols.size, row), cols, size * scale)
            self.added.add(position)

    def add_violated(self, x: FloatArray) -> bool:
        """Add the rows that `x` violates most, spread over time.  True if any was added."""
        memory = self.formulation.memory
        excess = memory.live(x) - self.formulation.problem.capacity * (1 + 1e-9)
        excess[list(self.added)] = 0.0
        # a peak: no less than its neighbours; a plateau gives one row only
        padded = np.concatenate([[-inf], excess, [-inf]])
        peak = (excess > 0) & (excess >= padded[:-2]) & (excess > padded[2:])
        worst = np.nonzero(peak)[0]
        worst = worst[np.argsort(-excess[worst])][:_ROWS_PER_ROUND]
        self.add_rows(worst.tolist())
        return bool(worst.size)

    def solve(self, time_limit_s: float, relaxed: bool) -> _Result:
        """Solve with the rows added so far; `relaxed` drops integrality."""
        formulation = self.formulation
        integers = self.proto.variables.integers
        del integers[:]
        integers.extend(
            (np.arange(formulation.objective.size) < formulation.strategies) & (not relaxed)
        )
        whole = whole_costs(formulation.problem)
        params = mathopt.SolveParameters(
            time_limit=timedelta(seconds=time_limit_s),
            relative_gap_tolerance=0.0 if whole else RELATIVE_GAP / 2,
            absolute_gap_tolerance=0.999 * self.scale if whole else 0.0,
        )
        model = mathopt.Model.from_model_proto(self.proto)
        found = mathopt.solve(model, mathopt.SolverType.HIGHS, params=params)
        reason = found.termination.reason
        if reason in _PROVEN_EMPTY:
            return _Result(None, inf, True)
        if reason not in _ANSWERED:
            raise SolverError(f"HiGHS stopped with {reason.name}: {found.termination.detail}")
        bound = found.termination.objective_bounds.dual_bound / self.scale
        x = None
        if found.has_primal_feasible_solution():
            values = found.variable_values()
            x = np.fromiter(values.values(), dtype=np.float64, count=len(values))
        return _Result(x, bound, False)


def _objective_scale(objective: FloatArray) -> float:
    """A power of two that brings the middle nonzero coefficient near 100: tolerances are 1e-7."""
    size = np.abs(objective[objective != 0])
    return 2.0 ** np.rint(np.log2(100 / np.median(size))) if size.size else 1.0


def _unit(sizes: FloatArray) -> float:
    """The largest number that all whole `sizes` are multiples of; 1 where they are not whole."""
    if sizes.size and (sizes == np.rint(sizes)).all() and sizes.max() < 2**62:
        return float(np.gcd.reduce(sizes.astype(np.int64))) or 1.0
    return 1.0
