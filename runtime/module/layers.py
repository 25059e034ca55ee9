"""Repeated blocks of a generated module: one class per distinct block, one object per layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..gathering.weights import Weight
from ..mesh.keeping import keeping_in_graphs
from ..mesh.mesh import Mesh
from .nested import Sharded

_T = TypeVar("_T")
_RANGE = re.compile(r"\{([\d.,]+)\}")


class Layer(Sharded):
    """A block of a generated module; its parameters are registered by the model that owns it.

    `WEIGHTS` has those that the block uses in another layout than they are stored in.  They are
    there while its forward runs, also a compiled one.
    """

    WEIGHTS: ClassVar[Mapping[str, Weight]] = {}
    _kept_in_part: ClassVar[Callable[..., Any]]

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._with_weights: Callable[[], AbstractContextManager[None]] = nullcontext
        self._explaining: Callable[[], AbstractContextManager[None]] = nullcontext
        self.keeps_compiled = False  # does it run compiled where it keeps a part of what it makes?
        self._how = ""  # it runs where it is compiled: so, `eagerly`, or keeping what this names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, with its weights as it uses them."""
        with self._with_weights(), self._explaining():
            return super().__call__(*args, **kwargs)

    def compile_forward(self, *, parts: bool = True, **options: Any) -> None:
        """Compile what the class says that it does, without the hooks of users and ours.

        `parts`: also for a layer that keeps a part of what it makes; else that runs as it is.
        """
        plain = type(self).forward.__get__(self)
        whole = torch.compile(plain, **options)
        in_part = torch.compile(_in_part(type(self)).__get__(self), **options)
        self.keeps_compiled = parts

        def forward(*inputs: Any) -> Any:
            match self._how:
                case "":
                    return whole(*inputs)
                case "eagerly":
                    return plain(*inputs)
                case keep:
                    return in_part(keep, *inputs)

        self.forward = forward

    def keeping(self, keep: str, *inputs: Any) -> Any:
        """Run compiled, so that backward finds such results and makes all else again."""
        return self._run(keep, inputs)

    def eagerly(self, *inputs: Any) -> Any:
        """Run as it is, even if it is compiled."""
        return self._run("eagerly", inputs)

    def _run(self, how: str, inputs: Sequence[Any]) -> Any:
        before, self._how = self._how, how
        try:
            return self(*inputs)
        finally:
            self._how = before

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not compiled: that of the forward would run this layer."""
        return {name: x for name, x in super().__getstate__().items() if name != "forward"}

    def bring_weights(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """`around()` has the layer's weights there while it is entered."""
        self._with_weights = around

    def explain_failures(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """`around()`, entered while the layer runs, says of failures which layer they are of."""
        self._explaining = around


def _in_part(of: type[Layer]) -> Callable[..., Any]:
    """The forward of a class of layers that keeps a part of what it makes: a function of its own
    for each, as a compiler knows what it has compiled by the function's code."""
    if "_kept_in_part" not in vars(of):
        code = _keeping.__code__.replace(co_name=f"{of.__name__}_in_part")
        of._kept_in_part = FunctionType(code, _keeping.__globals__)  # pyright: ignore[reportPrivateUsage]
    return of._kept_in_part  # pyright: ignore[reportPrivateUsage]


def _keeping(layer: Layer, keep: str, *inputs: Any) -> Any:
    def forward(*given: Any) -> Any:  # torch 2.11 compiles no `__get__` of a method
        return type(layer).forward(layer, *given)

    return checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False,
        context_fn=partial(keeping_in_graphs, keep),
    )  # fmt: skip


def per_layer(
    table: Mapping[str, _T], item_of_layer: Callable[[_T, int], _T] = lambda item, index: item
) -> dict[str, _T]:
    """`table` with names such as `layers.{0..3}.weight` or `layers.{0,2}.weight` written out.

    Layers come in order, each with its own names in the order of the table; `item_of_layer` makes
    an item of the table that of one layer.

    >>> list(per_layer({"h.{0..1}.w": 1, "h.{0..1}.b": 2}))
    ['h.0.w', 'h.0.b', 'h.1.w', 'h.1.b']
    """
    rows: list[tuple[str, int, int, str, _T]] = []
    first: dict[str, int] = {}
    for position, (name, item) in enumerate(table.items()):
        match = _RANGE.search(name)
        if match is None:
            rows.append((name, 0, position, name, item))
            first[name] = position
            continue
        path = name[: match.start()]
        first.setdefault(path, position)
        for index in _indices(match.group(1)):
            full = of_layer(name, index)
            rows.append((path, index, position, full, item_of_layer(item, index)))
    rows.sort(key=lambda row: (first[row[0]], row[1], row[2]))
    return {full: item for _, _, _, full, item in rows}


def of_layer(name: str, index: int) -> str:
    """The name in one layer.

    >>> of_layer("h.{0..3}.w", 2)
    'h.2.w'
    """
    return _RANGE.sub(str(index), name, count=1)


def _indices(text: str) -> list[int]:
    out: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("..")
        out += range(int(low), int(high or low) + 1)
    return out


def install_layers(
    model: nn.Module,
    mesh: Mesh,
    layers: Mapping[str, Sequence[type[Layer]]],
    first: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Put one object of each class under its path: `{"model.layers": [Block, Block]}`.

    `first` has by path the number of the first of them, where that is not 0.
    """
    for path, classes in layers.items():
        owner = model
        *parents, leaf = path.split(".")
        for name in parents:
            if not hasattr(owner, name):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        held = nn.ModuleList()
        for index, cls in enumerate(classes, first.get(path, 0)):
            held.add_module(str(index), cls(mesh))
        owner.add_module(leaf, held)
