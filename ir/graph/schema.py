"""The JSON form of a graph, as `serialize` writes it: what each field may be.

Names of it stand in a generated module, so texts are what a capture writes and nothing else.
"""

from __future__ import annotations

import torch

from ...facts.schema import (
    Either,
    Flag,
    ListOf,
    Named,
    Null,
    Number,
    OneOf,
    Record,
    Row,
    Shape,
    Text,
    Whole,
    nesting,
)
from .names import (
    is_call_path,
    is_class_name,
    is_held,
    is_identifier,
    is_op,
    is_path,
    is_word,
)

DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
KINDS = ("parameter", "buffer", "constant")  # of what `Param` stands for
_DEPTH = 8  # of lists in one another: dims of a constant
_MOST_LAYERS = 2**14

LINE = Text("one line of text without quotes and backslashes", r'[^"\\]*')
WORD = Text("an identifier", r"\w+", is_word)
_DTYPE = OneOf(DTYPES)
_SIZE = Whole(0, 2**62)
_INDEX = Whole(0, 2**31)
_INTEGER = Whole(-(2**63), 2**64 - 1)
_NUMBER = Number()
_SPECIAL = Record({"float": OneOf(("inf", "-inf", "nan"))})
_REAL = Either(_NUMBER, _SPECIAL)
_COMPLEX = Record({"complex": Row(_REAL, _REAL)})
_PATH = ListOf(Either(LINE, _INTEGER), most=64)  # of keys and indices
_CONSTANT = Either(Null(), Flag(), _INTEGER, _NUMBER, LINE, _SPECIAL, ListOf(Null(), most=0))

_VALUE = Named(
    "value",
    Record({"name": LINE, "shape": ListOf(_SIZE, 16), "dtype": _DTYPE, "differentiable": Flag()}),
)
_CALL = Record(
    {
        "path": Text("names with dots between", "", is_call_path),
        "number": _INDEX,
        "class_name": Text("the name of a class", "", is_class_name),
        "arguments": ListOf(WORD),
        "file": LINE,
        "line": _INDEX,
        "targets": ListOf(LINE),
    }
)
_FUNCTION_CALL = Record(
    {
        "function": Text("an identifier", r"\w+", is_identifier),
        "path": Text("names with dots between", "", is_call_path),
        "number": _INDEX,
        "site": ListOf(_INDEX, 64),
        "arguments": ListOf(WORD),
        "taken": ListOf(WORD),
        "results": _INDEX,
        "file": LINE,
        "line": _INDEX,
        "targets": ListOf(LINE),
    }
)
_EXTENT = Row(Whole(1, 2**62), _SIZE, Whole(1, 2**62))
_INPUT = Record(
    {
        "name": WORD,
        "value": _VALUE,
        "labels": ListOf(LINE, 16),
        "path": _PATH,
        "extents": ListOf(Either(Null(), _EXTENT), 16),
    }
)
_SIGNATURE = Record(
    {"names": ListOf(WORD), "by_position": _INDEX, "fixed": ListOf(Row(_PATH, _CONSTANT))}
)
_HELD = Text("names with dots between", "", is_held)
_PART = Record({"name": _HELD, "dim": _INDEX, "start": _SIZE})


def _numbers(inner: Shape | None) -> Shape:
    lists = () if inner is None else (ListOf(inner),)
    return Either(Null(), Flag(), _INTEGER, _NUMBER, _SPECIAL, _COMPLEX, *lists)


_PARAM = Named(
    "param",
    Record(
        {
            "name": _HELD,
            "value": _VALUE,
            "kind": OneOf(KINDS),
            "aliases": ListOf(LINE),
            "data": nesting("data", _numbers(None), _numbers, _DEPTH),
            "part": Either(Null(), _PART),
            "stored": Either(Null(), _DTYPE),
        },
        optional={"matrix": Flag()},
    ),
)


def _arguments(inner: Shape | None) -> Shape:
    lists = () if inner is None else (ListOf(inner),)
    value, dtype = Record({"value": LINE}), Record({"dtype": _DTYPE})
    plain = (Null(), Flag(), _INTEGER, _NUMBER, LINE)
    return Either(*plain, value, dtype, _SPECIAL, _COMPLEX, *lists)


_NODE = Named(
    "node",
    Record(
        {
            "name": LINE,
            "op": Text("a full name, as `aten.add.Tensor`", "", is_op),
            "args": ListOf(Row(WORD, nesting("argument", _arguments(None), _arguments, _DEPTH))),
            "outputs": ListOf(_VALUE),
            "loc": Row(LINE, _INDEX, ListOf(_INDEX), ListOf(LINE)),
        }
    ),
)
_BLOCK = Record(
    {
        "class_name": Text("the name of a class", "", is_class_name),
        "params": ListOf(_PARAM),
        "inputs": ListOf(_VALUE),
        "nodes": ListOf(_NODE),
        "outputs": ListOf(LINE),
    }
)
_LOOP = Record(
    {
        "loop": LINE,
        "path": Text("identifiers and numbers with dots between", "", is_path),
        "blocks": ListOf(_BLOCK),
        "order": ListOf(_INDEX, _MOST_LAYERS),
        "carried": ListOf(LINE),
        "invariants": ListOf(LINE),
        "outputs": ListOf(_VALUE),
    }
)
GRAPH = Named(
    "graph",
    Record(
        {
            "name": LINE,
            "calls": ListOf(Either(_FUNCTION_CALL, _CALL)),
            "inputs": ListOf(_INPUT),
            "signature": Either(Null(), _SIGNATURE),
            "bounds": ListOf(Text("one line of text"), 64),
            "params": ListOf(_PARAM),
            "body": ListOf(Either(_LOOP, _NODE)),
            "outputs": ListOf(Record({"path": _PATH, "value": LINE})),
        }
    ),
)

__all__ = ["DTYPES", "GRAPH", "LINE", "WORD"]
