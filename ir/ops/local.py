"""One rank's part of a node: what its choices make of its factors and of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ...facts.blocks import local_shape
from ...facts.spec import R, Spec, State, V
from ..graph import Node, Value
from .rule import Choice, Rule


@dataclass(frozen=True, slots=True)
class Local:
    """One rank's part of `node` under a choice for each mesh axis; `sizes` are those of the axes.

    `ways`: how many ways each factor is cut.  `order`: in which order ranks hold the tokens of a
    sequence that they share, `contiguous` or `zigzag`.  `imbalance`: load of the busiest rank's
    experts over the mean, 0 for that of a usual router.
    """

    node: Node
    rule: Rule
    choices: tuple[Choice, ...]
    sizes: tuple[int, ...]
    ways: Mapping[str, int]
    training: bool
    order: str = "contiguous"
    imbalance: float = 0.0

    @property
    def backward(self) -> bool:
        """Is there a backward pass?"""
        return self.training and any(value.differentiable for value in self.node.outputs)

    @property
    def dtype(self) -> str:
        """The dtype of the first result, as torch writes it."""
        return str(self.node.outputs[0].type.dtype)

    def size(self, *factors: str) -> int:
        """The product of the factors' sizes on the busiest rank."""
        return prod(-(-self.rule.sizes[f] // self.ways.get(f, 1)) for f in factors)

    def axes(self, factor: str) -> tuple[int, ...]:
        """The mesh axes that cut `factor`, by a choice of that name."""
        return tuple(axis for axis, choice in enumerate(self.choices) if choice == factor)

    def specs(self) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
        """The specs of operands and of outputs."""
        return node_specs(self.node, self.rule, self.choices, self.training)

    def bytes(self, value: Value, spec: Spec) -> int:
        """Bytes that this rank holds of `value`."""
        return local_bytes(value, spec, self.sizes)


def local_bytes(value: Value, spec: Spec, sizes: tuple[int, ...]) -> int:
    """Bytes that one rank holds of `value` in `spec`."""
    return prod(local_shape(value.type.shape, spec, sizes)) * value.type.dtype.itemsize


def node_specs(
    node: Node, rule: Rule, choices: tuple[Choice, ...], training: bool
) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Specs of the operands and of the outputs of a node under its choices, one per axis.

    Without a gradient `V` says no more than `R`, and is written so.
    """
    table = rule.choices()
    rows = [table[choice] for choice in choices]

    def specs(values: tuple[Value, ...], side: int) -> tuple[Spec, ...]:
        return tuple(
            tuple(plain_state(row[side][i], training and value.differentiable) for row in rows)
            for i, value in enumerate(values)
        )

    return specs(node.operands, 0), specs(node.outputs, 1)


def plain_state(state: State, gradient: bool) -> State:
    """`state`, or `R` for `V` where there is no gradient to tell them apart."""
    return R if state == V and not gradient else state


__all__ = ["Local", "local_bytes", "node_specs", "plain_state"]
