"""How the weights of a block are stored and used, and the ways between: of values and gradients.

A `Unit` has the weights of one block, which move together (see `coming.py`).  While the block runs
they stand in the `__dict__` of the modules that own them, where they hide the parameters:
`parameters()` and state dicts have the shards.

    value      stored --cast--> home --> used
    gradient   stored <-------- home <-- used

Where a weight has a home, a copy may be kept there from step to step, made anew once per step, and
gradients may be summed up there over the micro-batches of a step:

    home kept, gradients late     ZeRO-1: a gather and a reduce-scatter per step
    home kept                     ZeRO-2: a gather per step, a reduce-scatter per micro-batch
    home not kept, late           DDP that accumulates
    no home                       FSDP, or DDP that does not: all of it at each use
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...compat.torch import registered
from .chains import Cast, Chain, Way


@dataclass(frozen=True, slots=True)
class Home:
    """Where a weight is between its uses, if that is not as its parameter is stored.

    `spec` is on each axis as `stored`, or V; `via` and `by` are of the way from `stored` there.
    """

    spec: str
    via: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    # A copy lies there in the dtype of use, made once per step.  False only where the way moves
    # nothing between ranks: then it is made of the parameter at each use
    kept: bool = True
    # Gradients are summed there over the micro-batches of a step, in float32 or wider, and reduced
    # to `stored` once; else each backward reduces them all the way
    late: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """How a parameter or buffer is stored, and how a block uses it.

    `stored` is also how its gradient and its optimizer's states lie.  `dtype` is that of its use
    (None: as it is stored).  `via` are the specs between, where the way to `used`, from `home` if
    there is one, is not one step; `by` has for each step the collective that it goes by otherwise
    than is usual, or "".  One that is used in several ways has a row for each: `of` is the name
    that it is stored under.

    `stages` is for weights that are no layer's: stage n of a model's forward is what it does after
    n of its loops over layers.  A weight is there from the first of the two stages to the last.
    """

    stored: str
    used: str
    via: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    of: str = ""
    stages: tuple[int, int] = (0, 0)
    dtype: torch.dtype | None = None
    home: Home | None = None


@dataclass(slots=True, eq=False)
class Held:
    """What there is of a weight at home: the copy, and the sum of gradients of this step."""

    copy: Tensor | None = None
    total: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Ways:
    """The chains of a weight, there and back: between `stored` and home, and between home and use.

    The value goes in `dtype`, its gradient in `reduced`; None: in that in which it comes.
    """

    to_home: Chain
    to_use: Chain
    from_use: Chain
    from_home: Chain
    dtype: torch.dtype | None = None
    reduced: torch.dtype | None = None

    @property
    def there(self) -> Chain:
        """All of the value's way."""
        return (*self.to_home, *self.to_use)

    @property
    def back(self) -> Chain:
        """All of the gradient's way."""
        return (*self.from_use, *self.from_home)


@dataclass(frozen=True, slots=True)
class Item:
    """A weight of a unit: the module and name that it is stored under, those that its users know,
    and its ways."""

    stored: tuple[nn.Module, str]
    used: tuple[nn.Module, str]
    ways: Ways
    kept: bool = False
    late: bool = False
    held: Held = field(default_factory=Held)

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
        """Is it brought by a collective, or cast, for each use, so that backward makes it again?"""
        cast = self.ways.dtype not in (None, self.source().dtype)
        if self.kept:
            return _communicates(self.ways.to_use)
        return cast or _communicates(self.ways.there)

    @property
    def is_plain(self) -> bool:
        """Is it used as it is stored, and are gradients as they come, on a mesh with axes of one
        rank where they would move?"""
        ways = self.ways
        as_stored = ways.dtype in (None, self.source().dtype) and self.used == self.stored
        return as_stored and not ways.there and not ways.back

    def way_there(self) -> tuple[Tensor, Way]:
        """What its way to its use begins with now; a copy that is to be kept is made on it."""
        if self.held.copy is not None:
            return self.held.copy, self.ways.to_use
        cast = _cast(self.ways.dtype)
        keep = (self._keep,) if self.kept else ()
        return self.source().detach(), (*cast, *self.ways.to_home, *keep, *self.ways.to_use)

    def way_back(self, *, more: bool) -> Way:
        """The way of a gradient as it is used: to one as it is stored, or, where `more` gradients
        of a step are to come and it is late, into the sum at home."""
        ways = self.ways
        if not self.late:
            return (*_reduced(ways.back, ways.reduced), *_cast(self.source().dtype))
        home = _reduced(ways.from_use, ways.reduced)
        return (*home, self._add) if more else (*home, self._with_total, *self._rest)

    def take_total(self) -> tuple[Tensor, Way]:
        """The sum of this step's gradients, which must be there, and its way to the shard."""
        total, self.held.total = self.held.total, None
        assert total is not None
        return total, self._rest

    @property
    def _rest(self) -> Way:
        """The way of a gradient, or of the wider sum of some, from home."""
        stored = self.source().dtype
        reduced = self.ways.reduced or self.ways.dtype or stored
        return (*_reduced(self.ways.from_home, reduced), *_cast(stored))

    def _keep(self, x: Tensor) -> Tensor:
        self.held.copy = x
        return x

    def _add(self, x: Tensor) -> Tensor:
        if self.held.total is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            self.held.total = x.to(wide, copy=True)
        else:
            self.held.total.add_(x)
        return x

    def _with_total(self, x: Tensor) -> Tensor:
        total, self.held.total = self.held.total, None
        return x if total is None else total.add_(x)


Unit: TypeAlias = tuple[Item, ...]


def _communicates(chain: Chain) -> bool:
    return any(leg.collective is not None for leg in chain)


def _reduced(chain: Chain, dtype: torch.dtype | None) -> Way:
    """The chain, in a dtype of its own where ranks exchange anything along it."""
    return (*_cast(dtype), *chain) if _communicates(chain) else chain


def _cast(dtype: torch.dtype | None) -> Way:
    return () if dtype is None else (Cast(dtype),)
