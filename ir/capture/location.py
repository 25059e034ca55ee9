"""Where a captured node comes from: file, line, modules, and the name its line assigns it to."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from types import CodeType

import torch
from torch import nn

from ...compat.transformers import WRAPPERS
from ..graph import Call

_FRAME = re.compile(
    r'^ *File "(?P<file>[^"]*)", line (?P<line>\d+), in (?P<function>\S*)', re.MULTILINE
)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_ROOMS = [os.path.join(_PACKAGE, room) for room in ("ir", "compat")]  # what runs in a capture
_OURS = tuple(path + os.sep for room in _ROOMS for path in (room, os.path.realpath(room)))
_WRAPPERS = os.path.join(*WRAPPERS.split(".")) + os.sep


@dataclass(frozen=True, slots=True)
class Statement:
    """The innermost statement around a line: its first line, and the name(s) it assigns."""

    line: int
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """A function: its name, its first line, what it takes, those of it that may be tensors in the
    order in which operators take them, and how many results it returns, 0 where its `return`s
    differ in that or it has none."""

    name: str
    line: int
    arguments: tuple[str, ...]
    taken: tuple[str, ...]
    results: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A line of a function that ran."""

    path: str
    line: int
    function: str

    @property
    def file(self) -> str:
        """The path's last part."""
        return self.path.replace("\\", "/").rpartition("/")[2]


@lru_cache(maxsize=4096)
def user_frames(stack_trace: str) -> tuple[Frame, ...]:
    """The frames outside torch, this package, and wrappers of transformers, outermost first."""
    found: list[Frame] = []
    for match in _FRAME.finditer(stack_trace):
        full = os.path.abspath(match["file"])
        ours = full.startswith((_TORCH, *_OURS))
        if not ours and _WRAPPERS not in full:
            found.append(Frame(match["file"], int(match["line"]), match["function"]))
    return tuple(found)


def model_frames(stack_trace: str) -> tuple[Frame, ...]:
    """Of `user_frames` each `forward`, and the functions that it calls in files beside its own."""
    folders: set[str] = set()
    found: list[Frame] = []
    for frame in user_frames(stack_trace):
        folder = os.path.dirname(os.path.abspath(frame.path))
        folders |= {folder} if frame.function == "forward" else set()
        found += [frame] if folder in folders else []
    return tuple(found)


def innermost_frame(stack_trace: str) -> tuple[str, int]:
    """(path, line) of the innermost frame of a model's code; ("", 0) without one."""
    frames = user_frames(stack_trace)
    return (frames[-1].path, frames[-1].line) if frames else ("", 0)


def place(path: str, line: int) -> str:
    """`models/gpt.py:12`, as messages say where: from the working directory, if it is in there."""
    inside = os.path.abspath(path).startswith(os.getcwd() + os.sep)
    return f"{os.path.relpath(path) if inside else path}:{line}"


def statement(path: str, line: int) -> Statement:
    """The statement of file `path` that `line` belongs to."""
    return _statements(path).get(line, Statement(line, ()))


def definition(path: str, line: int) -> Definition | None:
    """The innermost function of file `path` that `line` stands in; no lambda, and no method."""
    around = [each for each in _definitions(path) if each[0] <= line <= each[1]]
    return max(around, key=lambda each: each[0])[2] if around else None


@lru_cache(maxsize=256)
def _definitions(path: str) -> tuple[tuple[int, int, Definition | None], ...]:
    """First and last line of each function of a file, and what it is; None for methods."""
    found: list[tuple[int, int, Definition | None]] = []
    for node in ast.walk(_tree(path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        given = node.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        taken = _taken(node, set(names) - _numbers(given))
        known = Definition(node.name, node.lineno, tuple(names), taken, _results(node))
        is_method = names[:1] in (["self"], ["cls"])
        found.append((node.lineno, node.end_lineno or node.lineno, None if is_method else known))
    return tuple(found)


def _numbers(given: ast.arguments) -> set[str]:
    """The arguments whose default is a number, a flag or a text."""
    places = [*given.posonlyargs, *given.args]
    late = zip(reversed(places), reversed(given.defaults), strict=False)
    pairs = [*late, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return {
        each.arg
        for each, default in pairs
        if isinstance(default, ast.Constant) and default.value is not None
    }


_OPERATIONS = (ast.AugAssign, ast.BinOp, ast.Call, ast.Compare, ast.Subscript, ast.UnaryOp)
_FACTS = frozenset({"device", "dim", "dtype", "ndim", "shape", "size"})  # no operator takes these


def _taken(function: ast.FunctionDef | ast.AsyncFunctionDef, names: set[str]) -> tuple[str, ...]:
    """These arguments, in the order in which operations first take them."""
    found: dict[str, None] = {}

    def left(node: ast.AST) -> list[str]:
        """The arguments in an expression that no operation in it takes."""
        if isinstance(node, ast.Name):
            return [node.id] if node.id in names else []
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            return []
        inside = [name for child in ast.iter_child_nodes(node) for name in left(child)]
        if isinstance(node, _OPERATIONS):
            found.update(dict.fromkeys(inside))
            return []
        return inside if isinstance(node, (ast.expr, ast.keyword)) else []

    for statement in function.body:
        left(statement)
    return tuple(found)


def _results(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many values it returns, 0 where that is not one number."""
    returned = [each.value for each in ast.walk(function) if isinstance(each, ast.Return)]
    counts = {len(v.elts) if isinstance(v, ast.Tuple) else 1 for v in returned if v is not None}
    return counts.pop() if len(counts) == 1 and None not in returned else 0


@lru_cache(maxsize=256)
def _tree(path: str) -> ast.Module:
    """A file, empty for one of another language, or changed since it was imported."""
    try:
        return ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return ast.Module([], [])


@lru_cache(maxsize=256)
def _statements(path: str) -> dict[int, Statement]:
    """Line -> statement, for every line of a simple (not compound) statement of the file."""
    table: dict[int, Statement] = {}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            entry = Statement(node.lineno, _targets(node))
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                table[line] = entry
    return table


def _targets(node: ast.stmt) -> tuple[str, ...]:
    """`x` for `x = ...`, `x: T = ...` and `x += ...`; `a`, `b` for `a, b = ...`; else nothing."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        target = node.target
    else:
        return ()
    items = target.elts if isinstance(target, ast.Tuple) else [target]
    names = tuple(item.id for item in items if isinstance(item, ast.Name))
    return names if len(names) == len(items) else ()


def first_calls(model: nn.Module) -> dict[str, Call]:
    """By its path, the first call of each module of `model`."""
    known: dict[type[nn.Module], Call] = {}
    found: dict[str, Call] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in known:
            known[kind] = _call_of(kind)
        found[path] = replace(known[kind], path=path)
    return found


def _call_of(kind: type[nn.Module]) -> Call:
    """What is known of the calls of a class."""
    arguments = tuple(
        name
        for name, parameter in inspect.signature(kind.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )
    file, line, code = "", 0, getattr(inspect.unwrap(kind.forward), "__code__", None)
    if isinstance(code, CodeType) and not kind.__module__.startswith("torch."):
        file, line = code.co_filename.replace("\\", "/").rpartition("/")[2], code.co_firstlineno
    return Call("", 0, kind.__name__, arguments[1:], file, line)


__all__ = [
    "Frame", "Statement", "first_calls", "innermost_frame", "model_frames", "place", "statement",
    "user_frames",
]  # fmt: skip
