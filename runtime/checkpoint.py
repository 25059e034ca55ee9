"""Where full tensors come from: a state dict, or safetensors files read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor


class Source(Protocol):
    """Full tensors by name, of which any slice can be read."""

    title: str  # how errors call it

    def names(self) -> list[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one full tensor."""
        ...

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """One slice, one `slice` per dim."""
        ...


class StateDict:
    """Full tensors that are in memory."""

    title = "the state dict"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        """All names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one full tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A view of the slice."""
        return self._tensors[name].detach()[slices]


class Safetensors:
    """A `.safetensors` file, or a Hugging Face folder with one or several; a context manager.

    Raises FileNotFoundError or ValueError, with the path, if there is nothing to read.
    """

    def __init__(self, path: str | Path) -> None:
        self.title = f"checkpoint {path}"
        self._open = ExitStack()
        self._handles: dict[Path, Any] = {}
        self._files = _files_by_name(Path(path))

    def __enter__(self) -> Safetensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.clear()
        self._open.close()

    def names(self) -> list[str]:
        """All names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one full tensor, from the file's header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """The slice alone is read from disk."""
        handle = self._handle(name)
        return handle.get_slice(name)[slices] if slices else handle.get_tensor(name)

    def _handle(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._handles:
            self._handles[path] = self._open.enter_context(safe_open(path, framework="pt"))
        return self._handles[path]


def _files_by_name(path: Path) -> dict[str, Path]:
    if path.is_file():
        return _names_in(path)
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: no such file or folder")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _names_in_index(index)
    single = path / "model.safetensors"
    if single.is_file():
        return _names_in(single)
    raise FileNotFoundError(
        f"checkpoint {path}: the folder holds neither model.safetensors.index.json nor"
        " model.safetensors; save the model with safetensors first"
    )


def _names_in(path: Path) -> dict[str, Path]:
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint {path}: expected a .safetensors file or a folder with them")
    with safe_open(path, framework="pt") as handle:
        return {name: path for name in handle.keys()}  # noqa: SIM118 (a handle is no mapping)


def _names_in_index(index: Path) -> dict[str, Path]:
    weight_map: object = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"checkpoint {index}: no `weight_map` from tensor names to files")
    files = {str(name): index.parent / Path(str(file)).name for name, file in weight_map.items()}
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise FileNotFoundError(f"checkpoint {index}: it names files that are not there: {missing}")
    return files
