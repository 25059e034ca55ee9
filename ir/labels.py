"""Which dims of which values are the batch, which the sequence.

Inputs carry labels (`b`, `s`); factor rules carry them through the graph.  A dim that merges
several factors has several labels, major to minor; a dim of unknown origin has none.  Labels name
things for people (reports, comments, baselines); no decision about correctness reads them.
"""

from __future__ import annotations

from typing import TypeAlias

from .graph import Graph, Loop, Node, Value
from .ops import rule_of

DimLabels: TypeAlias = tuple[tuple[str, ...], ...]  # per dim the labels of its factors


def label_dims(graph: Graph) -> dict[str, DimLabels]:
    """Labels of every value, by the value's name."""
    labels: dict[str, DimLabels] = {}
    for item in graph.inputs:
        rank = len(item.value.type.shape)
        names = (*item.labels, *[""] * rank)[:rank]
        labels[item.value.name] = tuple((name,) if name else () for name in names)
    for item in graph.body:
        if isinstance(item, Node):
            _label_node(item, labels)
        else:
            _label_loop(item, labels)
    return labels


def factor_labels(node: Node, labels: dict[str, DimLabels]) -> dict[str, str]:
    """Label of each factor of the node's rule that has one."""
    found: dict[str, str] = {}
    rule = rule_of(node)
    for value, dims in zip(node.operands, rule.operands, strict=True):
        for dim, names in zip(dims, labels.get(value.name, ()), strict=False):
            factors = [f for f in dim if rule.sizes[f] != 1]
            if len(factors) == len(names):
                for factor, name in zip(factors, names, strict=True):
                    found.setdefault(factor, name)
    return found


def _label_node(node: Node, labels: dict[str, DimLabels]) -> None:
    rule, factors = rule_of(node), factor_labels(node, labels)
    for value, dims in zip(node.outputs, rule.results, strict=True):
        labels[value.name] = tuple(
            tuple(factors[f] for f in dim if f in factors)
            if all(f in factors or rule.sizes[f] == 1 for f in dim)
            else ()
            for dim in dims
        )


def _label_loop(loop: Loop, labels: dict[str, DimLabels]) -> None:
    outer: tuple[Value, ...] = (*loop.carried, *loop.invariants)
    for block in loop.blocks:
        for inner, value in zip(block.inputs, outer, strict=True):
            labels[inner.name] = labels.get(value.name, ())
        for node in block.nodes:
            _label_node(node, labels)
    for value, inner in zip(loop.outputs, loop.blocks[-1].outputs, strict=True):
        labels[value.name] = labels.get(inner.name, ())
