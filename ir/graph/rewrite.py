"""Small tools for passes: replace values, rebuild a flat graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .nodes import Arg, Graph, Node, Output, Value


def substitute(arg: Arg, by: Mapping[str, Value]) -> Arg:
    """`arg` with every value whose name is in `by` replaced."""
    if isinstance(arg, Value):
        return by.get(arg.name, arg)
    if isinstance(arg, tuple):
        return tuple(substitute(item, by) for item in arg)
    return arg


def with_operands(node: Node, by: Mapping[str, Value]) -> Node:
    """`node` with its operands replaced; the same object where nothing changes."""
    if not any(value.name in by for value in node.operands):
        return node
    return replace(node, args=tuple((name, substitute(arg, by)) for name, arg in node.args))


def with_args(node: Node, **changes: Arg) -> Node:
    """`node` with some of its arguments replaced by name."""
    return replace(node, args=tuple((name, changes.get(name, arg)) for name, arg in node.args))


def flat(graph: Graph) -> tuple[Node, ...]:
    """The nodes of a graph without loops."""
    nodes = tuple(item for item in graph.body if isinstance(item, Node))
    if len(nodes) != len(graph.body):
        raise ValueError("this pass takes a flat graph, before `fold`")
    return nodes


def with_body(graph: Graph, nodes: Iterable[Node], by: Mapping[str, Value]) -> Graph:
    """`graph` with a new flat body, its outputs replaced as in `by`."""
    outputs = tuple(Output(o.path, by.get(o.value.name, o.value)) for o in graph.outputs)
    return replace(graph, body=tuple(nodes), outputs=outputs)


def producers(nodes: Sequence[Node]) -> dict[str, Node]:
    """Value name -> the node that makes it."""
    return {value.name: node for node in nodes for value in node.outputs}


__all__ = [
    "flat", "producers", "substitute", "with_args", "with_body", "with_operands",
]  # fmt: skip
