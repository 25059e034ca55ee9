"""Losses: sums or means over tokens of a comparison with labels."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...facts.traffic import Traffic
from ..graph import Node, Value
from .forms import call, factors
from .local import Local
from .operator import Family, Light, Limit, Operator, Render, named_values, opaque, shapes_of
from .rule import Rule

FAMILY = Family()
_REDUCTIONS = {1: "mean", 2: "sum"}
_COUNT_BYTES = 8  # the number of labels is an int64


class CrossEntropy(Operator):
    """Mean or sum of -log p(label) over tokens that count; the vocabulary may be cut."""

    noun = "loss"
    words: Mapping[str, str] = MappingProxyType({"v": "vocabulary"})

    def rule(self, node: Node) -> Rule:
        """Tokens and the vocabulary, whose sums are made inside."""
        if node.arg("reduction") not in _REDUCTIONS:
            return opaque(node)
        vocabulary = "v" if node.arg("label_smoothing") == 0 else "[v]"
        return factors(f"... {vocabulary}, ... -> ", uneven="v", inside="v")(node)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Logits and labels."""
        return named_values(node, ("logits", "labels"))

    def traffic(self, local: Local) -> tuple[Traffic, ...]:
        """Sums over a cut vocabulary, in at least 32 bits, and how many labels count."""
        logits, tokens = local.node.operands[0], local.rule.operands[0][:-1]
        over = [local.axes(factor) for dim in tokens for factor in dim]
        rows = local.size(*(factor for dim in tokens for factor in dim))
        moved: list[Traffic] = []
        if axes := local.axes("v"):
            number = max(4, logits.type.dtype.itemsize)
            moved.append(Traffic("all_reduce", axes, rows * number))  # the largest logit
            # the sum of exponentials, and the label's logit
            moved.append(Traffic("all_reduce", axes, 2 * rows * number))
        if _REDUCTIONS.get(local.node.int_arg("reduction")) == "mean":
            moved += [Traffic("all_reduce", axes, _COUNT_BYTES) for axes in over if axes]
        return tuple(moved)

    def limits(self, node: Node) -> Mapping[str, Limit]:
        """Labels are numbers of the vocabulary, or that which does not count."""
        logits = node.operands[0]
        last = len(logits.type.shape) - 1
        return {"labels": Limit(logits, last, ignored=node.int_arg("ignore_index"))}

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """Cross entropy over the last dim of the logits, any number of leading dims."""
        return _cross_entropy(**args)

    def emit(self, node: Node, render: Render) -> str:
        """`ops.cross_entropy`, told which axes cut the vocabulary and the tokens."""
        reduction = node.arg("reduction")
        logits = node.operands[0].type.shape
        assert isinstance(reduction, int)
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"{node.loc}: cross_entropy with reduction='none' is not supported in a generated "
                "module; reduce with 'mean' or 'sum'"
            )
        tokens = [axis for i in range(len(logits) - 1) if (axis := render.axis(f"i{i}"))]
        vocab = render.axis("v")
        smoothing = node.arg("label_smoothing")
        return call(
            "ops.cross_entropy",
            render.arg("logits"),
            render.arg("labels"),
            ignore_index="" if node.arg("ignore_index") == -100 else render.arg("ignore_index"),
            reduction="" if reduction == 1 else f'"{_REDUCTIONS[reduction]}"',
            label_smoothing="" if smoothing == 0 else render.arg("label_smoothing"),
            vocab_axis=vocab,
            vocab_size=str(logits[-1]) if vocab else "",
            token_axes=f"({', '.join(tokens)},)" if tokens else "",
        )


FAMILY.add("shardwright.cross_entropy", CrossEntropy())


def _cross_entropy(
    logits: Tensor, labels: Tensor, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction=_REDUCTIONS[reduction],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


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

__all__ = ["FAMILY", "CrossEntropy"]
