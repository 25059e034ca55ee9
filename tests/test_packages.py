"""An installed wheel holds every package: the map in pyproject.toml names them one by one."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from shardwright.compat.versions import TRIED, untried

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("codegen", "compat", "costmodel", "facts", "ir", "planner", "runtime")


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


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """What `make test-oldest` installs comes from pyproject.toml, and is as literal as this."""
    command = [sys.executable, str(ROOT / ".ci" / "oldest.py")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(found) == len(project["dependencies"]) + 1
    assert found["torch"] == "2.11" and found["ortools"] == "9.15.6755"
    assert all(f"{name}>={found[name]}" in " ".join(
        [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    ) for name in found)  # fmt: skip


def test_versions_that_were_tried() -> None:
    """The torch that the Makefile installs is one of them."""
    pinned = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert untried({"torch": pinned[1]}) == ""


def test_untried_versions_are_named_in_one_sentence() -> None:
    (_, torch), (_, transformers) = TRIED["torch"], TRIED["transformers"]
    assert untried({}) == ""
    fine = {
        "torch": f"{torch[0]}.{torch[1]}.9+cpu",
        "transformers": f"{transformers[0]}.{transformers[1]}.0.dev0",
    }
    assert untried(fine) == ""
    assert untried({"torch": "2.10.0", "transformers": "6.0.0"}) == (
        f"never tried on torch 2.10.0 (but on 2.11 to {torch[0]}.{torch[1]}), transformers 6.0.0 "
        f"(but on 5.23 to {transformers[0]}.{transformers[1]}); `plan verify` tells if it is right"
    )
    assert untried({"torch": "unknown"}).startswith("never tried on torch unknown ")
