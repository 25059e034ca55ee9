"""Operators of the user's own, defined with `torch.library.custom_op`: kept whole by capture.

Each runs as it is, with its own backward, where the file that defines it has been imported.
"""

from __future__ import annotations

import sys

from ...compat.torch import defined_by
from ..graph import Graph, Node
from ..graph.names import is_python_file
from .operator import Operator, Render

DEFINED_IN = "defined_in"
"""The last argument of such a node: the path of a file, as `import_user` takes it."""


class UserOperator(Operator):
    """Runs replicated; its file is imported at the top of a module that calls it."""

    def emit(self, node: Node, render: Render) -> str:
        """The call, without where the operator is defined."""
        args = tuple((name, arg) for name, arg in node.args if name != DEFINED_IN)
        bare = Node(node.name, node.op, args, node.outputs, node.loc)
        return super().emit(bare, render)


def place_of(op: str) -> str:
    """The file to import for the operator `mylib.square.default`; empty if torch has it by itself.

    Raises ValueError, which says what to do, where that cannot be known.
    """
    space, packet, *_ = op.split(".")
    if space in _OF_TORCH:
        return ""
    function = defined_by(f"{space}::{packet}")
    if function is None:
        raise ValueError(
            f"`{op}` is an operator that is not defined with `torch.library.custom_op`, so that "
            "the file that a generated module must import for it is not known; define it so"
        )
    name = function.__module__
    module = sys.modules.get(name)
    path = getattr(module, "__file__", None) or ""
    if name == "__main__" or getattr(module, "__package__", "") or not is_python_file(path):
        raise ValueError(
            f"`{op}` is defined in `{name}` ({path or 'no file'}), which no generated module can "
            "import; move it into a file of its own, outside packages, whose path has letters, "
            "digits, spaces and `.,+@~=-_/` only"
        )
    return path


def places_in(graph: Graph) -> tuple[str, ...]:
    """What a module of `graph` imports of the user's, in the order of use."""
    found = (dict(node.args).get(DEFINED_IN) for node in graph.nodes)
    return tuple(dict.fromkeys(place for place in found if isinstance(place, str)))


_OF_TORCH = frozenset({"aten", "prims", "quantized", "shardwright", "_c10d_functional", "rngprims"})

__all__ = ["DEFINED_IN", "UserOperator", "place_of", "places_in"]
