"""Where a captured node comes from: file, line, module, and the name its line assigns it to."""

from __future__ import annotations

import ast
import linecache
import os
import re
from dataclasses import dataclass
from functools import lru_cache

import torch

_FRAME = re.compile(r'^ *File "(?P<file>[^"]*)", line (?P<line>\d+), in', re.MULTILINE)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_SELF = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the room
# transformers' wrappers stand between a model's line and ours
_WRAPPERS = os.path.join("transformers", "integrations") + os.sep


@dataclass(frozen=True, slots=True)
class Statement:
    """The innermost statement around a line: its first line, and the name(s) it assigns."""

    line: int
    targets: tuple[str, ...]


@lru_cache(maxsize=4096)
def innermost_frame(stack_trace: str) -> tuple[str, int]:
    """(path, line) of the innermost frame of a model's code; ("", 0) without one.

    That is outside torch, this package, and wrappers of transformers.
    """
    found = [(m["file"], int(m["line"])) for m in _FRAME.finditer(stack_trace)]
    for path, line in reversed(found):
        full = os.path.abspath(path)
        ours = full.startswith((_TORCH, _SELF, os.path.realpath(_SELF) + os.sep))
        if not ours and _WRAPPERS not in full:
            return path, line
    return "", 0


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


__all__ = ["Statement", "innermost_frame", "statement"]
