"""The weights of a block move together, before it runs; their gradients when it has run backward.

A `Unit` has the weights of one block.  Before the block runs they are taken from the specs in which
they are stored to those in which it uses them, and stand in the `__dict__` of the modules that own
them, where they hide the parameters: `parameters()` and state dicts have the shards.

Gradients leave when the last of a unit's is there, and are waited for when the unit before has run
backward.  Autograd runs nodes in the reverse of the order in which they were made; the node that
waits is made where the unit is sent for, which is when the unit before begins (`schedule.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ...compat.torch import registered
from .again import Recipes
from .chains import Chain, Flight


@dataclass(frozen=True, slots=True)
class Weight:
    """How a parameter or buffer is stored, and how a block uses it.

    `via` are the specs between, where the way from `stored` to `used` is not one step.  One that
    is used in several ways has a row for each: `of` is the name that it is stored under.  `by` has
    for each step the collective that it goes by otherwise than is usual, or "".

    `stages` is for weights that are no layer's: stage n of a model's forward is what it does after
    n of its loops over layers.  A weight is there from the first of the two stages to the last.
    """

    stored: str
    used: str
    via: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    of: str = ""
    stages: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Item:
    """A weight of a unit: the module and name that it is stored under, those that its users know,
    and the chains of the weight there and of its gradient back."""

    stored: tuple[nn.Module, str]
    used: tuple[nn.Module, str]
    forward: Chain
    backward: Chain

    def source(self) -> Tensor:
        """The tensor as it is stored, also while `used` hides it."""
        return registered(*self.stored)

    def show(self, tensor: Tensor) -> None:
        """Let users find the weight as they want it."""
        owner, leaf = self.used
        owner.__dict__[leaf] = tensor

    def hide(self) -> None:
        """Users find the stored tensor again, if any."""
        owner, leaf = self.used
        owner.__dict__.pop(leaf, None)

    @property
    def is_moved(self) -> bool:
        """Is it brought by a collective, so that it is not kept for backward?"""
        return any(leg.collective is not None for leg in self.forward)


Unit: TypeAlias = tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class _Reduced:
    """Gradients on their way to the shards of the trained weights `numbers`."""

    numbers: tuple[int, ...]
    flight: Flight


class Coming:
    """A unit's weights on their way to one run of its block."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        sources = [item.source() for item in unit]
        training = torch.is_grad_enabled()
        self._trained = [i for i, x in enumerate(sources) if training and x.requires_grad]
        self._reduced: list[_Reduced] = []  # what backward puts there for the node that waits
        self._sources: tuple[Tensor, ...] = ()
        if self._trained:
            self._sources = _Await.apply(self._reduced, *(sources[i] for i in self._trained))
        self._stored = [x.detach() for x in sources]
        self._flight = Flight(self._stored, [item.forward for item in unit], "forward")

    def arrive(self, recipes: Recipes | None) -> Node | None:
        """Show the weights to the block; the node that their gradients reach."""
        used = self._flight.finish()
        node = None
        if self._trained:
            items = [self._unit[i] for i in self._trained]
            wholes = [used[i] for i in self._trained]
            shown = _Arrive.apply(self._reduced, items, wholes, *self._sources)
            node = shown[0].grad_fn
            for i, x in zip(self._trained, shown, strict=True):
                used[i] = x
        for item, x in zip(self._unit, used, strict=True):
            item.show(x)
        if recipes is not None:
            moved = [i for i, item in enumerate(self._unit) if item.is_moved]
            stored, ways = [self._stored[i] for i in moved], [self._unit[i].forward for i in moved]
            recipes.remember([used[i] for i in moved], stored, ways, node)
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
        wholes: Sequence[Tensor],
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reduced, ctx.items = reduced, items
        ctx.shapes = [x.shape for x in sources]
        return tuple(x.detach() for x in wholes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        items: Sequence[Item] = ctx.items
        there = {i: x for i, x in enumerate(gradients) if x is not None}
        if torch.is_grad_enabled() and any(x.requires_grad for x in there.values()):
            given = {i: _sent_back(x, items[i]) for i, x in there.items()}  # create_graph=True
        else:
            ways = [items[i].backward for i in there]
            flight = Flight(list(there.values()), ways, "backward")
            ctx.reduced.append(_Reduced(tuple(there), flight))
            given = {i: x.new_zeros(()).expand(ctx.shapes[i]) for i, x in there.items()}
        return None, None, None, *(given.get(i) for i in range(len(gradients)))


def _sent_back(gradient: Tensor, item: Item) -> Tensor:
    """A gradient as the shard's, such that it can be differentiated again."""
    for back, there in zip(item.backward, reversed(item.forward), strict=True):
        gradient = back.axis.move_with_gradient(gradient, back.move, there.move)
    return gradient
