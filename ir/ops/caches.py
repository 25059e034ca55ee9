"""How caches and states lie on the mesh, by the choices of the operators that fill them."""

from __future__ import annotations

from collections.abc import Sequence

from ...facts.spec import R, S, Spec
from ..graph import Node
from .registry import local_of, operator_of, rule_of
from .rule import Choice
from .states import state_spec


def cache_name(node: Node) -> str:
    """The name of what an operator remembers, where it stands."""
    name = node.arg(operator_of(node).remembers)
    assert isinstance(name, str)
    return name


def keeps_tokens(node: Node) -> bool:
    """Does it cache something of every token, and not a state of fixed size?"""
    operator = operator_of(node)
    return bool(operator.remembers) and operator.attends


def cache_spec(node: Node, choices: Sequence[Choice]) -> Spec:
    """The spec of an attention's cache, whose dims are batch, heads, sequence, or of a state."""
    if not keeps_tokens(node):
        return state_spec(operator_of(node), node, choices)
    dims = {"b": S(0), "n": S(1), **dict.fromkeys(rule_of(node).algorithms, S(2))}
    return tuple(dims.get(choice, R) for choice in choices)


def cache_bytes_in(node: Node, spec: Spec, sizes: tuple[int, ...], run: int = 0) -> float:
    """Bytes that one rank keeps of a cache in a layout (see `cache_spec`); `run` as in
    `Operator.remembered`."""
    if not keeps_tokens(node):
        names = {S(dim): name for name, dim in operator_of(node).cut_state(node).items()}
        choices = tuple(names.get(state, "R") for state in spec)
        return operator_of(node).remembered(local_of(node, choices, sizes), run)
    owning = next(name for name in rule_of(node).algorithms if _owns(node, name))
    choices = tuple({S(0): "b", S(1): "n", S(2): owning}.get(state, "R") for state in spec)
    return operator_of(node).remembered(local_of(node, choices, sizes), run)


def owning_axis(node: Node, choices: Sequence[Choice]) -> int:
    """The axis whose ranks have all new tokens, and each caches those that it owns; -1 if none."""
    return next((axis for axis, choice in enumerate(choices) if _owns(node, choice)), -1)


def _owns(node: Node, choice: Choice) -> bool:
    way = rule_of(node).algorithms.get(choice)
    return way is not None and way.operands[0] == R


__all__ = ["cache_bytes_in", "cache_name", "cache_spec", "keeps_tokens", "owning_axis"]
