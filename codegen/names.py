"""Names of local variables in generated code: those of the user's source where they fit."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Iterable

from ..facts.moves import primitive
from ..ir.graph import Node
from ..ir.ops.registry import operator_of
from ..planner.plan.program import Compute, Convert, Sharded

# What generated functions use by these names
_RESERVED = frozenset({"self", "torch", "F", "ops", "nn", "Tensor", "layer", "device"})
# Assigning to these would hide a function; lower case, because those are the same in all versions
_BUILTIN = frozenset(name for name in dir(builtins) if name.islower()) - {
    *(
        "_",
        "copyright",
        "credits",
        "exit",
        "help",
        "license",
        "quit",
    ),  # there only in interactive Pythons
}
_CONVERTED = {
    "all_gather": "full",
    "all_reduce": "sum",
    "reduce_scatter": "part",
    "all_to_all": "moved",
    "slice": "part",
    "pad": "padded",
    "mask": "share",
    "nothing": "copy",
}


def hides(name: str) -> bool:
    """Would an argument of that name hide something that the body of a function uses?"""
    return name in ("self", "torch", "F", "ops", "float", "others")


class Names:
    """Gives each live value its own name; a name is free again after its value's last use."""

    def __init__(self, reserved: Iterable[str]) -> None:
        self._reserved = _RESERVED | set(reserved)
        self._of: dict[Sharded, str] = {}
        self._base: dict[Sharded, str] = {}
        self._taken: dict[str, Sharded] = {}

    def __getitem__(self, item: Sharded) -> str:
        return self._of[item]

    def __contains__(self, item: Sharded) -> bool:
        return item in self._of

    def base(self, item: Sharded) -> str:
        """The name that `item` was given before it was made unique."""
        return self._base[item]

    def live(self) -> list[Sharded]:
        """Everything that has a name now, oldest first."""
        return list(self._taken.values())

    def release(self, item: Sharded) -> None:
        """`item` is not used any more."""
        name = self._of.get(item)
        if name is not None and self._taken.get(name) == item:
            del self._taken[name]

    def give(self, item: Sharded, base: str) -> str:
        """A name for `item`, as near to `base` as is free; `sum_` rather than a built-in's name."""
        base = base if base.isidentifier() and not keyword.iskeyword(base) else f"x_{base}"
        base = base if base.isidentifier() else "x"
        base = f"{base}_" if base in _BUILTIN else base
        name, count = base, 1
        while name in self._reserved or name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._of[item], self._base[item], self._taken[name] = name, base, item
        return name


def base_name(statement: Compute | Convert, names: Names, dying: set[Sharded]) -> str:
    """What the result of a statement would best be called.

    In order: the name the user's line assigns it to; for a layer with weights the layer's own
    name; the name of the operand that it replaces; the op's name.
    """
    if isinstance(statement, Convert):
        base = names.base(statement.source) if statement.source in names else "x"
        if statement.source in dying:
            return base
        step = statement.priced.step
        return f"{base}_{_CONVERTED[primitive(step.a, step.b)]}"
    node = statement.node
    if node.loc.target:
        return node.loc.target
    tail = node.loc.module.rsplit(".", 1)[-1]
    if tail and not tail.isdigit() and _owns(node):
        return tail
    first = statement.operands[0] if statement.operands else None
    if first in dying and first in names and len(node.outputs) == 1:
        return names.base(first)
    return node.op.split(".")[1].strip("_")


def _owns(node: Node) -> bool:
    """Is the node the main op of its module?"""
    return operator_of(node).names_module
