"""What every solver takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal, Protocol, TypeAlias

import numpy as np

from .problem import ShardingProblem, evaluate, whole_costs

# "Optimal" means that cost and bound differ by less than this, relative to the cost.
RELATIVE_GAP = 1e-6
# The least time a back end is given: enough to answer a trivial problem.
LEAST_S = 0.01

Status: TypeAlias = Literal["optimal", "feasible", "infeasible", "unknown", "dearer"]


class SolverError(RuntimeError):
    """A solver failed, or gave an answer that the evaluator does not confirm: a bug."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A solver's answer.

    `optimal`: proven within a relative gap of 1e-6 (integer costs: exactly).  `feasible`: the best
    found in the time.  `infeasible`: proven, `reason` says what shows it, and `clash` the node of
    which no strategy goes with the others', where it is not memory.  `unknown`: neither an
    assignment nor a proof.  `dearer`: proven that whatever there is costs the given ceiling or
    more.  `assignment` is None for the last three; `cost` is then inf.  `bound` is a proven lower
    bound on every feasible assignment's cost (-inf if none is known).  `seconds` is the wall-clock
    time of the whole call.
    """

    assignment: tuple[int, ...] | None
    cost: float
    bound: float
    status: Status
    seconds: float
    reason: str = ""
    clash: str = ""

    @property
    def gap(self) -> float:
        """(cost - bound) / |cost|; 0 when they are equal."""
        if self.cost == self.bound:
            return 0.0
        return (self.cost - self.bound) / abs(self.cost) if self.cost else float("inf")


def _smallest_cost(problem: ShardingProblem) -> float:
    """The smallest size of a nonzero finite cost: what a total of 0 is measured against."""
    sizes = (np.abs(item.costs) for item in (*problem.nodes, *problem.edges))
    least = min((float(s[(s > 0) & np.isfinite(s)].min(initial=inf)) for s in sizes), default=inf)
    return least if isfinite(least) else 0.0


def conclude(
    problem: ShardingProblem, assignment: tuple[int, ...], bound: float, seconds: float
) -> Solution:
    """The solution that an assignment and a proven lower bound amount to.

    Raises `SolverError` if the evaluator finds the assignment infeasible.
    """
    found = evaluate(problem, assignment)
    if not found.feasible:
        raise SolverError(
            f"`{problem.name}`: a solver's assignment is not feasible: {found.reason}"
        )
    whole = whole_costs(problem)
    slack = 1 - 1e-3 if whole else RELATIVE_GAP * max(abs(found.cost), _smallest_cost(problem))
    if found.cost - bound <= slack:
        # a bound may exceed the cost by rounding; whole costs leave nothing in between
        proven = found.cost if whole else min(bound, found.cost)
        return Solution(assignment, found.cost, proven, "optimal", seconds)
    return Solution(assignment, found.cost, bound, "feasible", seconds)


class Solver(Protocol):
    """A back end: solves a problem as it is given, without presolve."""

    def __call__(
        self, problem: ShardingProblem, *, time_limit_s: float, ceiling: float = inf
    ) -> Solution:
        """Solve within about `time_limit_s` seconds; what costs `ceiling` or more is not wanted,
        and may be answered with `dearer`."""
        ...


__all__ = [
    "LEAST_S",
    "RELATIVE_GAP",
    "Solution",
    "Solver",
    "SolverError",
    "Status",
    "conclude",
]
