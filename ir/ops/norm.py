"""Norms over the last dims, which stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Arg, Node
from .forms import call, factors, optional
from .local import Local
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


class RMSNorm(Norm):
    """A norm that torch has a kernel for on some devices alone."""

    def unfused_bytes(self, local: Local) -> float:
        """What is divided by its norm; of a narrow operand in float32, as what is normed is, in
        place of the operand."""
        value, (spec, *_) = local.node.operands[0], local.specs()[0]
        itemsize = value.type.dtype.itemsize
        numbers = local.bytes(value, spec) // itemsize
        return float(numbers * (itemsize if itemsize >= 4 else 4 + 4 - itemsize))


FAMILY.add(
    "aten.rms_norm.default", RMSNorm(_norm_rule, _emit_rms_norm, saves=("input", "weight if input"))
)

FAMILY.called("normed", "rms_norm layer_norm")

__all__ = ["FAMILY"]
