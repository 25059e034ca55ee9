"""Losses over a vocabulary as one operator each, so that no wide copy of the logits is made.

    cross_entropy(float32(logits))                  ->  cross_entropy(logits, dtype=float32)
    cross_entropy(linear(x, weight))                ->  linear_cross_entropy(x, weight)
    cap * tanh(x / cap)                             ->  softcap

The second where nothing else reads the logits, with what models do to them in between: a scale,
a softcap, a cast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..graph import Arg, Node, Value
from .formulas import Body, Found

_CAST = "aten.to.dtype"
_MUL = "aten.mul.Tensor"
_SOFTCAP = "shardwright.softcap"
_HALF = (torch.bfloat16, torch.float16)


def cross_entropy(body: Body, node: Node) -> Found | None:
    """A loss of logits in half precision that are cast, or of those that a linear layer makes."""
    if node.op != "shardwright.cross_entropy" or not isinstance(node.arg("reduction"), int):
        return None
    given, args = node.arg("logits"), dict(node.args)
    logits = _before_cast(body, given)
    cast = logits is not given
    args |= {"logits": logits, "dtype": node.output.type.dtype if cast else args["dtype"]}
    head = _head(body, logits) if body.read_once(given) else None
    if head is not None:
        rest = {name: arg for name, arg in args.items() if name not in ("logits", "labels")}
        found: dict[str, Arg] = {"x": head.x, "weight": head.weight, "labels": args["labels"]}
        found |= {"bias": head.bias, "scale": head.scale, "softcap": head.softcap, **rest}
        return "shardwright.linear_cross_entropy", tuple(found.items())
    return (node.op, tuple(args.items())) if cast else None


def softcap(body: Body, node: Node) -> Found | None:
    """Numbers that are kept between -cap and cap by a tanh."""
    found = _capped(body, node)
    if found is None:
        return None
    x, cap = found
    return _SOFTCAP, (("x", x), ("cap", cap))


@dataclass(frozen=True, slots=True)
class _Head:
    """Logits: softcap(scale * (x @ weight.T + bias))."""

    x: Arg
    weight: Arg
    bias: Arg
    scale: float = 1.0
    softcap: float = 0.0


def _head(body: Body, logits: Arg) -> _Head | None:
    """How a linear layer makes `logits`, where each step is read once."""
    if not body.read_once(logits):
        return None
    cap, node = 0.0, body.node(logits)
    if node is not None and (capped := _capped(body, node)):
        logits, cap = capped
        node = body.node(logits) if body.read_once(logits) else None
    scale = 1.0
    if node is not None and (scaled := _scaled(node)):
        logits, scale = scaled
        node = body.node(logits) if body.read_once(logits) else None
    made = _linear(body, node) if node is not None else None
    return _Head(*made, scale, cap) if made is not None else None


def _linear(body: Body, node: Node) -> tuple[Arg, Arg, Arg] | None:
    """(x, weight, bias) where `node` is a linear layer, or x @ weight.T."""
    if node.op == "aten.linear.default":
        return node.arg("input"), node.arg("weight"), node.arg("bias")
    turned = node.arg("other") if node.op == "aten.matmul.default" else None
    transpose = body.by(turned, "aten.transpose.int")
    if transpose is None or len(transpose.output.type.shape) != 2:
        return None
    return node.arg("self"), transpose.arg("self"), None


def _before_cast(body: Body, logits: Arg) -> Arg:
    """What is cast from half precision to float32, in which the loss computes anyway."""
    cast = body.by(logits, _CAST)
    source = cast.arg("self") if cast else None
    if cast is None or not isinstance(source, Value):
        return logits
    widened = source.type.dtype in _HALF and cast.output.type.dtype == torch.float32
    return source if widened else logits


def _capped(body: Body, node: Node) -> tuple[Value, float] | None:
    """(x, cap) where `node` is cap * tanh(x / cap), also as an operator."""
    if node.op == _SOFTCAP:
        x, cap = node.arg("x"), node.arg("cap")
        assert isinstance(x, Value) and isinstance(cap, float)
        return x, cap
    scaled = _scaled(node)
    tanh = body.only(scaled[0], "aten.tanh.default") if scaled and node.op == _MUL else None
    if scaled is None or tanh is None or not body.read_once(tanh.arg("self")):
        return None
    divided = body.node(tanh.arg("self"))
    inner = _scaled(divided) if divided else None
    if inner is None or abs(inner[1] * scaled[1] - 1) > 1e-6 or scaled[1] <= 0:
        return None
    return inner[0], scaled[1]


def _scaled(node: Node) -> tuple[Value, float] | None:
    """(x, factor) where `node` is x times a number, or divided by one, in the dtype of x."""
    if node.op not in (_MUL, "aten.div.Tensor"):
        return None
    x, other = node.arg("self"), node.arg("other")
    if not isinstance(x, Value) or isinstance(other, bool) or not isinstance(other, int | float):
        return None
    if x.type != node.output.type or not other:
        return None
    return x, float(other) if node.op == _MUL else 1.0 / other


__all__ = ["cross_entropy", "softcap"]
