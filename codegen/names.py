"""Names of local variables in generated code: those of the user's source where they fit."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..ir.graph import Node
from ..ir.ops.registry import is_view, operator_of
from ..planner.plan.program import Compute, Convert, LoopCall, Sharded, Statement
from .nesting import ModuleCall

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
_CONVERTED: Mapping[str, str] = {
    "all_gather": "full",
    "all_reduce": "sum",
    "reduce_scatter": "part",
    "all_to_all": "moved",
    "slice": "part",
    "pad": "padded",
    "mask": "share",
    "nothing": "copy",
}

# What several results are called
_SEVERAL: Mapping[str, tuple[str, ...]] = {
    "part": ("first", "second", "third", "fourth"),
    "top": ("top_values", "top_indices"),
    "sorted": ("sorted_values", "order"),
    "max": ("largest", "where_largest"),
    "min": ("smallest", "where_smallest"),
}


@dataclass(frozen=True, slots=True)
class Base:
    """What a value would best be called; `users`: so it is called in the user's source.

    Of a view or a cast `kin` is what it is another form of.
    """

    name: str
    users: bool = False
    kin: Sharded | None = None

    def numbered(self, number: int) -> Base:
        """For one of several results."""
        words = _SEVERAL.get(self.name, ())
        return Base(words[number] if number < len(words) else f"{self.name}_{number}")

    def converted(self, item: Convert) -> Base:
        """For another form beside what is called so."""
        return Base(f"{self.name}_{_CONVERTED[item.primitive]}")


def hides(name: str) -> bool:
    """Would an argument of that name hide something that the body of a function uses?"""
    return name in ("self", "torch", "F", "ops", "float", "others")


class Names:
    """Gives each value of a function a name.

    A name stands for one thing: it is given again only when the value that had it is not used any
    more, and to the same value in another spec, to a view or a cast of it, or where the user's
    source calls both so.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        self.last: dict[Sharded, int] = {}  # the statement that uses a value last, by its number
        self._reserved = _RESERVED | set(reserved)
        self._of: dict[Sharded, str] = {}
        self._base: dict[Sharded, Base] = {}
        self._holder: dict[str, Sharded] = {}

    def __getitem__(self, item: Sharded) -> str:
        return self._of[item]

    def __contains__(self, item: Sharded) -> bool:
        return item in self._of

    def base(self, item: Sharded) -> Base:
        """What `item` is called, before that was made unique; also where it has no name."""
        return self._base.get(item, Base("x"))

    def note(self, item: Sharded, base: Base) -> None:
        """`item` has no name, and would be called `base`."""
        self._base[item] = base

    def known(self) -> list[Sharded]:
        """Everything that a name stands for now, oldest first."""
        return list(self._holder.values())

    def give(self, item: Sharded, base: Base, at: int) -> str:
        """A name for what statement number `at` makes, as near to `base` as can be.

        `sum_` rather than the name of a built-in.
        """
        text = base.name
        text = text if text.isidentifier() and not keyword.iskeyword(text) else f"x_{text}"
        text = text if text.isidentifier() else "x"
        text = f"{text}_" if text in _BUILTIN else text
        name, count = text, 1
        while name in self._reserved or not self._is_free(name, item, base, at):
            count += 1
            name = f"{text}_{count}"
        self._of[item], self._base[item] = name, base
        self._holder.pop(name, None)
        self._holder[name] = item
        return name

    def _is_free(self, name: str, item: Sharded, base: Base, at: int) -> bool:
        if name not in self._holder:
            return True
        holder = self._holder[name]
        same = holder.value == item.value or holder == base.kin
        same = same or (base.users and self._base[holder].users)
        return same and 0 <= at and self.last.get(holder, -1) <= at


def base_of(item: Compute | Convert | ModuleCall, names: Names) -> Base:
    """What the result of a statement would best be called.

    In order: the name the user's line assigns it to; for a layer with weights the layer's own
    name; for views and casts the name of what they show; a noun for the operator.
    """
    if isinstance(item, Convert):
        base = names.base(item.source)
        return Base(base.name, base.users, item.source)
    if isinstance(item, ModuleCall):
        call = item.function.call
        target = next((name for name in call.targets if name != "_"), "") if call else ""
        return (
            Base(target, True)
            if target
            else Base(item.path.rpartition(".")[2].lstrip("0123456789") or "x")
        )
    node = item.node
    if node.loc.target:
        return Base(node.loc.target, True)
    tail = node.loc.module.rpartition(".")[2]
    if tail and not tail.isdigit() and _owns(node):
        return Base(tail)
    first = item.operands[0] if item.operands else None
    if first is not None and len(node.outputs) == 1 and _shows(node):
        return Base(names.base(first).name, False, first)
    return Base(operator_of(node).noun or node.op.split(".")[1].strip("_"))


def words_of(statements: Iterable[Statement]) -> dict[str, str]:
    """By the name of a value, what the user calls it, or what it is a view of; else a noun."""
    words: dict[str, str] = {}
    for item in statements:
        if isinstance(item, Compute):
            words |= _words(item.node, words)
        elif isinstance(item, LoopCall):
            for body in item.bodies:
                outer = (*item.loop.carried, *item.loop.invariants)
                for value, inner in zip(outer, body.block.inputs, strict=True):
                    if value.name in words:
                        words[inner.name] = words[value.name]
                words |= words_of_nodes(body.block.nodes, words)
    return words


def words_of_nodes(nodes: Iterable[Node], words: Mapping[str, str]) -> dict[str, str]:
    """`words`, with those of what `nodes` make."""
    found = dict(words)
    for node in nodes:
        found |= _words(node, found)
    return found


def _words(node: Node, words: Mapping[str, str]) -> dict[str, str]:
    targets = node.loc.targets
    if len(targets) == len(node.outputs):
        return {value.name: name for value, name in zip(node.outputs, targets, strict=True)}
    if len(node.outputs) > 1:
        return {}
    shown = words.get(node.operands[0].name) if node.operands and _shows(node) else None
    word = shown or operator_of(node).noun or node.op.split(".")[1].strip("_")
    return {node.output.name: word}


def _shows(node: Node) -> bool:
    """Is the result the first operand in another form?"""
    return is_view(node) or operator_of(node).shows


def _owns(node: Node) -> bool:
    """Is the node the main op of its module?"""
    return operator_of(node).names_module
