"""Do operators give what their graph says?  They run on the meta device, and compute nothing.

A graph may come from a file that anyone wrote: rules and emitters rely on arguments and shapes that
a capture gives.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from ...compat.torch import schema_arguments
from ..graph import Arg, Graph, Node, Value
from ..graph.check import GraphError
from ..graph.names import is_path
from .operator import PLACEMENT, torch_operator
from .registry import find_op, operator_of, rule_of
from .users import check_arguments, is_users


def check_nodes(graph: Graph) -> None:
    """Raises GraphError for a node whose operator is unknown, or gives other tensors."""
    read = graph.read
    for node in graph.nodes:
        _check_node(node, read)


def _check_node(node: Node, read: Set[str]) -> None:
    """Results that nothing reads may differ: those of some operators (`embedding_bag`) depend on
    whether there will be gradients."""
    place = f"node `{node.name}` ({node.op})"
    if is_users(node):  # of the user's file, which is not loaded for this
        try:
            check_arguments(node)
            rule_of(node)
        except ValueError as error:
            raise GraphError(f"{place}: {error}") from error
        return
    if find_op(node.op) is None and not node.op.startswith("aten."):
        raise GraphError(f"{place}: there is no such operator")
    try:
        _check_arguments(node)
        results = _results(node)
        rule_of(node)
    except Exception as error:  # torch's operators raise anything
        says = str(error).strip().split("\n")[0] or type(error).__name__
        raise GraphError(f"{place}: its arguments do not fit: {says}") from error
    if len(results) != len(node.outputs) or any(
        (tuple(x.shape), x.dtype) != (value.type.shape, value.type.dtype)
        for x, value in zip(results, node.outputs, strict=True)
        if value.name in read
    ):
        raise GraphError(f"{place} gives other tensors than the graph says")


def _check_arguments(node: Node) -> None:
    """Raises ValueError where they are not those of torch's operator, or choose a device.

    A number for a dtype must not come to torch, which takes it unseen and may crash.
    """
    if node.op.startswith("aten."):
        wanted = schema_arguments(torch_operator(node.op))
        if [name for name, _ in node.args] != [argument.name for argument in wanted]:
            raise ValueError(f"it takes {', '.join(argument.name for argument in wanted)}")
        for argument, (name, arg) in zip(wanted, node.args, strict=True):
            is_dtype = "ScalarType" in str(argument.real_type)
            if is_dtype and not (arg is None or isinstance(arg, torch.dtype)):
                raise ValueError(f"`{name}` is no dtype")
    for name, arg in node.args:
        if name in PLACEMENT and arg is not None:
            raise ValueError(f"`{name}` is not for a plan to say")
    remembers = operator_of(node).remembers
    if remembers and not (isinstance(path := node.arg(remembers), str) and is_path(path)):
        raise ValueError(f"`{remembers}` must be identifiers and numbers with dots between")


def _results(node: Node) -> list[Tensor]:
    op, args = operator_of(node), {name: _empty(arg) for name, arg in node.args}
    with torch.device("meta"), torch.no_grad():
        if op.remembers:
            args.pop(op.remembers)
            result, _ = op.continued(None, args)
        else:
            result = op.evaluate(node.op, args)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _empty(arg: Arg) -> Any:
    if isinstance(arg, Value):
        return torch.empty(arg.type.shape, dtype=arg.type.dtype, device="meta")
    return [_empty(item) for item in arg] if isinstance(arg, tuple) else arg


__all__ = ["check_nodes"]
