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


@lru_cache(maxsize=256)
def _statements(path: str) -> dict[int, Statement]:
    """Line -> statement, for every line of a simple (not compound) statement of the file."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:  # a file of another language, or changed since it was imported
        return {}
    table: dict[int, Statement] = {}
    for node in ast.walk(tree):
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
