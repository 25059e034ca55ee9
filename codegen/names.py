"""Names of local variables in generated code: those of the user's source where they fit."""

from __future__ import annotations

import builtins
import itertools
import keyword
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..ir.graph import Call, FunctionCall, Node
from ..ir.ops.registry import is_view, operator_of
from ..planner.plan.program import Compute, Convert, LoopCall, Sharded, Statement
from .nesting import ModuleCall, UserCall, makes_of

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

# What a noun becomes for something made of what is called so
_MADE_OF: Mapping[tuple[str, str], str] = {("scaled", "activated"): "gated"}


@dataclass(frozen=True, slots=True)
class Base:
    """What a value would best be called; `users`: so it is called in the user's source.

    Of a view or a cast `kin` is what it is another form of.  `other` is a name for it while the
    first one stands for something else that is still used.
    """

    name: str
    users: bool = False
    kin: Sharded | None = None
    other: str = ""

    def numbered(self, number: int) -> Base:
        """For one of several results."""
        words = _SEVERAL.get(self.name, ())
        return Base(words[number] if number < len(words) else f"{self.name}_{number}")

    def converted(self, item: Convert) -> Base:
        """For another form beside what is called so."""
        return Base(f"{self.name}_{_CONVERTED[item.primitive]}")


def _variable(text: str) -> str:
    """`text` where it may name a variable; `sum_` rather than the name of a built-in."""
    text = text if text.isidentifier() and not keyword.iskeyword(text) else f"x_{text}"
    text = text if text.isidentifier() else "x"
    return f"{text}_" if text in _BUILTIN else text


def may_be_an_axis(name: str) -> bool:
    """May a mesh axis have that name, which the bodies of functions have for a variable?"""
    return _variable(name) == name and name not in _RESERVED


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
        """A name for what statement number `at` makes, as near to `base` as can be."""
        name = self.choose(item, base, at)
        self._of[item], self._base[item] = name, base
        self._holder.pop(name, None)
        self._holder[name] = item
        return name

    def choose(self, item: Sharded, base: Base, at: int) -> str:
        """The name that `give` would give now."""
        text = _variable(base.name)
        names = [text, *([_variable(base.other)] if base.other else [])]
        numbered = (f"{names[-1]}_{count}" for count in itertools.count(2))
        free = (name for name in itertools.chain(names, numbered) if name not in self._reserved)
        return next(name for name in free if self._is_free(name, item, base, at))

    def _is_free(self, name: str, item: Sharded, base: Base, at: int) -> bool:
        if name not in self._holder:
            return True
        holder = self._holder[name]
        same = holder.value == item.value or holder == base.kin
        same = same or (base.users and self._base[holder].users)
        return same and 0 <= at and self.last.get(holder, -1) <= at


def base_of(
    item: Compute | Convert | ModuleCall | UserCall,
    names: Names,
    within: Call | FunctionCall | None = None,
) -> Base:
    """What the result of a statement in the forward of `within` would best be called.

    In order: the name the user's line assigns it to, if that is one of this forward; for a layer
    with weights the layer's own name; for views and casts the name of what they show; a noun for
    the operator.
    """
    if isinstance(item, Convert):
        base = names.base(item.source)
        return replace(base, kin=item.source)
    if isinstance(item, ModuleCall):
        call, tail = item.function.call, item.path.rpartition(".")[2]
        own = tail.lstrip("0123456789") or "x"
        target = next((name for name in call.targets if name != "_"), "") if call else ""
        return Base(target, True, other=own) if target else Base(own)
    if isinstance(item, UserCall):
        call = item.function.call
        target = next((name for name in call.targets if name != "_"), "") if call else ""
        return Base(target, True) if target else _last_word(item, names)
    node, noun = item.node, _noun(item.node)
    tail = node.loc.module.rpartition(".")[2]
    own = tail if tail and not tail.isdigit() and operator_of(node).names_module else ""
    call = node.loc.calls[-1] if node.loc.calls else None
    inlined = bool(own) and call is not None and bool(call.file) and call != within
    if node.loc.target and not inlined:
        return Base(node.loc.target, True, other=own or noun)
    if own:
        return Base(own)
    first = item.operands[0] if item.operands else None
    if first is not None and len(node.outputs) == 1 and _shows(node):
        name, dtype = names.base(first).name, node.output.type.dtype
        cast = dtype != first.value.type.dtype
        return Base(name, False, first, f"{name}_{str(dtype).partition('.')[2]}" if cast else "")
    made_of = (names.base(operand).name for operand in item.operands)
    return Base(next((w for n in made_of if (w := _MADE_OF.get((noun, n)))), noun))


def _last_word(item: UserCall, names: Names) -> Base:
    """What the statement that makes a function's result would call it."""
    last = next(s for s in item.function.statements if item.outputs[0] in makes_of(s))
    return Base("x") if isinstance(last, LoopCall) else base_of(last, names)


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
        named = zip(node.outputs, targets, strict=True)
        return {value.name: name for value, name in named if name != "_"}
    if len(node.outputs) > 1:
        return {}
    shown = words.get(node.operands[0].name) if node.operands and _shows(node) else None
    return {node.output.name: shown or _noun(node)}


def _noun(node: Node) -> str:
    """What the result of such an operator is called."""
    return operator_of(node).noun or node.op.split(".")[1].strip("_")


def _shows(node: Node) -> bool:
    """Is the result the first operand in another form?"""
    return is_view(node) or operator_of(node).shows
