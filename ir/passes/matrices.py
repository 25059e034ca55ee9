"""Which parameters are matrices of hidden layers: what optimizers of whole matrices step (Muon).

These are operands of matrix products, and the stacks of matrices that experts take, but for
tables (what an embedding reads rows of) and heads (products that nothing follows but the loss, or
the model's result).  A fused weight is one matrix, as the user has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..graph import Graph, Node, Value
from ..graph.rewrite import flat, producers
from ..ops.lookup import Embedding
from ..ops.product import Product
from ..ops.registry import operator_of

_Weights = Mapping[str, frozenset[str]]  # by value that parameters alone make up, which these are


def with_matrices(graph: Graph) -> Graph:
    """The flat graph, with `Param.matrix` where a parameter is one."""
    nodes = flat(graph)
    weights = _weights(graph, nodes)
    tables = {name for node in nodes for name in _read_by_rows(node, weights)}
    heads = {name for node in _heads(graph, nodes, weights) for name in _taken(node, weights)}
    found = {name for node in nodes for name in _taken(node, weights)} - tables - heads
    params = tuple(
        replace(param, matrix=True) if param.name in found and param.value.differentiable else param
        for param in graph.params
    )
    return replace(graph, params=params)


def _weights(graph: Graph, nodes: Sequence[Node]) -> _Weights:
    found = {param.value.name: frozenset({param.name}) for param in graph.params}
    for node in nodes:
        own = [found.get(value.name) for value in node.operands]
        if own and all(names is not None for names in own):
            names = frozenset(name for each in own for name in each or ())
            found |= {value.name: names for value in node.outputs}
    return found


def _taken(node: Node, weights: _Weights) -> Iterator[str]:
    """The parameters that a product, or a layer of experts, has as matrices, without biases."""
    operator = operator_of(node)
    dims = 2 if isinstance(operator, Product) else 3 if operator.experts else 0
    for value in node.operands if dims else ():
        if len(value.type.shape) == dims:
            yield from weights.get(value.name, ())


def _read_by_rows(node: Node, weights: _Weights) -> frozenset[str]:
    if not isinstance(operator_of(node), Embedding):
        return frozenset()
    return weights.get(node.operands[0].name, frozenset())


def _heads(graph: Graph, nodes: Sequence[Node], weights: _Weights) -> Iterator[Node]:
    """The products that are the last on the way to an output."""
    made = producers(nodes)
    left: list[Value] = [output.value for output in graph.outputs]
    seen: set[str] = set()
    while left:
        value = left.pop()
        node = made.get(value.name)
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if isinstance(operator_of(node), Product):
            yield node
            continue
        before = [v for v in node.operands if v.differentiable and v.name not in weights]
        if len(before) == 1 or value.type.shape == ():  # terms of a loss
            left += before


__all__ = ["with_matrices"]
