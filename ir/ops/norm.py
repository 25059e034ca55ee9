"""Norms over the last dims, which stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Arg, Node
from .forms import call, factors, optional
from .operator import Family, Leaf, Light, Render
from .rule import Choice, Rule
from .sizes import Resizing

FAMILY = Family()


class Norm(Light):
    """A norm; declared as `Light` is."""

    names_module = True
    rowwise = True

    def leaf(self, node: Node, choices: Sequence[Choice]) -> Leaf | None:
        """What it norms is whole, so that the module is torch's own."""
        kind = "RMSNorm" if node.op == "aten.rms_norm.default" else "LayerNorm"
        eps = node.arg("eps")
        return Leaf(kind, options=() if eps is None else (("eps", eps),))

    def resized(self, node: Node, new: Resizing) -> dict[str, Arg]:
        """The last dims."""
        inner, result = node.arg("normalized_shape"), new.shape(node.output)
        assert isinstance(inner, tuple)
        return {"normalized_shape": result[len(result) - len(inner) :]}


def _norm_rule(node: Node) -> Rule:
    shape = node.arg("normalized_shape")
    assert isinstance(shape, tuple)
    whole = " ".join(f"[h{i}]" for i in range(len(shape)))
    operands = ", ".join([f"... {whole}", *[whole] * (len(node.operands) - 1)])
    return factors(f"{operands} -> ... {whole}", uneven="")(node)


def _emit_layer_norm(node: Node, render: Render) -> str:
    args = [render.arg(name) for name in ("input", "normalized_shape")]
    weight, bias = (optional(render, name) for name in ("weight", "bias"))
    if weight and bias:
        return call("F.layer_norm", *args, weight, bias, eps=render.arg("eps"))
    return call("F.layer_norm", *args, weight=weight, bias=bias, eps=render.arg("eps"))


def _emit_rms_norm(node: Node, render: Render) -> str:
    args = [render.arg(name) for name in ("input", "normalized_shape")]
    weight = optional(render, "weight")
    return call("F.rms_norm", *args, *([weight] if weight else []), eps=optional(render, "eps"))


FAMILY.add(
    "aten.layer_norm.default",
    Norm(_norm_rule, _emit_layer_norm, saves=("input", "weight", "bias")),
)
FAMILY.add(
    "aten.rms_norm.default", Norm(_norm_rule, _emit_rms_norm, saves=("input", "weight if input"))
)

FAMILY.called("normed", "rms_norm layer_norm")

__all__ = ["FAMILY"]
