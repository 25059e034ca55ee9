"""Graphs rewritten value by value: every floating dtype as float64, dropout off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..graph import Arg, Block, Graph, Loop, Node, Param, TensorType, Value
from ..ops.registry import operator_of


def rebuilt(
    graph: Graph,
    *,
    value: Callable[[Value], Value],
    node: Callable[[Node], Node] = lambda node: node,
    param: Callable[[Param], Param] = lambda param: param,
    order: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda order: order,
) -> Graph:
    """`graph` with `value` applied to every value wherever it stands.

    `node`, `param` and `order` (of a loop's blocks) are applied first, to the old ones; what they
    give still holds old values.
    """

    def arg(old: Arg) -> Arg:
        if isinstance(old, Value):
            return value(old)
        return tuple(arg(item) for item in old) if isinstance(old, tuple) else old

    def new_node(old: Node) -> Node:
        made = node(old)
        args = tuple((name, arg(a)) for name, a in made.args)
        return replace(made, args=args, outputs=tuple(map(value, made.outputs)))

    def new_param(old: Param) -> Param:
        made = param(old)
        return replace(made, value=value(made.value))

    def new_block(old: Block) -> Block:
        return replace(
            old,
            params=tuple(map(new_param, old.params)),
            inputs=tuple(map(value, old.inputs)),
            nodes=tuple(map(new_node, old.nodes)),
            outputs=tuple(map(value, old.outputs)),
        )

    def item(old: Node | Loop) -> Node | Loop:
        if isinstance(old, Node):
            return new_node(old)
        return replace(
            old,
            blocks=tuple(map(new_block, old.blocks)),
            order=order(old.order),
            carried=tuple(map(value, old.carried)),
            invariants=tuple(map(value, old.invariants)),
            outputs=tuple(map(value, old.outputs)),
        )

    return replace(
        graph,
        inputs=tuple(replace(i, value=value(i.value)) for i in graph.inputs),
        params=tuple(map(new_param, graph.params)),
        body=tuple(map(item, graph.body)),
        outputs=tuple(replace(o, value=value(o.value)) for o in graph.outputs),
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for a floating format, pairs of float64 for a complex one; others stay."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def widened(graph: Graph) -> Graph:
    """The graph with every floating dtype as float64, so that sums agree to 1e-9 in any order."""

    def value(old: Value) -> Value:
        return replace(old, type=TensorType(old.type.shape, wide(old.type.dtype)))

    def arg(old: Arg) -> Arg:
        if isinstance(old, tuple):
            return tuple(arg(item) for item in old)
        return wide(old) if isinstance(old, torch.dtype) else old

    def node(old: Node) -> Node:
        args = tuple((name, arg(a)) for name, a in old.args)
        if not old.operands and old.output.type.dtype.is_floating_point:  # torch.ones(2, 3)
            args = tuple((name, torch.float64 if name == "dtype" else a) for name, a in args)
        return replace(old, args=args)

    def param(old: Param) -> Param:
        return replace(old, stored=old.stored and wide(old.stored))

    return rebuilt(graph, value=value, node=node, param=param)


def without_dropout(graph: Graph) -> Graph:
    """The graph as it runs in eval mode: dropout lets everything through."""

    def node(old: Node) -> Node:
        changes = operator_of(old).in_eval
        return replace(old, args=tuple((name, changes.get(name, a)) for name, a in old.args))

    return rebuilt(graph, value=lambda value: value, node=node)


__all__ = ["rebuilt", "wide", "widened", "without_dropout"]
