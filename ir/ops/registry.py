"""The registry of ops: every family's declarations by name, and what is asked of a node's."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..graph import Node, Value
from ..graph.remember import once_for_each
from . import (
    along,
    attention,
    cached_attention,
    convolution,
    elementwise,
    factory,
    lookup,
    loss,
    moe,
    norm,
    parts,
    product,
    random,
    recurrence,
    reduction,
    rotary,
    routing,
    shape,
    spatial,
)
from .local import Local
from .operator import Family, Operator
from .rule import Choice, Rule
from .users import FUNCTION, RULE, UserFunction, UserOperator, is_users

OPS = Family()
for _family in (
    elementwise.FAMILY,
    random.FAMILY,
    along.FAMILY,
    norm.FAMILY,
    rotary.FAMILY,
    reduction.FAMILY,
    shape.FAMILY,
    parts.FAMILY,
    lookup.FAMILY,
    factory.FAMILY,
    product.FAMILY,
    spatial.FAMILY,
    attention.FAMILY,
    cached_attention.FAMILY,
    convolution.FAMILY,
    recurrence.FAMILY,
    loss.FAMILY,
    routing.FAMILY,
    moe.FAMILY,
):
    for _name, _operator in _family.items():
        OPS.add(_name, _operator)

_UNKNOWN = Operator()
_OF_USERS = UserOperator()
_FUNCTION = UserFunction()


def register(names: str, op: Operator) -> None:
    """Add `op` under one or more space-separated names; a second registration is an error."""
    OPS.add(names, op)


def find_op(name: str) -> Operator | None:
    """The op called `name`, or None if it has no declaration (it then runs replicated)."""
    return OPS.get(name)


def operator_of(node: Node) -> Operator:
    """The declaration of the node's op; that of one without any knows nothing."""
    known = OPS.get(node.op)
    if known is not None:
        return known
    if not is_users(node):
        return _UNKNOWN
    return _FUNCTION if node.op == FUNCTION else _OF_USERS


def is_ruled(node: Node) -> bool:
    """Has somebody said how it may be cut?  Without that it runs replicated."""
    return find_op(node.op) is not None or RULE in dict(node.args)


@once_for_each
def rule_of(node: Node) -> Rule:
    """The factor rule of `node`; an op without one keeps every dim whole."""
    return _added_up(node, operator_of(node).rule(node))


def _added_up(node: Node, rule: Rule) -> Rule:
    """The rule without partial sums of truth values, which ranks cannot add up."""
    logical = {i for i, value in enumerate(node.operands) if value.type.dtype == torch.bool}
    if any(out.type.dtype == torch.bool for out in node.outputs):
        kept = {f for dims in rule.results for dim in dims for f in dim}
        return replace(rule, linear=(), whole=rule.whole | set(rule.sizes) - kept - rule.inside)
    if not any(group & logical for group in rule.linear):
        return rule
    return replace(rule, linear=tuple(group for group in rule.linear if not group & logical))


def is_view(node: Node) -> bool:
    """Do the outputs share the memory of the first operand?"""
    if not node.operands or not operator_of(node).aliases:
        return False
    return all(out.type.dtype == node.operands[0].type.dtype for out in node.outputs)


def words_of(node: Node, choice: Choice) -> str:
    """What reports call a choice, where the declaration says it."""
    if way := rule_of(node).algorithms.get(choice):
        return way.words or operator_of(node).words.get(choice, "")
    return operator_of(node).words.get(choice, "")


def saved_values(node: Node) -> tuple[Value, ...]:
    """Values that autograd keeps from this node for the backward pass (unknown op: all of them)."""
    if not any(out.differentiable for out in node.outputs):
        return ()
    return operator_of(node).saves(node)


def local_of(
    node: Node,
    choices: tuple[Choice, ...] = (),
    sizes: tuple[int, ...] = (),
    *,
    training: bool = False,
    order: str = "contiguous",
    imbalance: float = 0.0,
) -> Local:
    """One rank's part of `node` (see `Local`); without choices the whole of it.

    Raises ValueError where the sizes do not allow the choices.
    """
    rule = rule_of(node)
    ways = rule.ways(choices, sizes)
    if ways is None:
        raise ValueError(f"{node.loc}: {node.op} cannot be cut {choices} over axes of {sizes}")
    return Local(node, rule, choices, sizes, ways, training, order, imbalance)


__all__ = [
    "OPS",
    "find_op",
    "is_ruled",
    "is_view",
    "local_of",
    "operator_of",
    "register",
    "rule_of",
    "saved_values",
    "words_of",
]
