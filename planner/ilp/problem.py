"""The sharding problem: which strategy does each node take?

A `ShardingProblem` is a pairwise choice problem with memory: every node takes one of its
strategies, pays that strategy's cost, every edge charges for the pair chosen at its two ends, and
at every time the bytes of the live usages must fit the limit.  It is the form of Google's public
IOPDDL benchmark, except that a node may have several usages.

`evaluate` prices an assignment.  It is independent of presolve and of every solver, and every
solver's answer passes through it.

Units: costs are float64 seconds (IOPDDL files: integers without unit), `inf` forbids; usages are
bytes; times are integers without unit, intervals are half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, inf, prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

# Summing floats in another order may move a sum by this much, relative to the limit.  Whole
# bytes up to 1 TB are still compared exactly.
LIMIT_TOLERANCE = 1e-12

# The same for the least that costs add up to.
_ROUNDING = 1e-12

BRUTE_FORCE_LIMIT = 2_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Usage:
    """Memory that is live in `[start, end)`: `bytes[k]` under the node's strategy k.

    Invariants: start <= end (an empty interval is never live); bytes are finite and >= 0.
    """

    start: int
    end: int
    bytes: FloatArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", np.asarray(self.bytes, dtype=np.float64))
        if self.start > self.end:
            raise ValueError(f"a usage's interval [{self.start}, {self.end}) ends before it starts")
        if self.bytes.ndim != 1:
            raise ValueError(f"a usage's bytes must be a vector, got shape {self.bytes.shape}")
        if not np.isfinite(self.bytes).all() or (self.bytes < 0).any():
            raise ValueError("a usage's bytes must be finite and at least 0")


@dataclass(frozen=True, slots=True, eq=False)
class ProblemNode:
    """One choice: `costs[k]` is the price of strategy k, `inf` where it is forbidden.

    Invariants: at least one strategy; no cost is NaN or -inf; every usage has one entry for each
    strategy.
    """

    name: str
    costs: FloatArray
    usages: tuple[Usage, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", np.asarray(self.costs, dtype=np.float64))
        if self.costs.ndim != 1 or self.costs.size == 0:
            raise ValueError(
                f"node `{self.name}`: costs must be a vector with at least one strategy, "
                f"got shape {self.costs.shape}"
            )
        _check_costs(self.costs, f"node `{self.name}`")
        for usage in self.usages:
            if usage.bytes.size != self.costs.size:
                raise ValueError(
                    f"node `{self.name}` has {self.costs.size} strategies, "
                    f"but a usage with {usage.bytes.size} entries"
                )


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """`costs[i, j]`: the price when node `a` takes strategy i and node `b` takes j; `inf` forbids.

    Parallel edges add up.  A self-loop (a == b) charges the diagonal.
    """

    a: int
    b: int
    costs: FloatArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", np.asarray(self.costs, dtype=np.float64))
        if self.costs.ndim != 2:
            raise ValueError(
                f"edge ({self.a}, {self.b}): costs must be a matrix, got shape {self.costs.shape}"
            )
        _check_costs(self.costs, f"edge ({self.a}, {self.b})")


def _check_costs(costs: FloatArray, where: str) -> None:
    if np.isnan(costs).any() or (costs == -inf).any():
        raise ValueError(f"{where}: a cost is NaN or -inf; costs are finite, or inf to forbid")


def least_cost(nodes: Sequence[ProblemNode], edges: Sequence[Edge] = ()) -> float:
    """What every assignment costs at least: each node and edge for itself at its cheapest."""
    least = fsum(float(item.costs.min()) for item in (*nodes, *edges))
    return least - _ROUNDING * abs(least)


@dataclass(frozen=True, slots=True, eq=False)
class ShardingProblem:
    """Nodes, edges between them by index, and the bytes that may be live at any time.

    Invariants: edges join nodes that exist and have one cost for each pair of strategies;
    `usage_limit` is finite and at least 0, or None for no limit.
    """

    name: str
    nodes: tuple[ProblemNode, ...]
    edges: tuple[Edge, ...]
    usage_limit: float | None

    def __post_init__(self) -> None:
        if self.usage_limit is not None and not 0 <= self.usage_limit < inf:
            raise ValueError(f"usage_limit must be at least 0, or None, got {self.usage_limit}")
        for edge in self.edges:
            if not (0 <= edge.a < len(self.nodes) and 0 <= edge.b < len(self.nodes)):
                raise ValueError(
                    f"edge ({edge.a}, {edge.b}) names a node outside 0..{len(self.nodes) - 1}"
                )
            want = (self.nodes[edge.a].costs.size, self.nodes[edge.b].costs.size)
            if edge.costs.shape != want:
                raise ValueError(
                    f"edge ({edge.a}, {edge.b}) joins nodes with {want[0]} and {want[1]} "
                    f"strategies, but its costs have shape {edge.costs.shape}"
                )

    @property
    def capacity(self) -> float:
        """The largest live sum that counts as fitting; inf without a limit."""
        if self.usage_limit is None:
            return inf
        return self.usage_limit + LIMIT_TOLERANCE * self.usage_limit

    def __str__(self) -> str:
        """Every node with its costs and usages, every edge with its costs: a row per strategy."""
        limit = "no limit" if self.usage_limit is None else f"limit {self.usage_limit:.9g}"
        lines = [f"{self.name}: {len(self.nodes)} nodes, {len(self.edges)} edges, {limit}"]
        for index, node in enumerate(self.nodes):
            lines += [f"node {index} {node.name}", f"  costs {_numbers(node.costs)}"]
            lines += [f"  live [{u.start}, {u.end}) {_numbers(u.bytes)}" for u in node.usages]
        for edge in self.edges:
            lines += [f"edge {edge.a} {edge.b}", *(f"  {_numbers(row)}" for row in edge.costs)]
        return "\n".join(lines)


def _numbers(values: FloatArray) -> str:
    """To six digits, enough to compare two problems by eye.

    >>> _numbers(np.array([0.5, inf]))
    '0.5 inf'
    """
    return " ".join(f"{x:.6g}" for x in values)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an assignment costs.

    `cost` is inf if a chosen strategy or pair is forbidden; it does not depend on memory.
    `peak_usage` is the largest live sum and `peak_time` the first time it is reached (None if
    nothing is ever live).  `reason` says why the assignment is not feasible, and is empty if it is.
    """

    cost: float
    peak_usage: float
    peak_time: int | None
    feasible: bool
    reason: str = ""


def evaluate(problem: ShardingProblem, assignment: Sequence[int]) -> Evaluation:
    """Price `assignment`, one strategy index per node.

    Raises `ValueError` if it has the wrong length or an index is out of range.

    >>> p = ShardingProblem("p", (ProblemNode("x", np.array([3.0, 1.0])),), (), None)
    >>> evaluate(p, [1]).cost
    1.0
    """
    nodes = problem.nodes
    if len(assignment) != len(nodes):
        raise ValueError(f"the problem has {len(nodes)} nodes, the assignment {len(assignment)}")
    for node, choice in zip(nodes, assignment, strict=True):
        if not 0 <= choice < node.costs.size:
            raise ValueError(
                f"node `{node.name}` has strategies 0..{node.costs.size - 1}, got {choice}"
            )
    cost, reason = _price(problem, assignment)
    peak, when = _peak(problem, assignment)
    if not reason and peak > problem.capacity:
        reason = f"{peak:.17g} bytes are live at time {when}, the limit is {problem.usage_limit}"
    return Evaluation(cost, peak, when, not reason, reason)


def _price(problem: ShardingProblem, assignment: Sequence[int]) -> tuple[float, str]:
    """Cost, and the first forbidden choice in words."""
    nodes, terms, reason = problem.nodes, list[float](), ""
    for node, choice in zip(nodes, assignment, strict=True):
        terms.append(float(node.costs[choice]))
        if terms[-1] == inf and not reason:
            reason = f"strategy {choice} of node `{node.name}` is forbidden"
    for edge in problem.edges:
        i, j = assignment[edge.a], assignment[edge.b]
        terms.append(float(edge.costs[i, j]))
        if terms[-1] == inf and not reason:
            a, b = nodes[edge.a].name, nodes[edge.b].name
            reason = f"strategy {i} of node `{a}` with strategy {j} of node `{b}` is forbidden"
    return (inf if reason else fsum(terms)), reason


def _peak(problem: ShardingProblem, assignment: Sequence[int]) -> tuple[float, int | None]:
    """Largest live sum and the first time of it, by a sweep over starts and ends."""
    live = [
        (usage.start, usage.end, float(usage.bytes[choice]))
        for node, choice in zip(problem.nodes, assignment, strict=True)
        for usage in node.usages
        if usage.start < usage.end
    ]
    if not live:
        return 0.0, None
    times = sorted({time for start, end, _ in live for time in (start, end)})
    index = {time: k for k, time in enumerate(times)}
    change = np.zeros(len(times))
    for start, end, size in live:
        change[index[start]] += size
        change[index[end]] -= size
    total = np.cumsum(change)
    first = int(total.argmax())
    return float(total[first]), times[first]


def whole_costs(problem: ShardingProblem) -> bool:
    """Are all costs integers (or inf), so that two different costs differ by at least 1?"""
    return all(
        bool((item.costs == np.rint(item.costs)).all()) for item in (*problem.nodes, *problem.edges)
    )


def brute_force(problem: ShardingProblem) -> tuple[tuple[int, ...], float] | None:
    """An optimal assignment and its cost by trying everything; None if nothing is feasible.

    Raises `ValueError` beyond `BRUTE_FORCE_LIMIT` assignments.
    """
    shape = tuple(node.costs.size for node in problem.nodes)
    if prod(shape) > BRUTE_FORCE_LIMIT or len(shape) > 30:
        raise ValueError(
            f"`{problem.name}` has {prod(shape):.3g} assignments, "
            f"brute force stops at {BRUTE_FORCE_LIMIT}"
        )
    total = np.zeros(shape)
    for axis, node in enumerate(problem.nodes):
        total = total + _spread(node.costs, (axis,), len(shape))
    for edge in problem.edges:
        if edge.a == edge.b:
            total = total + _spread(np.diagonal(edge.costs), (edge.a,), len(shape))
        else:
            total = total + _spread(edge.costs, (edge.a, edge.b), len(shape))
    starts = {u.start for node in problem.nodes for u in node.usages if u.start < u.end}
    for time in starts if problem.usage_limit is not None else ():
        live = np.zeros(shape)
        for axis, node in enumerate(problem.nodes):
            for usage in node.usages:
                if usage.start <= time < usage.end:
                    live = live + _spread(usage.bytes, (axis,), len(shape))
        total = np.where(live > problem.capacity, inf, total)
    best = int(total.argmin())
    cost = float(total.reshape(-1)[best])
    if cost == inf:
        return None
    return tuple(int(k) for k in np.unravel_index(best, shape)), cost


def _spread(values: FloatArray, axes: tuple[int, ...], ndim: int) -> FloatArray:
    """`values` over `axes` of an `ndim`-dimensional array, size 1 elsewhere."""
    if len(axes) == 2 and axes[0] > axes[1]:
        values, axes = values.T, (axes[1], axes[0])
    shape = [1] * ndim
    for axis, size in zip(axes, values.shape, strict=True):
        shape[axis] = size
    return values.reshape(shape)


def live_rows(starts: IntArray, ends: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """The times that matter for memory, and where each interval covers them.

    Of all sets of intervals that are live together only those that are subsets of no other can
    be the worst.  Returns their times, ascending, and for each interval `[starts, ends)` the
    half-open range of rows (positions in the times) in which it is live.

    >>> [x.tolist() for x in live_rows(np.array([0, 1, 5]), np.array([4, 3, 9]))]
    [[1, 5], [0, 0, 1], [1, 1, 2]]
    """
    live = starts < ends
    events = np.unique(np.concatenate([starts[live], ends[live]]))
    is_start = np.isin(events, starts[live])
    is_end = np.isin(events, ends[live])
    # maximal where something starts and the next event ends something
    times = events[:-1][is_start[:-1] & is_end[1:]]
    return times, np.searchsorted(times, starts), np.searchsorted(times, ends)


__all__ = [
    "BRUTE_FORCE_LIMIT", "Edge", "Evaluation", "FloatArray", "IntArray", "LIMIT_TOLERANCE",
    "ProblemNode", "ShardingProblem", "Usage", "brute_force", "evaluate", "least_cost", "live_rows",
    "whole_costs",
]  # fmt: skip
