"""Modules of the user's are found by name or path, once, with what lies beside them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from shardwright.facts.users import import_user, installed

FILES = {
    "inner/__init__.py": "",
    "inner/ops.py": "from ..parts import PART\nfrom . import more\n",
    "inner/more.py": "",
    "parts.py": "PART = 3\n",
    "__init__.py": "",
}


@pytest.fixture
def package(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A package that is imported nowhere, under a name of its own."""
    folder = tmp_path / f"users_{request.node.name}"
    for file, text in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def test_a_path_in_a_package(package: Path) -> None:
    before = list(sys.path)
    module = import_user(str(package / "inner" / "ops.py"))
    assert module.__name__ == f"{package.name}.inner.ops" and module.PART == 3
    assert import_user(str(package / "inner" / "ops.py")) is module
    assert import_user(str(package / "__init__.py")) is sys.modules[package.name]
    assert sys.path == before


def test_a_path_alone(tmp_path: Path) -> None:
    (tmp_path / "users_beside.py").write_text("PART = 4\n")
    (tmp_path / "users_alone.py").write_text("from users_beside import PART\n")
    module = import_user(str(tmp_path / "users_alone.py"))
    assert module.PART == 4 and import_user(str(tmp_path / "users_alone.py")) is module
    assert import_user(str(tmp_path / "users_beside.py")) is sys.modules["users_beside"]


def test_a_name_is_one_that_every_process_finds(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{package.name}.inner.ops"
    monkeypatch.syspath_prepend(str(package.parent))
    module = import_module(name)
    assert installed(name) and import_user(name) is module
    monkeypatch.chdir(package.parent)  # found as the current folder, too, which others do not have
    assert not installed(name)
    monkeypatch.chdir(package)
    monkeypatch.setattr(sys, "argv", [str(package.parent / "train.py")])
    assert not installed(name)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"`ops.import_user\('nowhere.ops'\)`.*install"):
        import_user("nowhere.ops")
    with pytest.raises(FileNotFoundError, match="nowhere.py` does not exist: lines"):
        import_user(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize("name", ["os.system", "Lost", "Plain", "os"])
def test_what_is_no_function_is_not_handed_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"users_of_{name.replace('.', '_')}.py"
    path.write_text("import os\n\nclass Plain:\n    apply = os.system\n")
    with pytest.raises(ImportError, match=f"`{name}` in .* is no torch.autograd.Function"):
        import_user(str(path), name)
