"""What in a graph must fit together, wherever it is from; `schema` says what each field may be."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import cast

from ...facts.nested import Constant, Path, spelled
from .names import is_dotted, is_place
from .nodes import Block, Graph, Loop, Node, Param, Value

_MOST_BYTES = 2**62  # of one tensor


class GraphError(ValueError):
    """A graph that no capture makes; the message says what does not fit."""


def check_graph(graph: Graph) -> None:
    """Raises GraphError where names, references, and the shapes of what is passed on disagree."""
    _distinct("nodes", (node.name for node in graph.nodes))
    _distinct("inputs", (item.name for item in graph.inputs))
    _distinct("outputs", (str(item.path) for item in graph.outputs))
    _check_signature(graph)
    for item in graph.inputs:
        _check_size(item.value)
        _check(
            len(item.labels) in (0, len(item.value.type.shape)),
            f"input `{item.name}` has {len(item.value.type.shape)} dims and other labels",
        )
        _check(
            len(item.extents) in (0, len(item.value.type.shape)),
            f"input `{item.name}` has {len(item.value.type.shape)} dims and other extents",
        )
    _check_params(graph.params)
    for item in graph.body:
        if isinstance(item, Node):
            _check_node(item)
        else:
            _check_loop(item)


def _check_signature(graph: Graph) -> None:
    """Arguments, and the paths in them."""
    own = tuple(item.name for item in graph.inputs)
    names = own if graph.signature is None else graph.signature.names
    fixed: tuple[tuple[Path, Constant], ...] = ()
    if graph.signature is not None:
        fixed = graph.signature.fixed
        _check(graph.signature.by_position <= len(names), "`by_position` is more than all names")
    _distinct("arguments", names)
    paths = [*(item.path or (item.name,) for item in graph.inputs), *(path for path, _ in fixed)]
    fits = all(paths) and {path[0] for path in paths} == set(names)
    _check(fits, "paths of inputs are not of the arguments")
    ordered = sorted(paths, key=lambda path: [(type(key).__name__, key) for key in path])
    for path, after in pairwise(ordered):  # where one begins others, it stands right before them
        within = after[: len(path)] == path
        _check(not within, f"input `{spelled(path)}` is one tensor or value, and holds others")


def _check_params(params: Iterable[Param]) -> None:
    params = tuple(params)
    _distinct("parameters", (param.name for param in params))
    for param in params:
        _check_size(param.value)
        shape, part = param.value.type.shape, param.part
        _check(part is None or part.dim < len(shape), f"`{param.name}` is a part along no dim")
        cast = param.stored is None or (param.kind == "parameter" and _is_real(param))
        _check(cast, f"`{param.name}` is stored in another dtype, and is no real parameter")
        held = (param.kind == "constant") == (param.data is not None)
        held = held and (param.data is None or _is_of_shape(param.data, shape))
        _check(held, f"the data of `{param.name}` is not of shape {list(shape)}")


def _check_node(node: Node) -> None:
    _distinct(f"arguments of `{node.name}`", (name for name, _ in node.args))
    _check(bool(node.outputs), f"node `{node.name}` has no result")
    for value in node.outputs:
        _check_size(value)
    for name, arg in node.args:
        if name == "defined_in":
            good = isinstance(arg, str) and is_place(arg)
            _check(good, f"`{arg}` of `{node.op}` must be a module, or the path of a .py file")
        if name == "function":
            good = isinstance(arg, str) and is_dotted(arg)
            _check(good, f"`{arg}` of `{node.op}` must be the name of a class")


def _check_loop(loop: Loop) -> None:
    taken = _types((*loop.carried, *loop.invariants))
    carried = _types(loop.carried)
    _check(bool(loop.blocks and loop.order), f"loop `{loop.name}` has no layers")
    known = set(loop.order) == set(range(len(loop.blocks)))
    _check(known, f"the order of loop `{loop.name}` is not of its {len(loop.blocks)} blocks")
    _check(_types(loop.outputs) == carried, f"loop `{loop.name}` gives other values than it takes")
    for block in loop.blocks:
        _check_block(block)
        name = f"a block of loop `{loop.name}`"
        _check(_types(block.inputs) == taken, f"{name} does not take what the loop gives to it")
        _check(_types(block.outputs) == carried, f"{name} gives other values than it takes")


def _check_block(block: Block) -> None:
    _check_params(block.params)
    for node in block.nodes:
        _check_node(node)


def _types(values: Iterable[Value]) -> list[object]:
    return [value.type for value in values]


def _is_real(param: Param) -> bool:
    stored = param.stored
    used = param.value.type.dtype
    return stored is not None and stored.is_floating_point and used.is_floating_point


def _is_of_shape(data: object, shape: tuple[int, ...]) -> bool:
    if not shape:
        return not isinstance(data, tuple)
    rows = cast("tuple[object, ...]", data)
    fits = isinstance(data, tuple) and len(rows) == shape[0]
    return fits and all(_is_of_shape(row, shape[1:]) for row in rows)


def _check_size(value: Value) -> None:
    _check(value.type.bytes <= _MOST_BYTES, f"`{value.name}` has more bytes than can be counted")


def _distinct(what: str, names: Iterable[str]) -> None:
    names = list(names)
    _check(len(set(names)) == len(names), f"two {what} have one name")


def _check(good: bool, wrong: str) -> None:
    if not good:
        raise GraphError(wrong)


__all__ = ["GraphError", "check_graph"]
