"""Which bytes are live when in a step: the usages of a problem's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from ...facts.spec import P, Spec
from ...ir.graph import Loop, Value
from ..ilp.problem import Usage
from .lattice import Bools, Floats
from .prices import Prices
from .regions import Region
from .runs import Runs
from .spans import Span, Spans
from .times import Times


class Live:
    """Usages over the times of a step; sizes are bytes by strategy."""

    def __init__(self, prices: Prices, times: Times) -> None:
        self._prices = prices
        self._times = times
        self._spans = Spans(prices, times)

    def carried(self, loop: Loop, value: Value, specs: Sequence[Spec]) -> tuple[Usage, ...]:
        """What a loop carries: layers that are recomputed keep what they take in, each its own."""
        setting = self._prices.setting
        if not setting.recompute:
            return ()
        scopes = {id(r.scope): r.scope for r in self._prices.regions if r.scope.loop is loop}
        modes = setting.recomputed.of(loop)
        layers = modes.full + modes.part
        start = min(self._times.start(scope) for scope in scopes.values())
        size = np.array([float(self._prices.local_bytes(value, spec)) for spec in specs])
        last = max(scopes.values(), key=lambda scope: self._times.back(scope)[0].times.start)
        usages: list[Usage] = []
        for window in self._times.back(last):  # until then all are there
            left = ceil(len(loop.order) * (last.weight - window.done) / last.weight)
            usages.append(Usage(start, window.times.stop, min(left, layers) * size))
            start = window.times.stop
        return (*usages, *self._of_others(layers * size))

    def _of_others(self, size: Floats) -> list[Usage]:
        """What the other micro-batches in flight keep, all of the time."""
        others = self._prices.setting.in_flight - 1
        return [Usage(0, self._times.horizon, others * size)] if others else []

    def gradient(
        self, name: str, layers: int, size: Floats, summed: Bools, late: Bools
    ) -> list[Usage]:
        """A gradient is there from the first backward that gives it, in one layer after another;
        where it is `summed` over micro-batches, from the first of them to the last.  A `late` one
        takes the place of sums that are counted with the weight's home."""
        users = [
            region
            for region in self._prices.regions
            if any(self._prices.outer_name(value.name) == name for value in region.operands)
        ]
        first = min(users, key=lambda region: self._times.backward(region)[0], default=None)
        starts = () if first is None else self._times.backward(first)
        windows = () if first is None else self._times.back(first.scope)
        ends = [*starts[1:], self._times.horizon]
        usages: list[Usage] = []
        for start, window, end in zip(starts, windows, ends, strict=False):
            there = layers if end == self._times.horizon else min(window.done + 1, layers)
            usages.append(Usage(start, end, there * size * ~(summed | late)))
        if summed.any():
            usages.append(Usage(0, self._times.horizon, layers * size * summed))
        return usages

    def kept(self, region: Region, runs: Runs) -> list[Usage]:
        """What autograd keeps of each run of a region until its backward has run."""
        scope, windows = region.scope, self._times.back(region.scope)
        modes = self._prices.setting.recomputed.runs(scope)
        start = self._times.start(scope)
        usages: list[Usage] = []
        for window, at in zip(windows, self._times.backward(region), strict=True):
            left = max(modes.kept - window.done, 0)
            some = max(min(modes.part, modes.part + modes.kept - window.done), 0)
            if not left:  # one layer at a time runs again; it has then what one that keeps all has
                usages.append(Usage(window.times.start, at + 1, runs.kept))
            if some and not left:
                usages.append(Usage(start, window.times.start, runs.part))
                some -= 1
            if left or some:
                usages.append(Usage(start, at + 1, left * runs.kept + some * runs.part))
            start = at + 1
        kept = modes.kept * runs.kept + modes.part * runs.part
        return usages + (self._of_others(kept) if modes.kept or modes.part else [])

    def running(self, me: int, runs: Runs, allowed: Sequence[int]) -> list[Usage]:
        """What a region holds while it runs, and values, in backward their gradients, from the
        region that makes them on."""
        region = self._prices.regions[me]
        training = self._prices.setting.training
        usages = [Usage(at, at + 1, runs.ahead) for at in self._times.forward(region)]
        if training:
            usages += [Usage(at, at + 1, runs.behind) for at in self._times.backward(region)]
        for span in self._spans.gradients(me) if training else self._spans.values(me):
            value = (region.operands if span.is_operand else region.values)[span.number]
            sizes = [
                float(self._prices.local_bytes(value, spec))
                for spec in self._specs(region, span, allowed)
            ]
            usages.append(Usage(span.start, span.end, np.array(sizes)))
        return usages if training else usages + self._summands(me, allowed)

    def _summands(self, me: int, allowed: Sequence[int]) -> list[Usage]:
        """Results that are partial sums, which stay beside what they are converted to."""
        region = self._prices.regions[me]
        size = np.array(
            [
                sum(
                    float(self._prices.local_bytes(value, spec))
                    for value, spec in zip(
                        region.values, region.strategies[k].produces, strict=True
                    )
                    if P in spec
                )
                for k in allowed
            ]
        )
        return [Usage(start, end, size) for start, end in self._spans.summands(me)]

    @staticmethod
    def _specs(region: Region, span: Span, allowed: Sequence[int]) -> list[Spec]:
        ways = [region.strategies[k] for k in allowed]
        if span.is_operand:
            return [way.requires[span.number][0] for way in ways]
        return [way.produces[span.number] for way in ways]


__all__ = ["Live"]
