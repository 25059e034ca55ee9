"""Graphs as plain JSON data, and back to equal graphs.

A value is written out where it is defined (inputs, parameters, node and loop results) and named
where it is read.  Reading executes nothing: ops stay names, and every field is checked; a mistake
is a ValueError that says which field it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ...facts.nested import Constant, Path
from .nodes import (
    Arg,
    Block,
    Call,
    Graph,
    Input,
    Loc,
    Loop,
    Node,
    Output,
    Param,
    Part,
    Signature,
    TensorType,
    Value,
)

_T = TypeVar("_T")

_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_KINDS = ("parameter", "buffer", "constant")

# ---- writing -----------------------------------------------------------------------------------


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """Dicts, lists, strings, numbers, bools and None only; finite numbers, so strict JSON."""
    calls: dict[Call, int] = {}
    for node in graph.nodes:
        for call in node.loc.calls:
            calls.setdefault(call, len(calls))
    return {
        "name": graph.name,
        "calls": [_call(call) for call in calls],
        "inputs": [
            {
                "name": i.name,
                "value": _value(i.value),
                "labels": list(i.labels),
                "path": list(i.path),
            }
            for i in graph.inputs
        ],
        "signature": None if graph.signature is None else _signature(graph.signature),
        "params": [_param(param) for param in graph.params],
        "body": [_node(i, calls) if isinstance(i, Node) else _loop(i, calls) for i in graph.body],
        "outputs": [{"path": list(o.path), "value": o.value.name} for o in graph.outputs],
    }


def _signature(signature: Signature) -> dict[str, Any]:
    return {
        "names": list(signature.names),
        "by_position": signature.by_position,
        "fixed": [[list(path), _data(value)] for path, value in signature.fixed],
    }


def _value(value: Value) -> dict[str, Any]:
    return {
        "name": value.name,
        "shape": list(value.type.shape),
        "dtype": _dtype_name(value.type.dtype),
        "differentiable": value.differentiable,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _param(param: Param) -> dict[str, Any]:
    return {
        "name": param.name,
        "value": _value(param.value),
        "kind": param.kind,
        "aliases": list(param.aliases),
        "data": _data(param.data),
        "part": None if param.part is None else _part(param.part),
    }


def _part(part: Part) -> dict[str, Any]:
    return {"name": part.name, "dim": part.dim, "start": part.start}


def _data(item: Any) -> Any:
    if isinstance(item, tuple):
        return [_data(part) for part in item]
    return _number(item) if isinstance(item, (float, complex)) else item


def _number(number: float | complex) -> Any:
    """JSON has no complex numbers, no infinities and no NaN."""
    if isinstance(number, complex):
        return {"complex": [_number(number.real), _number(number.imag)]}
    return number if math.isfinite(number) else {"float": str(number)}


def _call(call: Call) -> dict[str, Any]:
    return {
        "path": call.path,
        "number": call.number,
        "class_name": call.class_name,
        "arguments": list(call.arguments),
        "file": call.file,
        "line": call.line,
        "targets": list(call.targets),
    }


def _node(node: Node, calls: Mapping[Call, int]) -> dict[str, Any]:
    loc = node.loc
    return {
        "name": node.name,
        "op": node.op,
        "args": [[name, _arg(arg)] for name, arg in node.args],
        "outputs": [_value(value) for value in node.outputs],
        "loc": [loc.file, loc.line, [calls[call] for call in loc.calls], list(loc.targets)],
    }


def _arg(arg: Arg) -> Any:
    if isinstance(arg, Value):
        return {"value": arg.name}
    if isinstance(arg, torch.dtype):
        return {"dtype": _dtype_name(arg)}
    if isinstance(arg, tuple):
        return [_arg(item) for item in arg]
    return _number(arg) if isinstance(arg, (float, complex)) else arg


def _loop(loop: Loop, calls: Mapping[Call, int]) -> dict[str, Any]:
    return {
        "loop": loop.name,
        "path": loop.path,
        "blocks": [_block(block, calls) for block in loop.blocks],
        "order": list(loop.order),
        "carried": [value.name for value in loop.carried],
        "invariants": [value.name for value in loop.invariants],
        "outputs": [_value(value) for value in loop.outputs],
    }


def _block(block: Block, calls: Mapping[Call, int]) -> dict[str, Any]:
    return {
        "class_name": block.class_name,
        "params": [_param(param) for param in block.params],
        "inputs": [_value(value) for value in block.inputs],
        "nodes": [_node(node, calls) for node in block.nodes],
        "outputs": [value.name for value in block.outputs],
    }


# ---- reading -----------------------------------------------------------------------------------


def graph_from_json(data: Any) -> Graph:
    """The graph that `graph_to_json` wrote.  Raises ValueError naming the field that is wrong."""
    field = _Field(data, "graph")
    scope: dict[str, Value] = {}
    inputs = tuple(_read_input(item, scope) for item in field["inputs"].items())
    params = tuple(_read_param(item, scope) for item in field["params"].items())
    calls = tuple(_read_call(item) for item in field["calls"].items())
    body = tuple(_read_item(item, scope, calls) for item in field["body"].items())
    outputs = tuple(
        Output(
            _read_path(item["path"]),
            item["value"].read_from(scope),
        )
        for item in field["outputs"].items()
    )
    signature = None
    if field["signature"].data is not None:
        signature = _read_signature(field["signature"])
    return Graph(field["name"].text(), inputs, params, body, outputs, signature)


def _read_signature(field: _Field) -> Signature:
    fixed: list[tuple[Path, Constant]] = []
    for pair in field["fixed"].items():
        parts = pair.items()
        if len(parts) != 2:
            raise pair.wrong("a pair [path, value]")
        fixed.append((_read_path(parts[0]), _read_constant(parts[1])))
    names = tuple(name.word() for name in field["names"].items())
    return Signature(names, field["by_position"].of(int), tuple(fixed))


def _read_path(field: _Field) -> Path:
    return tuple(_read_key(key) for key in field.items())


def _read_key(field: _Field) -> str | int:
    return field.text() if isinstance(field.data, str) else field.of(int)


def _read_constant(field: _Field) -> Constant:
    if field.data == []:
        return ()
    if isinstance(field.data, str):
        return field.text()
    return _read_special(field) if isinstance(field.data, dict) else _read_number(field)


class _Field:
    """A piece of JSON and where it stands, for messages: `graph.body[3].op`."""

    def __init__(self, data: Any, path: str) -> None:
        self.data = data
        self.path = path

    def wrong(self, expected: str) -> ValueError:
        shown = repr(self.data)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ValueError(f"{self.path}: expected {expected}, got {shown}")

    def __getitem__(self, key: str) -> _Field:
        if not isinstance(self.data, Mapping):
            raise self.wrong("an object")
        if key not in self.data:
            raise ValueError(f"{self.path}: the field `{key}` is missing")
        return _Field(self.data[key], f"{self.path}.{key}")

    def items(self) -> list[_Field]:
        if not isinstance(self.data, list):
            raise self.wrong("a list")
        return [_Field(item, f"{self.path}[{i}]") for i, item in enumerate(self.data)]

    def of(self, kind: type[_T]) -> _T:
        if type(self.data) is not kind:
            raise self.wrong(f"a value of type {kind.__name__}")
        return self.data

    def one_of(self, *kinds: type[Any]) -> Any:
        if type(self.data) not in kinds:
            raise self.wrong("a value of type " + " or ".join(kind.__name__ for kind in kinds))
        return self.data

    def word(self) -> str:
        """A name that stands as code in a generated module: letters, digits, `_` and dots."""
        name = self.of(str)
        if not re.fullmatch(r"[\w.]*", name):
            raise self.wrong("a name of letters, digits, `_` and dots")
        return name

    def text(self) -> str:
        """Text that stands in a string or a comment of a generated module, and cannot leave it."""
        text = self.of(str)
        if not text.isprintable() or '"' in text or "\\" in text:
            raise self.wrong("one line of text without quotes and backslashes")
        return text

    def many(self, kind: type[_T]) -> tuple[_T, ...]:
        return tuple(item.of(kind) for item in self.items())

    def dtype(self) -> torch.dtype:
        name = self.of(str)
        if name not in _DTYPES:
            raise self.wrong("the name of a torch dtype")
        return _DTYPES[name]

    def read_from(self, scope: Mapping[str, Value]) -> Value:
        name = self.of(str)
        if name not in scope:
            raise self.wrong("the name of a value defined before")
        return scope[name]


def _read_value(field: _Field, scope: dict[str, Value]) -> Value:
    """A definition; it enters the scope."""
    name = field["name"].text()
    if name in scope:
        raise field["name"].wrong("a name that is not taken yet")
    shape = field["shape"].many(int)
    if any(size < 0 for size in shape):
        raise field["shape"].wrong("sizes of at least 0")
    value = Value(name, TensorType(shape, field["dtype"].dtype()), field["differentiable"].of(bool))
    scope[name] = value
    return value


def _read_input(field: _Field, scope: dict[str, Value]) -> Input:
    value = _read_value(field["value"], scope)
    labels = field["labels"].many(str)
    return Input(field["name"].word(), value, labels, _read_path(field["path"]))


def _read_param(field: _Field, scope: dict[str, Value]) -> Param:
    kind = field["kind"].of(str)
    if kind not in _KINDS:
        raise field["kind"].wrong(f"one of {', '.join(_KINDS)}")
    value = _read_value(field["value"], scope)
    return Param(
        field["name"].text(),
        value,
        kind,
        tuple(alias.text() for alias in field["aliases"].items()),
        _read_data(field["data"]),
        _read_part(field["part"], value) if field["part"].data is not None else None,
    )


def _read_part(field: _Field, value: Value) -> Part:
    dim, start = field["dim"].of(int), field["start"].of(int)
    if not 0 <= dim < len(value.type.shape):
        raise field["dim"].wrong(f"one of the {len(value.type.shape)} dims of `{value.name}`")
    if start < 0:
        raise field["start"].wrong("a number from 0")
    return Part(field["name"].text(), dim, start)


def _read_data(field: _Field) -> Any:
    if isinstance(field.data, list):
        return tuple(_read_data(item) for item in field.items())
    if isinstance(field.data, dict):
        return _read_complex(field) if "complex" in field.data else _read_special(field)
    return _read_number(field)


def _read_number(field: _Field) -> bool | int | float | None:
    return field.one_of(type(None), bool, int, float)


def _read_complex(field: _Field) -> complex:
    parts = field["complex"].items()
    if len(parts) != 2:
        raise field["complex"].wrong("a real and an imaginary part")
    real, imaginary = (
        _read_special(part) if isinstance(part.data, dict) else part.of(float) for part in parts
    )
    return complex(real, imaginary)


def _read_special(field: _Field) -> float:
    """inf, -inf or nan."""
    name = field["float"].of(str)
    if name not in ("inf", "-inf", "nan"):
        raise field["float"].wrong("inf, -inf or nan")
    return float(name)


def _read_call(field: _Field) -> Call:
    return Call(
        field["path"].text(),
        field["number"].of(int),
        field["class_name"].word(),
        tuple(name.word() for name in field["arguments"].items()),
        field["file"].text(),
        field["line"].of(int),
        tuple(target.text() for target in field["targets"].items()),
    )


def _read_item(field: _Field, scope: dict[str, Value], calls: Sequence[Call]) -> Node | Loop:
    is_loop = isinstance(field.data, Mapping) and "loop" in field.data
    return _read_loop(field, scope, calls) if is_loop else _read_node(field, scope, calls)


def _read_node(field: _Field, scope: dict[str, Value], calls: Sequence[Call]) -> Node:
    args: list[tuple[str, Arg]] = []
    for pair in field["args"].items():
        parts = pair.items()
        if len(parts) != 2:
            raise pair.wrong("a pair [name, argument]")
        name = parts[0].word()
        args.append((name, _read_arg(_Field(parts[1].data, f"{pair.path}.{name}"), scope)))
    loc = field["loc"].items()
    if len(loc) != 4:
        raise field["loc"].wrong("[file, line, calls, targets]")
    file, line, within, targets = loc
    if any(not 0 <= number < len(calls) for number in within.many(int)):
        raise within.wrong(f"numbers of the {len(calls)} calls, from 0")
    return Node(
        field["name"].of(str),
        field["op"].word(),
        tuple(args),
        tuple(_read_value(item, scope) for item in field["outputs"].items()),
        Loc(
            file.text(),
            line.of(int),
            tuple(calls[number] for number in within.many(int)),
            tuple(target.text() for target in targets.items()),
        ),
    )


def _read_arg(field: _Field, scope: Mapping[str, Value]) -> Arg:
    if isinstance(field.data, list):
        return tuple(_read_arg(item, scope) for item in field.items())
    if isinstance(field.data, dict):
        readers: dict[str, Callable[[], Arg]] = {
            "value": lambda: field["value"].read_from(scope),
            "dtype": lambda: field["dtype"].dtype(),
            "float": lambda: _read_special(field),
            "complex": lambda: _read_complex(field),
        }
        keys = list(field.data)
        if len(keys) != 1 or keys[0] not in readers:
            raise field.wrong(f"an object with one key: {', '.join(readers)}")
        return readers[keys[0]]()
    return field.one_of(type(None), bool, int, float, str)


def _read_loop(field: _Field, scope: dict[str, Value], calls: Sequence[Call]) -> Loop:
    blocks = tuple(_read_block(item, calls) for item in field["blocks"].items())
    order = field["order"].many(int)
    if any(not 0 <= kind < len(blocks) for kind in order):
        raise field["order"].wrong(f"numbers of the {len(blocks)} blocks, from 0")
    carried = tuple(item.read_from(scope) for item in field["carried"].items())
    invariants = tuple(item.read_from(scope) for item in field["invariants"].items())
    for block, item in zip(blocks, field["blocks"].items(), strict=True):
        if len(block.inputs) != len(carried) + len(invariants):
            raise item["inputs"].wrong(f"{len(carried) + len(invariants)} inputs")
        if len(block.outputs) != len(carried):
            raise item["outputs"].wrong(f"{len(carried)} outputs")
    outputs = tuple(_read_value(item, scope) for item in field["outputs"].items())
    name, path = field["loop"].text(), field["path"].word()
    return Loop(name, path, blocks, order, carried, invariants, outputs)


def _read_block(field: _Field, calls: Sequence[Call]) -> Block:
    scope: dict[str, Value] = {}
    params = tuple(_read_param(item, scope) for item in field["params"].items())
    inputs = tuple(_read_value(item, scope) for item in field["inputs"].items())
    nodes = tuple(_read_node(item, scope, calls) for item in field["nodes"].items())
    outputs = tuple(item.read_from(scope) for item in field["outputs"].items())
    return Block(field["class_name"].word(), params, inputs, nodes, outputs)


__all__ = ["graph_from_json", "graph_to_json"]
