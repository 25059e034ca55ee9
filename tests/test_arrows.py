"""The arrows between packages: who imports whom, read from the code; types count, too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("codegen", "compat", "costmodel", "facts", "ir", "planner", "runtime", "shardwright")

# package -> what it may import of ours; a room's name alone is the files that lie directly in it
ARROWS: dict[str, str] = {
    "facts": "",
    "compat": "",
    "costmodel.machines": "facts",
    "costmodel": "costmodel.machines facts",
    "costmodel.calibration": "costmodel costmodel.machines facts",
    "ir.graph": "facts",
    "ir.ops.algorithms": "facts",
    "ir.ops": "ir.ops.algorithms ir.graph facts compat",
    "ir.reference": "ir.ops ir.graph facts compat",
    "ir.passes": "ir.ops ir.graph facts",
    "ir.capture": "ir.passes ir.reference ir.ops ir.graph facts compat",
    "planner": "planner.ilp facts",
    "planner.ilp": "",
    "planner.strategies": "planner planner.ilp costmodel costmodel.machines ir.ops ir.graph facts",
    "planner.plan": (
        "planner planner.strategies planner.ilp costmodel costmodel.machines ir.ops ir.graph facts"
    ),
    "planner.report": "planner.plan planner.strategies costmodel ir.ops ir.graph facts",
    "planner.search": (
        "planner planner.plan planner.strategies planner.ilp costmodel costmodel.machines"
        " ir.passes ir.reference ir.ops ir.graph facts"
    ),
    "codegen": "planner planner.plan planner.strategies ir.ops ir.graph facts",
    "codegen.export": "planner planner.plan planner.strategies ir.ops ir.graph facts",
    "runtime.mesh": "facts compat",
    "runtime.gathering": "runtime.mesh facts compat",
    "runtime.cache": "runtime.mesh facts",
    "runtime.attention": "runtime.cache runtime.mesh facts compat",
    "runtime.serving": "runtime.cache runtime.mesh facts",
    "runtime.training": "runtime.mesh facts compat",
    "runtime.module": (
        "runtime.training runtime.serving runtime.cache runtime.gathering runtime.mesh facts compat"
    ),
    "runtime.pipeline": (
        "runtime.module runtime.training runtime.serving runtime.cache runtime.mesh facts"
    ),
    "runtime": (
        "runtime.pipeline runtime.module runtime.training runtime.serving runtime.attention"
        " runtime.cache runtime.gathering runtime.mesh facts compat"
    ),
    "shardwright": " ".join(
        [
            "codegen codegen.export planner planner.report planner.search planner.plan",
            "planner.strategies",
        ]
        + ["planner.ilp"]
        + ["ir.capture ir.passes ir.reference ir.ops ir.graph"]
        + ["costmodel.calibration costmodel costmodel.machines"]
        + ["runtime runtime.cache runtime.mesh facts compat"]
    ),
}

# third-party packages, where fewer than the room's may be loaded; the rest: torch, numpy, networkx
OUTSIDE: dict[str, set[str]] = {
    "facts": set(),
    "costmodel": {"numpy"},
    "costmodel.machines": set(),
    "planner.ilp": {"numpy", "networkx", "ortools", "pyomo", "highspy"},
    "runtime": {"torch", "safetensors"},
    "runtime.module": {"torch", "safetensors"},
    "compat": {"torch", "transformers"},
    "costmodel.calibration": {"torch", "numpy"},
    "shardwright": {"torch", "typer", "rich", "click", "numpy", "networkx", "pandas"},
}
for _package in ("mesh", "gathering", "cache", "attention", "serving", "training", "pipeline"):
    OUTSIDE[f"runtime.{_package}"] = {"torch"}
OUTSIDE["runtime.attention"].add("triton")  # which torch for CUDA brings; imported there alone


def _package(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).parent.parts)


@cache
def imports() -> tuple[tuple[Path, Path], ...]:
    """(file, file of ours that it imports from), for imports at any depth of the code."""
    return tuple(pair for file in _files() for pair in _of(file))


def _files() -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted((ROOT / room).glob("*.py" if room == "shardwright" else "**/*.py"))


def _of(file: Path) -> Iterator[tuple[Path, Path]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = list(file.relative_to(ROOT).parent.parts)
        # `shardwright` is the package that the rooms lie in
        above = (["shardwright"] if parts[0] != "shardwright" else []) + parts
        base = above[: len(above) - node.level + 1] + (node.module or "").split(".")
        for alias in node.names:
            yield file, _file_of([part for part in base if part], alias.name)


def _file_of(base: list[str], name: str) -> Path:
    """Where `from base import name` finds it."""
    inside = base[1:] if len(base) > 1 and base[1] in ROOMS else base
    if base == ["shardwright"] and name in ROOMS:
        return ROOT / name / "__init__.py"
    for path in (ROOT.joinpath(*inside, name), ROOT.joinpath(*inside)):
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    raise AssertionError(f"no file for `from {'.'.join(base)} import {name}`")


def test_every_package_has_its_arrows() -> None:
    assert {_package(file) for file in _files()} <= {*ARROWS, "ir", "codegen"}


@pytest.mark.parametrize("package", sorted(ARROWS))
def test_arrows(package: str) -> None:
    found = {
        (_package(b), f"{a.relative_to(ROOT)} imports {b.relative_to(ROOT)}")
        for a, b in imports()
        if _package(a) == package and _package(b) != package
    }
    assert sorted(text for to, text in found if to not in ARROWS[package].split()) == []


def test_the_arrows_point_downward() -> None:
    graph = nx.DiGraph((a, b) for a, targets in ARROWS.items() for b in targets.split())
    assert nx.is_directed_acyclic_graph(graph)


def test_no_file_is_in_a_circle() -> None:
    graph = nx.DiGraph((str(a), str(b)) for a, b in imports() if a != b)
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert circles == []


def test_libraries() -> None:
    ours = {"shardwright", "tests", *ROOMS}
    wrong: list[str] = []
    for file in _files():
        package = _package(file)
        allowed = OUTSIDE.get(package, {"torch", "numpy", "networkx"})
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - ours - sys.stdlib_module_names:
                if name not in allowed:
                    wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []
