"""Which rank makes which matrices orthogonal in a step of Muon, and what that takes.

Muon's update is that of whole matrices.  So each has an owner, which is sent the others' parts,
works alone, and sends every rank its part of the result: over p ranks a p-th of the work for each,
and of FSDP's shards a p-th of the bytes that gathering all of them everywhere would bring.
Planner and runtime read the same here.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace

STEPS = 5
"""Newton-Schulz iterations, as torch.optim.Muon has them."""
NUMBER_BYTES = 2
"""Of a number on its way: both ways bfloat16, in which torch.optim.Muon iterates."""
ROUND_BYTES = 64 * 2**20
"""Of an owner's matrices in one exchange; a larger matrix goes alone."""


def newton_schulz_flops(rows: int, columns: int, steps: int = STEPS) -> float:
    """FLOPs of one matrix: each iteration makes X X^T, its square, and their sum's product with X.

    >>> newton_schulz_flops(100, 1000, 1)  # 2 * 2 * 100 * 100 * 1000 + 2 * 100 ** 3
    42000000.0
    """
    short, long = sorted((rows, columns))
    return steps * (4.0 * short * short * long + 2.0 * short**3)


def owners(costs: Sequence[float], may: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """The owner of each of some pieces of work, one of the ranks that `may`: the costliest first,
    always to the rank that has least.

    >>> owners([3.0, 2.0, 1.0], [[0, 1]] * 3, 2)
    [0, 1, 1]
    """
    loads = [0.0] * ranks
    found = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(may[i], key=lambda rank: loads[rank])
        loads[found[i]] += costs[i]
    return found


def busiest(costs: Sequence[float], ranks: int) -> float:
    """The load of the rank that has most, where each may do any of the work, shared out likewise.

    >>> busiest([3.0, 2.0, 2.0], 2)
    4.0
    """
    loads = [0.0] * ranks
    for cost in sorted(costs, reverse=True):
        heapreplace(loads, loads[0] + cost)
    return max(loads)


def portions(count: int, edges: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """A stack of `count` matrices in ranges, none across one of the `edges`, for all ranks to have
    some.

    >>> portions(8, [0, 4, 8], 4), portions(1, [0, 1], 4)
    ([(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1)])
    """
    most = -(-count // ranks)
    inner = sorted({0, count, *(edge for edge in edges if 0 < edge < count)})
    return [
        (start, min(start + most, end))
        for first, end in zip(inner, inner[1:], strict=False)
        for start in range(first, end, most)
    ]


__all__ = [
    "NUMBER_BYTES", "ROUND_BYTES", "STEPS", "busiest", "newton_schulz_flops", "owners", "portions",
]  # fmt: skip
