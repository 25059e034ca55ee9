"""What of Python outlasts a forward pass and can be reached from a model's own code.

Beside attributes of modules these are global variables, cells of closures, default arguments,
attributes of classes, and of objects of the user's own.  Only names that the code of the model's
classes uses are looked at, and of libraries such as torch none.
"""

from __future__ import annotations

import argparse
import dis
import functools
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, cast

import numpy
from torch import Tensor, nn

from ...compat.torch import forward_hooks
from .location import place

_OF_MODULES = frozenset(vars(nn.Module())) | {"forward"}
_LIBRARIES = sys.stdlib_module_names | {"torch", "transformers", "numpy", "shardwright"}
_BAGS = (SimpleNamespace, argparse.Namespace, threading.local)
_LEAVES = (int, float, complex, str, bytes, Tensor, type(None))
_CLOCKS = frozenset({"time", "datetime", "secrets", "uuid"})


@dataclass(frozen=True, slots=True)
class Holder:
    """Something with named values: of `space` all but `_OF_MODULES`, or those of `names`.

    `title` has the name in place of `{}`; `codes` are those that may change it, the likeliest
    first.
    """

    title: str
    space: MutableMapping[str, Any]
    names: frozenset[str] | None
    codes: tuple[CodeType, ...]

    def held(self) -> dict[str, Any]:
        """The values now."""
        if self.names is not None:
            return {name: self.space[name] for name in self.names if name in self.space}
        return {name: value for name, value in self.space.items() if name not in _OF_MODULES}

    def told(self, name: str) -> str:
        """`COUNT` (models/gpt.py:12): the name and where it is changed, or else used."""
        shown = f"`{self.title.format(name)}`"
        for operation in ("STORE_", "LOAD_"):
            for code in self.codes:
                line = _line(code, name, operation)
                if line:
                    return f"{shown} ({place(code.co_filename, line)})"
        return shown


def _line(code: CodeType, name: str, operation: str) -> int:
    """Where `code` does that with the name; 0 if it does not."""
    line = 0
    for step in dis.get_instructions(code):
        line = step.starts_line or line
        if step.argval == name and step.opname.startswith(operation):
            return line
    return 0


class _Attributes(MutableMapping[str, Any]):
    """Attributes of a class, or those of an object that stand in slots: what `names` gives."""

    def __init__(self, owner: Any, names: Callable[[], Iterable[str]]) -> None:
        self._owner, self._names = owner, names

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._owner, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(list(self))


class _Cells(MutableMapping[str, Any]):
    """The variables of a closure."""

    def __init__(self, cells: Mapping[str, CellType]) -> None:
        self._cells = cells

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except ValueError as error:  # it is not assigned yet
            raise KeyError(name) from error

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self._cells[name].cell_contents

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._cells if name in self)

    def __len__(self) -> int:
        return len(list(self))


class _Context:
    """A context variable as an object with a value."""

    def __init__(self, variable: ContextVar[Any]) -> None:
        self._variable = variable

    @property
    def value(self) -> Any:
        return self._variable.get(None)

    @value.setter
    def value(self, value: Any) -> None:
        self._variable.set(value)


class Reached:
    """All holders of a model, those of its modules first.

    `clocks`: does its code name what gives another answer each time?  `caches`: its functions that
    remember what they gave.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: list[Holder] = []
        self._seen: dict[int, Any] = {}  # which keeps them, so that no id is used twice
        self._to_visit: deque[tuple[str, Any]] = deque()
        self._globals: dict[int, tuple[dict[str, Any], set[str], list[CodeType]]] = {}
        self._codes: list[CodeType] = []
        self.clocks = False
        self.caches: list[Any] = []
        self._seen |= {id(module): module for module in model.modules()}
        for path, module in model.named_modules():
            self._object(f"{path}.{{}}" if path else "{}", module)
            self._later("hook", forward_hooks(module))
        while self._to_visit:
            self._visit(*self._to_visit.popleft())
        for space, names, codes in self._globals.values():
            self._found.append(Holder("{}", space, frozenset(names), tuple(codes)))
        everywhere = tuple(self._codes)
        self.holders = [replace(each, codes=each.codes + everywhere) for each in self._found]

    def _later(self, title: str, value: Any) -> None:
        if not isinstance(value, _LEAVES) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._to_visit.append((title, value))

    def _visit(self, title: str, value: Any) -> None:
        """Look into one value; `title` is what it is called."""
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(cast("type[Any]", value))
        else:
            if callable(getattr(value, "cache_clear", None)) and _is_own(value):
                self.caches.append(value)
            parts = _parts(value)
            if isinstance(value, (functools.partial, BuiltinMethodType)):
                self._holder(Holder(f"{{}} of {title}", parts, None, ()))
            for part in parts.values():
                self._later(title, part)
            if not parts:
                self._object(f"{title}.{{}}", value)

    def _object(self, title: str, value: Any) -> None:
        """A module, or an object of a class of the user's own."""
        if isinstance(value, ContextVar):
            context = _Context(cast("ContextVar[Any]", value))
            self._holder(Holder(title, _Attributes(context, lambda: ["value"]), None, ()))
            return
        kind, space = type(value), getattr(value, "__dict__", None)
        self._later(title, kind)
        if not (isinstance(value, (nn.Module, *_BAGS)) or _is_own(kind)):
            return
        codes = tuple(_codes_of(kind))
        if isinstance(space, dict):
            self._holder(Holder(title, cast("dict[str, Any]", space), None, codes))
        slots = frozenset(name for base in kind.__mro__ for name in _slots(base))
        if slots:
            self._holder(Holder(title, _Attributes(value, lambda: slots), slots, codes))

    def _holder(self, holder: Holder) -> None:
        self._found.append(holder)
        for name, value in holder.held().items():
            self._later(holder.title.format(name), value)

    def _class(self, kind: type[Any]) -> None:
        """Its functions, and what else it has."""
        for base in kind.__bases__:
            self._later(base.__name__, base)
        if not _is_own(kind):
            return
        for value in vars(kind).values():
            if _is_code(value):
                self._later(kind.__name__, value)
        space = _Attributes(kind, lambda: [n for n, v in vars(kind).items() if _is_data(n, v)])
        self._holder(Holder(f"{kind.__name__}.{{}}", space, None, tuple(_codes_of(kind))))

    def _function(self, function: FunctionType) -> None:
        """What it closes over, its defaults, its attributes, and the globals that it names."""
        self._later(function.__name__, vars(function).get("__wrapped__"))
        if not _is_own(function):
            return
        codes = tuple(_codes(function.__code__))
        self._codes += codes
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        name = function.__name__
        for title, space in (
            ("{}", _Cells(cells)),
            (f"{{}} of {name}", _defaults(function)),
            (f"{name}.{{}}", vars(function)),
        ):
            self._holder(Holder(title, space, None, codes))
        self._named(function.__globals__, codes)

    def _named(self, space: dict[str, Any], codes: tuple[CodeType, ...]) -> None:
        """The variables of a file that these codes name."""
        _, known, own = self._globals.setdefault(id(space), (space, set(), []))
        names = {name for code in codes for name in code.co_names} - known
        known |= names
        own += codes
        for name in names & space.keys():
            value = space[name]
            if not isinstance(value, ModuleType):
                self.clocks |= getattr(value, "__module__", None) in _CLOCKS
                self._later(name, value)
                continue
            self.clocks |= value.__name__ in _CLOCKS
            if value.__name__.partition(".")[0] not in _LIBRARIES:
                self._named(vars(value), codes)


def _parts(value: Any) -> dict[str, Any]:
    """What a method, a property, a partial function, a wrapper or a container is made of."""
    match value:
        case MethodType() | BuiltinMethodType() | staticmethod() | classmethod():
            names = ("__func__", "__self__")
        case property():
            names = ("fget", "fset")
        case functools.partial():
            names = ("func", "args", "keywords")
        case dict():
            return dict(enumerate(cast("dict[Any, Any]", value).values()))  # pyright: ignore
        case list() | tuple() | set() | frozenset() | deque():
            return dict(enumerate(cast("list[Any]", value)))  # pyright: ignore
        case _:
            inside = getattr(value, "__dict__", None)
            names = ("__wrapped__",) if isinstance(inside, dict) and "__wrapped__" in inside else ()
    return {name: getattr(value, name, None) for name in names}


def _is_own(thing: Any) -> bool:
    """Is a class or function none of a library that is known to keep nothing?"""
    return str(getattr(thing, "__module__", None) or "").partition(".")[0] not in _LIBRARIES


def _is_code(value: Any) -> bool:
    """Is it a function, a method, a property, or something else that a class gives anew?"""
    return hasattr(type(value), "__get__")


def _is_data(name: str, value: Any) -> bool:
    return not name.startswith("__") and not _is_code(value)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code and that of functions in it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _codes(part)


def _codes_of(kind: type[Any]) -> Iterator[CodeType]:
    """Those of all functions of a class of the user's own and of its bases."""
    for base in kind.__mro__:
        for value in vars(base).values() if _is_own(base) else ():
            if isinstance(value, FunctionType):
                yield from _codes(value.__code__)


def _defaults(function: FunctionType) -> dict[str, Any]:
    """Argument -> its default."""
    code, given = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(given) :]
    return dict(zip(names, given, strict=True)) | (function.__kwdefaults__ or {})


def _slots(kind: type[Any]) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ()) if _is_own(kind) else ()
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def turned(value: Any) -> str:
    """The state of what gives something else each time it is asked; "" for anything else."""
    match value:
        case random.Random():
            return repr(value.getstate())
        case numpy.random.Generator():
            return repr(value.bit_generator.state)
        case numpy.random.RandomState():
            return repr(value.get_state())
        case GeneratorType():
            frame = value.gi_frame
            return f"{frame.f_lasti} {frame.f_locals}" if frame else "ended"
        case Iterator():
            return _reduced(value)
        case _:
            return ""


def _reduced(value: Any) -> str:
    """What an iterator of Python's own would be pickled as."""
    if type(value).__module__ not in ("builtins", "itertools"):
        return ""
    try:
        return repr(value.__reduce__())
    except TypeError:
        return ""


__all__ = ["Holder", "Reached", "turned"]
