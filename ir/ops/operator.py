"""What is known of an operator: the base of all declarations.

A declaration says how an operator may be cut (`rule`), how it is written in a generated module
(`emit`), which tensors autograd keeps (`saves`), and what it computes (`evaluate`).  Strategies,
local shapes, FLOPs, communication and memory follow from these; nothing outside of `ir/ops` and
`runtime` knows an operator by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from ..graph import Node, Value, values_in
from .rule import Rule, opaque_rule

Kind = Literal["matmul", "attention", "experts", "elementwise", "view"]


class Render(Protocol):
    """What an op needs to know to write itself for one rank."""

    def arg(self, name: str) -> str:
        """Source text of the argument `name`."""
        ...

    def items(self, name: str) -> list[str]:
        """Source texts of the items of the list argument `name`."""
        ...

    def sizes(self) -> list[str]:
        """Source text of the local size of each dim of the first result."""
        ...

    def axis(self, factor: str) -> str:
        """The `Axis` expression that cuts `factor`, or an empty string."""
        ...

    def sharded_axes(self) -> tuple[str, ...]:
        """Names of the mesh axes over which the result is sharded."""
        ...

    def algorithm(self) -> tuple[str, str]:
        """The algorithm that the op runs over an axis, and that axis; empty strings if none."""
        ...

    def order(self) -> str:
        """In which order ranks hold the tokens of a sequence: `contiguous` or `zigzag`."""
        ...


class Operator:
    """The base of all declarations, and that of an operator of which nothing is known.

    Such a one runs replicated, keeps everything for backward, and the report names it.
    """

    kind: Kind = "elementwise"
    # decided alone: light operators are decided together with their neighbours
    heavy: bool = True
    # may the result share the memory of the first operand, where the dtype is the same?
    aliases: bool = False
    # the argument that names what it remembers from call to call (a cache), if it does
    remembers: str = ""

    def rule(self, node: Node) -> Rule:
        """Which dims are which factors."""
        return opaque(node)

    def emit(self, node: Node, render: Render) -> str:
        """The expression that runs the node on local tensors."""
        args = [f"{name}={text}" for name, _ in node.args if (text := render.arg(name)) != "None"]
        return f"torch.ops.{node.op}({', '.join(args)})"

    def saves(self, node: Node) -> tuple[Value, ...]:
        """Values that autograd keeps for the backward pass, if there is one."""
        return (*node.operands, *node.outputs)

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Any:
        """The result on whole tensors; `name` is the operator's, `args` the node's.

        Raises ValueError if torch has no operator of that name.
        """
        return _call_torch(name, args)

    def continued(self, memory: Any, args: Mapping[str, Any]) -> tuple[Any, Any]:
        """The result, and what is remembered then; `memory` is what was before, None at first.

        For operators with `remembers`, instead of `evaluate`; `args` are without that argument.
        """
        raise NotImplementedError(f"{type(self).__name__} remembers nothing")


class Light(Operator):
    """An operator of one line: a rule, a template over the names of its schema, what it saves.

    `emit` may be a function instead.  `saves` has names of arguments, and `result` for the output;
    `weight if input`: only where the gradient of `input` is needed.
    """

    heavy = False

    def __init__(
        self,
        rule: Callable[[Node], Rule],
        emit: str | Callable[[Node, Render], str],
        saves: Sequence[str] = (),
    ) -> None:
        self._rule, self._emit, self._saves = rule, emit, tuple(saves)

    def rule(self, node: Node) -> Rule:
        """Which dims are which factors."""
        return self._rule(node)

    def emit(self, node: Node, render: Render) -> str:
        """The template, filled with the source texts of the arguments."""
        if isinstance(self._emit, str):
            return self._emit.format(**{name: render.arg(name) for name, _ in node.args})
        return self._emit(node, render)

    def saves(self, node: Node) -> tuple[Value, ...]:
        """The arguments and results that are named in the declaration."""
        return named_values(node, self._saves)


class View(Light):
    """A light operator that moves nothing: its results are other views of its operand."""

    kind: Kind = "view"
    aliases = True


class Family(dict[str, Operator]):
    """The operators of one file, by their names."""

    def add(self, names: str, op: Operator) -> None:
        """Declare one or more space-separated names; a second declaration is an error."""
        for name in names.split():
            if name in self:
                raise ValueError(f"duplicate registration of op `{name}`")
            self[name] = op


def named_values(node: Node, entries: Sequence[str]) -> tuple[Value, ...]:
    """The values that `Light.saves` names."""
    kept: list[Value] = []
    for entry in entries:
        name, _, other = entry.partition(" if ")
        if other and not any(value.differentiable for value in values_in(node.arg(other))):
            continue
        kept += node.outputs[:1] if name == "result" else values_in(node.arg(name))
    return tuple(kept)


def shapes_of(values: Sequence[Value]) -> list[tuple[int, ...]]:
    """The shapes of `values`."""
    return [value.type.shape for value in values]


def opaque(node: Node) -> Rule:
    """The rule of a node of which nothing is known: every dim is whole."""
    return opaque_rule(shapes_of(node.operands), shapes_of(node.outputs))


def _call_torch(name: str, args: Mapping[str, Any]) -> Any:
    packet, _, overload = name.removeprefix("aten.").rpartition(".")
    function = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if function is None:
        raise ValueError(f"there is no operator `{name}`")
    # placement arguments are None in the graph and mean the default; `self` may be positional
    schema = function._schema.arguments
    positional = [args[a.name] for a in schema if a.name in args and not a.kwarg_only]
    keywords = {a.name: args[a.name] for a in schema if a.name in args and a.kwarg_only}
    return function(*positional, **keywords)


__all__ = [
    "Family", "Kind", "Light", "Operator", "Render", "View",
    "named_values", "opaque", "shapes_of",
]  # fmt: skip
