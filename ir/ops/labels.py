"""Which dims of which values are the batch, which the sequence.

Inputs carry labels (`b`, `s`); factor rules carry them through the graph.  A dim that merges
several factors has several labels, major to minor; a dim of unknown origin has none.  Labels name
things for people (reports, comments, baselines); no decision about correctness reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from ..graph import Graph, Loop, Node, Value
from ..graph.remember import once_for_each
from .registry import rule_of

LABELS = {"b": "batch", "s": "sequence"}  # in words
DimLabels: TypeAlias = tuple[tuple[str, ...], ...]  # per dim the labels of its factors


@once_for_each
def label_dims(graph: Graph) -> Mapping[str, DimLabels]:
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


Sources: TypeAlias = dict[str, tuple[frozenset[str], ...]]


def size_labels(graph: Graph, labels: Mapping[str, DimLabels]) -> Sources:
    """By value, the labels of inputs on which the size of each dim may depend.

    Of a dim without a label, as that of a slice or of a convolution, those of what became of it:
    of the dims that the operator has and its result has not, and of all where nothing is known.
    """
    found: Sources = {
        name: tuple(frozenset(names) for names in dims) for name, dims in labels.items()
    }
    while True:
        before = dict(found)
        for item in graph.body:
            if isinstance(item, Node):
                _source_node(item, found)
                continue
            outer = (*item.carried, *item.invariants)
            for block in item.blocks:
                for inner, value in zip(block.inputs, outer, strict=True):
                    _add_sources(inner.name, found.get(value.name, ()), found)
                for node in block.nodes:
                    _source_node(node, found)
                for value, inner in zip(item.outputs, block.outputs, strict=True):
                    _add_sources(value.name, found.get(inner.name, ()), found)
                for inner, value in zip(block.inputs, item.outputs, strict=False):
                    _add_sources(inner.name, found.get(value.name, ()), found)
        if found == before:
            return found


def _source_node(node: Node, found: Sources) -> None:
    rule = rule_of(node)
    sources: dict[str, frozenset[str]] = {}
    for value, dims in zip(node.operands, rule.operands, strict=True):
        for names, of in zip(dims, found.get(value.name, ()), strict=False):
            for name in names:
                sources[name] = sources.get(name, frozenset()) | of
    kept = {name for dims in rule.results for names in dims for name in names}
    gone = frozenset[str]().union(*(of for name, of in sources.items() if name not in kept))
    for value, dims in zip(node.outputs, rule.results, strict=True):
        each = (
            frozenset[str]().union(*(sources.get(name, gone) for name in names)) for names in dims
        )
        _add_sources(value.name, tuple(each), found)


def _add_sources(name: str, more: tuple[frozenset[str], ...], found: Sources) -> None:
    if more:
        known = found.get(name, (frozenset[str](),) * len(more))
        found[name] = tuple(a | b for a, b in zip(known, more, strict=True))


def factor_labels(node: Node, labels: Mapping[str, DimLabels]) -> dict[str, str]:
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


@once_for_each
def factors_of_nodes(graph: Graph) -> Mapping[str, Mapping[str, str]]:
    """By node, the label of each factor that has one."""
    labels = label_dims(graph)
    return {node.name: factor_labels(node, labels) for node in graph.nodes}


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
