"""What `torch.autocast` casts inside of a model.

An export records a region and what its operators return, but not the casts of their operands.
Those are found by running each operator on fake tensors as the region does, and again on cast
operands without autocast: both must compute the same in the same formats.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ...compat.torch import OpOverload, TorchDispatchMode, schema_arguments, tree_leaves
from .location import innermost_frame, place

_CAST = "aten._to_copy.default"
_Formats = tuple[torch.dtype, ...]


class ForeignAutocast(ValueError):
    """Autocast of a device on which no model is captured; the message says where."""


@dataclass(frozen=True, slots=True)
class Region:
    """An enabled `torch.autocast(device, dtype)`."""

    device: str
    dtype: torch.dtype

    def casts(self, node: fx.Node) -> dict[fx.Node, torch.dtype]:
        """The operands of `node` that are cast before it runs, and to what.

        Where the region casts inside of an operator that is made of several (a loss), its operands
        are cast so that no part runs in a narrower format.  Raises ValueError where that is not so.
        """
        operands = [x for x in node.all_input_nodes if _is_cast_by_regions(x.meta.get("val"))]
        if str(node.target).startswith("shardwright."):
            self._check_kept_whole(node, operands)
            return {}
        wanted = _run(node, {}, self)
        candidates = (
            dict(wanted.cast),
            dict.fromkeys(operands, self.dtype),
            dict.fromkeys(operands, torch.float32),
        )
        for fits in (_Run.same, _Run.no_narrower):
            for casts in candidates:
                if fits(_run(node, casts, None), wanted):
                    return casts
        raise ValueError(
            f"`torch.autocast` casts inside of `{node.target}` in a way that cannot be kept; call "
            "it on what you cast yourself, or outside of the region"
        )

    def _check_kept_whole(self, node: fx.Node, operands: list[fx.Node]) -> None:
        """Raises ValueError for an operator of ours that stands for several, some of them cast."""
        if any(x.meta["val"].dtype != self.dtype for x in operands):
            raise ValueError(
                f"`{node.target}` is kept whole, and `torch.autocast` would cast inside of it; "
                f"give it operands in {self.dtype}"
            )


def _is_cast_by_regions(value: object) -> bool:
    """Autocast leaves whole numbers, complex ones and float64."""
    return (
        isinstance(value, Tensor) and value.dtype.is_floating_point and value.dtype != torch.float64
    )


# ---- running an operator -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """What an operator computes, views and casts apart, and in which formats."""

    steps: tuple[tuple[str, _Formats], ...]
    results: _Formats
    cast: Mapping[fx.Node, torch.dtype]  # operands, by the first cast of each

    def same(self, other: _Run) -> bool:
        return (self.steps, self.results) == (other.steps, other.results)

    def no_narrower(self, other: _Run) -> bool:
        """The same operators and results, no number of any in a narrower format than in `other`."""
        if self.results != other.results or len(self.steps) != len(other.steps):
            return False
        pairs = zip(self.steps, other.steps, strict=True)
        return all(a[0] == b[0] and _at_least(a[1], b[1]) for a, b in pairs)


def _at_least(formats: _Formats, others: _Formats) -> bool:
    return len(formats) == len(others) and all(
        torch.promote_types(a, b) == a for a, b in zip(formats, others, strict=True)
    )


class _Watch(TorchDispatchMode):
    """Sees every operator that is left when those made of several are taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, _Formats]] = []
        self.cast: dict[int, torch.dtype] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(func) == _CAST:
            self.cast.setdefault(id(args[0]), kwargs["dtype"])
        elif not (func.namespace == "prim" or _views(func)):  # prim: questions such as x.device
            self.steps.append((str(func), _formats((args, kwargs))))
        return func(*args, **(kwargs or {}))


def _views(func: OpOverload) -> bool:
    aliases = [argument.alias_info for argument in schema_arguments(func)]
    return any(alias and not alias.is_write for alias in aliases)


def _formats(values: Any) -> _Formats:
    return tuple(leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _run(node: fx.Node, casts: Mapping[fx.Node, torch.dtype], region: Region | None) -> _Run:
    """Run the operator of `node` on fake operands; without results where it refuses these."""
    values = {x: x.meta["val"] for x in node.all_input_nodes}
    values |= {x: values[x].to(dtype) for x, dtype in casts.items()}
    args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    target: Any = node.target
    watch = _Watch()
    device, dtype = (region.device, region.dtype) if region else ("cpu", None)
    with torch.no_grad(), torch.autocast(device, dtype, region is not None, False), watch:
        try:
            results = _formats(target(*args, **kwargs))
        except RuntimeError:  # operands of unlike formats
            return _Run((), (), {})
    cast = {x: watch.cast[id(value)] for x, value in values.items() if id(value) in watch.cast}
    return _Run(tuple(watch.steps), results, cast)


# ---- regions that cannot be kept ---------------------------------------------------------------


@contextmanager
def own_autocast() -> Generator[None]:
    """Inside, models turn autocast on for the CPU alone, where they are captured.

    Raises ForeignAutocast where autocast is on already, and inside for other devices, on which
    torch turns it off without a word where there is none: what was made before, as decorators are,
    does not tell any more whether it was on.
    """
    if any(torch.is_autocast_enabled(device) for device in _devices()):
        raise ForeignAutocast(
            "`torch.autocast` is on around the planning: the plan would hold what it casts. Plan "
            "outside of the region; the generated module may run inside of one"
        )
    make, begin = torch.autocast.__init__, torch.autocast.__enter__
    signature = inspect.signature(make)
    off = set[torch.autocast]()  # made inside, to turn autocast off

    def init(self: torch.autocast, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("enabled", True) and given["device_type"] != "cpu":
            raise ForeignAutocast(_elsewhere(given["device_type"]))
        make(self, *args, **kwargs)
        off.add(self)

    def enter(self: torch.autocast) -> object:
        if self.device != "cpu" and self not in off:
            raise ForeignAutocast(_elsewhere(self.device, _decorated()))
        return begin(self)

    changed: Any = torch.autocast
    changed.__init__, changed.__enter__ = init, enter
    try:
        yield
    finally:
        changed.__init__, changed.__enter__ = make, begin


def _devices() -> Iterator[str]:
    yield "cpu"
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        assert found is not None
        yield found.type


def _decorated() -> str:
    """The place of the function that `torch.autocast` is a decorator of, if it is one now."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "decorate_autocast":
        frame = frame.f_back
    function = frame and inspect.unwrap(frame.f_locals["func"])
    code = getattr(function, "__code__", None)
    return place(code.co_filename, code.co_firstlineno) if code else ""


def _elsewhere(device: str, where: str = "") -> str:
    where = where or place(*innermost_frame("".join(traceback.format_stack())))
    return (
        f"{where}: the model turns autocast on for {device!r} alone, and is captured without one: "
        "write `with torch.autocast(x.device.type, ...)` in `forward`, and the plan keeps what is "
        "cast on a CPU"
    )


__all__ = ["ForeignAutocast", "Region", "own_autocast"]
