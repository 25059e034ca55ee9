"""Which dims of which values are the batch, which the sequence.

Inputs carry labels (`b`, `s`); factor rules carry them through the graph.  A dim that merges
several factors has several labels, major to minor; a dim of unknown origin has none.  Labels name
things for people (reports, comments, baselines); no decision about correctness reads them.
"""

from __future__ import annotations

from typing import TypeAlias

from ..graph import Graph, Loop, Node, Value
from .registry import rule_of

LABELS = {"b": "batch", "s": "sequence"}  # in words
DimLabels: TypeAlias = tuple[tuple[str, ...], ...]  # per dim the labels of its factors


def label_dims(graph: Graph) -> dict[str, DimLabels]:
    """Labels of every value, by the value's name.

    Labels run forward from the inputs and backward from later uses: `arange(4096)` whose result is
    added to something of the sequence's length is itself of that length, whatever it is.
    """
    labels: dict[str, DimLabels] = {}
    for item in graph.inputs:
        rank = len(item.value.type.shape)
        names = (*item.labels, *[""] * rank)[:rank]
        labels[item.value.name] = tuple((name,) if name else () for name in names)
    while True:
        before = dict(labels)
        for item in graph.body:
            _label_item(item, labels)
        for item in reversed(graph.body):
            _label_item(item, labels, backward=True)
        if labels == before:
            return labels


def factor_labels(node: Node, labels: dict[str, DimLabels]) -> dict[str, str]:
    """Label of each factor of the node's rule that has one; an algorithm has its first cut's."""
    found: dict[str, str] = {}
    rule = rule_of(node)
    values = zip((*node.operands, *node.outputs), (*rule.operands, *rule.results), strict=True)
    for value, dims in values:
        for dim, names in zip(dims, labels.get(value.name, ()), strict=False):
            factors = [f for f in dim if rule.sizes[f] != 1]
            if len(factors) == len(names):
                for factor, name in zip(factors, names, strict=True):
                    found.setdefault(factor, name)
    for algorithm, way in rule.algorithms.items():
        if label := found.get(way.cuts[0], way.label):
            found[algorithm] = label
    return found


def _label_item(item: Node | Loop, labels: dict[str, DimLabels], backward: bool = False) -> None:
    if isinstance(item, Node):
        _label_node(item, labels)
        return
    outer: tuple[Value, ...] = (*item.carried, *item.invariants)
    for block in item.blocks:
        for inner, value in zip(block.inputs, outer, strict=True):
            _equal(inner, value, labels)
        for node in reversed(block.nodes) if backward else block.nodes:
            _label_node(node, labels)
        for value, inner in zip(item.outputs, block.outputs, strict=True):
            _equal(inner, value, labels)
        for inner, value in zip(block.inputs, outer, strict=True):
            _equal(inner, value, labels)


def _label_node(node: Node, labels: dict[str, DimLabels]) -> None:
    rule, factors = rule_of(node), factor_labels(node, labels)
    values = zip((*node.operands, *node.outputs), (*rule.operands, *rule.results), strict=True)
    for value, dims in values:
        derived = tuple(
            tuple(factors[f] for f in dim if f in factors)
            if all(f in factors or rule.sizes[f] == 1 for f in dim)
            else ()
            for dim in dims
        )
        _merge(value.name, derived, labels)


def _equal(a: Value, b: Value, labels: dict[str, DimLabels]) -> None:
    """Two names of one value: what is known of either is known of both."""
    _merge(a.name, labels.get(b.name, ()), labels)
    _merge(b.name, labels.get(a.name, ()), labels)


def _merge(name: str, derived: DimLabels, labels: dict[str, DimLabels]) -> None:
    known = labels.get(name, ((),) * len(derived))
    if derived:
        labels[name] = tuple(a or b for a, b in zip(known, derived, strict=True))
