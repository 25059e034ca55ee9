"""Convolutions over images and sound: whole in space, cut by samples and channels."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType

from ...facts.work import Kernels
from ...facts.work import Product as Multiplied
from ..graph import Node, Value
from .forms import call, factors, optional
from .local import Local
from .operator import Family, Operator, Render, named_values
from .rule import Rule

FAMILY = Family()


class Convolution(Operator):
    """x (b, c, ...) or (c, ...) with a weight (o, c / groups, ...); channels mix within a group."""

    words: Mapping[str, str] = MappingProxyType({"o": "channels", "c": "input channels"})
    noun = "convolved"
    names_module = True
    rigid = True
    spent_on = "convolutions"

    def rule(self, node: Node) -> Rule:
        """Samples and, in one group, channels of the input and of the result."""
        image, weight = (value.type.shape for value in node.operands[:2])
        space = range(len(weight) - 2)
        given, kernel, made = (" ".join(f"[{letter}{i}]" for i in space) for letter in "xky")
        batch = "b " if len(image) == len(weight) else ""
        inner, outer = ("c", "o") if node.arg("groups") == 1 else ("[c]", "[o]")
        side = inner if inner == "c" else "[i]"
        bias = f", {outer}" if isinstance(node.arg("bias"), Value) else ""
        text = f"{batch}{inner} {given}, {outer} {side} {kernel}{bias} -> {batch}{outer} {made}"
        return factors(text, addends=[2] if bias else ())(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """What it multiplies, where the other's gradient is needed."""
        return named_values(node, ("input if weight", "weight if input"))

    def work(self, local: Local) -> Kernels:
        """As the product of every patch with the weight; in backward one for each gradient."""
        image, weight = local.node.operands[:2]
        groups, kernel = local.node.int_arg("groups"), weight.type.shape[2:]
        places = prod(local.node.output.type.shape[-len(kernel) :])
        samples = local.size("b") if "b" in local.rule.sizes else 1
        sizes = (
            samples * places, local.size("o") // groups, local.size("c") // groups * prod(kernel),
        )  # fmt: skip
        product = Multiplied(*sizes, groups, local.dtype)
        back = [product for value in (image, weight) if value.differentiable]
        return Kernels(((product,),), (tuple(back),) if local.backward else ())

    def emit(self, node: Node, render: Render) -> str:
        """`F.conv2d`, with what is not its default."""
        plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        options = {
            name: "" if _alike(node.arg(name), usual) else render.arg(name)
            for name, usual in plain.items()
        }
        bias = optional(render, "bias")
        args = [render.arg("input"), render.arg("weight"), *([bias] if bias else [])]
        return call(f"F.{node.op.split('.')[1]}", *args, **options)


def _alike(given: object, usual: int) -> bool:
    """Is every number of an option the usual one?"""
    return all(number == usual for number in (given if isinstance(given, tuple) else (given,)))


FAMILY.add("aten.conv1d.default aten.conv2d.default", Convolution())

__all__ = ["FAMILY"]
