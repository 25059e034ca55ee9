"""Operators and functions of the user's own: kept whole by capture, with their own backward.

Each runs as it is where the module that defines it has been imported.  Operators are made with
`torch.library.custom_op`; functions are classes of `torch.autograd.Function`.  The last arguments
of such a node are not the operator's: where it is defined, and how it may be cut (`RULE`), if its
author has said so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ...compat.torch import defined_by
from ...facts.users import PREFIX, Import, import_user, installed
from ..graph import Arg, Graph, Node, Value
from ..graph.names import is_python_file
from .local import Local
from .operator import Operator, Render, opaque, shapes_of
from .rule import Rule
from .user_rules import declared, rule_for

RULE = "sharding_rule"
DEFINED_IN = "defined_in"
"""The arguments that say how such a node may be cut, and the place that `import_user` takes."""

FUNCTION = "shardwright.function.default"
"""The op of a call of a `torch.autograd.Function`.

Its arguments: `function`, the name of its class in its module; `arguments`, what it is given;
`in_tuple`, does it return a tuple; `saves`, the numbers of operands, then of results, that it keeps
for backward; `kept_bytes`, of what it keeps besides, on whole tensors.
"""


class UserError(ValueError):
    """Something of the user's cannot be planned; the message says why, and what to do."""


class UserOperator(Operator):
    """Runs as its rule says, replicated without one; its module is imported at the top."""

    def rule(self, node: Node) -> Rule:
        """The one that the user has declared."""
        text = dict(node.args).get(RULE)
        if not isinstance(text, str):
            return opaque(node)
        return rule_for(text, shapes_of(node.operands), shapes_of(node.outputs))

    def emit(self, node: Node, render: Render) -> str:
        """The call, without what is not the operator's."""
        args = tuple((name, arg) for name, arg in node.args if name not in (RULE, DEFINED_IN))
        bare = Node(node.name, node.op, args, node.outputs, node.loc)
        return super().emit(bare, render)

    def needed(self, node: Node) -> frozenset[str]:
        """All, since its declaration need not be here."""
        return frozenset(name for name, _ in node.args)


class UserFunction(UserOperator):
    """A `torch.autograd.Function`."""

    noun = "applied"

    def title(self, node: Node) -> str:
        """The name of its class."""
        return str(node.arg("function"))

    def emit(self, node: Node, render: Render) -> str:
        """`Rounding.apply(x, 0.25)`."""
        call = f"{render.imported(import_of(node))}.apply({', '.join(render.items('arguments'))})"
        alone = node.arg("in_tuple") and len(node.outputs) == 1
        return f"{call}[0]" if alone else call

    def evaluate(self, name: str, args: Mapping[str, Any]) -> Any:
        """What the function gives."""
        function = import_user(args[DEFINED_IN], args["function"])
        return function.apply(*_tuples(args["arguments"]))

    def saves(self, node: Node) -> tuple[Value, ...]:
        """What it kept when it was captured."""
        values, kept = (*node.operands, *node.outputs), node.arg("saves")
        assert isinstance(kept, tuple)
        return tuple(values[at] for at in kept if isinstance(at, int))

    def extra_bytes(self, local: Local) -> float:
        """What it keeps besides, cut as its first result is."""
        result, spec = local.node.output, local.specs()[1][0]
        whole = local.node.int_arg("kept_bytes")
        return whole * local.bytes(result, spec) / max(result.type.bytes, 1)


def is_users(node: Node) -> bool:
    """Does the node call something of the user's?"""
    return bool(node.args) and node.args[-1][0] == DEFINED_IN


def import_of(node: Node) -> Import:
    """What a module imports for a node that calls something of the user's."""
    args = dict(node.args)
    return Import(str(args[DEFINED_IN]), str(args["function"]) if node.op == FUNCTION else "")


def imports_in(graph: Graph) -> tuple[Import, ...]:
    """What a module of `graph` imports of the user's, in the order of use."""
    return tuple(dict.fromkeys(import_of(node) for node in graph.nodes if is_users(node)))


def operator_arguments(op: str) -> tuple[tuple[str, Arg], ...]:
    """What a node of the operator `mylib.square.default` has besides; nothing if it is torch's.

    Raises UserError where a module could not import it.
    """
    space, packet, *_ = op.split(".")
    if space in _OF_TORCH:
        return ()
    function = defined_by(f"{space}::{packet}")
    if function is None:
        raise UserError(
            f"`{op}` is an operator that is not defined with `torch.library.custom_op`, so that "
            "the file that a generated module must import for it is not known; define it so"
        )
    return _about(f"{space}.{packet}", f"`{op}`", function.__module__)


def function_arguments(
    function: type[Any],
    arguments: tuple[Arg, ...],
    in_tuple: bool,
    saves: tuple[int, ...],
    kept_bytes: int,
) -> tuple[tuple[str, Arg], ...]:
    """The arguments of a node that calls `function`.  Raises UserError as `operator_arguments`."""
    about = _about(function, f"`{function.__qualname__}`", function.__module__)
    return (
        ("function", function.__qualname__),
        ("arguments", arguments),
        ("in_tuple", in_tuple),
        ("saves", saves),
        ("kept_bytes", kept_bytes),
        *about,
    )


def check_arguments(node: Node) -> None:
    """Raises ValueError for arguments of a call of the user's that no capture writes."""
    args = dict(node.args)
    if not isinstance(args.get(RULE, ""), str):
        raise ValueError(f"`{RULE}` must be a text")
    if node.op != FUNCTION:
        return
    saves, kept, values = args.get("saves"), args.get("kept_bytes"), node.operands + node.outputs
    good = {
        DEFINED_IN: is_users(node),
        "function": isinstance(args.get("function"), str),
        "arguments": isinstance(args.get("arguments"), tuple),
        "in_tuple": isinstance(args.get("in_tuple"), bool),
        "saves": isinstance(saves, tuple) and set(saves) <= set(range(len(values))),
        "kept_bytes": isinstance(kept, int) and kept >= 0,
    }
    if wrong := [name for name, fits in good.items() if not fits]:
        raise ValueError(f"`{wrong[0]}` is none that a call of a function can have")


def check_rule(node: Node) -> None:
    """Raises UserError, naming the tensors, where a rule that was declared does not fit them."""
    if not is_users(node):
        return
    try:
        UserOperator().rule(node)
    except ValueError as error:
        given = ", ".join(str(list(shape)) for shape in shapes_of(node.operands))
        made = ", ".join(str(list(shape)) for shape in shapes_of(node.outputs))
        raise UserError(
            f"{error}, where it is called with {given} and returns {made}; change the text given "
            "to `shardwright.rule`"
        ) from error


def _about(op: object, said: str, module: str) -> tuple[tuple[str, Arg], ...]:
    place, text = _place_of(module, said), declared(op)
    return (*([(RULE, text)] if text else []), (DEFINED_IN, place))


def _place_of(name: str, said: str) -> str:
    """The place of the loaded module `name`: its name where that can be imported anywhere."""
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    if name != "__main__" and not name.startswith(PREFIX) and path and installed(name):
        return name
    if name == "__main__" or not is_python_file(path):
        raise UserError(
            f"{said} is defined in `{name}` ({path or 'no file'}), which no generated module can "
            "import; move it into a file of its own, whose path has letters, digits, spaces and "
            "`.,+@~=-_/` only"
        )
    return path


def _tuples(items: Sequence[Any]) -> tuple[Any, ...]:
    """The interpreter has lists for tuples."""
    return tuple(_tuples(item) if isinstance(item, (list, tuple)) else item for item in items)


_OF_TORCH = frozenset({"aten", "prims", "quantized", "shardwright", "_c10d_functional", "rngprims"})

__all__ = [
    "DEFINED_IN", "FUNCTION", "RULE", "UserError", "UserFunction", "UserOperator",
    "check_arguments", "check_rule", "function_arguments", "import_of", "imports_in", "is_users",
    "operator_arguments",
]  # fmt: skip
