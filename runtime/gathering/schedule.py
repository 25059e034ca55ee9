"""When weights come and go: one unit ahead of its use, in the order in which a model runs.

A model runs stage 0, its first loop over layers, stage 1, and so on.  Each stage and each layer has
a unit of weights.  While one unit is used the next is on its way, so that memory holds two.  Layers
that are recomputed in backward go the other way.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.autograd.graph import Node

from ...compat.torch import will_run
from .again import Recipes, in_backward
from .chains import Flight
from .coming import Coming
from .unchanged import All, Unchanged
from .weights import Item, Unit


class Schedule:
    """The units of a model, in the order of use, and what is on its way."""

    def __init__(
        self,
        stages: Sequence[Sequence[tuple[Item, int]]],
        loops: Sequence[Sequence[Unit]],
        everywhere: All = bool,
    ) -> None:
        """`stages` has by stage what comes then, each with the last stage that uses it; `loops`
        the units of the layers of each loop."""
        self._unchanged = Unchanged(everywhere)
        self._units: list[Unit] = []
        self._start_of: list[int] = []  # by stage, where it stands in `_units`
        for n, stage in enumerate(stages):
            self._start_of.append(len(self._units))
            self._units.append(tuple(item for item, _ in stage))
            self._units += loops[n] if n < len(loops) else ()
        self._loops = [len(loop) for loop in loops]
        self._last_use = {id(item): last for stage in stages for item, last in stage}
        self._sent: dict[int, Coming] = {}
        self._nodes: dict[int, weakref.ref[Node]] = {}  # that gradients of a layer's weights reach
        self._stage: int | None = None  # which one runs; None while the model does not
        self._shown: list[Item] = []  # of this stage and earlier ones
        self._recipes: Recipes | None = None
        self._first = self._last = True  # of the micro-batches of a step

    @contextmanager
    def step(self) -> Generator[None]:
        """Around the micro-batches of a step, of which each is in `micro_batch`."""
        try:
            yield
            self._reduce_totals()
        finally:
            self._first = self._last = True
            for item in self._items():
                item.held.total = None

    def micro_batch(self, *, first: bool, last: bool) -> None:
        """The first or last one of a step begins, or one between.

        Copies at home are made by the first; the last sends sums of gradients off.
        """
        self._first, self._last = first, last

    @torch.no_grad()
    def _reduce_totals(self) -> None:
        """Reduce the sums that the last backward pass did not reach."""
        for unit in self._units:
            left = [item for item in unit if item.held.total is not None]
            begun = [item.take_total() for item in left]
            flight = Flight([x for x, _ in begun], [way for _, way in begun], "backward")
            for item, gradient in zip(left, flight.finish(), strict=True):
                source = item.source()
                source.grad = gradient if source.grad is None else source.grad + gradient

    def _items(self) -> Iterator[Item]:
        return (item for unit in self._units for item in unit)

    @contextmanager
    def model(self) -> Generator[None]:
        """Around the model's forward."""
        self._stop()
        if self._first:
            self._drop_copies()
        with ExitStack() as stack:
            if torch.is_grad_enabled() and any(item.is_moved for item in self._items()):
                self._recipes = Recipes()
                stack.enter_context(self._recipes.hooks())
            stack.callback(self._stop)
            self._begin_stage(0)
            yield
            if self._stage != len(self._loops):
                raise RuntimeError(
                    f"the model's forward ended after {self._stage} of its {len(self._loops)} loops"
                    " over layers; run every layer in order, or the weights of what comes after"
                    " them are not there"
                )

    def _drop_copies(self) -> None:
        """Parameters may have changed; in evaluation copies stay where they have not."""
        kept = [item for item in self._items() if item.kept]
        if torch.is_grad_enabled() or not kept:
            self._unchanged.forget()
        elif self._unchanged.since(kept) and all(item.held.copy is not None for item in kept):
            return
        for item in kept:
            item.held.copy = None

    @contextmanager
    def layer(self, loop: int, index: int) -> Generator[None]:
        """Around the forward of a layer, also when it is run again in backward."""
        at = self._start_of[loop] + 1 + index
        if self._stage is not None and index == 0:
            self._end_stage(loop)
        node = self._arrive(at)
        if self._stage is not None and node is not None:
            self._nodes[at] = weakref.ref(node)
        self._send_next(at, loop)
        try:
            yield
        finally:
            for item in self._units[at]:
                item.hide()
        if self._stage is not None and index + 1 == self._loops[loop]:
            self._begin_stage(loop + 1)

    def _begin_stage(self, stage: int) -> None:
        at = self._start_of[stage]
        self._stage = stage
        self._shown += self._units[at]
        self._arrive(at)
        self._send_next(at, stage)

    def _end_stage(self, stage: int) -> None:
        for item in self._shown:
            if self._last_use[id(item)] <= stage:
                item.hide()

    def _stop(self) -> None:
        self._stage = self._recipes = None
        for item in self._shown:
            item.hide()
        self._shown.clear()
        while self._sent:
            self._sent.pop(next(iter(self._sent))).cancel()

    def _arrive(self, at: int) -> Node | None:
        unit = self._units[at]
        if not unit:
            return None
        coming = self._sent.pop(at, None) or self._coming(unit)
        return coming.arrive(self._recipes)

    def _coming(self, unit: Unit) -> Coming:
        return Coming(unit, more=not self._last)

    def _send_next(self, at: int, loop: int) -> None:
        """Send for the unit that will be used after that at `at`."""
        if self._stage is not None:
            coming = range(at + 1, len(self._units))
        else:  # a layer runs again: backward asks for the one before it next
            coming = (i for i in range(at - 1, self._start_of[loop], -1) if self._is_awaited(i))
        following = next((i for i in coming if self._units[i]), None)
        if following is not None and following not in self._sent:
            self._sent[following] = self._coming(self._units[following])

    def _is_awaited(self, at: int) -> bool:
        node = self._nodes[at]() if at in self._nodes else None
        return in_backward() and node is not None and will_run(node)
