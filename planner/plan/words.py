"""What a plan is for, and does with an operator, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...costmodel.machines.cluster import shown_name
from ...facts.mesh import Mesh
from ...ir.graph import Node
from ...ir.ops.labels import LABELS, DimLabels, factor_labels
from ...ir.ops.registry import rule_of, words_of
from ...ir.ops.rule import Choice
from .plan import Request


def machine_text(request: Request) -> str:
    """`8 x h100`; of a cluster file its device."""
    return f"{request.gpus} x {shown_name(request.cluster)}"


def choices_text(
    node: Node, choices: Sequence[Choice], mesh: Mesh, labels: Mapping[str, DimLabels]
) -> str:
    """`dp: batch, tp: heads`."""
    known = factor_labels(node, labels)
    parts = [
        f"{name}: {_choice_text(node, choice, known)}"
        for name, choice in zip(mesh.names, choices, strict=True)
        if choice not in ("R", "V")
    ]
    return ", ".join(parts) or "replicated"


def _choice_text(node: Node, choice: Choice, known: Mapping[str, str]) -> str:
    if words := words_of(node, choice):
        return words
    if choice in known:
        return LABELS.get(known[choice], known[choice])
    rule = rule_of(node)
    if choice not in rule.sizes:
        return "partial sums" if choice.startswith("P") else choice
    dims = [i for result in rule.results for i, factors in enumerate(result) if choice in factors]
    return f"dim {dims[0]}" if dims else "partial sums"


__all__ = ["choices_text", "machine_text"]
