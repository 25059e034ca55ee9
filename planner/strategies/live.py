"""Which bytes are live when in a step: the usages of a problem's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from ...facts.spec import Spec
from ...ir.graph import Loop, Value
from ..ilp.problem import Usage
from .conversion import Bools, Floats
from .prices import Prices
from .regions import Region, Scope, recomputed_layers
from .times import Times, Window


class Live:
    """Usages over the times of a step; sizes are bytes by strategy."""

    def __init__(self, prices: Prices, times: Times) -> None:
        self._prices = prices
        self._times = times

    def carried(self, loop: Loop, value: Value, specs: Sequence[Spec]) -> tuple[Usage, ...]:
        """What a loop carries: layers that are recomputed keep what they take in, each its own."""
        setting = self._prices.setting
        if not setting.recompute:
            return ()
        scopes = {id(r.scope): r.scope for r in self._prices.regions if r.scope.loop is loop}
        layers = recomputed_layers(loop, setting.kept_layers)
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

    def gradient(self, name: str, layers: int, size: Floats, summed: Bools) -> list[Usage]:
        """A gradient is there from the first backward that gives it, in one layer after another;
        where it is `summed` over micro-batches, from the first of them to the last."""
        users = [
            region
            for region in self._prices.regions
            if any(self._prices.outer_name(value.name) == name for value in region.operands)
        ]
        windows: tuple[Window, ...] = min(
            (self._times.back(region.scope) for region in users),
            key=lambda each: each[0].times.start,
            default=(),
        )
        ends = [*(window.times.start for window in windows[1:]), self._times.horizon]
        usages: list[Usage] = []
        for window, end in zip(windows, ends, strict=False):
            there = layers if end == self._times.horizon else min(window.done + 1, layers)
            usages.append(Usage(window.times.start, end, there * size * ~summed))
        if summed.any():
            usages.append(Usage(0, self._times.horizon, layers * size * summed))
        return usages

    def kept(self, scope: Scope, size: Floats) -> list[Usage]:
        """What autograd keeps of each run of a scope until its backward has run."""
        windows = self._times.back(scope)
        keeping = self._prices.setting.keeping(scope)
        usages: list[Usage] = []
        if keeping < scope.weight:  # one layer at a time, after those that keep theirs
            turn = next(window for window in windows if window.done >= keeping)
            usages.append(Usage(turn.times.start, windows[-1].times.stop, size))
        start = self._times.start(scope)
        for window in windows if keeping else ():
            there = max(keeping - window.done, 0)
            usages.append(Usage(start, window.times.stop, there * size))
            start = window.times.stop
        return usages + (self._of_others(keeping * size) if keeping else [])

    def running(self, region: Region, size: Floats) -> list[Usage]:
        """What a region holds while it runs, in backward values and their gradients.  Without
        backward until its last use."""
        here = self._times.forward(region)
        if not self._prices.setting.training:
            ends = [self._last_use(region, run) + 1 for run in range(len(here))]
            return [Usage(at, end, size) for at, end in zip(here, ends, strict=True)]
        forward = [Usage(at, at + 1, size) for at in here]
        return forward + [Usage(at, at + 1, 2 * size) for at in self._times.backward(region)]

    def _last_use(self, region: Region, run: int) -> int:
        """The last time at which what a region makes in a window of its scope is used; its own if
        it never is."""
        made = {value.name for value in region.values}
        return max(
            self._times.forward(other)[run if other.scope is region.scope else -1]
            for other in self._prices.regions
            if other is region or any(value.name in made for value in other.operands)
        )


__all__ = ["Live"]
