"""Private names of torch and transformers stand in `compat` alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPAT = ROOT / "compat"
LIBRARIES = ("torch", "transformers")

# private by their look only: what named tuples have
_DOCUMENTED = {"_replace", "_asdict", "_fields"}


def files() -> Iterator[Path]:
    """Every file of the rooms but those of `compat`."""
    for room in ("codegen", "costmodel", "facts", "ir", "planner", "runtime", "shardwright"):
        yield from (ROOT / room).glob("*.py" if room == "shardwright" else "**/*.py")


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Everything that is imported from outside, by its whole name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def private_attributes(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """`x._name` and `getattr(x, "_name")`: the node, and the name.  Python documents `os._exit`."""
    for node in ast.walk(tree):
        name: object = None
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asks = node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            name = node.args[1].value if asks and isinstance(node.args[1], ast.Constant) else None
        if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
            assert isinstance(node, ast.expr)
            if ast.unparse(node).partition(".")[0] not in ("os", "sys"):
                yield node, name


def defined(tree: ast.AST) -> set[str]:
    """Private names that a file gives to functions, classes, fields and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            own = isinstance(node, ast.Name) or _is_self(node.value)
            found.add(node.id if isinstance(node, ast.Name) else node.attr if own else "")
    return {name for name in found if name.startswith("_")}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign(tree: ast.AST, everywhere: set[str], in_compat: set[str]) -> Iterator[str]:
    """The uses in one file of what is private and not ours.

    `everywhere`: what our classes define, which `self` may have from a base class in another file.
    `in_compat`: imports and attributes that `compat` is for.
    """
    here = defined(tree)
    for node, name in imported(tree):
        first, *rest = name.split(".")
        private = any(part.startswith("_") for part in rest) or first == "transformers"
        if first in LIBRARIES and (private or name in in_compat):
            yield f"{node.lineno}: import of {name}"
    for node, name in private_attributes(tree):
        inherited = isinstance(node, ast.Attribute) and _is_self(node.value) and name in everywhere
        if name in in_compat or not (inherited or name in here | _DOCUMENTED):
            yield f"{node.lineno}: {ast.unparse(node)}"


def _of_compat() -> set[str]:
    """The private attributes that `compat` uses, and the names that it hands on."""
    found: set[str] = set()
    for file in COMPAT.glob("*.py"):
        tree = ast.parse(file.read_text())
        handed_on = re.findall(r'^    "(\w+)",$', file.read_text(), re.MULTILINE)  # __all__
        found |= {name for _, name in imported(tree) if name.rpartition(".")[2] in handed_on}
        found |= {name for _, name in private_attributes(tree)}
    return found


def test_the_rooms_use_none() -> None:
    trees = {file: ast.parse(file.read_text()) for file in files()}
    everywhere, in_compat = set[str]().union(*map(defined, trees.values())), _of_compat()
    assert {"_version", "torch.utils.checkpoint.CheckpointFunction"} <= in_compat
    found = [
        f"{file.relative_to(ROOT)}:{use}"
        for file, tree in trees.items()
        for use in foreign(tree, everywhere, in_compat)
    ]
    assert found == []


def test_they_are_found() -> None:
    text = """\
import torch, transformers
from torch._C import thing
from torch.utils import _pytree
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from torch import nn
class Own(nn.Module):
    def _mine(self):
        self._count = self._parameters
        return self._mine(), self._base, self._count, torch._C._thing
def f(x, pair: Own):
    sys._getframe()
    return x._version, pair._count, getattr(x, "_grad"), pair._replace(a=1), x.__dict__, x._base
"""
    in_compat = {"_version", "_parameters", "torch.utils.checkpoint.CheckpointFunction"}
    assert sorted(foreign(ast.parse(text), {"_base", "_parameters"}, in_compat)) == [
        "12: getattr(x, '_grad')",
        "12: x._base",
        "12: x._version",
        "1: import of transformers",
        "2: import of torch._C.thing",
        "3: import of torch.utils._pytree",
        "4: import of torch.utils.checkpoint.CheckpointFunction",
        "8: self._parameters",
        "9: torch._C",
        "9: torch._C._thing",
    ]


def test_only_capture_loads_what_is_for_transformers() -> None:
    users = [
        str(file.relative_to(ROOT).parent)
        for file in files()
        if "compat.transformers import" in file.read_text()
        or "compat import transformers" in file.read_text()
    ]
    assert set(users) == {"ir/capture"}
