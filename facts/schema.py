"""What JSON data of ours may be: declared once, checked by that, and published as JSON Schema.

A `Shape` is a kind of data.  `check` raises a `Mismatch`, which says where in the data what stands
and what would do; `published` gives the same declaration to everyone else.

>>> pair = Record({"name": Text("a word", r"[a-z]+"), "size": Whole(1, 8)})
>>> check(pair, {"name": "tp", "size": 9}, "mesh")
Traceback (most recent call last):
    ...
shardwright.facts.schema.Mismatch: `mesh.size`: expected a whole number from 1 to 8, got 9
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias, cast

FLOAT_MAX = sys.float_info.max

_Json: TypeAlias = dict[str, Any]
_Defs: TypeAlias = dict[str, _Json | None]  # None while it is being made


class Mismatch(ValueError):
    """Data that is not of its shape; containers on the way up add where it stands."""

    def __init__(self, wanted: str, got: object) -> None:
        shown = repr(got)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        self._says = f"expected {wanted}, got {shown}" if wanted else str(got)
        self._where = ""

    def within(self, key: str | int) -> Mismatch:
        """The same, at `key` of a container."""
        step = f"[{key}]" if isinstance(key, int) else f".{key}"
        self._where = f"{step}{self._where}"
        return self

    def __str__(self) -> str:
        return f"`{self._where.removeprefix('.')}`: {self._says}"


def check(shape: Shape, data: object, name: str) -> None:
    """Raises Mismatch where `data`, which messages call `name`, is not of that shape."""
    try:
        shape.check(data)
    except Mismatch as mismatch:
        raise mismatch.within(name) from None


def published(shape: Shape, title: str) -> _Json:
    """The JSON Schema (2020-12) of `shape`."""
    defs: _Defs = {}
    top = shape.schema(defs)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **top,
        "$defs": defs,
    }


class Shape:
    """A kind of JSON data: `wanted` is what messages call it."""

    wanted = ""

    def accepts(self, data: object) -> bool:
        """Is `data` of the right JSON type?  Tells the shapes of an `Either` apart."""
        raise NotImplementedError

    def check(self, data: object) -> None:
        """Raises Mismatch for data of another shape."""
        if not self.accepts(data):
            raise Mismatch(self.wanted, data)

    def schema(self, defs: _Defs) -> _Json:
        """As JSON Schema; what has a name of its own is put into `defs`."""
        raise NotImplementedError


class Text(Shape):
    """One line that prints, of at most 4096 characters, that matches `pattern` as a whole.

    `good` says what a pattern cannot.
    """

    def __init__(
        self, wanted: str, pattern: str = "", good: Callable[[str], bool] = str.isprintable
    ) -> None:
        self.wanted, self._pattern, self._good = wanted, pattern, good

    def accepts(self, data: object) -> bool:
        return isinstance(data, str)

    def check(self, data: object) -> None:
        if not isinstance(data, str) or not self._fits(data):
            raise Mismatch(self.wanted, data)

    def _fits(self, text: str) -> bool:
        printed = len(text) <= 4096 and text.isprintable()
        return printed and bool(re.fullmatch(self._pattern or ".*", text)) and self._good(text)

    def schema(self, defs: _Defs) -> _Json:
        pattern = {"pattern": f"^(?:{self._pattern})$"} if self._pattern else {}
        return {"type": "string", "description": self.wanted, "maxLength": 4096, **pattern}


class OneOf(Shape):
    """One of some texts, as they are known when data is checked."""

    def __init__(self, values: Collection[str]) -> None:
        self._values = values

    def accepts(self, data: object) -> bool:
        return isinstance(data, str)

    def check(self, data: object) -> None:
        if not isinstance(data, str) or data not in self._values:
            raise Mismatch(f"one of {', '.join(self._values)}", data)

    def schema(self, defs: _Defs) -> _Json:
        return {"enum": list(self._values)}


class Whole(Shape):
    """A whole number in a range."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self.wanted = f"a whole number from {least} to {most}"

    def accepts(self, data: object) -> bool:
        return type(data) is int

    def check(self, data: object) -> None:
        if type(data) is not int or not self._least <= data <= self._most:
            raise Mismatch(self.wanted, data)

    def schema(self, defs: _Defs) -> _Json:
        return {"type": "integer", "minimum": self._least, "maximum": self._most}


class Number(Shape):
    """A finite number in a range, whole or not."""

    def __init__(self, least: float = -FLOAT_MAX, most: float = FLOAT_MAX) -> None:
        self._least, self._most = least, most
        self.wanted = f"a number from {least:g} to {most:g}"

    def accepts(self, data: object) -> bool:
        return type(data) in (int, float)

    def check(self, data: object) -> None:
        number = cast(float, data)
        if not self.accepts(data) or not self._least <= number <= self._most:
            raise Mismatch(self.wanted, data)

    def schema(self, defs: _Defs) -> _Json:
        return {"type": "number", "minimum": self._least, "maximum": self._most}


class Flag(Shape):
    """true or false."""

    wanted = "true or false"

    def accepts(self, data: object) -> bool:
        return isinstance(data, bool)

    def schema(self, defs: _Defs) -> _Json:
        return {"type": "boolean"}


class Null(Shape):
    """null."""

    wanted = "null"

    def accepts(self, data: object) -> bool:
        return data is None

    def schema(self, defs: _Defs) -> _Json:
        return {"type": "null"}


class ListOf(Shape):
    """A list of items of one shape."""

    wanted = "a list"

    def __init__(self, item: Shape, most: int = 2**26) -> None:
        self._item, self._most = item, most

    def accepts(self, data: object) -> bool:
        return isinstance(data, list)

    def check(self, data: object) -> None:
        items = _listed(self, data)
        if len(items) > self._most:
            raise Mismatch(f"at most {self._most} items", f"{len(items)} items")
        for index, item in enumerate(items):
            try:
                self._item.check(item)
            except Mismatch as mismatch:
                raise mismatch.within(index) from None

    def schema(self, defs: _Defs) -> _Json:
        return {"type": "array", "items": self._item.schema(defs), "maxItems": self._most}


class Row(Shape):
    """A list with one item of each of some shapes."""

    def __init__(self, *items: Shape) -> None:
        self._items = items
        self.wanted = f"a list of {len(items)} items"

    def accepts(self, data: object) -> bool:
        return isinstance(data, list)

    def check(self, data: object) -> None:
        items = _listed(self, data)
        if len(items) != len(self._items):
            raise Mismatch(self.wanted, data)
        for index, (shape, item) in enumerate(zip(self._items, items, strict=True)):
            try:
                shape.check(item)
            except Mismatch as mismatch:
                raise mismatch.within(index) from None

    def schema(self, defs: _Defs) -> _Json:
        items = [shape.schema(defs) for shape in self._items]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}


class Table(Shape):
    """An object from any names to values of one shape."""

    wanted = "an object"

    def __init__(self, name: Shape, value: Shape) -> None:
        self._name, self._value = name, value

    def accepts(self, data: object) -> bool:
        return isinstance(data, dict)

    def check(self, data: object) -> None:
        for name, value in _object(self, data).items():
            self._name.check(name)
            try:
                self._value.check(value)
            except Mismatch as mismatch:
                raise mismatch.within(name) from None

    def schema(self, defs: _Defs) -> _Json:
        named = self._name.schema(defs)
        value = self._value.schema(defs)
        return {"type": "object", "propertyNames": named, "additionalProperties": value}


class Record(Shape):
    """An object with these fields and no others; those in `optional` may be absent.

    Its first field tells it from other records of an `Either`.
    """

    def __init__(
        self, fields: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None
    ) -> None:
        self._fields, self._optional = fields, optional or {}
        self._all = {**fields, **self._optional}
        self.wanted = f"an object with `{next(iter(fields))}`"

    def accepts(self, data: object) -> bool:
        return isinstance(data, dict) and next(iter(self._fields)) in data

    def check(self, data: object) -> None:
        given = _object(self, data)
        for name in self._fields:
            if name not in given:
                raise Mismatch("", f"there is no field `{name}`")
        for name, value in given.items():
            if name not in self._all:
                raise Mismatch("", f"there is a field {name[:40]!r}, which is not known")
            try:
                self._all[name].check(value)
            except Mismatch as mismatch:
                raise mismatch.within(name) from None

    def schema(self, defs: _Defs) -> _Json:
        fields = {name: shape.schema(defs) for name, shape in self._all.items()}
        return {
            "type": "object",
            "properties": fields,
            "required": list(self._fields),
            "additionalProperties": False,
        }


class Either(Shape):
    """Data of the first of some shapes that accepts it."""

    def __init__(self, *shapes: Shape) -> None:
        self._shapes = shapes
        self.wanted = " or ".join(dict.fromkeys(shape.wanted for shape in shapes))

    def accepts(self, data: object) -> bool:
        return any(shape.accepts(data) for shape in self._shapes)

    def check(self, data: object) -> None:
        for shape in self._shapes:
            if shape.accepts(data):
                shape.check(data)
                return
        raise Mismatch(self.wanted, data)

    def schema(self, defs: _Defs) -> _Json:
        return {"anyOf": [shape.schema(defs) for shape in self._shapes]}


class Named(Shape):
    """A shape that the published schema defines once, under a name."""

    def __init__(self, name: str, shape: Shape) -> None:
        self._name, self._shape, self.wanted = name, shape, shape.wanted

    def accepts(self, data: object) -> bool:
        return self._shape.accepts(data)

    def check(self, data: object) -> None:
        self._shape.check(data)

    def schema(self, defs: _Defs) -> _Json:
        if self._name not in defs:
            defs[self._name] = None  # so that it may be inside of itself
            defs[self._name] = self._shape.schema(defs)
        return {"$ref": f"#/$defs/{self._name}"}


def nesting(name: str, plain: Shape, deeper: Callable[[Shape], Shape], depth: int) -> Shape:
    """`plain`, or what `deeper` makes around the same again, to a depth.

    >>> lists = nesting("lists", Flag(), lambda inner: Either(Flag(), ListOf(inner)), 2)
    >>> check(lists, [[True]], "lists")
    >>> check(lists, [[[True]]], "lists")
    Traceback (most recent call last):
        ...
    shardwright.facts.schema.Mismatch: `lists[0][0]`: expected true or false, got [True]
    """
    shape = plain
    for _ in range(depth):
        shape = Named(name, deeper(shape))
    return shape


def _listed(shape: Shape, data: object) -> Sequence[object]:
    if not isinstance(data, list):
        raise Mismatch(shape.wanted, data)
    return cast("list[object]", data)


def _object(shape: Shape, data: object) -> dict[str, object]:
    if not isinstance(data, dict):
        raise Mismatch(shape.wanted, data)
    return cast("dict[str, object]", data)


__all__ = [
    "Either", "Flag", "ListOf", "Mismatch", "Named", "Null", "Number", "OneOf", "Record", "Row",
    "Shape", "Table", "Text", "Whole", "check", "nesting", "published",
]  # fmt: skip
