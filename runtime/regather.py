"""Gathered parameters are not kept for backward: they are gathered again.

Autograd saves the weight of every matmul.  Of a weight that was gathered from shards that is the
whole weight, and sharding it would have saved nothing.  `regathering` swaps such saved tensors
for the recipe (which shard, which axis and dim) and runs it again when backward asks.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .collectives import WHOLE, Axis, Move

if TYPE_CHECKING:
    from .mesh import Mesh


@dataclass(slots=True)
class Recipe:
    """How to gather a parameter again: `source` along `dim` of `axis`.

    `made` is the storage that the last gathering made, while anything still uses it.
    """

    source: Tensor | View
    axis: Axis
    dim: int
    size: int | None
    made: weakref.ref[torch.UntypedStorage]

    def storage(self) -> torch.UntypedStorage:
        """The storage of the whole parameter, gathered again unless it is still there."""
        storage = self.made()
        if storage is None:
            source = self.source.tensor() if isinstance(self.source, View) else self.source
            move = Move(self.dim, WHOLE, self.size)
            whole = self.axis.move(source.detach(), move, "backward")
            storage = whole.untyped_storage()
            self.made = weakref.ref(storage)
        return storage


@dataclass(frozen=True, slots=True)
class View:
    """A tensor that looks into a gathered parameter."""

    recipe: Recipe
    dtype: torch.dtype
    device: torch.device
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The same tensor over a newly gathered parameter."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(self.recipe.storage(), self.offset, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A saved tensor that is none of ours, and its version when it was saved."""

    tensor: Tensor
    version: int


_Saved: TypeAlias = View | _Kept


@dataclass(slots=True)
class ParameterMemory:
    """The gathered parameters that are alive, by the address of their storage."""

    recipes: dict[int, Recipe] = field(default_factory=dict[int, Recipe])

    def remember(
        self, whole: Tensor, source: Tensor, axis: Axis, dim: int, size: int | None
    ) -> None:
        """`whole` was gathered from `source`; `source` may itself view a gathered parameter."""
        storage = whole.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        recipes = self.recipes

        def forget(_: object) -> None:
            recipes.pop(key, None)

        recipes[key] = Recipe(
            self.view(source) or source.detach(), axis, dim, size, weakref.ref(storage, forget)
        )

    def view(self, x: Tensor) -> View | None:
        """`x` as a view of a remembered parameter; None if it is something else."""
        if x.layout != torch.strided:
            return None
        key = x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
        recipe = self.recipes.get(key)
        if recipe is None:
            return None
        return View(
            recipe, x.dtype, x.device, int(x.storage_offset()), tuple(x.size()), tuple(x.stride())
        )

    def pack(self, x: Tensor) -> _Saved:
        """What to save in place of `x`."""
        # Detached: an operation that saves its own result would otherwise hold itself alive.
        return self.view(x) or _Kept(x if x.is_leaf else x.detach(), x._version)


def _unpack(saved: _Saved) -> Tensor:
    if isinstance(saved, View):
        return saved.tensor()
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            f"a tensor of shape {tuple(saved.tensor.shape)} that backward needs was changed in"
            " place after the forward pass used it; change a copy instead"
        )
    return saved.tensor


@contextmanager
def regathering(mesh: Mesh) -> Generator[None]:
    """Within, what `Axis.gather_parameter` returns is freed after its last use in forward.

    Backward gathers it again, once for all uses that overlap.  Costs one all-gather per
    parameter in backward and a dictionary look-up per saved tensor.
    """
    if mesh.size == 1 or not torch.is_grad_enabled():
        yield
        return
    memory = ParameterMemory()
    previous, mesh.parameter_memory = mesh.parameter_memory, memory
    try:
        with torch.autograd.graph.saved_tensors_hooks(memory.pack, _unpack):
            yield
    finally:
        mesh.parameter_memory = previous
