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
from ortools.math_opt import (
    callback_pb2,
    model_parameters_pb2,
    model_pb2,
    parameters_pb2,
    sparse_containers_pb2,
)
from ortools.math_opt.core.python import solver as core
from ortools.math_opt.python import mathopt

from .formulation import Formulation, formulate
from .problem import FloatArray, IntArray, ShardingProblem, whole_costs
from .solution import LEAST_S, RELATIVE_GAP, Solution, SolverError, conclude

# Above this many nonzeros memory rows are added only when violated, so many at a time.
_ALL_ROWS = 300_000
_SOME = 1e-6  # less of a strategy in a linear relaxation's answer is rounding
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


def solve(problem: ShardingProblem, *, time_limit_s: float, ceiling: float = inf) -> Solution:
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
            best = model.solve(left, relaxed, ceiling)
            bound = max(bound, best.bound)
            if best.x is None or not model.add_violated(best.x):
                break
        if best.infeasible and not relaxed and ceiling < inf:
            return Solution(None, inf, ceiling, "dearer", perf_counter() - started)
        if best.infeasible:
            reason = "no assignment satisfies all edges and memory rows"
            return Solution(None, inf, inf, "infeasible", perf_counter() - started, reason)
    bound = min(bound, ceiling)  # what costs more was not looked at
    if best.x is None:
        return Solution(None, inf, bound, "unknown", perf_counter() - started)
    found = conclude(problem, formulation.assignment(best.x), bound, perf_counter() - started)
    if found.cost > ceiling and best.finished:
        return Solution(None, inf, ceiling, "dearer", found.seconds)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """An optimal answer of the linear relaxation.

    The strategy of each node that it has most of, and all that it has any of; costs shifted from
    edges to their ends; the price of a byte at each of the problem's live rows (see
    `problem.live_rows`), and the times of those that have one.
    """

    rounded: tuple[int, ...]
    support: list[IntArray]
    shifts: list[list[FloatArray]]
    prices: FloatArray
    binding: IntArray


def relax(problem: ShardingProblem, *, time_limit_s: float) -> Relaxed | None:
    """Solve the linear relaxation of a presolved problem; None without an answer in the time."""
    started = perf_counter()
    formulation = formulate(problem)
    model = _Model(formulation)
    model.add_violated(np.ones(formulation.strategies))  # the rows where most can be live
    while True:
        found = model.relax(max(LEAST_S, time_limit_s - (perf_counter() - started)))
        if found is None or not model.add_violated(found[0]):
            break
    if found is None:
        return None
    x, duals = found
    prices = np.zeros(formulation.memory.times.size)
    first = formulation.rhs.size
    for number, (position, scale) in enumerate(model.scales.items()):
        row = formulation.memory.rows[position]
        prices[row] = max(0.0, -duals[first + number] * scale)
    binding = formulation.memory.times[prices > 0]
    support = [np.flatnonzero(part > _SOME) for part in np.split(x, formulation.starts[1:-1])]
    shifts = formulation.shifts(duals)
    return Relaxed(formulation.assignment(x), support, shifts, prices, binding)


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """Values of all variables (None if none were found), a proven bound in the problem's units."""

    x: FloatArray | None
    bound: float
    infeasible: bool
    finished: bool = False  # it is the best below a ceiling, or there is none


class _Model:
    """The formulation as a MathOpt protocol buffer, with the memory rows added so far."""

    def __init__(self, formulation: Formulation) -> None:
        self.formulation = formulation
        self.scale = _objective_scale(formulation.objective)
        self.scales: dict[int, float] = {}  # of the memory rows that were added, in order
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
            self.scales[position] = scale

    def add_violated(self, x: FloatArray) -> bool:
        """Add the rows that `x` violates most, spread over time.  True if any was added."""
        memory = self.formulation.memory
        excess = memory.live(x) - self.formulation.problem.capacity * (1 + 1e-9)
        excess[list(self.scales)] = 0.0
        # a peak: no less than its neighbours; a plateau gives one row only
        padded = np.concatenate([[-inf], excess, [-inf]])
        peak = (excess > 0) & (excess >= padded[:-2]) & (excess > padded[2:])
        worst = np.nonzero(peak)[0]
        worst = worst[np.argsort(-excess[worst])][:_ROWS_PER_ROUND]
        self.add_rows(worst.tolist())
        return bool(worst.size)

    def relax(self, time_limit_s: float) -> tuple[FloatArray, FloatArray] | None:
        """(values of the strategies, prices of all rows) of an optimal answer without integrality;
        None if there is none in the time.

        The solver is called as MathOpt calls it: its own wrapper would make Python objects of the
        basis, which takes longer than the solver.
        """
        del self.proto.variables.integers[:]
        self.proto.variables.integers.extend(np.zeros(self.formulation.objective.size, dtype=bool))
        # What presolve could find ours has found: HiGHS' own takes longer than the simplex then.
        params = mathopt.SolveParameters(
            time_limit=timedelta(seconds=time_limit_s), presolve=mathopt.Emphasis.OFF
        )
        kind = mathopt.SolverType.HIGHS
        found = core.solve(
            self.proto, kind.value, parameters_pb2.SolverInitializerProto(), params.to_proto(),
            model_parameters_pb2.ModelSolveParametersProto(), None,
            callback_pb2.CallbackRegistrationProto(), None, None,
        )  # fmt: skip
        if found.termination.reason != mathopt.TerminationReason.OPTIMAL.value:
            return None
        best = found.solutions[0]
        values = _dense(best.primal_solution.variable_values, self.formulation.objective.size)
        rows = len(self.proto.linear_constraints.ids)
        prices = _dense(best.dual_solution.dual_values, rows) / self.scale
        return values[: self.formulation.strategies], prices

    def solve(self, time_limit_s: float, relaxed: bool, ceiling: float = inf) -> _Result:
        """Solve with the rows added so far, infeasible also where nothing costs less than
        `ceiling`; `relaxed` drops integrality, and knows no ceiling."""
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
            presolve=mathopt.Emphasis.OFF,  # as in `relax`; it halves the time
        )
        if ceiling < inf and not relaxed:
            params.highs.double_options["objective_bound"] = ceiling * self.scale
        model = mathopt.Model.from_model_proto(self.proto)
        found = mathopt.solve(model, mathopt.SolverType.HIGHS, params=params)
        reason = found.termination.reason
        if reason in _PROVEN_EMPTY:
            return _Result(None, inf, True, True)
        if reason not in _ANSWERED:
            raise SolverError(f"HiGHS stopped with {reason.name}: {found.termination.detail}")
        bound = found.termination.objective_bounds.dual_bound / self.scale
        x = None
        if found.has_primal_feasible_solution():
            values = found.variable_values()
            x = np.fromiter(values.values(), dtype=np.float64, count=len(values))
        return _Result(x, bound, False, reason == mathopt.TerminationReason.OPTIMAL)


def _dense(sparse: sparse_containers_pb2.SparseDoubleVectorProto, size: int) -> FloatArray:
    """The numbers by id, 0 where there is none."""
    found = np.zeros(size)
    found[np.array(sparse.ids, dtype=np.int64)] = sparse.values
    return found


def _objective_scale(objective: FloatArray) -> float:
    """A power of two that brings the middle nonzero coefficient near 100: tolerances are 1e-7."""
    size = np.abs(objective[objective != 0])
    return 2.0 ** np.rint(np.log2(100 / np.median(size))) if size.size else 1.0


def _unit(sizes: FloatArray) -> float:
    """The largest number that all whole `sizes` are multiples of; 1 where they are not whole."""
    if sizes.size and (sizes == np.rint(sizes)).all() and sizes.max() < 2**62:
        return float(np.gcd.reduce(sizes.astype(np.int64))) or 1.0
    return 1.0
