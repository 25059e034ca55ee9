"""The statements of a program as functions again: one for each of the user's modules, nested."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..ir.graph import Call, FunctionCall, Node
from ..ir.ops.registry import operator_of
from ..planner.plan.program import Compute, Convert, LoopCall, Sharded, Statement
from .outline import Item, Outline, outline


@dataclass(frozen=True, slots=True)
class _Called:
    """A call of what is a function of its own."""

    function: Function

    @property
    def inputs(self) -> tuple[Sharded, ...]:
        """What it takes."""
        return self.function.inputs

    @property
    def outputs(self) -> tuple[Sharded, ...]:
        """What it gives."""
        return self.function.outputs


@dataclass(frozen=True, slots=True)
class ModuleCall(_Called):
    """`outputs = self.path(inputs)`: a call of a module of the user's."""

    path: str  # from the module whose forward calls it: `attention`, `experts.3`


@dataclass(frozen=True, slots=True)
class UserCall(_Called):
    """`outputs = name(inputs)`: a call of a function of the user's, which takes tensors alone."""

    @property
    def name(self) -> str:
        """The function's."""
        assert isinstance(self.function.call, FunctionCall)
        return self.function.call.name


@dataclass(frozen=True, slots=True)
class Function:
    """The forward of one module, or a function that one calls; `path` is that of the module, from
    the block or model on."""

    path: str
    call: Call | FunctionCall | None
    inputs: tuple[Sharded, ...]
    statements: tuple[Step, ...]
    outputs: tuple[Sharded, ...]

    def own(self, path: str) -> str | None:
        """`path` from this module on, None for what is not in it."""
        if not self.path:
            return path
        prefix = f"{self.path}."
        return path[len(prefix) :] if path.startswith(prefix) else None


Step: TypeAlias = Statement | ModuleCall | UserCall
Define: TypeAlias = Callable[[Function], Function | None]
_Within: TypeAlias = Call | FunctionCall


def reads_of(item: Step) -> tuple[Sharded, ...]:
    """What a statement reads, in order, repeats kept."""
    if isinstance(item, Convert):
        return (item.source,)
    if isinstance(item, Compute):
        return item.operands
    if isinstance(item, ModuleCall | UserCall):
        return item.inputs
    return (*item.carried, *item.arguments)


def makes_of(item: Step) -> tuple[Sharded, ...]:
    """What a statement makes."""
    return (item.target,) if isinstance(item, Convert) else item.outputs


def nest(
    statements: Sequence[Statement],
    inputs: Sequence[Sharded],
    outputs: Sequence[Sharded],
    parameters: Mapping[str, str],
    loop: str = "",
    define: Define = lambda function: None,
) -> Function:
    """The forward of a block of `loop`, or of the model where that is empty.

    `parameters` has the paths of parameters in the block or model, by the names of their values.
    `define` writes a function of the user's, and gives it with its inputs in the order of its
    arguments; where it refuses to, the function is written where it is called.
    What stands before a loop stays before it: a call that has statements on both sides is written
    in the model's own forward.
    """
    scopes = [() if isinstance(s, Convert) else _within(s, loop, parameters) for s in statements]
    where = [sum(isinstance(s, LoopCall) for s in statements[:i]) for i in range(len(statements))]
    crossing = _crossing(scopes, where)
    for item, calls in zip(statements, scopes, strict=True):
        crossing |= set(calls) if isinstance(item, LoopCall) else set()
    everywhere = {s for item in statements for s in reads_of(item) if s.value.name in parameters}
    made = {s for item in statements for s in makes_of(item)}
    steps: list[Step] = []
    for part in range(max(where, default=0) + 1):
        numbers = [n for n, segment in enumerate(where) if segment == part]
        body = [n for n in numbers if not isinstance(statements[n], LoopCall)]
        rest = [item for n, item in enumerate(statements) if n not in body]
        results = {*outputs, *(s for item in rest for s in reads_of(item))}
        items = [
            Item(
                reads_of(statements[n]),
                makes_of(statements[n]),
                tuple(call for call in scopes[n] if call not in crossing),
                isinstance(statements[n], Convert),
            )
            for n in body
        ]
        flat = [statements[n] for n in body]
        steps += _outlined(items, flat, results, everywhere - made, _Root(loop, flat), define)
        steps += [statements[n] for n in numbers if n not in body]
    return Function("", _first_call(statements, loop), tuple(inputs), tuple(steps), tuple(outputs))


def _outlined(
    items: Sequence[Item[Sharded, _Within]],
    flat: Sequence[Statement],
    results: Collection[Sharded],
    everywhere: Collection[Sharded],
    root: _Root,
    define: Define,
) -> list[Step]:
    """The items, nested, without the functions that cannot be written."""
    while True:
        tree = outline(items, results, everywhere=everywhere, form_of=lambda item: item.value.name)
        refused: set[_Within] = set()
        steps = _steps(tree, flat, "", root, define, refused)
        if not refused:
            return steps
        items = [
            replace(item, calls=tuple(call for call in item.calls if call not in refused))
            for item in items
        ]


class _Root:
    """Paths of modules from the block or the model on."""

    def __init__(self, loop: str, statements: Sequence[Statement]) -> None:
        self.prefix = _prefix(loop, statements)

    def path(self, call: Call) -> str:
        """The module's path from here on."""
        return call.path.removeprefix(self.prefix)


def _nodes(statements: Sequence[Statement]) -> Iterator[Node]:
    for item in statements:
        if isinstance(item, Compute):
            yield item.node


def _block_call(node: Node, loop: str) -> int:
    """The number of the call of the block, or model, among those that a node ran in; -1: none."""
    pattern = re.compile(rf"{re.escape(loop)}\.\d+") if loop else re.compile("")
    found = [i for i, call in enumerate(node.loc.calls) if pattern.fullmatch(call.path)]
    return found[0] if found else -1


def _first_call(statements: Sequence[Statement], loop: str) -> Call | None:
    for node in _nodes(statements):
        at = _block_call(node, loop)
        if at >= 0:
            return node.loc.calls[at]
    return None


def _prefix(loop: str, statements: Sequence[Statement]) -> str:
    call = _first_call(statements, loop) if loop else None
    return f"{call.path}." if call else ""


def _within(
    item: Compute | LoopCall, loop: str, parameters: Mapping[str, str]
) -> tuple[_Within, ...]:
    """The calls of modules and then of functions that a statement ran in."""
    functions = () if isinstance(item, LoopCall) else item.node.loc.functions
    return (*_calls(item, loop, parameters), *functions)


def _calls(item: Compute | LoopCall, loop: str, parameters: Mapping[str, str]) -> tuple[Call, ...]:
    """The calls within the block or model that a statement ran in, of modules that can be classes.

    Those are modules of the user's own, each held by the one before, and holding the parameters
    and the cache that are used.
    """
    if isinstance(item, LoopCall):
        node = next((n for body in item.bodies for n in body.block.nodes if n.loc.calls), None)
        names = [item.loop.path]
    else:
        node = item.node
        remembers = operator_of(node).remembers
        names = [str(node.arg(remembers))] if remembers else []
        names += [parameters[v.name] for v in node.operands if v.name in parameters]
    at = -1 if node is None else _block_call(node, loop)
    if node is None or at < 0:
        return ()
    outer = f"{node.loc.calls[at].path}." if node.loc.calls[at].path else ""
    found: list[Call] = []
    block = outer
    for call in node.loc.calls[at + 1 :]:
        relative = call.path.removeprefix(block)
        holds = all(name.startswith(f"{relative}.") for name in names)
        if call.file and call.path.startswith(outer) and _is_path(call.path) and holds:
            found.append(call)
            outer = f"{call.path}."
    return tuple(found)


def _is_path(path: str) -> bool:
    return all(part.isidentifier() or part.isdigit() for part in path.split("."))


def _crossing(scopes: Sequence[tuple[_Within, ...]], where: Sequence[int]) -> set[_Within]:
    """Calls on both sides of a loop, and of modules that are called several times."""
    sides: dict[_Within, set[int]] = {}
    for calls, side in zip(scopes, where, strict=True):
        for call in calls:
            sides.setdefault(call, set()).add(side)
    times = Counter(call.path for call in sides if isinstance(call, Call))
    return {
        call
        for call, found in sides.items()
        if len(found) > 1 or (isinstance(call, Call) and times[call.path] > 1)
    }


def _steps(
    tree: Outline[Sharded, _Within],
    flat: Sequence[Statement],
    path: str,
    root: _Root,
    define: Define,
    refused: set[_Within],
) -> list[Step]:
    """The statements of a function; notes which of the user's that it calls are `refused`."""
    steps: list[Step] = []
    for part in tree.body:
        if isinstance(part, int):
            steps.append(flat[part])
            continue
        call = part.call
        assert call is not None
        full = root.path(call) if isinstance(call, Call) else path
        inner = tuple(_steps(part, flat, full, root, define, refused))
        function = Function(full, call, part.inputs, inner, part.outputs)
        if isinstance(call, Call):
            steps.append(ModuleCall(function, full.removeprefix(f"{path}.") if path else full))
            continue
        once = len({item.value.name for item in part.inputs}) == len(part.inputs)
        whole = once and len(part.outputs) == call.results and not any(map(_is_more, inner))
        defined = define(function) if whole else None
        if defined is None:
            refused.add(call)
        steps.append(UserCall(defined or function))
    return steps


def _is_more(step: Step) -> bool:
    """Does a statement need more than what the function that it stands in is given?"""
    return isinstance(step, Convert | ModuleCall)
