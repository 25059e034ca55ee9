"""Exact reductions of a sharding problem, each of which can be undone.

`presolve` returns a smaller problem with the same optimum and a way back: `restore` turns any
assignment of the smaller problem into one of the original with the same cost and the same
feasibility.  The reductions, repeated until none applies:

- arc consistency: a strategy that is forbidden, or has no allowed partner across some edge, goes;
- memory: usages are reduced to the rows (times) that can exceed the limit, what is always live is
  charged once, and a strategy that cannot fit next to everyone's smallest usage goes;
- fixed nodes are folded into their neighbours and the memory that is always live;
- followers: a node whose strategy is determined by a neighbour's is merged into it;
- elimination: a node without memory that can bind and with at most two neighbours is replaced by
  the best it can do for each of their choices (min-plus product);
- separable edges become node costs;
- dominated strategies go: another one of the same node is never dearer or larger.

What remains constant is held by one node with one strategy, named `(fixed)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .problem import (
    Edge,
    FloatArray,
    IntArray,
    ProblemNode,
    ShardingProblem,
    Usage,
    live_rows,
    whole_costs,
)

# A reparametrised edge whose entries are all this small relative to its largest is separable:
# float subtraction leaves such dust, integer costs leave none.
_DUST = 1e-13
# Elementary steps that one min-plus product may take, and pairs one dominance check may look at.
_PRODUCT_LIMIT = 20_000_000

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FIXED = "(fixed)"


# --- the way back ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Fixed:
    """`node` takes `choice`, whatever the others do."""

    node: int
    choice: int


@dataclass(frozen=True, slots=True, eq=False)
class _Follows:
    """`node` takes `choice[p]` when `leader` takes `leader_keep[p]`."""

    node: int
    leader: int
    leader_keep: IntArray
    choice: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class _Between:
    """`node` takes the k that minimises `to_a[i, k] + to_b[j, k]` (its own cost is in `to_a`)."""

    node: int
    a: int
    b: int
    a_keep: IntArray
    b_keep: IntArray
    keep: IntArray
    to_a: FloatArray
    to_b: FloatArray


_Step: TypeAlias = _Fixed | _Follows | _Between


def _undo(step: _Step, full: list[int]) -> None:
    if isinstance(step, _Fixed):
        full[step.node] = step.choice
    elif isinstance(step, _Follows):
        at = int(np.searchsorted(step.leader_keep, full[step.leader]))
        full[step.node] = int(step.choice[at])
    else:
        i = int(np.searchsorted(step.a_keep, full[step.a]))
        j = int(np.searchsorted(step.b_keep, full[step.b]))
        full[step.node] = int(step.keep[(step.to_a[i] + step.to_b[j]).argmin()])


@dataclass(frozen=True, slots=True, eq=False)
class Presolved:
    """A reduced problem and the way back.

    `problem.nodes[k]` is node `origin[k]` of the original with the strategies `keep[k]` left
    (original indices, ascending); a last node `(fixed)` without origin may follow, with the
    constant part of the cost and of the memory.  Times in `problem` are rows: `times[r]` is the
    time in the original that row r stands for.
    """

    original: ShardingProblem
    problem: ShardingProblem
    origin: tuple[int, ...]
    keep: tuple[IntArray, ...]
    times: IntArray
    _steps: tuple[_Step, ...]

    def restore(self, assignment: Sequence[int]) -> tuple[int, ...]:
        """The original's assignment for one of the reduced problem: same cost, same feasibility."""
        if len(assignment) != len(self.problem.nodes):
            raise ValueError(
                f"the reduced problem has {len(self.problem.nodes)} nodes, "
                f"the assignment {len(assignment)}"
            )
        full = [-1] * len(self.original.nodes)
        for node, keep, choice in zip(self.origin, self.keep, assignment, strict=False):
            full[node] = int(keep[choice])
        for step in reversed(self._steps):
            _undo(step, full)
        return tuple(full)


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No assignment is feasible; `reason` says which node or time shows it, `node` the former."""

    reason: str
    node: str = ""


class _NoAssignment(Exception):
    """Raised inside a reduction that finds a node without strategies or a row without room."""

    def __init__(self, reason: str, node: str = "") -> None:
        super().__init__(reason)
        self.node = node


# --- the reduction ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Live:
    """A node's usages: usage u is live in rows `[first[u], stop[u])` with `bytes[u, k]`."""

    first: IntArray
    stop: IntArray
    bytes: FloatArray

    def joined(self, other: _Live) -> _Live:
        """The usages of both."""
        return _Live(
            np.concatenate([self.first, other.first]),
            np.concatenate([self.stop, other.stop]),
            np.concatenate([self.bytes, other.bytes]),
        )

    def at(self, usages: IntArray | BoolArray) -> _Live:
        """Some of the usages."""
        return _Live(self.first[usages], self.stop[usages], self.bytes[usages])

    def merged(self) -> _Live:
        """Usages of the same rows added up; those that are never live left out."""
        live = self.first < self.stop
        used = self if live.all() else self.at(live)
        if used.first.size < 2:
            return used
        key = used.first * (int(used.stop.max(initial=0)) + 1) + used.stop
        _, first, group = np.unique(key, return_index=True, return_inverse=True)
        if first.size == key.size:
            return used
        merged = used.at(first)
        merged.bytes = np.zeros_like(merged.bytes)
        np.add.at(merged.bytes, group, used.bytes)
        return merged


class _Reduction:
    """A problem being reduced.  `keep[n]` (ascending) are the strategies left of node n.

    `adj[a][b]` is the matrix between a and b with a's strategies as rows; `adj[b][a]` is its
    transpose, a view.  `dirty` and `dirty_edges` are the nodes (edges) whose surroundings
    (matrices) changed since `simplify` last saw them, `undecided` the nodes for which that holds
    of `dominate`, `shrunk` those that lost strategies since `propagate`.  `base_change[r]` is
    what is live in row r whatever is chosen, less the same of row r - 1.
    """

    def __init__(self, problem: ShardingProblem) -> None:
        self.problem = problem
        count = len(problem.nodes)
        self.cost = [node.costs.copy() for node in problem.nodes]
        self.keep = [np.arange(node.costs.size) for node in problem.nodes]
        self.adj: list[dict[int, FloatArray]] = [{} for _ in range(count)]
        self.usages: list[_Live | None] = [None] * count
        self.alive = [True] * count
        self.steps: list[_Step] = []
        self.offset = 0.0
        self.dust = 0.0 if whole_costs(problem) else _DUST
        self.dirty: set[int] = set(range(count))
        self.dirty_edges: set[tuple[int, int]] = set()
        self.shrunk: set[int] = set(range(count))
        self.undecided: set[int] = set(range(count))
        self.times = np.zeros(0, dtype=np.int64)
        self.base_change = np.zeros(1)
        self._load_edges()
        if problem.usage_limit is not None:
            self._load_usages()

    def _load_edges(self) -> None:
        for edge in self.problem.edges:
            if edge.a == edge.b:
                self.cost[edge.a] = self.cost[edge.a] + np.diagonal(edge.costs)
            else:
                self.add_edge(edge.a, edge.b, edge.costs)

    def _load_usages(self) -> None:
        flat = [
            (n, usage)
            for n, node in enumerate(self.problem.nodes)
            for usage in node.usages
            if usage.start < usage.end
        ]
        starts = np.array([usage.start for _, usage in flat], dtype=np.int64)
        ends = np.array([usage.end for _, usage in flat], dtype=np.int64)
        self.times, first, stop = live_rows(starts, ends)
        self.base_change = np.zeros(self.times.size + 1)
        for (n, usage), row, end in zip(flat, first, stop, strict=True):
            live = _Live(row.reshape(1), end.reshape(1), usage.bytes.reshape(1, -1))
            self.add_usages(n, live)

    # primitive changes

    @property
    def base(self) -> FloatArray:
        """Bytes live in each row whatever is chosen."""
        return np.cumsum(self.base_change)[:-1]

    def touch(self, n: int) -> None:
        self.dirty.add(n)
        self.undecided.add(n)

    def add_edge(self, a: int, b: int, costs: FloatArray) -> bool:
        """Add `costs` to the edge between a and b; True if there was one already."""
        parallel = b in self.adj[a]
        self.set_edge(a, b, self.adj[a][b] + costs if parallel else costs)
        return parallel

    def set_edge(self, a: int, b: int, costs: FloatArray) -> None:
        self.adj[a][b] = costs
        self.adj[b][a] = costs.T
        self.dirty_edges.add((min(a, b), max(a, b)))
        self.undecided.update((a, b))

    def drop_edge(self, a: int, b: int) -> None:
        del self.adj[a][b]
        del self.adj[b][a]
        self.touch(a)
        self.touch(b)

    def add_usages(self, n: int, more: _Live) -> None:
        """Add live bytes to node n."""
        held = self.usages[n]
        self.usages[n] = more if held is None else held.joined(more)

    def shrink(self, n: int, mask: BoolArray) -> None:
        """Keep only the strategies of node n that are true in `mask`."""
        if not mask.any():
            name = self.name(n)
            raise _NoAssignment(f"no strategy of node `{name}` is left", name)
        self.cost[n] = self.cost[n][mask]
        self.keep[n] = self.keep[n][mask]
        live = self.usages[n]
        if live is not None:
            live.bytes = live.bytes[:, mask]
        for b, costs in self.adj[n].items():
            self.set_edge(n, b, costs[mask])
        self.shrunk.add(n)
        self.touch(n)

    def remove(self, n: int, step: _Step) -> None:
        """Take node n out; its edges and usages must be accounted for already."""
        for b in self.adj[n]:
            del self.adj[b][n]
            self.touch(b)
        self.adj[n] = {}
        self.usages[n] = None
        self.alive[n] = False
        self.dirty.discard(n)
        self.steps.append(step)

    def name(self, n: int) -> str:
        return self.problem.nodes[n].name

    # the reductions

    def run(self) -> None:
        """Apply all reductions until nothing changes (each takes something away, so it ends)."""
        self.propagate()
        self.memory()
        while True:
            self.propagate()
            while self.dirty or self.dirty_edges:
                edges = sorted(self.dirty_edges)
                self.dirty_edges = set()
                for a, b in edges:
                    if b in self.adj[a]:
                        self.normalise(a, b)
                for a, b in edges:
                    if b in self.adj[a]:
                        self.merge(a, b)
                nodes = sorted(self.dirty)
                self.dirty = set()
                for n in nodes:
                    if self.alive[n]:
                        self.simplify(n)
            if not self.memory() and not self.dominate():
                return

    def propagate(self) -> None:
        """Arc consistency, started from the nodes that lost strategies."""
        while self.shrunk:
            n = self.shrunk.pop()
            if not self.alive[n]:
                continue
            finite = np.isfinite(self.cost[n])
            if not finite.all():
                self.shrink(n, finite)
            for b in list(self.adj[n]):
                self.revise(n, b)

    def revise(self, a: int, b: int) -> None:
        """Drop b's strategies that no strategy of a allows."""
        allowed = _any_rows(np.isfinite(self.adj[a][b]))
        if not allowed.all():
            self.shrink(b, allowed)

    def made_parallel(self, a: int, b: int) -> None:
        """Restore arc consistency after costs were added to the edge between a and b."""
        self.revise(a, b)
        self.revise(b, a)
        self.propagate()

    def normalise(self, a: int, b: int) -> None:
        """Move what an edge charges for one end alone to that node; drop the edge if that is all.

        Afterwards every row and column of the edge has minimum 0 (arc consistency holds).
        """
        costs = self.adj[a][b]
        rows = costs.min(axis=1)
        left = costs - rows[:, None] if rows.any() else costs
        cols = left.min(axis=0)
        left = left - cols[None, :] if cols.any() else left
        if left is not costs:
            dust = self.dust * max(float(np.abs(rows).max()), float(np.abs(cols).max()))
            left = np.where(left <= dust, 0.0, left)
            self.cost[a] = self.cost[a] + rows
            self.cost[b] = self.cost[b] + cols
            self.adj[a][b] = left
            self.adj[b][a] = left.T
        if not left.any():
            self.drop_edge(a, b)

    def merge(self, a: int, b: int) -> None:
        """Merge b into a, or a into b, if one's strategy determines the other's."""
        finite = np.isfinite(self.adj[a][b])
        if self.keep[a].size > 1 < self.keep[b].size:
            if (finite.sum(axis=1) == 1).all():
                self.follow(b, a, finite.argmax(axis=1))
            elif (finite.sum(axis=0) == 1).all():
                self.follow(a, b, finite.argmax(axis=0))

    def simplify(self, n: int) -> None:
        """Fold a fixed node, eliminate one with few neighbours and no memory."""
        if self.keep[n].size == 1:
            self.fold(n)
        elif self.usages[n] is None and len(self.adj[n]) <= 2:
            self.eliminate(n)

    def fold(self, n: int) -> None:
        """A node with one strategy: its costs go to its neighbours, its bytes are always live."""
        self.offset += float(self.cost[n][0])
        for b, costs in self.adj[n].items():
            self.cost[b] = self.cost[b] + costs[0]
            if not np.isfinite(costs[0]).all():
                raise AssertionError("arc consistency must hold before a node is folded")
        live = self.usages[n]
        if live is not None:
            self._charge(live, live.bytes[:, 0])
        self.remove(n, _Fixed(n, int(self.keep[n][0])))

    def follow(self, n: int, leader: int, choice: IntArray) -> None:
        """Merge n into `leader`, whose strategy i forces n's `choice[i]`."""
        between = self.adj[leader][n]
        own = between[np.arange(choice.size), choice] + self.cost[n][choice]
        self.cost[leader] = self.cost[leader] + own
        live = self.usages[n]
        if live is not None:
            self.add_usages(leader, _Live(live.first, live.stop, live.bytes[:, choice]))
        parallel: list[int] = []
        for c, costs in list(self.adj[n].items()):
            if c != leader:
                if self.add_edge(leader, c, costs[choice]):
                    parallel.append(c)
        keep = self.keep[n][choice]
        self.remove(n, _Follows(n, leader, self.keep[leader], keep))
        for c in parallel:
            if self.alive[c] and c in self.adj[leader]:
                self.made_parallel(leader, c)

    def eliminate(self, n: int) -> None:
        """Replace a node without memory and with at most two neighbours by its best response."""
        if not self.adj[n]:
            best = int(self.cost[n].argmin())
            self.offset += float(self.cost[n][best])
            self.remove(n, _Fixed(n, int(self.keep[n][best])))
        elif len(self.adj[n]) == 1:
            ((a, costs),) = self.adj[n].items()
            total = costs + self.cost[n][:, None]
            best_of = total.argmin(axis=0)
            self.cost[a] = self.cost[a] + total.min(axis=0)
            self.remove(n, _Follows(n, a, self.keep[a], self.keep[n][best_of]))
        else:
            self._eliminate_between(n)

    def _eliminate_between(self, n: int) -> None:
        (a, from_a), (b, from_b) = self.adj[n].items()
        size, na, nb = self.cost[n].size, from_a.shape[1], from_b.shape[1]
        grows = na * nb > size * (na + nb) and b not in self.adj[a]
        if grows or size * na * nb > _PRODUCT_LIMIT:
            return
        to_a = from_a + self.cost[n][:, None]
        best = np.full((na, nb), inf)
        for k in range(size):
            np.minimum(best, to_a[k][:, None] + from_b[k][None, :], out=best)
        step = _Between(n, a, b, self.keep[a], self.keep[b], self.keep[n], to_a.T, from_b.T)
        self.remove(n, step)
        if self.add_edge(a, b, best):
            self.made_parallel(a, b)

    # memory

    def memory(self) -> bool:
        """Keep the rows that can bind; forbid strategies that cannot fit.  True if any went."""
        if not self.times.size:
            return False
        self._charge_smallest()
        capacity, base = self.problem.capacity, self.base
        worst = int(base.argmax())
        if base[worst] > capacity:
            raise _NoAssignment(
                f"at time {self.times[worst]} at least {base[worst]:.17g} bytes are live, "
                f"whatever is chosen; the limit is {self.problem.usage_limit}"
            )
        usages = [live for live in self.usages if live is not None]
        if usages:
            first = np.concatenate([live.first for live in usages])
            stop = np.concatenate([live.stop for live in usages])
            most = np.concatenate([live.bytes.max(axis=1) for live in usages])
            binding = base + self._per_row(first, stop, most) > capacity
            self._keep_rows(_undominated_rows(first, stop, base, binding))
        else:
            self._keep_rows(np.zeros(self.times.size, dtype=bool))
        return self._forbid_oversized() or bool(self.dirty or self.dirty_edges)

    def _per_row(self, first: IntArray, stop: IntArray, values: FloatArray) -> FloatArray:
        """Sum over usages of `values`, per row."""
        change = np.zeros(self.times.size + 1)
        np.add.at(change, first, values)
        np.subtract.at(change, stop, values)
        return np.cumsum(change)[:-1]

    def _charge(self, live: _Live, values: FloatArray) -> None:
        """These bytes are live whatever is chosen."""
        np.add.at(self.base_change, live.first, values)
        np.subtract.at(self.base_change, live.stop, values)

    def _charge_smallest(self) -> None:
        """What a usage takes under every strategy is always live."""
        for n, live in enumerate(self.usages):
            if live is None:
                continue
            live = live.merged()
            least = live.bytes.min(axis=1)
            if least.any():
                self._charge(live, least)
                live.bytes = live.bytes - least[:, None]
            self._set_usages(n, live.at(_any_rows(live.bytes.T != 0)))

    def _set_usages(self, n: int, live: _Live) -> None:
        self.usages[n] = live if live.first.size else None
        if not live.first.size:
            self.touch(n)

    def _keep_rows(self, mask: BoolArray) -> None:
        """Drop the rows that are false in `mask`, and usages that are then in no row."""
        if mask.all():
            return
        new = np.concatenate([[0], np.cumsum(mask)])
        self.base_change = np.diff(self.base[mask], prepend=0.0, append=0.0)
        self.times = self.times[mask]
        for n, live in enumerate(self.usages):
            if live is not None:
                self._set_usages(n, _Live(new[live.first], new[live.stop], live.bytes).merged())

    def _forbid_oversized(self) -> bool:
        """Forbid strategies that exceed the room that everyone else's smallest usage leaves."""
        if not self.times.size:
            return False
        table = [self.problem.capacity - self.base]  # table[k][r] = least room in [r, r + 2**k)
        while 2 ** len(table) <= self.times.size:
            last, half = table[-1], 2 ** (len(table) - 1)
            table.append(np.minimum(last[:-half], last[half:]))
        changed = False
        for n, live in enumerate(self.usages):
            if live is None:
                continue
            level = np.frexp(live.stop - live.first)[1] - 1  # floor(log2(length))
            room = np.empty(level.size)
            for k in np.unique(level).tolist():
                at = level == k
                row = table[k]
                room[at] = np.minimum(row[live.first[at]], row[live.stop[at] - 2**k])
            fits = ~_any_rows(live.bytes > room[:, None])
            if not fits.all():
                self.shrink(n, fits)
                changed = True
        return changed

    # dominance

    def dominate(self) -> bool:
        """Drop dominated strategies of all nodes.  True if any went."""
        changed = False
        nodes = sorted(self.undecided)
        self.undecided = set()
        for n in nodes:
            if self.alive[n] and self.cost[n].size > 1:
                mask = self._undominated(n)
                if not mask.all():
                    self.shrink(n, mask)
                    changed = True
        return changed

    def _undominated(self, n: int) -> BoolArray:
        """Strategies j of node n that no i matches or beats, whatever the neighbours choose.

        i dominates j if cost_i + sum over edges of max_k (edge[i, k] - edge[j, k]) <= cost_j and
        i uses no more memory in any row.  Of equals the first stays.  The relation is
        transitive, so all dominated strategies may go at once.
        """
        cost, edges = self.cost[n], [_distinct_columns(e) for e in self.adj[n].values()]
        count = cost.size
        i, j = _no_dearer(cost, edges)
        live = self.usages[n]
        if live is not None and i.size:
            for size in live.bytes[group_rows(live.bytes)[0]]:
                left = np.nonzero(size[i] <= size[j])[0]
                i, j = i[left], j[left]
        total = cost[i] - cost[j]
        for e in edges:
            if not i.size:
                return np.ones(count, dtype=bool)
            total = total + _worst_difference(e, i, j)
            left = np.nonzero(total <= 0)[0]
            i, j, total = i[left], j[left], total[left]
        wins = np.zeros((count, count), dtype=bool)
        wins[i, j] = True
        tie_lost = wins & wins.T & (np.arange(count)[:, None] > np.arange(count)[None, :])
        return ~_any_rows(wins & ~tie_lost)

    # the result

    def result(self) -> Presolved:
        nodes = [n for n, alive in enumerate(self.alive) if alive]
        index = {n: k for k, n in enumerate(nodes)}
        reduced = [
            ProblemNode(
                self.name(n),
                self.cost[n],
                _as_usages(self.usages[n]),
            )
            for n in nodes
        ]
        edges = tuple(
            Edge(index[a], index[b], np.ascontiguousarray(costs))
            for a in nodes
            for b, costs in self.adj[a].items()
            if a < b
        )
        always = self.base
        if self.offset or always.any():
            base = tuple(Usage(r, r + 1, always[r : r + 1]) for r in range(always.size))
            reduced.append(ProblemNode(FIXED, np.array([self.offset]), base))
        limit = self.problem.usage_limit if self.times.size else None
        problem = ShardingProblem(self.problem.name, tuple(reduced), edges, limit)
        keep = tuple(self.keep[n] for n in nodes)
        return Presolved(self.problem, problem, tuple(nodes), keep, self.times, tuple(self.steps))


def _undominated_rows(
    first: IntArray, stop: IntArray, base: FloatArray, mask: BoolArray
) -> BoolArray:
    """Of the rows in `mask`, those that no other makes superfluous.

    A row goes if all its usages are also live in the next (or the previous) row that is left,
    and that row has no less base.
    """
    rows = np.nonzero(mask)[0]
    forward, idle = True, 0
    while rows.size > 1 and idle < 2:
        # positions among the rows left; a usage that is in none of them changes nothing
        begin, end = np.searchsorted(rows, first), np.searchsorted(rows, stop)
        live = begin < end
        changes = np.zeros(rows.size + 1, dtype=bool)
        stay = np.ones(rows.size, dtype=bool)
        if forward:  # row r is a subset of r + 1 if nothing ends between them
            changes[end[live]] = True
            stay[:-1] = changes[1:-1] | (base[rows[:-1]] > base[rows[1:]])
        else:
            changes[begin[live]] = True
            stay[1:] = changes[1:-1] | (base[rows[1:]] > base[rows[:-1]])
        idle = idle + 1 if stay.all() else 0
        forward = not forward
        rows = rows[stay]
    left = np.zeros_like(mask)
    left[rows] = True
    return left


def _any_rows(mask: BoolArray) -> BoolArray:
    """Which columns are true in any row."""
    return np.logical_or.reduce(mask, axis=0)


def _as_usages(live: _Live | None) -> tuple[Usage, ...]:
    if live is None:
        return ()
    rows = zip(live.first.tolist(), live.stop.tolist(), live.bytes, strict=True)
    return tuple(Usage(first, stop, size) for first, stop, size in rows)


def _no_dearer(cost: FloatArray, edges: Sequence[FloatArray]) -> tuple[IntArray, IntArray]:
    """The pairs of strategies i, j where i is no dearer than j if each neighbour takes what is
    cheapest with j; without that, none dominates the other.

    An edge that forbids much leaves few pairs for those after it.
    """
    i, j = np.nonzero(cost[:, None] <= cost[None, :])
    other = np.nonzero(i != j)[0]
    i, j = i[other], j[other]
    total = cost[i] - cost[j]
    for edge in sorted(edges, key=lambda e: -np.count_nonzero(e == inf) / e.size):
        if not i.size:
            break
        best = edge.argmin(axis=1)
        least = edge[np.arange(cost.size), best]
        total = total + (edge[i, best[j]] - least[j])
        left = np.nonzero(total <= 0)[0]
        i, j, total = i[left], j[left], total[left]
    return i, j


def _worst_difference(edge: FloatArray, i: IntArray, j: IntArray) -> FloatArray:
    """max over k of edge[i, k] - edge[j, k] for each pair; a k that j may not take is free."""
    out = np.empty(i.size)
    chunk = max(1, 4_000_000 // edge.shape[1])
    for at in range(0, i.size, chunk):
        mine, other = edge[i[at : at + chunk]], edge[j[at : at + chunk]]
        with np.errstate(invalid="ignore"):
            difference = np.where(np.isfinite(other), mine - other, -inf)
        out[at : at + chunk] = difference.max(axis=1)
    return out


def _distinct_columns(costs: FloatArray) -> FloatArray:
    """`costs` with repeated columns left out."""
    if costs.shape[1] <= 16:  # grouping would cost more than it saves
        return costs
    first, _ = group_rows(costs.T)
    return costs if first.size == costs.shape[1] else costs[:, first]


def group_rows(costs: FloatArray) -> tuple[IntArray, IntArray]:
    """Group identical rows: the first row of each group, and each row's group.

    Rows are grouped by an exact 64-bit hash of their bits, then compared, so no two different
    rows share a group.
    """
    bits = np.ascontiguousarray(costs + 0.0).view(np.int64)  # + 0.0 turns -0.0 into 0.0
    weights = _hash_weights(bits.shape[1])
    hashes = ((bits ^ (bits >> 29)) * weights).sum(axis=1)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    if not np.array_equal(bits, bits[first[group]]):  # hash collision
        _, first, group = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    return first, group.reshape(-1)


def _hash_weights(count: int) -> IntArray:
    """Fixed odd multipliers, so that results do not change from run to run."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state ^= state >> np.uint64(31)
    return (state * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)).view(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One of a problem's independent parts.

    `problem.nodes[k]` is node `nodes[k]` of the whole; a last node `(fixed)` without counterpart
    may follow, which holds what nodes outside the part always keep live in its rows.
    """

    problem: ShardingProblem
    nodes: tuple[int, ...]


def split(problem: ShardingProblem) -> tuple[Part, ...]:
    """The parts that no edge and no memory row joins, smallest first.

    For presolved problems: every row is taken to bind, and a node with one strategy and no
    edges is in no part, as nothing is left to decide or to check about it.
    """
    ends = [end for edge in problem.edges for end in (edge.a, edge.b)]
    linked = set(ends)
    loose = [n for n, node in enumerate(problem.nodes) if node.costs.size == 1 and n not in linked]
    parent = list(range(len(problem.nodes)))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for edge in problem.edges:
        parent[root(edge.a)] = root(edge.b)
    free = set(loose)
    live = sorted(
        (usage.start, usage.end, n)
        for n, node in enumerate(problem.nodes)
        for usage in node.usages
        if usage.start < usage.end and n not in free and problem.usage_limit is not None
    )
    until = None
    for k, (start, end, n) in enumerate(live):
        if until is not None and start < until:
            parent[root(n)] = root(live[k - 1][2])
        until = end if until is None else max(until, end)
    groups: dict[int, list[int]] = {}
    for n in range(len(problem.nodes)):
        if n not in free:
            groups.setdefault(root(n), []).append(n)
    edges: dict[int, list[Edge]] = {}
    for edge in problem.edges:
        edges.setdefault(root(edge.a), []).append(edge)
    parts = [_part(problem, nodes, edges.get(r, []), loose) for r, nodes in groups.items()]
    return tuple(sorted(parts, key=lambda part: len(part.nodes)))


def _part(
    problem: ShardingProblem, nodes: list[int], edges: Sequence[Edge], loose: Sequence[int]
) -> Part:
    index = {n: k for k, n in enumerate(nodes)}
    chosen = [problem.nodes[n] for n in nodes]
    first = min((u.start for node in chosen for u in node.usages), default=0)
    last = max((u.end for node in chosen for u in node.usages), default=0)
    always = tuple(
        Usage(max(usage.start, first), min(usage.end, last), usage.bytes)
        for n in loose
        for usage in problem.nodes[n].usages
        if usage.start < last and usage.end > first
    )
    if always:
        chosen.append(ProblemNode(FIXED, np.zeros(1), always))
    own = tuple(Edge(index[edge.a], index[edge.b], edge.costs) for edge in edges)
    limit = problem.usage_limit
    return Part(ShardingProblem(problem.name, tuple(chosen), own, limit), tuple(nodes))


def presolve(problem: ShardingProblem) -> Presolved | Infeasible:
    """Reduce `problem` exactly; see the module's docstring for how."""
    reduction = _Reduction(problem)
    try:
        reduction.run()
    except _NoAssignment as stop:
        return Infeasible(str(stop), stop.node)
    return reduction.result()


def clash(problem: ShardingProblem) -> str:
    """The node that has no strategy beside any of the others', whatever the memory; "" where
    reductions find none."""
    found = presolve(replace(problem, usage_limit=None))
    return found.node if isinstance(found, Infeasible) else ""


__all__ = [
    "FIXED", "Infeasible", "Part", "Presolved", "clash", "group_rows", "presolve", "split",
]  # fmt: skip
