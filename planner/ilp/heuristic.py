"""A bound and a good assignment for problems too large for an exact solver in the time given.

The bound is a Lagrangian dual: memory rows get prices, and the edges' costs are shifted between
edges and nodes by sequential message passing (each node in turn collects what its edges can
give, then hands it on to the edges ahead), which raises the sum of all minima, a lower bound.
The assignment comes from the same sweeps: each node takes the strategy that is best given its
predecessors' choices, the messages from ahead and the memory left, then local search improves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, inf
from time import perf_counter

import numpy as np

from .problem import FloatArray, IntArray, ShardingProblem, live_rows, whole_costs
from .solution import Solution, conclude

_POLISH_SWEEPS = 20
_DECODE_EVERY = 3  # rounds, once something is found
_MARGIN_SWEEPS = 2
# The bound is taken to rise by this much at most in one step on the memory prices.
_FIRST_STEP = 0.05
_SMALLEST_STEP = 1e-4
# Rounding in a sum of thousands of shifts, relative to the sum.
_BOUND_ROUNDING = 1e-9


def search(problem: ShardingProblem, *, time_limit_s: float) -> Solution:
    """Raise the bound and improve an assignment until they meet, or for `time_limit_s` seconds.

    For presolved problems (every strategy has an allowed partner across every edge).  Never
    answers `infeasible`; `unknown` means that no feasible assignment was found.
    """
    started = perf_counter()
    until = started + time_limit_s
    state, whole = _Search(problem), whole_costs(problem)
    bound, cost, best, step, turn = -inf, inf, None, 1.0, 0
    while step > _SMALLEST_STEP:
        decode = best is None or turn % _DECODE_EVERY == 0
        _, decoded = state.sweep(True, decode)
        if decode:
            over, price, polished = state.polish(decoded, until)
            if over <= 0 and price < cost:
                cost, best = price, tuple(polished)
        alone, _ = state.sweep(False, False)
        proven = state.bound()
        step = min(1.0, 1.1 * step) if proven > bound else 0.8 * step
        bound = max(bound, proven)
        met = best is not None and cost - bound <= 1e-7 * abs(cost)
        if met or perf_counter() > until:
            break
        state.reprice(alone, step * min(cost - bound, _FIRST_STEP * abs(bound) + 1e-12))
        turn += 1
    bound -= _BOUND_ROUNDING * abs(bound)
    bound = float(ceil(bound)) if whole else bound
    seconds = perf_counter() - started
    if best is None:
        return Solution(None, inf, bound, "unknown", seconds)
    return conclude(problem, best, bound, seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Margins:
    """What prices prove: every assignment costs at least `bound`, and one in which node n takes
    strategy k at least `bound + above[n][k]`; and the best assignment found, of `cost` (inf
    without one)."""

    bound: float
    above: list[FloatArray]
    cost: float
    assignment: tuple[int, ...] | None


def margins(
    problem: ShardingProblem,
    shifts: list[list[FloatArray]],
    prices: FloatArray,
    start: tuple[int, ...],
) -> Margins:
    """The margins that `shifts` and `prices` prove (see `_Search`), after a few sweeps.

    `start` is the assignment from which local search begins.  For presolved problems.
    """
    state = _Search(problem)
    state.shift, state.prices = shifts, prices
    cost, best = inf, None
    _, decoded = state.sweep(True, True)
    for assignment in (list(start), decoded):
        over, price, polished = state.polish(assignment, inf)
        if over <= 0 and price < cost:
            cost, best = price, tuple(polished)
    for _ in range(_MARGIN_SWEEPS):
        state.sweep(False, False)
        state.sweep(True, False)
    bound = state.bound()
    return Margins(bound - _BOUND_ROUNDING * abs(bound), state.above(), cost, best)


@dataclass(slots=True, eq=False)
class _Link:
    """One edge as one of its ends sees it; `costs` has the own strategies as rows."""

    edge: int
    end: int
    other: int
    costs: FloatArray


@dataclass(slots=True, eq=False)
class _Node:
    """A node with its links and its usages (`bytes[u, k]` live in rows `[first[u], stop[u])`)."""

    costs: FloatArray
    first: IntArray
    stop: IntArray
    bytes: FloatArray
    links: list[_Link] = field(default_factory=list)


class _Search:
    """Messages, memory prices and the sweeps over them.

    `shift[e][end]` is what edge e has given to its end's strategies; whatever it is, the minima
    of the shifted edges and nodes add up to a lower bound.  `prices[r]` >= 0 is what a byte costs
    in row r, `room[r]` is the limit less what nodes with one strategy keep live.
    """

    def __init__(self, problem: ShardingProblem) -> None:
        self.problem = problem
        flat = [
            (n, usage)
            for n, node in enumerate(problem.nodes)
            for usage in node.usages
            if usage.start < usage.end and problem.usage_limit is not None
        ]
        times, first, stop = live_rows(
            np.array([usage.start for _, usage in flat], dtype=np.int64),
            np.array([usage.end for _, usage in flat], dtype=np.int64),
        )
        own: list[list[int]] = [[] for _ in problem.nodes]
        for k, (n, _) in enumerate(flat):
            own[n].append(k)
        self.nodes = [
            _Node(
                node.costs,
                first[own[n]],
                stop[own[n]],
                np.array([flat[k][1].bytes for k in own[n]]).reshape(len(own[n]), node.costs.size),
            )
            for n, node in enumerate(problem.nodes)
        ]
        self.room = np.full(times.size, problem.capacity)
        for node in self.nodes:
            if node.costs.size == 1:
                for f, s, size in zip(node.first, node.stop, node.bytes[:, 0], strict=True):
                    self.room[f:s] -= size
                node.first, node.stop, node.bytes = node.first[:0], node.stop[:0], node.bytes[:0]
        self.shift: list[list[FloatArray]] = []
        for e, edge in enumerate(problem.edges):
            self.nodes[edge.a].links.append(_Link(e, 0, edge.b, edge.costs))
            self.nodes[edge.b].links.append(_Link(e, 1, edge.a, np.ascontiguousarray(edge.costs.T)))
            self.shift.append([np.zeros(edge.costs.shape[0]), np.zeros(edge.costs.shape[1])])
        self.prices = np.zeros(times.size)

    # the bound

    def sweep(self, forward: bool, decode: bool) -> tuple[list[int], list[int]]:
        """Pass messages once; returns each node's best strategy alone, and a decoded assignment.

        The second is decoded only if asked for.
        """
        count = len(self.nodes)
        alone, chosen = [0] * count, [-1] * count
        free = self.room.copy()
        above = np.concatenate([[0.0], np.cumsum(self.prices)])
        for n in range(count) if forward else range(count - 1, -1, -1):
            node = self.nodes[n]
            total = node.costs + (above[node.stop] - above[node.first]) @ node.bytes
            given = total.copy() if decode else total
            ahead: list[_Link] = []
            for link in node.links:
                shift = self.shift[link.edge]
                own = (link.costs - shift[1 - link.end]).min(axis=1)
                shift[link.end] = own
                total = total + own
                if (link.other > n) == forward:
                    ahead.append(link)
                    given = given + own
                elif decode:
                    given = given + link.costs[:, chosen[link.other]]
            alone[n] = int(total.argmin())
            if decode:
                chosen[n] = self.take(node, given, free)
            share = total / max(len(ahead), len(node.links) - len(ahead), 1)
            for link in ahead:
                self.shift[link.edge][link.end] = self.shift[link.edge][link.end] - share
        return alone, chosen

    def take(self, node: _Node, price: FloatArray, free: FloatArray) -> int:
        """The cheapest strategy that fits in `free`, which is updated."""
        over = self.overflow(node, free)
        choice = int(np.lexsort((price, over))[0]) if over.any() else int(price.argmin())
        self.charge(node, choice, free, 1.0)
        return choice

    def overflow(self, node: _Node, free: FloatArray) -> FloatArray:
        """Bytes by which each strategy exceeds `free` where that is worst."""
        over = np.zeros(node.costs.size)
        for f, s, size in zip(node.first.tolist(), node.stop.tolist(), node.bytes, strict=True):
            np.maximum(over, size - free[f:s].min(), out=over)
        return over

    def charge(self, node: _Node, choice: int, free: FloatArray, sign: float) -> None:
        for f, s, size in zip(
            node.first.tolist(), node.stop.tolist(), node.bytes[:, choice].tolist(), strict=True
        ):
            if size:
                free[f:s] -= sign * size

    def bound(self) -> float:
        """The lower bound that the current shifts and prices prove."""
        above = np.concatenate([[0.0], np.cumsum(self.prices)])
        total = -float(self.prices @ self.room) if self.prices.size else 0.0
        for node in self.nodes:
            own = node.costs + (above[node.stop] - above[node.first]) @ node.bytes
            for link in node.links:
                own = own + self.shift[link.edge][link.end]
            total += float(own.min())
        for edge, (of_a, of_b) in zip(self.problem.edges, self.shift, strict=True):
            total += float((edge.costs - of_a[:, None] - of_b).min())
        return total

    def above(self) -> list[FloatArray]:
        """By how much each strategy of each node raises the lower bound, at least."""
        prices = np.concatenate([[0.0], np.cumsum(self.prices)])
        found: list[FloatArray] = []
        for node in self.nodes:
            total = node.costs + (prices[node.stop] - prices[node.first]) @ node.bytes
            for link in node.links:  # all that the edge can give goes to this node
                given = self.shift[link.edge][1 - link.end]
                total = total + (link.costs - given).min(axis=1)
            found.append(total - total.min())
        return found

    def reprice(self, alone: list[int], gap: float) -> None:
        """A subgradient step on the memory prices, of the length that would close `gap`."""
        free = self.room.copy()
        for node, choice in zip(self.nodes, alone, strict=True):
            self.charge(node, choice, free, 1.0)
        ascent = np.where((self.prices > 0) | (free < 0), -free, 0.0)
        norm = float(ascent @ ascent)
        if norm:
            self.prices = np.maximum(0.0, self.prices + gap / norm * ascent)

    # the assignment

    def polish(self, chosen: list[int], until: float) -> tuple[float, float, list[int]]:
        """Local search, one node at a time; returns overflow, cost and the assignment.

        Forbidden choices count first, then bytes over the limit, then cost.
        """
        chosen, free = list(chosen), self.room.copy()
        for node, choice in zip(self.nodes, chosen, strict=True):
            self.charge(node, choice, free, 1.0)
        for _ in range(_POLISH_SWEEPS):
            moved = False
            for n, node in enumerate(self.nodes):
                if node.costs.size == 1:
                    continue
                price = node.costs.copy()
                banned = np.zeros(price.size)
                for link in node.links:
                    column = link.costs[:, chosen[link.other]]
                    banned += column == inf
                    price = price + np.where(column == inf, 0.0, column)
                old = chosen[n]
                self.charge(node, old, free, -1.0)
                key = np.lexsort((price, np.maximum(self.overflow(node, free), 0.0), banned))
                best = int(key[0])
                over = self.overflow(node, free)
                same = (banned[best], over[best], price[best]) == (
                    banned[old],
                    over[old],
                    price[old],
                )
                chosen[n] = old if same else best
                moved = moved or not same
                self.charge(node, chosen[n], free, 1.0)
            if not moved or perf_counter() > until:
                break
        bad = sum(edge.costs[chosen[edge.a], chosen[edge.b]] == inf for edge in self.problem.edges)
        over = float(-free.min(initial=0.0))
        cost = sum(float(node.costs[k]) for node, k in zip(self.nodes, chosen, strict=True))
        cost += sum(float(e.costs[chosen[e.a], chosen[e.b]]) for e in self.problem.edges)
        return (inf if bad else over), cost, chosen


__all__ = ["search"]
