"""The weights of a block move together, before it runs; their gradients when it has run backward.

Gradients leave when the last of a unit's is there, and are waited for when the unit before has run
backward.  Autograd runs nodes in the reverse of the order in which they were made; the node that
waits is made where the unit is sent for, which is when the unit before begins (`schedule.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .again import Recipes
from .chains import Flight
from .weights import Item, Unit


@dataclass(frozen=True, slots=True)
class _Reduced:
    """Gradients on their way to the shards of the trained weights `numbers`.

    None for a weight whose gradient stays at home until more of them are there.
    """

    numbers: tuple[int | None, ...]
    flight: Flight


class Coming:
    """A unit's weights on their way to one run of its block.

    `more`: other micro-batches of this step follow, with gradients of their own.
    """

    def __init__(self, unit: Unit, *, more: bool = False) -> None:
        self._unit = unit
        self._more = more
        sources = [item.source() for item in unit]
        training = torch.is_grad_enabled()
        self._trained = [i for i, x in enumerate(sources) if training and x.requires_grad]
        self._reduced: list[_Reduced] = []  # what backward puts there for the node that waits
        self._sources: tuple[Tensor, ...] = ()
        if self._trained:
            self._sources = _Await.apply(self._reduced, *(sources[i] for i in self._trained))
        begun = [item.way_there() for item in unit]
        self._flight = Flight([x for x, _ in begun], [way for _, way in begun], "forward")

    def arrive(self, recipes: Recipes | None) -> Node | None:
        """Show the weights to the block; the node that their gradients reach."""
        used = self._flight.finish()
        node = None
        if self._trained:
            items = [self._unit[i] for i in self._trained]
            wholes = [used[i] for i in self._trained]
            shown = _Arrive.apply(self._reduced, items, self._more, wholes, *self._sources)
            node = shown[0].grad_fn
            for i, x in zip(self._trained, shown, strict=True):
                used[i] = x
        for item, x in zip(self._unit, used, strict=True):
            item.show(x)
        if recipes is not None:
            moved = [i for i, item in enumerate(self._unit) if item.is_moved]
            again = [self._unit[i].way_there() for i in moved]  # of copies at home, if they are
            starts, ways = [x for x, _ in again], [way for _, way in again]
            recipes.remember([used[i] for i in moved], starts, ways, node)
        return node

    def cancel(self) -> None:
        """Wait for what nobody uses: the other ranks have sent it."""
        self._flight.finish()


class _Await(torch.autograd.Function):
    """The stored tensors themselves; backward waits for their gradients, where they are coming."""

    @staticmethod
    def forward(ctx: Any, reduced: list[_Reduced], *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reduced = reduced
        return tuple(x.view_as(x) for x in sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = list(gradients)
        while ctx.reduced:
            reduced: _Reduced = ctx.reduced.pop()
            for i, gradient in zip(reduced.numbers, reduced.flight.finish(), strict=True):
                if i is not None:
                    found[i] = gradient
        return None, *found


class _Arrive(torch.autograd.Function):
    """The weights as they are used, of the tensors stored; backward sends their gradients off.

    What it hands on in their place has their shape and no memory: `_Await`, alone, replaces it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        reduced: list[_Reduced],
        items: Sequence[Item],
        more: bool,
        wholes: Sequence[Tensor],
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reduced, ctx.items, ctx.more = reduced, items, more
        return tuple(x.detach() for x in wholes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        items: Sequence[Item] = ctx.items
        there = {i: x for i, x in enumerate(gradients) if x is not None}
        if torch.is_grad_enabled() and any(x.requires_grad for x in there.values()):
            given = {i: _sent_back(x, items[i]) for i, x in there.items()}  # create_graph=True
        else:
            ways = [items[i].way_back(more=ctx.more) for i in there]
            flight = Flight(list(there.values()), ways, "backward")
            stay = {i for i in there if items[i].late and ctx.more}
            ctx.reduced.append(_Reduced(tuple(None if i in stay else i for i in there), flight))
            given = {i: _nothing_like(items[i].source()) for i in there if i not in stay}
        return None, None, None, None, *(given.get(i) for i in range(len(gradients)))


def _nothing_like(x: Tensor) -> Tensor:
    """Zeros of its shape and dtype, without memory."""
    return x.new_zeros(()).expand(x.shape)


def _sent_back(gradient: Tensor, item: Item) -> Tensor:
    """A gradient as the shard's, such that it can be differentiated again."""
    reduced = item.ways.reduced
    gradient = gradient if reduced is None else gradient.to(reduced)
    for back, there in zip(item.ways.back, reversed(item.ways.there), strict=True):
        gradient = back.axis.move_with_gradient(gradient, back.move, there.move)
    return gradient.to(item.source().dtype)
