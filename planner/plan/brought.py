"""What it takes to bring the weights of blocks together.

The problem adds up seconds of bytes weight by weight.  Here they are those of the collectives that
run, each with all that it takes: a large message has more of a link than small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..strategies.prices import Prices
from .program import PricedStep, Program, Sharded, Weight
from .traffic import Together


def brought_steps(
    program: Program, together: Sequence[Together], prices: Prices
) -> dict[Sharded, tuple[PricedStep, ...]]:
    """The steps of every weight that moves, each with its share, by bytes, of the seconds of the
    collectives that take it in a step, `together`: per layer, on average."""
    spent: dict[tuple[Sharded, int], float] = {}
    for each in together:
        traffic = each.traffic
        seconds = prices.network.seconds(traffic.kind, traffic.axes, traffic.bytes) * each.times
        for item, step, share in each.shares:
            mine = seconds * share / traffic.bytes if traffic.bytes else 0.0
            spent[item, step] = spent.get((item, step), 0.0) + mine
    return {
        weight.item: tuple(
            replace(step, seconds=alone + spent.get((weight.item, i), 0.0) / layers)
            for i, (step, alone) in enumerate(_local(weight, prices, program.micro_batches))
        )
        for weight, layers in program.brought()
        if weight.way
    }


def _local(weight: Weight, prices: Prices, times: int) -> list[tuple[PricedStep, float]]:
    """The steps of a weight, and the seconds that each takes on a rank alone, `times` in a step.

    Those on the way home are collectives alone.
    """
    conversions = prices.conversions(weight.param.value, param=True)
    found = [(priced, 0.0) for priced in weight.homecoming]
    at = weight.kept.spec
    for priced in weight.steps:
        found.append((priced, times * conversions.local_seconds(priced.step, at)))
        at = tuple(priced.step.b if i in priced.step.axes else s for i, s in enumerate(at))
    return found


__all__ = ["brought_steps"]
