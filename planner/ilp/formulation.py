"""The tight linear formulation, as arrays.

Variables: `s[n, k]` in {0, 1}, node n takes strategy k; for each edge continuous
`e[r, c] >= 0`, the pair of its ends lies in row group r and column group c.

    sum_k s[n, k] = 1                                  each node
    sum_c e[r, c] = sum of s over row group r          each edge, each row group
    sum_r e[r, c] = sum of s over column group c       each edge, each column group
    sum of bytes * s <= limit                          each memory row that can bind

Rows of an edge's matrix that are equal form a group, and columns likewise: the pair's price
depends on the groups alone, so nothing is lost, and most edges shrink by an order of magnitude
(many strategies produce or need the same layout).  Row and column sums make this the convex hull of
each edge taken alone, where `e >= s_i + s_j - 1` is far from it.  Forbidden pairs get no
variable.  Where every row group allows just one column group and the other way round, the sums
of the two groups are equal and the edge needs no e at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .presolve import group_rows
from .problem import FloatArray, IntArray, ShardingProblem, live_rows


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """A sparse matrix: `values[k]` at `(rows[k], cols[k])`, no place twice, row-major order."""

    rows: IntArray
    cols: IntArray
    values: FloatArray


@dataclass(frozen=True, eq=False)
class Formulation:
    """min `objective @ x` where `matrix @ x == rhs`, `0 <= x <= upper`, the first `strategies`
    variables binary, and the memory rows hold.

    `starts[n]` is the variable of node n's first strategy (one more entry than nodes).
    """

    problem: ShardingProblem
    starts: IntArray
    objective: FloatArray
    upper: FloatArray
    matrix: Sparse
    rhs: FloatArray

    @property
    def strategies(self) -> int:
        """Number of binary variables; they come first."""
        return int(self.starts[-1])

    @cached_property
    def memory(self) -> Memory:
        """The memory rows."""
        return Memory(self.problem, self.starts)

    def shifts(self, prices: FloatArray) -> list[list[FloatArray]]:
        """Costs shifted from each edge to the strategies of its two ends by `prices` of the
        equations; the problem must have no edge from a node to itself."""
        found: list[list[FloatArray]] = []
        at = len(self.problem.nodes)  # the first equations are those of the nodes
        for edge in self.problem.edges:
            groups = _Groups.of(edge.costs)
            of_rows = prices[at : at + groups.shape[0]]
            at += groups.shape[0]
            if groups.match is not None:
                own = groups.matched_price - of_rows
                given = np.empty(groups.shape[1])
                given[groups.match] = of_rows
                found.append([own[groups.row], given[groups.col]])
                continue
            of_cols = prices[at : at + groups.shape[1]]
            at += groups.shape[1]
            found.append([of_rows[groups.row], of_cols[groups.col]])
        return found

    def assignment(self, x: FloatArray) -> tuple[int, ...]:
        """The strategy of each node with the largest value in `x`."""
        pairs = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        return tuple(int(x[start:stop].argmax()) for start, stop in pairs)


class Memory:
    """All memory rows of a problem that can bind, kept by usage so that thousands stay small."""

    def __init__(self, problem: ShardingProblem, starts: IntArray) -> None:
        self.limit = problem.usage_limit
        self.strategies = int(starts[-1])
        flat = [
            (n, usage)
            for n, node in enumerate(problem.nodes)
            for usage in node.usages
            if usage.start < usage.end and self.limit is not None
        ]
        self.node = np.array([n for n, _ in flat], dtype=np.int64)
        begin = np.array([usage.start for _, usage in flat], dtype=np.int64)
        end = np.array([usage.end for _, usage in flat], dtype=np.int64)
        times, self.first, self.stop = live_rows(begin, end)
        self.size = np.array([usage.bytes.size for _, usage in flat], dtype=np.int64)
        self.bytes = np.concatenate([usage.bytes for _, usage in flat] or [np.zeros(0)])
        self.at = np.concatenate([[0], np.cumsum(self.size)])  # where a usage's bytes start
        local = np.arange(self.bytes.size) - np.repeat(self.at[:-1], self.size)
        self.variable = np.repeat(starts[self.node], self.size) + local
        self.rows = np.zeros(0, dtype=np.int64)
        if times.size:
            most = np.maximum.reduceat(self.bytes, self.at[:-1])
            self.rows = np.nonzero(self._per_row(most, times.size) > problem.capacity)[0]
        self.times = times  # of all rows, those that cannot bind included

    def _per_row(self, values: FloatArray, count: int) -> FloatArray:
        change = np.zeros(count + 1)
        np.add.at(change, self.first, values)
        np.subtract.at(change, self.stop, values)
        return np.cumsum(change)[:-1]

    def live(self, x: FloatArray) -> FloatArray:
        """Bytes live in each of `rows` under (fractional) strategy values `x`."""
        if not self.rows.size:
            return np.zeros(0)
        values = np.add.reduceat(self.bytes * x[self.variable], self.at[:-1])
        return self._per_row(values, self.times.size)[self.rows]

    def entries(self) -> int:
        """About how many nonzeros all `rows` would have."""
        begin, end = np.searchsorted(self.rows, self.first), np.searchsorted(self.rows, self.stop)
        return int(((end - begin) * self.size).sum())

    def row(self, position: int) -> tuple[IntArray, FloatArray]:
        """Variables and bytes of row number `position` in `rows`."""
        row = self.rows[position]
        live = np.nonzero((self.first <= row) & (row < self.stop))[0]
        index = np.concatenate([np.arange(self.at[u], self.at[u + 1]) for u in live])
        total = np.zeros(self.strategies)
        np.add.at(total, self.variable[index], self.bytes[index])
        used = np.nonzero(total)[0]
        return used, total[used]


class _Builder:
    """Collects variables and equations."""

    def __init__(self, objective: FloatArray) -> None:
        self.objective = [objective]
        self.variables = objective.size
        self.equations = 0
        self.rows: list[IntArray] = []
        self.cols: list[IntArray] = []
        self.values: list[FloatArray] = []
        self.rhs: list[FloatArray] = []

    def variables_for(self, costs: FloatArray) -> IntArray:
        """New variables with these costs."""
        index = np.arange(self.variables, self.variables + costs.size)
        self.objective.append(costs)
        self.variables += costs.size
        return index

    def equations_for(self, rhs: FloatArray) -> int:
        """New equations; returns the first one's number."""
        first = self.equations
        self.rhs.append(rhs)
        self.equations += rhs.size
        return first

    def add(self, rows: IntArray, cols: IntArray, value: float) -> None:
        self.rows.append(rows)
        self.cols.append(cols)
        self.values.append(np.full(rows.size, value))

    def matrix(self) -> Sparse:
        rows, cols = np.concatenate(self.rows), np.concatenate(self.cols)
        order = np.lexsort((cols, rows))
        return Sparse(rows[order], cols[order], np.concatenate(self.values)[order])


def formulate(problem: ShardingProblem) -> Formulation:
    """The formulation of `problem`, which must have at least one node."""
    sizes = np.array([node.costs.size for node in problem.nodes], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    costs = np.concatenate([node.costs for node in problem.nodes])
    for edge in problem.edges:
        if edge.a == edge.b:
            costs[starts[edge.a] : starts[edge.a + 1]] += np.diagonal(edge.costs)
    allowed = np.isfinite(costs)
    builder = _Builder(np.where(allowed, costs, 0.0))
    one = builder.equations_for(np.ones(sizes.size))
    builder.add(one + np.repeat(np.arange(sizes.size), sizes), np.arange(costs.size), 1.0)
    for edge in problem.edges:
        if edge.a != edge.b:
            _add_edge(builder, edge.costs, int(starts[edge.a]), int(starts[edge.b]))
    upper = np.ones(builder.variables)
    upper[: costs.size] = allowed
    return Formulation(
        problem,
        starts,
        np.concatenate(builder.objective),
        upper,
        builder.matrix(),
        np.concatenate(builder.rhs),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """An edge's costs by groups of equal rows and columns: `row` and `col` are those of each
    strategy.  Where each row group allows just one column group and the other way round, `match`
    is the column group of each row group."""

    costs: FloatArray
    row: IntArray
    col: IntArray
    match: IntArray | None

    @staticmethod
    def of(costs: FloatArray) -> _Groups:
        row_first, row = group_rows(costs)
        col_first, col = group_rows(costs.T)
        grouped = costs[np.ix_(row_first, col_first)]
        finite = np.isfinite(grouped)
        one = bool((finite.sum(axis=1) == 1).all() and (finite.sum(axis=0) == 1).all())
        return _Groups(grouped, row, col, finite.argmax(axis=1) if one else None)

    @property
    def shape(self) -> tuple[int, int]:
        """How many groups of rows and of columns."""
        rows, cols = self.costs.shape
        return rows, cols

    @property
    def matched_price(self) -> FloatArray:
        """What each row group costs with the column group that it is matched with."""
        return self.costs[np.arange(self.shape[0]), self.match]


def _add_edge(builder: _Builder, costs: FloatArray, start_a: int, start_b: int) -> None:
    """Equations of one edge; `start_a` and `start_b` are the variables of its ends."""
    groups = _Groups.of(costs)
    (rows, cols), row_group, col_group = groups.shape, groups.row, groups.col
    s_a = start_a + np.arange(row_group.size)
    s_b = start_b + np.arange(col_group.size)
    if groups.match is not None:  # sum over the row group = sum over its column group
        equation = builder.equations_for(np.zeros(rows))
        of_col = np.empty(cols, dtype=np.int64)
        of_col[groups.match] = np.arange(rows)
        builder.add(equation + row_group, s_a, 1.0)
        builder.add(equation + of_col[col_group], s_b, -1.0)
        builder.objective[0][s_a] += groups.matched_price[row_group]
        return
    grouped = groups.costs
    r, c = np.nonzero(np.isfinite(grouped))
    e = builder.variables_for(grouped[r, c])
    equation = builder.equations_for(np.zeros(rows + cols))
    builder.add(equation + r, e, 1.0)
    builder.add(equation + rows + c, e, 1.0)
    builder.add(equation + row_group, s_a, -1.0)
    builder.add(equation + rows + col_group, s_b, -1.0)


__all__ = ["Formulation", "Memory", "Sparse", "formulate"]
