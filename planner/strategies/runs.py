"""What one run of a region takes on one rank, by its strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.ops.registry import saved_values
from .conversion import Floats
from .prices import Prices
from .regions import Region, Strategy
from .spans import while_backward, while_forward


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """One run of a region: seconds, bytes kept for backward, bytes held at the widest node, forward
    and backward, and bytes of KV cache that stay; each by strategy.  What is held is without
    parameters, and what `Spans` has."""

    seconds: Floats
    kept: Floats
    ahead: Floats
    behind: Floats
    cached: Floats

    def of(self, strategies: Sequence[int]) -> Runs:
        """Of some strategies, by their numbers."""
        k = list(strategies)
        return Runs(self.seconds[k], self.kept[k], self.ahead[k], self.behind[k], self.cached[k])

    def towards(self, other: Runs, share: float) -> Runs:
        """On average, where such a share of the runs are as in `other`; bytes are alike in both."""
        mean = (1 - share) * self.seconds + share * other.seconds
        return Runs(mean, self.kept, self.ahead, self.behind, self.cached)


def keepers(prices: Prices) -> Mapping[str, int]:
    """Which region counts the memory of a value that autograd keeps: one region per value, and one
    value of those that are views of each other.

    Parameters are not counted (-1): they are there anyway, or gathered again.
    """
    found: dict[str, int] = dict.fromkeys(prices.params, -1)
    for index, region in enumerate(prices.regions):
        for node in region.nodes:
            for value in saved_values(node):
                found.setdefault(prices.viewed(value.name)[0], index)
    for index, region in enumerate(prices.regions):
        kept = {prices.viewed(v.name)[0] for node in region.nodes for v in saved_values(node)}
        for value in region.values:
            if value.name in kept:
                found[value.name] = index
    return found


def runs_of(prices: Prices, me: int, kept_by: Mapping[str, int]) -> Runs:
    """What region number `me` takes; `kept_by` is what `keepers` gives."""
    region = prices.regions[me]
    rows = [_measure(prices, region, strategy, me, kept_by) for strategy in region.strategies]
    return Runs(*np.array(rows).T)


def _measure(
    prices: Prices, region: Region, strategy: Strategy, me: int, kept_by: Mapping[str, int]
) -> tuple[float, float, float, float, float]:
    """A row of `Runs`."""
    produced = dict(zip((v.name for v in region.values), strategy.produces, strict=True))
    again = prices.setting.again(region.scope)
    seconds = routed = cached = 0.0
    kept: dict[str, float] = {}
    for node, choices in zip(region.nodes, strategy.choices, strict=True):
        cost = prices.node_cost(node, choices)
        seconds += cost.seconds + again * cost.forward_s
        for name, size in cost.kept:
            whole, share = prices.viewed(name)
            if kept_by.get(whole) == me:
                kept[whole] = size / share
        routed += cost.routed
        cached += cost.cache
        for value, need in cost.needs:
            if produced.get(value.name, need) != need:  # the result of a reduction
                conversions = prices.conversions(value, param=False)
                seconds += conversions.seconds(produced[value.name], need)
    training = prices.setting.training
    ahead = while_forward(prices, region, strategy, kept_by if training else {})
    behind = while_backward(prices, region, strategy) if training else 0.0
    return seconds, sum(kept.values()) + routed, ahead, behind, cached


__all__ = ["Runs", "keepers", "runs_of"]
