"""Files of the user's that a generated module needs: they define operators that it calls."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ..facts.users import PREFIX


def import_user(path: str) -> ModuleType:
    """The module in the file at `path`, run once; FileNotFoundError says what to change."""
    file = Path(path).resolve()
    known = sys.modules.get(PREFIX + file.stem)
    if known is not None and Path(known.__file__ or "").resolve() == file:
        return known
    if not file.is_file():
        raise FileNotFoundError(
            f"`{path}` does not exist: lines `ops.import_user(...)` at the top of a generated "
            "module name the files that define operators of yours; put the right path there"
        )
    return load_file(Path(path))


def load_file(path: Path) -> ModuleType:
    """Run the file as a module, with its folder importable as when it is run as a script."""
    name = PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the file runs
    with _beside(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _beside(path: Path) -> Generator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


__all__ = ["import_user", "load_file"]
