"""Causal convolutions over tokens: each token sees itself and a few before it.

In serving the inputs before the new tokens are a state: of fixed size, one for each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph import Node, TensorType, Value
from .forms import call, factors, optional
from .local import Local
from .operator import Family, Operator, Render, named_values
from .rule import Choice, Rule
from .states import in_order, kept_bytes, last_of

FAMILY = Family()


def reach_of(node: Node) -> int:
    """How many tokens before its own a token sees."""
    weight = node.arg("weight")
    assert isinstance(weight, Value)
    return (weight.type.shape[2] - 1) * node.int_arg("dilation")


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The convolution of (b, c, reach + t) whose result (b, o, t) looks back only."""
    groups = x.shape[1] // weight.shape[1]
    return F.conv1d(x, weight, bias, dilation=dilation, groups=groups)


def _rule(node: Node) -> Rule:
    """Channels that see themselves alone can be cut; else those of the result, if it sees all."""
    x, weight = (value.type.shape for value in node.operands[:2])
    groups = x[1] // weight[1]
    if groups == x[1] == weight[0]:
        channels, kernel, out = "c", "c 1", "c"
    elif groups == 1:
        channels, kernel, out = "[i]", "c [i]", "c"
    else:
        channels, kernel, out = "[i]", "[c] [j]", "[c]"
    bias = "" if node.arg("bias") is None else f", {out}"
    positions = ", b [t]" if "positions" in dict(node.args) else ""
    text = f"b {channels} [t], {kernel} [k]{bias}{positions} -> b {out} [t]"
    return factors(text, uneven="c")(node)


class CausalConvolution(Operator):
    """x (b, c, t) over its tokens, as if zeros stood before them."""

    words = {"c": "channels"}
    noun = "convolved"
    names_module = True
    continued_by = "shardwright.cached_convolution"
    tokens_dim = 2

    def rule(self, node: Node) -> Rule:
        """Batch and channels; tokens and the kernel are whole."""
        return _rule(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """What it multiplies."""
        return named_values(node, ("x", "weight"))

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """On whole tensors."""
        reach = (args["weight"].shape[2] - 1) * args["dilation"]
        return convolved(
            F.pad(args["x"], (reach, 0)), args["weight"], args["bias"], args["dilation"]
        )

    def emit(self, node: Node, render: Render) -> str:
        """`ops.causal_convolution`."""
        return _call("ops.causal_convolution", node, render)


class CachedConvolution(CausalConvolution):
    """The same of new tokens, behind those of which a state has the last."""

    continued_by = ""
    remembers = "state"

    def state(self, node: Node) -> TensorType:
        """The last inputs of each sequence (b, c, reach)."""
        x = node.operands[0].type
        return TensorType((*x.shape[:2], reach_of(node)), x.dtype)

    def cut_state(self, node: Node) -> Mapping[Choice, int]:
        """Sequences, and channels that see themselves alone."""
        own = "c" in _rule(node).operands[0][1]
        return {"b": 0, "c": 1} if own else {"b": 0}

    def remembered(self, local: Local, run: int = 0) -> float:
        """Bytes of the state."""
        return kept_bytes(self, local)

    def continued(self, memory: Any, args: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The result, and the last inputs; `memory` are those before, or None."""
        x, weight, dilation = args["x"], args["weight"], args["dilation"]
        reach = (weight.shape[2] - 1) * dilation
        if memory is None:
            memory = x.new_zeros(*x.shape[:2], reach)
        whole = torch.cat([memory, x], 2)
        in_order(args["positions"])
        result = convolved(whole, weight, args["bias"], dilation)
        return result, last_of(whole, args["positions"], reach)

    def emit(self, node: Node, render: Render) -> str:
        """`ops.cached_convolution` with the name of its state."""
        state = f"self.{node.arg('state')}"
        return _call("ops.cached_convolution", node, render, state, render.arg("positions"))


def _call(function: str, node: Node, render: Render, *more: str) -> str:
    dilation = "" if node.arg("dilation") == 1 else render.arg("dilation")
    return call(
        function,
        render.arg("x"),
        render.arg("weight"),
        *more,
        bias=optional(render, "bias"),
        dilation=dilation,
    )


FAMILY.add("shardwright.causal_convolution", CausalConvolution())
FAMILY.add("shardwright.cached_convolution", CachedConvolution())

__all__ = ["FAMILY", "CachedConvolution", "CausalConvolution"]
