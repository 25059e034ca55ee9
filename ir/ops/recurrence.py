"""States that a model's own lines carry from token to token, from one step of serving to the next.

    before = state(initial)            # what the tokens so far have left; `initial` without any
    ...                                # the model's lines
    new_state(before, after)           # what is left then

A recurrence that is written out token by token also has `state_step`, which passes padding over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph import Node, TensorType, Value
from .forms import call, factors
from .local import Local
from .operator import Family, Operator, Render
from .rule import Choice, Rule
from .states import in_order, kept_bytes

FAMILY = Family()


def _dims(node: Node) -> list[str]:
    """Names of the dims of a state, that of sequences first."""
    sizes = node.output.type.shape
    return [name if size > 1 else "1" for name, size in zip(_names(node), sizes, strict=True)]


def _names(node: Node) -> list[str]:
    return ["b", *(f"d{i}" for i in range(1, len(node.output.type.shape)))]


def _rule(node: Node) -> Rule:
    """States are cut along any of their dims, alike; positions with the batch."""
    state = " ".join(_dims(node))
    states = sum(name != "positions" for name, arg in node.args if isinstance(arg, Value))
    positions = [f"{_dims(node)[0]} [t]"] if "positions" in dict(node.args) else []
    return factors(f"{', '.join([*[state] * states, *positions])} -> {state}")(node)


class _OfState(Operator):
    """What they share: a state (b, ...) of each sequence, and where it is cut."""

    noun = "state"
    spent_on = "states"

    def rule(self, node: Node) -> Rule:
        """Any dim can be cut."""
        return _rule(node)

    def state(self, node: Node) -> TensorType:
        """As it stands in the graph."""
        return node.output.type

    def cut_state(self, node: Node) -> Mapping[Choice, int]:
        """Each dim by its own factor."""
        return {name: dim for dim, name in enumerate(_dims(node)) if name != "1"}

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Nothing: there is no backward."""
        return ()


class State(_OfState):
    """What the tokens so far have left of `initial`; in training nothing came before."""

    continued_by = "shardwright.state_before"

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """The initial state."""
        return args["initial"]


class StateBefore(State):
    """`State` in serving."""

    continued_by = ""
    remembers = "state"

    def continued(self, memory: Any, args: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What is remembered, or the initial state."""
        in_order(args["positions"])
        found = args["initial"] if memory is None else memory
        return found, found

    def emit(self, node: Node, render: Render) -> str:
        """`ops.state_before`."""
        return _call("ops.state_before", node, render, "initial")


class NewState(_OfState):
    """What is left by the new tokens, `after`; nothing reads it before the next step."""

    continued_by = "shardwright.state_after"
    acts = True

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """The new state."""
        return args["after"]


class StateAfter(NewState):
    """`NewState` in serving: a sequence without new tokens keeps its state."""

    continued_by = ""
    remembers = "state"

    def remembered(self, local: Local, run: int = 0) -> float:
        """Bytes of the state."""
        return kept_bytes(self, local)

    def continued(self, memory: Any, args: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The new state, twice."""
        kept = _where_new((args["positions"] >= 0).any(1), args["after"], args["before"])
        return kept, kept

    def emit(self, node: Node, render: Render) -> str:
        """`ops.state_after`."""
        return _call("ops.state_after", node, render, "before", "after")


class Step(_OfState):
    """The state after the token in column `index`, `after`, or `before`, if that is padding."""

    heavy = False
    continued_by = "shardwright.state_step"
    keeps_out_padding = True

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """Without padding."""
        return args["after"]


class StateStep(Step):
    """`Step` in serving."""

    continued_by = ""

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Tensor:
        """By the positions (b, t)."""
        new = args["positions"][:, args["index"]] >= 0
        return _where_new(new, args["after"], args["before"])

    def emit(self, node: Node, render: Render) -> str:
        """`ops.state_step`."""
        given = [render.arg(name) for name in ("before", "after", "positions", "index")]
        return call("ops.state_step", *given)


def _call(function: str, node: Node, render: Render, *tensors: str) -> str:
    given = [render.arg(name) for name in tensors]
    return call(function, *given, f"self.{node.arg('state')}", render.arg("positions"))


def _where_new(new: Tensor, after: Tensor, before: Tensor) -> Tensor:
    return torch.where(new.view(-1, *[1] * (after.ndim - 1)), after, before)


FAMILY.add("shardwright.state", State())
FAMILY.add("shardwright.state_before", StateBefore())
FAMILY.add("shardwright.step", Step())
FAMILY.add("shardwright.state_step", StateStep())
FAMILY.add("shardwright.new_state", NewState())
FAMILY.add("shardwright.state_after", StateAfter())

__all__ = ["FAMILY"]
