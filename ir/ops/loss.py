"""Losses: sums or means over tokens of a comparison with labels."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...facts import work as facts
from ...facts.logits import block_rows, chunk_columns
from ...facts.traffic import Traffic
from ...facts.work import Kernels
from ..graph import Node, Value
from .forms import call, factors, optional
from .local import Local
from .operator import Family, Light, Limit, Operator, Render, named_values, opaque, shapes_of
from .rule import Rule

FAMILY = Family()
_REDUCTIONS = {1: "mean", 2: "sum"}
_COUNT_BYTES = 8  # the number of labels is an int64


class CrossEntropy(Operator):
    """Mean or sum of -log p(label) over tokens that count; the vocabulary may be cut.

    `dtype` is that of the loss; None: that of the logits.
    """

    noun = "loss"
    words: Mapping[str, str] = MappingProxyType({"v": "vocabulary"})

    def rule(self, node: Node) -> Rule:
        """Tokens and the vocabulary, whose sums are made inside."""
        if node.arg("reduction") not in _REDUCTIONS:
            return opaque(node)
        return factors("... v, ... -> ", uneven="v", inside="v")(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Logits and labels."""
        return named_values(node, ("logits", "labels"))

    def extra_bytes(self, local: Local) -> float:
        """The log of each token's sum of exponentials."""
        return float(_tokens(local) * _wide(local.node.operands[0]))

    def buffers(self, local: Local) -> float:
        """A block of logits in a wide format."""
        return _block_bytes(local, local.size("v"))

    def both_buffers(self, local: Local) -> tuple[float, float]:
        """Backward computes in a wide format from narrow logits themselves."""
        size, value = self.buffers(local), local.node.operands[0]
        return size, size / _copies(value)

    def traffic(self, local: Local) -> tuple[Traffic, ...]:
        """Sums over a cut vocabulary, in at least 32 bits, and how many labels count."""
        rows, number = _tokens(local), _wide(local.node.operands[0])
        moved: list[Traffic] = []
        if axes := local.axes("v"):
            sums = 2 if local.node.arg("label_smoothing") == 0 else 3
            moved.append(Traffic("all_reduce", axes, rows * number))  # the largest lse
            # the sum of exponentials, the label's logit, and with smoothing the sum
            moved.append(Traffic("all_reduce", axes, sums * rows * number))
        if _REDUCTIONS.get(local.node.int_arg("reduction")) == "mean":
            over = (local.axes(factor) for factor in _token_factors(local))
            moved += [Traffic("all_reduce", axes, _COUNT_BYTES) for axes in over if axes]
        return tuple(moved)

    def limits(self, node: Node) -> Mapping[str, Limit]:
        """Labels are numbers of the vocabulary, or that which does not count."""
        logits = node.operands[0]
        last = len(logits.type.shape) - 1
        return {"labels": _label_limit(node, logits, last)}

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """Cross entropy over the last dim of the logits, any number of leading dims."""
        return _cross_entropy(**args)

    def emit(self, node: Node, render: Render) -> str:
        """`ops.cross_entropy`, told which axes cut the vocabulary and the tokens."""
        options = _options(node, render, node.operands[0].type.shape[-1])
        return call("ops.cross_entropy", render.arg("logits"), render.arg("labels"), **options)


class LinearCrossEntropy(CrossEntropy):
    """Cross entropy of softcap(scale * (x @ weight.T + bias)), of which a few logits are there at
    a time: they are made in chunks, and made again in backward.  A softcap of 0 is none."""

    spent_on = "matrix products"

    def rule(self, node: Node) -> Rule:
        """Tokens and the vocabulary; a token's numbers are whole, as its logits are not summed."""
        bias = "" if node.arg("bias") is None else ", v"
        return factors(f"... [k], v [k], ...{bias} -> ", uneven="v", inside="v")(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """What the logits are made of."""
        return named_values(node, ("x", "weight", "labels", "bias"))

    def both_buffers(self, local: Local) -> tuple[float, float]:
        """A chunk of logits with a block of it, whose gradients take its place, and in backward
        what is added up to the gradient of x."""
        x, tokens = local.node.operands[0], _tokens(local)
        itemsize = x.type.dtype.itemsize
        columns = chunk_columns(tokens, local.size("v"), itemsize)
        chunk, block = tokens * columns * itemsize, _block_bytes(local, columns)
        added = tokens * local.size("k") * (_wide(x) + itemsize)
        return chunk + block, chunk + block / _copies(x) + added

    def work(self, local: Local) -> Kernels:
        """One product; in backward again, and one for each side that has a gradient."""
        x, weight = local.node.operands[:2]
        tokens, dtype = _tokens(local), str(x.type.dtype)
        m, n, k = tokens, local.size("v"), local.size("k")
        made = facts.Product(m, n, k, 1, dtype)
        logits = float(m * n * x.type.dtype.itemsize)
        forward = (made, facts.Stream(2 * logits))
        if not local.backward:
            return Kernels((forward,))
        turned = ((m, k, n), (n, k, m))
        sides = zip((x, weight), turned, strict=True)
        back = tuple(facts.Product(*sizes, 1, dtype) for v, sizes in sides if v.differentiable)
        return Kernels((forward,), ((made, facts.Stream(3 * logits), *back),))

    def limits(self, node: Node) -> Mapping[str, Limit]:
        """Labels are rows of the weight, or that number which does not count."""
        weight = node.operands[1]
        return {"labels": _label_limit(node, weight, 0)}

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """The logits of all tokens, and their cross entropy."""
        return _linear_cross_entropy(**args)

    def emit(self, node: Node, render: Render) -> str:
        """`ops.linear_cross_entropy`, told which axes cut the vocabulary and the tokens."""
        options = _options(node, render, node.operands[1].type.shape[0])
        return call(
            "ops.linear_cross_entropy",
            *(render.arg(name) for name in ("x", "weight", "labels")),
            bias=optional(render, "bias"),
            scale="" if node.arg("scale") == 1 else render.arg("scale"),
            softcap="" if node.arg("softcap") == 0 else render.arg("softcap"),
            **options,
        )


FAMILY.add("shardwright.cross_entropy", CrossEntropy())
FAMILY.add("shardwright.linear_cross_entropy", LinearCrossEntropy())


def _label_limit(node: Node, table: Value, dim: int) -> Limit:
    mean = _REDUCTIONS.get(node.int_arg("reduction")) == "mean"
    return Limit(table, dim, ignored=node.int_arg("ignore_index"), averaged=mean)


def _token_factors(local: Local) -> list[str]:
    """The factors that count tokens: all but the last dim of the logits, or of x."""
    return [factor for dim in local.rule.operands[0][:-1] for factor in dim]


def _tokens(local: Local) -> int:
    """Tokens on a rank."""
    return local.size(*_token_factors(local))


def _wide(value: Value) -> int:
    """Bytes of a number in the format that a loss computes in."""
    return max(4, value.type.dtype.itemsize)


def _block_bytes(local: Local, columns: int) -> float:
    """The logarithms of a block of logits, or their gradients; in a wide format, of which there is
    a copy of narrow logits besides."""
    rows, value = min(block_rows(columns), _tokens(local)), local.node.operands[0]
    return float(_copies(value) * rows * columns * _wide(value))


def _copies(value: Value) -> int:
    """How many blocks a loss of `value` has in a wide format."""
    return 1 if _wide(value) == value.type.dtype.itemsize else 2


def _options(node: Node, render: Render, classes: int) -> dict[str, str]:
    """Keyword arguments that differ from the defaults; an empty text is left out."""
    reduction = node.int_arg("reduction")
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{node.loc}: cross_entropy with reduction='none' is not supported in a generated "
            "module; reduce with 'mean' or 'sum'"
        )
    leading = len(node.operands[0].type.shape) - 1
    tokens = [axis for i in range(leading) if (axis := render.axis(f"i{i}"))]
    vocab = render.axis("v")
    return {
        "dtype": optional(render, "dtype"),
        "ignore_index": "" if node.arg("ignore_index") == -100 else render.arg("ignore_index"),
        "reduction": "" if reduction == 1 else f'"{_REDUCTIONS[reduction]}"',
        "label_smoothing": ""
        if node.arg("label_smoothing") == 0
        else render.arg("label_smoothing"),
        "vocab_axis": vocab,
        "vocab_size": str(classes) if classes % render.ways("v") else "",
        "token_axes": f"({', '.join(tokens)}{',' * (len(tokens) == 1)})" if tokens else "",
    }


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    dtype: torch.dtype | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(dtype or logits.dtype),
        labels.reshape(-1),
        reduction=_REDUCTIONS[reduction],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    **options: Any,
) -> Tensor:
    logits = F.linear(x, weight, bias) * scale
    capped = (logits / softcap).tanh() * softcap if softcap else logits
    return _cross_entropy(capped, labels, **options)


def _mse_rule(node: Node) -> Rule:
    shape = node.operands[0].type.shape
    if shapes_of(node.operands) != [shape, shape] or node.arg("reduction") not in _REDUCTIONS:
        return opaque(node)
    return factors("..., ... -> ")(node)


def _emit_mse(node: Node, render: Render) -> str:
    reduction = node.arg("reduction")
    name = _REDUCTIONS.get(reduction, "none") if isinstance(reduction, int) else "none"
    text = call(
        "F.mse_loss",
        render.arg("self"),
        render.arg("target"),
        reduction="" if name == "mean" else f'"{name}"',
    )
    rank = len(node.operands[0].type.shape) if name == "mean" else 0
    cut = [axis for i in range(rank) if (axis := render.axis(f"i{i}"))]
    return text + "".join(f" / {axis}.size" for axis in cut)  # local means average


FAMILY.add("aten.mse_loss.default", Light(_mse_rule, _emit_mse, saves=("self", "target")))

__all__ = ["FAMILY", "CrossEntropy", "LinearCrossEntropy"]
