"""Modules of the user's that a plan needs: how they are named, found and imported.

They define operators and functions that the plan's graph calls.  A *place* is the name of a module
that every process of this Python finds (`mypackage.ops`), or the path of its file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PREFIX = "_shardwright_"
"""How the names of modules begin that are loaded by the path of their file."""


@dataclass(frozen=True, slots=True)
class Import:
    """What a generated module imports: the module at `place`, or the `function` that it defines."""

    place: str
    function: str = ""  # `Rounding`, `Rounding.Up`: the name of its class there


def is_file(place: str) -> bool:
    """Is `place` the path of a file, and not the name of a module?"""
    return place.endswith(".py")


def import_user(place: str, function: str = "") -> Any:
    """The module at `place`, which runs once, or the class of the `torch.autograd.Function` in it.

    Raises FileNotFoundError or ModuleNotFoundError, which says what to change, where there is no
    such module, and ImportError where it has no such function.
    """
    module = _at_path(place) if is_file(place) else _by_name(place)
    return _function_in(module, function) if function else module


def load_file(path: Path) -> ModuleType:
    """Run the file as a module, with its folder importable as when it is run as a script."""
    name = PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the file runs
    with _importable(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


def installed(name: str) -> bool:
    """Does every process of this Python find the module `name`, which is loaded here?

    So it is where its package is found without the folders that only this process looks into: the
    current one, and that of the script that runs.
    """
    top = name.partition(".")[0]
    own = {"", str(Path.cwd()), str(Path(sys.argv[0] or "x").resolve().parent)}
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if entry not in own]
    try:
        specs = (finder.find_spec(top, None) for finder in sys.meta_path)
        found = next((spec for spec in specs if spec is not None), None)
    finally:
        sys.path[:] = before
    loaded = getattr(sys.modules.get(top), "__spec__", None)
    return found is not None and loaded is not None and _home(found) == _home(loaded)


def _home(spec: Any) -> object:
    """Where a module lies: its file, or the folders of a package without one."""
    return spec.origin or list(spec.submodule_search_locations or ())


def _by_name(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: the line `ops.import_user({name!r})` at the top of a generated module names "
            "a module that defines operators or functions of yours; install its package here, or "
            "put the path of its file there"
        ) from error


def _at_path(path: str) -> ModuleType:
    file = Path(path).resolve()
    known = [m for name, m in list(sys.modules.items()) if name != "__main__" and _file(m) == file]
    if known:
        return known[0]
    if not file.is_file():
        raise FileNotFoundError(
            f"`{path}` does not exist: lines `ops.import_user(...)` at the top of a generated "
            "module name the files that define operators or functions of yours; put the right path "
            "there"
        )
    if not (file.parent / "__init__.py").is_file():
        return load_file(Path(path))
    root, name = _in_package(file)
    with _importable(root):
        return import_module(name)


def _file(module: object) -> Path | None:
    """The file that a module was made from; what stands in for modules may have anything there."""
    spec = getattr(module, "__dict__", {}).get("__spec__")
    origin = getattr(spec, "origin", None)
    return Path(origin).resolve() if isinstance(origin, str) and is_file(origin) else None


def _in_package(file: Path) -> tuple[Path, str]:
    """The folder that holds the package of `file`, and the module's whole name."""
    parts, folder = [] if file.stem == "__init__" else [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _function_in(module: ModuleType, function: str) -> Any:
    """The class `function` of `module`; nothing else that has an `apply` is handed out."""
    found: Any = module
    for part in function.split("."):
        found = getattr(found, part, None)
    bases = [f"{base.__module__}.{base.__qualname__}" for base in getattr(found, "__mro__", ())]
    if "torch.autograd.function.Function" not in bases:
        raise ImportError(
            f"`{function}` in {module.__spec__ and module.__spec__.origin} is no "
            "torch.autograd.Function, which the plan was made with; plan again"
        )
    return found


@contextmanager
def _importable(folder: Path) -> Generator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


__all__ = ["PREFIX", "Import", "import_user", "installed", "is_file", "load_file"]
