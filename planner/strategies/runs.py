"""What one run of a region takes on one rank, by its strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ...ir.ops.registry import saved_values
from .lattice import Floats
from .prices import Prices
from .regions import Modes, Region, Strategy
from .selected import Reread, again_in_part, reread
from .spans import while_backward, while_forward


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """One run of a region: seconds, bytes kept for backward, bytes held at the widest node, forward
    and backward, and bytes of KV cache that stay; each by strategy.  What is held is without
    parameters, and what `Spans` has.

    `again` are the seconds more where the layer runs again in backward, and `again_in_part` where
    it keeps a part of what it makes: `part` bytes.
    """

    seconds: Floats
    kept: Floats
    ahead: Floats
    behind: Floats
    cached: Floats
    again: Floats
    again_in_part: Floats
    part: Floats

    def of(self, strategies: Sequence[int]) -> Runs:
        """Of some strategies, by their numbers."""
        k = list(strategies)
        return Runs(*(getattr(self, each.name)[k] for each in fields(self)))

    def mean(self, modes: Modes) -> Runs:
        """On average, where layers run again so."""
        full, part = modes.shares()
        return replace(self, seconds=self.seconds + full * self.again + part * self.again_in_part)


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
    twice = _Twice(again_in_part(region.scope.nodes), tuple(reread(region)))
    rows = [
        _measure(prices, region, strategy, me, kept_by, twice) for strategy in region.strategies
    ]
    return Runs(*np.array(rows).T)


@dataclass(frozen=True, slots=True)
class _Twice:
    """Of a layer that keeps a part: the nodes that run again, and what a region reads again."""

    nodes: frozenset[str]
    reread: tuple[Reread, ...]


def _measure(
    prices: Prices,
    region: Region,
    strategy: Strategy,
    me: int,
    kept_by: Mapping[str, int],
    twice: _Twice,
) -> tuple[float, ...]:
    """A row of `Runs`."""
    produced = dict(zip((v.name for v in region.values), strategy.produces, strict=True))
    in_part, stay = twice.nodes, prices.kept_results
    seconds = again = some = routed = routed_in_part = cached = 0.0
    kept: dict[str, float] = {}
    for node, choices in zip(region.nodes, strategy.choices, strict=True):
        cost = prices.node_cost(node, choices)
        seconds += cost.seconds
        again += cost.forward_s
        some += (cost.forward_s - cost.spared_s) * (node.name in in_part)
        for name, size in cost.kept:
            whole, share = prices.viewed(name)
            if kept_by.get(whole) == me:
                kept[whole] = size / share
        routed += cost.routed
        routed_in_part += cost.routed_in_part
        cached += cost.cache
        for value, need in cost.needs:
            if produced.get(value.name, need) != need:  # the result of a reduction
                once, more = prices.inner_s(value, produced[value.name], need)
                seconds, again, some = seconds + once, again + more, some + more
    training = prices.setting.training
    ahead = while_forward(prices, region, strategy, kept_by if training else {})
    behind = while_backward(prices, region, strategy) if training else 0.0
    part = sum(size for name, size in kept.items() if name in stay) + routed_in_part
    part += _reread_bytes(prices, region, strategy, twice.reread) if training else 0.0
    whole = sum(kept.values()) + routed
    return seconds, whole, ahead, behind, cached, again, some, part


def _reread_bytes(
    prices: Prices, region: Region, strategy: Strategy, again: Sequence[Reread]
) -> float:
    """Bytes that a layer which keeps a part has for its second run alone."""
    found, choices = 0.0, dict(zip((n.name for n in region.nodes), strategy.choices, strict=True))
    for each in again:
        needs = dict(
            (value.name, need)
            for value, need in prices.node_cost(each.node, choices[each.node.name]).needs
        )
        size = prices.local_bytes(each.value, needs[each.value.name])
        found += size / prices.viewed(each.value.name)[1]
    return found


__all__ = ["Runs", "keepers", "runs_of"]
