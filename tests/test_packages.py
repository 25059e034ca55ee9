"""An installed wheel holds every package: the map in pyproject.toml names them one by one."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("codegen", "costmodel", "facts", "ir", "planner", "runtime")


def test_every_folder_with_code_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")
    }
    rooms = {"shardwright": "shardwright"} | {f"shardwright.{room}": room for room in ROOMS}
    assert setuptools["package-dir"] == rooms
    packages = ["shardwright", *(".".join(("shardwright", *folder.parts)) for folder in folders)]
    assert sorted(setuptools["packages"]) == sorted(packages)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
