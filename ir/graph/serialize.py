"""Graphs as plain JSON data, and back to equal graphs.

A value is written out where it is defined (inputs, parameters, node and loop results) and named
where it is read.  Reading executes nothing: ops stay names.  `schema` says what each field may be,
`check` what must fit together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from ...facts.nested import Constant
from ...facts.schema import check
from .check import GraphError, check_graph
from .nodes import (
    Arg,
    Block,
    Call,
    Extent,
    FunctionCall,
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
from .schema import DTYPES, GRAPH

_Numbers: TypeAlias = dict[Call | FunctionCall, int]

# ---- writing -----------------------------------------------------------------------------------


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """Dicts, lists, strings, numbers, bools and None only; finite numbers, so strict JSON."""
    calls: _Numbers = {}
    for node in graph.nodes:
        for call in (*node.loc.calls, *node.loc.functions):
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
                "extents": [e and [e.least, e.most, e.step] for e in i.extents],
            }
            for i in graph.inputs
        ],
        "signature": None if graph.signature is None else _signature(graph.signature),
        "bounds": list(graph.bounds),
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
        "stored": param.stored and _dtype_name(param.stored),
        **({"matrix": True} if param.matrix else {}),
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


def _call(call: Call | FunctionCall) -> dict[str, Any]:
    if isinstance(call, FunctionCall):
        return {
            "function": call.name,
            "path": call.path,
            "number": call.number,
            "site": list(call.site),
            "arguments": list(call.arguments),
            "taken": list(call.taken),
            "results": call.results,
            "file": call.file,
            "line": call.line,
            "targets": list(call.targets),
        }
    return {
        "path": call.path,
        "number": call.number,
        "class_name": call.class_name,
        "arguments": list(call.arguments),
        "file": call.file,
        "line": call.line,
        "targets": list(call.targets),
    }


def _node(node: Node, calls: _Numbers) -> dict[str, Any]:
    loc = node.loc
    return {
        "name": node.name,
        "op": node.op,
        "args": [[name, _arg(arg)] for name, arg in node.args],
        "outputs": [_value(value) for value in node.outputs],
        "loc": [
            loc.file,
            loc.line,
            [calls[call] for call in (*loc.calls, *loc.functions)],
            list(loc.targets),
        ],
    }


def _arg(arg: Arg) -> Any:
    if isinstance(arg, Value):
        return {"value": arg.name}
    if isinstance(arg, torch.dtype):
        return {"dtype": _dtype_name(arg)}
    if isinstance(arg, tuple):
        return [_arg(item) for item in arg]
    return _number(arg) if isinstance(arg, (float, complex)) else arg


def _loop(loop: Loop, calls: _Numbers) -> dict[str, Any]:
    return {
        "loop": loop.name,
        "path": loop.path,
        "blocks": [_block(block, calls) for block in loop.blocks],
        "order": list(loop.order),
        "carried": [value.name for value in loop.carried],
        "invariants": [value.name for value in loop.invariants],
        "outputs": [_value(value) for value in loop.outputs],
    }


def _block(block: Block, calls: _Numbers) -> dict[str, Any]:
    return {
        "class_name": block.class_name,
        "params": [_param(param) for param in block.params],
        "inputs": [_value(value) for value in block.inputs],
        "nodes": [_node(node, calls) for node in block.nodes],
        "outputs": [value.name for value in block.outputs],
    }


# ---- reading -----------------------------------------------------------------------------------


def graph_from_json(data: object) -> Graph:
    """The graph that `graph_to_json` wrote.

    Raises Mismatch for a field that is wrong, GraphError for what does not fit together.
    """
    check(GRAPH, data, "graph")
    graph = _Reader().graph(data)
    check_graph(graph)
    return graph


class _Reader:
    """Makes a graph of data that has been checked; a name that nothing has is a GraphError."""

    def __init__(self) -> None:
        self._names: set[str] = set()  # of all values: each is defined once
        self._calls: tuple[Call | FunctionCall, ...] = ()

    def graph(self, data: Any) -> Graph:
        """The whole graph."""
        scope: dict[str, Value] = {}
        self._calls = tuple(_read_call(call) for call in data["calls"])
        inputs = tuple(self._input(item, scope) for item in data["inputs"])
        params = tuple(self._param(param, scope) for param in data["params"])
        body = tuple(
            self._loop(item, scope) if "loop" in item else self._node(item, scope)
            for item in data["body"]
        )
        outputs = tuple(
            Output(tuple(out["path"]), _known(out["value"], scope)) for out in data["outputs"]
        )
        signature = data["signature"] and _read_signature(data["signature"])
        bounds = tuple(data["bounds"])
        return Graph(data["name"], inputs, params, body, outputs, signature, bounds)

    def _input(self, data: Any, scope: dict[str, Value]) -> Input:
        return Input(
            data["name"],
            self._value(data["value"], scope),
            tuple(data["labels"]),
            tuple(data["path"]),
            tuple(extent and Extent(*extent) for extent in data["extents"]),
        )

    def _value(self, data: Any, scope: dict[str, Value]) -> Value:
        """A definition; it enters the scope."""
        name: str = data["name"]
        if name in self._names:
            raise GraphError(f"two values are called `{name}`")
        self._names.add(name)
        kind = TensorType(tuple(data["shape"]), DTYPES[data["dtype"]])
        scope[name] = Value(name, kind, data["differentiable"])
        return scope[name]

    def _param(self, data: Any, scope: dict[str, Value]) -> Param:
        part = data["part"]
        return Param(
            data["name"],
            self._value(data["value"], scope),
            data["kind"],
            tuple(data["aliases"]),
            _read_data(data["data"]),
            part and Part(part["name"], part["dim"], part["start"]),
            data["stored"] and DTYPES[data["stored"]],
            data.get("matrix", False),
        )

    def _node(self, data: Any, scope: dict[str, Value]) -> Node:
        file, line, within, targets = data["loc"]
        args = tuple((name, _read_arg(arg, scope)) for name, arg in data["args"])
        if any(number >= len(self._calls) for number in within):
            raise GraphError(f"node `{data['name']}` is in a call that is not there")
        known = [self._calls[number] for number in within]
        calls = tuple(call for call in known if isinstance(call, Call))
        functions = tuple(call for call in known if isinstance(call, FunctionCall))
        outputs = tuple(self._value(value, scope) for value in data["outputs"])
        loc = Loc(file, line, calls, tuple(targets), functions)
        return Node(data["name"], data["op"], args, outputs, loc)

    def _loop(self, data: Any, scope: dict[str, Value]) -> Loop:
        carried = tuple(_known(name, scope) for name in data["carried"])
        invariants = tuple(_known(name, scope) for name in data["invariants"])
        blocks = tuple(self._block(block) for block in data["blocks"])
        outputs = tuple(self._value(value, scope) for value in data["outputs"])
        order = tuple(data["order"])
        return Loop(data["loop"], data["path"], blocks, order, carried, invariants, outputs)

    def _block(self, data: Any) -> Block:
        scope: dict[str, Value] = {}
        params = tuple(self._param(param, scope) for param in data["params"])
        inputs = tuple(self._value(value, scope) for value in data["inputs"])
        nodes = tuple(self._node(node, scope) for node in data["nodes"])
        outputs = tuple(_known(name, scope) for name in data["outputs"])
        return Block(data["class_name"], params, inputs, nodes, outputs)


def _known(name: str, scope: Mapping[str, Value]) -> Value:
    if name not in scope:
        raise GraphError(f"`{name}` is read where nothing is called so")
    return scope[name]


def _read_call(data: Any) -> Call | FunctionCall:
    lists = ("arguments", "site", "taken", "targets")
    fields: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in data.items()}
    return FunctionCall(fields.pop("function"), **fields) if "function" in data else Call(**fields)


def _read_signature(data: Any) -> Signature:
    fixed = tuple((tuple(path), _read_constant(value)) for path, value in data["fixed"])
    return Signature(tuple(data["names"]), data["by_position"], fixed)


def _read_constant(data: Any) -> Constant:
    return () if data == [] else float(data["float"]) if isinstance(data, dict) else data


def _read_data(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(map(_read_data, data))
    return _read_number(data) if isinstance(data, dict) else data


def _read_arg(data: Any, scope: Mapping[str, Value]) -> Arg:
    if isinstance(data, list):
        return tuple(_read_arg(item, scope) for item in data)
    if not isinstance(data, dict):
        return data
    if "value" in data:
        return _known(data["value"], scope)
    return DTYPES[data["dtype"]] if "dtype" in data else _read_number(data)


def _read_number(data: Any) -> float | complex:
    """What JSON has no number for; a part of a complex number may be one that it has."""
    if "complex" in data:
        real, imaginary = (
            float(part["float"] if isinstance(part, dict) else part) for part in data["complex"]
        )
        return complex(real, imaginary)
    return float(data["float"])


__all__ = ["graph_from_json", "graph_to_json"]
