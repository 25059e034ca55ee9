"""Operators along one dim, which stays whole: softmax, sums up to each row, differences."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Node
from .forms import along_dim, call, optional, same_shape
from .operator import Family, Light, Render, opaque
from .rule import Rule

FAMILY = Family()


def _emit_softmax(function: str) -> Callable[[Node, Render], str]:
    def emit(node: Node, render: Render) -> str:
        return call(
            function, render.arg("self"), dim=render.arg("dim"), dtype=optional(render, "dtype")
        )

    return emit


FAMILY.add(
    "aten.softmax.int",
    Light(along_dim(), _emit_softmax("F.softmax"), saves=("result",), ties=same_shape),
)
FAMILY.add(
    "aten.log_softmax.int",
    Light(along_dim(), _emit_softmax("F.log_softmax"), saves=("result",), ties=same_shape),
)


def _cumsum_rule(node: Node) -> Rule:
    return along_dim(linear=node.output.type.dtype == node.operands[0].type.dtype)(node)


def _emit_cumsum(node: Node, render: Render) -> str:
    dtype = optional(render, "dtype")
    return call(f"{render.arg('self')}.cumsum", render.arg("dim"), dtype=dtype)


FAMILY.add("aten.cumsum.default", Light(_cumsum_rule, _emit_cumsum, ties=same_shape))
FAMILY.add(
    "aten.cumprod.default", Light(along_dim(), "{self}.cumprod({dim})", saves=("self", "result"))
)
FAMILY.add("aten.glu.default", Light(along_dim(), "F.glu({self}, dim={dim})", saves=("self",)))


def _diff_rule(node: Node) -> Rule:
    if len(node.operands) > 1:
        return opaque(node)  # values to put before or after
    return along_dim(linear=node.output.type.continuous)(node)


def _emit_diff(node: Node, render: Render) -> str:
    return call(
        "torch.diff",
        render.arg("self"),
        n="" if node.arg("n") == 1 else render.arg("n"),
        dim="" if node.arg("dim") == -1 else render.arg("dim"),
        prepend=optional(render, "prepend"),
        append=optional(render, "append"),
    )


FAMILY.add("aten.diff.default", Light(_diff_rule, _emit_diff))

FAMILY.called("probabilities", "softmax")
FAMILY.called("total", "cumsum")
FAMILY.called("difference", "diff")

__all__ = ["FAMILY"]
