"""A layer of experts: what it takes and moves when tokens, experts or hidden units are cut.

How many tokens a rank's experts get is decided by the router.  With n tokens on each of p ranks,
k choices per token and E experts, balanced routing gives a rank n k pairs (token, expert); of them
`imbalance` times as many are expected on the busiest one, which all wait for.  In the form with
all-to-all a token goes once to each rank that has one of its experts, to a given one with the
probability q = 1 - C(E - E/p, k) / C(E, k); so n (p - 1) q rows come in from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, log, sqrt

from ...costmodel.compute import matmul_s
from ...ir.graph import Node
from ...ir.ops.registry import experts_dims, rule_of
from ...ir.ops.rule import Choice
from .conversion import Network

_INDEX_BYTES = 4
_COUNT_BYTES = 8
# Popularity of the i-th most popular expert is i ** -_POWER: between uniform (0) and Zipf (1).
# Trained routers with a balancing loss lie below, routers on one narrow domain above.
_POWER = 0.5


def usual_imbalance(experts: int, ranks: int) -> float:
    """Load of the busiest of `ranks` equal blocks of experts over the mean, for a power-law router.

    Mean of the largest of `ranks` sums of `experts / ranks` popularities, each sum taken as normal:
    1 + v sqrt(2 ln ranks / (experts / ranks)) with v the popularities' coefficient of variation.

    >>> usual_imbalance(8, 1), round(usual_imbalance(256, 32), 2)
    (1.0, 1.61)
    """
    if ranks == 1:
        return 1.0
    shares = [(i + 1) ** -_POWER for i in range(experts)]
    mean = sum(shares) / experts
    spread = sqrt(sum((share - mean) ** 2 for share in shares) / experts) / mean
    busiest = 1.0 + spread * sqrt(2.0 * log(ranks) * ranks / experts)
    return min(busiest, float(ranks))


@dataclass(frozen=True, slots=True)
class Local:
    """One rank's part of a layer of experts."""

    tokens: int
    choices: int
    experts: int  # on this rank
    all_experts: int
    width: int
    hidden: int
    out: int
    matrices: int  # of the first product: 2 with a gate
    itemsize: int
    axes: tuple[int, ...]  # that cut the experts
    ranks: int
    sends: bool  # tokens go to their experts; else every rank has all and gives a summand
    imbalance: float

    @staticmethod
    def of(
        node: Node, choices: Sequence[Choice], sizes: Sequence[int], imbalance: float = 0.0
    ) -> Local:
        """The part under `choices`; `imbalance` of 0 is `usual_imbalance`."""
        rule = rule_of(node)
        ways = rule.ways(choices, sizes)
        if ways is None:
            raise ValueError(f"{node.loc}: experts cannot be cut {tuple(choices)} over {sizes}")
        tokens, picks, experts, width, hidden, out, matrices = experts_dims(node, ways)
        axes = tuple(i for i, choice in enumerate(choices) if "e" in rule.cuts(choice))
        ranks, total = ways.get("e", 1), rule.sizes["e"]
        load = 1.0
        if ranks > 1:
            load = min(imbalance, float(ranks)) or usual_imbalance(total, ranks)
        return Local(
            tokens, picks, experts, total, width, hidden, out, matrices,
            node.output.type.dtype.itemsize, axes, ranks,
            any(choice in rule.algorithms for choice in choices), load,
        )  # fmt: skip

    @property
    def pairs(self) -> float:
        """Rows (token, expert) that the busiest rank's experts compute."""
        mean = self.tokens * self.choices / (1 if self.sends else self.ranks)
        return mean * self.imbalance

    @property
    def rows_sent(self) -> float:
        """Rows that a rank sends, those to itself included, with balanced routing."""
        block = self.all_experts // self.ranks
        missed = comb(self.all_experts - block, self.choices) / comb(self.all_experts, self.choices)
        return self.tokens * self.ranks * (1.0 - missed)


def seconds(local: Local, dtype: str, network: Network, *, backward: bool) -> tuple[float, float]:
    """(forward, backward) seconds on the busiest rank, without the exchanges."""
    pairs = max(local.pairs, 1.0)
    # Of few rows each goes to another expert: their weights are what is read.
    active = max(local.experts * (1.0 - (1.0 - 1.0 / local.experts) ** pairs), 1.0)
    rows = pairs / active
    products = (  # (rows, columns of the result, inner size) of each expert's two products
        (rows, local.matrices * local.hidden, local.width),
        (rows, local.out, local.hidden),
    )

    def product(m: float, n: float, k: float) -> float:
        return network.once(
            ("experts", m, n, k, active, dtype),
            lambda: matmul_s(m, n, k, active, dtype, network.cluster),
        )

    result = local.tokens * local.out * local.itemsize
    moved = network.traffic_seconds(2.0 * (saved_bytes(local) + result))
    forward = sum(product(*sizes) for sizes in products) + moved
    if not backward:
        return forward, 0.0
    return forward, sum(product(m, k, n) + product(k, n, m) for m, n, k in products) + moved


def exchange_seconds(local: Local, network: Network, *, backward: bool) -> tuple[float, float]:
    """(forward, backward) seconds of the exchanges, which nothing hides."""

    def passing(back: bool) -> float:
        sent = exchanged(local, back)
        return sum(network.seconds("all_to_all", local.axes, n) for n in sent)

    return passing(False), passing(True) if backward else 0.0


def exchanged(local: Local, backward: bool) -> list[float]:
    """Bytes of each all-to-all, as `costmodel.collective` counts them (one rank's buffer)."""
    if not local.sends or local.ranks == 1:
        return []
    rows = local.rows_sent * local.imbalance
    there = [rows * local.width * local.itemsize, rows * local.choices * local.itemsize]
    back = [rows * local.out * local.itemsize]
    if backward:
        return [*back, *there]
    counts, numbers = float(_COUNT_BYTES * local.ranks), rows * local.choices * _INDEX_BYTES
    return [counts, numbers, *there, *back]


def saved_bytes(local: Local) -> float:
    """Bytes of the sorted rows that the products take and give, which autograd keeps."""
    widths = local.width + (local.matrices + 1) * local.hidden + local.out
    return local.pairs * widths * local.itemsize


__all__ = [
    "Local", "exchange_seconds", "exchanged", "saved_bytes", "seconds", "usual_imbalance",
]  # fmt: skip
