"""Gathered parameters are not kept for backward: they are gathered again.

Autograd saves the weight of every matmul.  Of a weight that was gathered from shards that is the
whole weight, and sharding it would have saved nothing.  `regathering` swaps such saved tensors
for the recipe (which shard, which axis and dim) and runs it again when backward asks.  The
parameters that backward will need next are gathered while it computes (see `ahead.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..mesh.collectives import Axis, Gathering

if TYPE_CHECKING:
    from ..mesh.mesh import Mesh


@dataclass(slots=True, eq=False, weakref_slot=True)
class Recipe:
    """How to gather a parameter again: `source` along `dim` of `axis`.

    `made` is the storage that the last gathering made, while anything still uses it.  `before` is
    the recipe that forward made before this one: backward will ask for it next.  `node` is the
    autograd node of the gathering; it runs if a gradient reaches the parameter.
    """

    source: Tensor | View
    axis: Axis
    dim: int
    size: int | None
    made: weakref.ref[torch.UntypedStorage]
    before: Recipe | None
    node: Node | None
    uses: int = 0  # how often backward will ask for it
    kept: torch.UntypedStorage | None = None  # between the first and the last of them
    under_way: Gathering | None = None

    def expect(self) -> None:
        """Backward will ask once more."""
        if self.uses == 0 and isinstance(self.source, View):
            self.source.recipe.expect()
        self.uses += 1

    def storage(self) -> torch.UntypedStorage:
        """The storage of the whole parameter, gathered again unless it is still there."""
        storage = self.made()
        if storage is None:
            self._start()
            self._start_earlier()
            assert self.under_way is not None
            storage = self.under_way.whole().untyped_storage()
            self.under_way = None
            self.made = weakref.ref(storage)
        self.uses = max(self.uses - 1, 0)
        self.kept = storage if self.uses else None
        return storage

    def _start(self) -> None:
        if self.under_way is None:
            source = self.source.tensor() if isinstance(self.source, View) else self.source
            move = source.detach(), self.dim, self.size
            self.under_way = self.axis.start_gather(*move, "backward")

    def _start_earlier(self) -> None:
        """Start what backward will ask for next: at least as many bytes as this one has."""
        assert self.under_way is not None
        wanted, recipe = self.under_way.nbytes, self.before
        while recipe is not None and wanted > 0:
            if recipe.under_way is None and recipe._is_coming():
                recipe._start()
            if recipe.under_way is not None:
                wanted -= recipe.under_way.nbytes
            recipe = recipe.before

    def _is_coming(self) -> bool:
        """Will this backward ask for it, and can it be started now?"""
        return (
            self.uses > 0
            and self.made() is None
            and not isinstance(self.source, View)
            and self.node is not None
            and _in_backward()
            and torch._C._will_engine_execute_node(self.node)  # pyright: ignore
        )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # pyright: ignore


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
    last: Recipe | None = None

    def remember(
        self, whole: Tensor, source: Tensor, axis: Axis, dim: int, size: int | None
    ) -> None:
        """`whole` was gathered from `source`; `source` may itself view a gathered parameter."""
        storage = whole.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        recipes = self.recipes

        def forget(_: object) -> None:
            recipes.pop(key, None)

        recipes[key] = self.last = Recipe(
            self.view(source) or source.detach(),
            axis,
            dim,
            size,
            weakref.ref(storage, forget),
            self.last,
            whole.grad_fn,
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
        view = self.view(x)
        if view is not None:
            view.recipe.expect()
            return view
        # Detached: an operation that saves its own result would otherwise hold itself alive.
        return _Kept(x if x.is_leaf else x.detach(), x._version)


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

    Backward gathers it again, and keeps it from the first to the last of its uses.  Costs one
    all-gather per parameter in backward and a dictionary look-up per saved tensor.
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
