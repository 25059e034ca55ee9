"""The default solver: HiGHS through highspy, on the tight formulation.

The model is handed over as arrays, which takes milliseconds where building it expression by
expression takes seconds.  Where the memory rows are few they are all in the model; else only those
that a solution violates are added, and it is solved again from where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from time import perf_counter

import highspy
import numpy as np

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
    highspy.HighsModelStatus.kInfeasible,
    highspy.HighsModelStatus.kUnboundedOrInfeasible,  # every variable is bounded
    highspy.HighsModelStatus.kObjectiveBound,  # there is none below the ceiling
)
_OPTIMAL = highspy.HighsModelStatus.kOptimal
_OUT_OF_TIME = highspy.HighsModelStatus.kTimeLimit
_FEASIBLE = highspy.SolutionStatus.kSolutionStatusFeasible


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


class _Highs(highspy.Highs):
    """HiGHS that prints nothing: it greets as its callbacks are enabled, when it is made."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)


class _Model:
    """The formulation inside HiGHS, with the memory rows added so far."""

    def __init__(self, formulation: Formulation) -> None:
        self.formulation = formulation
        self.scale = _objective_scale(formulation.objective)
        self.scales: dict[int, float] = {}  # of the memory rows that were added, in order
        self.highs = _Highs()
        self.set(output_flag=False, threads=1, parallel="off")
        # what presolve could find ours has found: HiGHS' own takes longer than the simplex then
        self.set(presolve="off")
        self.highs.passModel(self._program())

    def set(self, **options: bool | float | str) -> None:
        """Options of HiGHS by their names."""
        for name, value in options.items():
            if self.highs.setOptionValue(name, value) != highspy.HighsStatus.kOk:
                raise SolverError(f"HiGHS has no option `{name}` of {value!r}")

    def _program(self) -> highspy.HighsLp:
        formulation, matrix = self.formulation, self.formulation.matrix
        count, equations = formulation.objective.size, formulation.rhs.size
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = count, equations
        program.col_cost_ = formulation.objective * self.scale
        program.col_lower_ = np.zeros(count)
        # the equations bound e; a bound of its own would only slow the simplex down
        first = np.arange(count) < formulation.strategies
        program.col_upper_ = np.where(first, formulation.upper, inf)
        program.row_lower_ = program.row_upper_ = formulation.rhs
        starts = np.concatenate([[0], np.cumsum(np.bincount(matrix.rows, minlength=equations))])
        program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        program.a_matrix_.start_ = starts
        program.a_matrix_.index_ = matrix.cols
        program.a_matrix_.value_ = matrix.values
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        program.integrality_ = [kinds[whole] for whole in first.tolist()]
        return program

    def add_rows(self, positions: Iterable[int]) -> None:
        """Add memory rows by their position in `formulation.memory.rows`."""
        memory = self.formulation.memory
        for position in positions:
            cols, size = memory.row(position)
            room = self.formulation.problem.capacity
            unit = _unit(size)
            scale = min(1 / unit, _ROW_LIMIT / room) if room else 1 / unit
            self.highs.addRow(
                -inf, room * scale, cols.size, cols.astype(np.int32), size * scale
            )  # fmt: skip
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

    def run(self, time_limit_s: float, *, relaxed: bool) -> highspy.HighsModelStatus:
        """Solve with the rows added so far, with integrality or without."""
        # the clock of HiGHS goes on from one run to the next
        self.set(solve_relaxation=relaxed, time_limit=self.highs.getRunTime() + time_limit_s)
        self.highs.run()
        return self.highs.getModelStatus()

    @property
    def values(self) -> FloatArray:
        """Of the strategies."""
        values = np.array(self.highs.getSolution().col_value)
        return values[: self.formulation.strategies]

    def relax(self, time_limit_s: float) -> tuple[FloatArray, FloatArray] | None:
        """(values of the strategies, prices of all rows) of an optimal answer without integrality;
        None if there is none in the time."""
        if self.run(time_limit_s, relaxed=True) != _OPTIMAL:
            return None
        return self.values, np.array(self.highs.getSolution().row_dual) / self.scale

    def solve(self, time_limit_s: float, relaxed: bool, ceiling: float = inf) -> _Result:
        """Solve with the rows added so far, infeasible also where nothing costs less than
        `ceiling`; `relaxed` drops integrality, and knows no ceiling."""
        whole = whole_costs(self.formulation.problem)
        self.set(
            mip_rel_gap=0.0 if whole else RELATIVE_GAP / 2,
            mip_abs_gap=0.999 * self.scale if whole else 0.0,
            objective_bound=inf if relaxed else ceiling * self.scale,
        )
        status = self.run(time_limit_s, relaxed=relaxed)
        if status in _PROVEN_EMPTY:
            return _Result(None, inf, True, True)
        if status not in (_OPTIMAL, _OUT_OF_TIME):
            raise SolverError(f"HiGHS stopped with {self.highs.modelStatusToString(status)}")
        info = self.highs.getInfo()
        found = info.primal_solution_status == int(_FEASIBLE)
        bound = info.objective_function_value if relaxed else info.mip_dual_bound
        if relaxed and status == _OUT_OF_TIME:
            bound = -inf
        return _Result(
            self.values if found else None, bound / self.scale, False, status == _OPTIMAL
        )


def _objective_scale(objective: FloatArray) -> float:
    """A power of two that brings the middle nonzero coefficient near 100: tolerances are 1e-7."""
    size = np.abs(objective[objective != 0])
    return 2.0 ** np.rint(np.log2(100 / np.median(size))) if size.size else 1.0


def _unit(sizes: FloatArray) -> float:
    """The largest number that all whole `sizes` are multiples of; 1 where they are not whole."""
    if sizes.size and (sizes == np.rint(sizes)).all() and sizes.max() < 2**62:
        return float(np.gcd.reduce(sizes.astype(np.int64))) or 1.0
    return 1.0
