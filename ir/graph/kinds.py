"""Nodes that are the same but for the names of their values and where they come from."""

from __future__ import annotations

from .nodes import Arg, Node, Value
from .remember import once_for_each

_numbers: dict[object, int] = {}


@once_for_each
def kind_of(node: Node) -> int:
    """A number that nodes share which do the same with tensors of the same types.

    >>> from .nodes import TensorType
    >>> import torch
    >>> kind = TensorType((4,), torch.float32)
    >>> x, y, z = (Value(name, kind) for name in "xyz")
    >>> mul = [Node(z.name, "aten.mul.Tensor", (("a", x), ("b", b)), (z,)) for b in (x, y, z)]
    >>> [kind_of(mul[1]) == kind_of(node) for node in mul]
    [False, True, True]
    """
    names: dict[str, int] = {}

    def plain(arg: Arg) -> object:
        if isinstance(arg, Value):
            return names.setdefault(arg.name, len(names)), arg.type, arg.differentiable
        return tuple(map(plain, arg)) if isinstance(arg, tuple) else (type(arg), arg)

    args = tuple((name, plain(arg)) for name, arg in node.args)
    made = tuple((value.type, value.differentiable) for value in node.outputs)
    return _numbers.setdefault((node.op, args, made), len(_numbers))


__all__ = ["kind_of"]
