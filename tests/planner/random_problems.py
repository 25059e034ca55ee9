"""Random small problems with every awkward feature, for the tests of presolve and the solvers."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from shardwright.planner.ilp.problem import Edge, ProblemNode, ShardingProblem, Usage

INF = float("inf")


@st.composite
def problems(draw: st.DrawFn) -> ShardingProblem:
    """Ties, infinities, parallel edges, self-loops, followers, several usages, tight limits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 6))
    levels = draw(st.sampled_from([2, 5, 1000]))
    forbidden = draw(st.sampled_from([0.0, 0.15, 0.5, 0.7]))
    whole = draw(st.booleans())

    def costs(*shape: int) -> np.ndarray:
        values = rng.integers(0, levels, shape).astype(float)
        if not whole:
            values = values * 1e-4 + rng.choice([0.0, 1e-6], shape)
        return np.where(rng.random(shape) < forbidden, INF, values)

    sizes = rng.integers(1, 5, count)
    most_usages = draw(st.integers(0, 3))
    nodes = tuple(
        ProblemNode(f"n{k}", costs(size), tuple(usages(rng, size, most_usages)))
        for k, size in enumerate(sizes)
    )
    chance = draw(st.sampled_from([0.2, 0.5, 0.9]))
    edges: list[Edge] = []
    for a in range(count):
        for b in range(count):
            if rng.random() < (0.1 if a == b else chance / 2):
                matrix = costs(sizes[a], sizes[b])
                if rng.random() < 0.3 and sizes[a] == sizes[b]:  # a follower
                    matrix = np.where(np.eye(sizes[a], dtype=bool), 0.0, INF)
                edges.append(Edge(a, b, matrix))
    limit = draw(st.sampled_from([None, 4.0, 9.0, 14.0]))
    return ShardingProblem("random", nodes, tuple(edges), limit)


def usages(rng: np.random.Generator, size: int, most: int) -> list[Usage]:
    found: list[Usage] = []
    for _ in range(rng.integers(0, most + 1)):
        start, length = rng.integers(0, 6), rng.integers(0, 5)
        sizes = rng.integers(0, 6, size).astype(float)
        found.append(Usage(int(start), int(start + length), sizes))
    return found
