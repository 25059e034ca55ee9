"""Operators that draw random numbers, each rank from a generator of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..graph import Arg, Node
from .forms import call
from .operator import Family, Light, Render
from .rule import Rule, broadcast_rule

FAMILY = Family()


class Dropout(Light):
    """Zeros at random places while training."""

    shows = True
    in_eval: Mapping[str, Arg] = MappingProxyType({"train": False})


def _emit_dropout(node: Node, render: Render) -> str:
    axes = ", ".join(f'"{name}"' for name in render.sharded_axes())
    generator = f"self.generator({axes})"
    return call("ops.dropout", render.arg("input"), render.arg("p"), "self.training", generator)


def _dropout_rule(node: Node) -> Rule:
    shape = node.output.type.shape
    return broadcast_rule([shape], shape, linear=[[0]], passes=True)


FAMILY.add("aten.dropout.default", Dropout(_dropout_rule, _emit_dropout, saves=("result",)))

__all__ = ["FAMILY"]
