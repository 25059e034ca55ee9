"""Operators that make a tensor of nothing: each rank makes the whole, or its own part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..graph import Arg, Node
from .forms import call
from .operator import Family, Light, Render, opaque, shapes_of
from .rule import Rule, broadcast_rule, opaque_rule
from .sizes import Resizing, Sizes

FAMILY = Family()


def _emit_factory(function: str, *names: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        args = [render.arg(name) for name in names]
        return call(function, *args, dtype=str(node.output.type.dtype), device="self.device")

    return emit


def _emit_arange(node: Node, render: Render) -> str:
    """Counting whole numbers from 0: its length may be that of the sequence, so it is a size."""
    start = node.arg("start") if node.op == "aten.arange.start" else 0
    end = node.arg("end")
    if start != 0 or not isinstance(end, int):
        names = ("end",) if node.op == "aten.arange.default" else ("start", "end")
        return _emit_factory("torch.arange", *names)(node, render)
    dtype = str(node.output.type.dtype)
    return call("torch.arange", render.sizes()[0], dtype=dtype, device="self.device")


def _free(sizes: Sizes, node: Node) -> None:
    """Any size will do; an argument follows it."""


def _new_end(node: Node, new: Resizing) -> dict[str, Arg]:
    named = dict(node.args)
    start = node.int_arg("start") if "start" in named else 0
    step = node.int_arg("step") if "step" in named else 1
    return {"end": start + step * new.shape(node.output)[0]}


FAMILY.add(
    "aten.arange.default aten.arange.start",
    Light(opaque, _emit_arange, ties=_free, resized=_new_end),
)
FAMILY.add(
    "aten.arange.start_step",
    Light(
        opaque,
        _emit_factory("torch.arange", "start", "end", "step"),
        ties=_free,
        resized=_new_end,
    ),
)


def _sized_factory(function: str, *names: str) -> Light:
    """A constant fill: the result's dims are factors, so that each rank makes its own part."""

    def rule(node: Node) -> Rule:
        """`new_zeros` takes a tensor, of which it reads nothing but the dtype."""
        made = broadcast_rule([], node.output.type.shape, passes=False)
        given = opaque_rule(shapes_of(node.operands), [])
        return replace(
            made, operands=given.operands, sizes={**made.sizes, **given.sizes}, whole=given.whole
        )

    def emit(node: Node, render: Render) -> str:
        sizes = render.sizes()
        shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        args = [shape, *(render.arg(name) for name in names)]
        return call(function, *args, dtype=str(node.output.type.dtype), device="self.device")

    return Light(rule, emit)


FAMILY.add("aten.full.default", _sized_factory("torch.full", "fill_value"))
FAMILY.add("aten.new_full.default", _sized_factory("torch.full", "fill_value"))
FAMILY.add("aten.empty.memory_format", _sized_factory("torch.empty"))
FAMILY.add("aten.new_empty.default", _sized_factory("torch.empty"))
FAMILY.add("aten.zeros.default", _sized_factory("torch.zeros"))
FAMILY.add("aten.ones.default", _sized_factory("torch.ones"))
FAMILY.add("aten.new_zeros.default", _sized_factory("torch.zeros"))
FAMILY.add("aten.new_ones.default", _sized_factory("torch.ones"))
FAMILY.add(
    "aten.scalar_tensor.default", Light(opaque, _emit_factory("torch.tensor", "s"), ties=_free)
)

FAMILY.called("empty", "empty new_empty")
FAMILY.called("zeros", "zeros new_zeros")
FAMILY.called("ones", "ones new_ones")
FAMILY.called("filled", "full new_full scalar_tensor")
FAMILY.called("positions", "arange")

__all__ = ["FAMILY"]
