"""Weights as `transformers` keeps them: safetensors files, their index, and the configuration.

Rank 0 writes.  It holds one file at a time, the others one tensor.  All is written in a draft
beside its place, which has the name asked for when it is complete.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...facts.files import DataError, read_json
from ...facts.given import shown
from ..mesh.mesh import Mesh
from .checkpoint import Experts, Writer
from .state import State


@runtime_checkable
class HasJson(Protocol):
    """A configuration of `transformers`."""

    def to_json_string(self) -> str:
        """It as text."""
        ...


Config: TypeAlias = Mapping[str, Any] | HasJson | str | Path
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def save_pretrained(
    state: State,
    folder: Path,
    config: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    experts: Experts,
    max_shard_bytes: int,
) -> None:
    """See `ShardedModule.save_pretrained`; without a `config` none is written."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is 1 or more, got {max_shard_bytes}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"weights are saved in a dtype of real numbers, got {dtype}")
    files = _Files(state, dtype, experts, max_shard_bytes)
    draft = _Draft(folder, state.mesh)
    draft.begin(files.total)
    try:
        for name, originals in files.originals.items():
            own: dict[str, Tensor] = {}
            for original in originals:
                own.update(files.tensors(original, keep=draft.here))
            draft.write(name, _writing(own, files.metadata))
            own.clear()
        draft.write("", lambda path: _write_rest(path, files, _with_dtype(config, files)))
        draft.finish()
    finally:
        draft.clear()


class _Files:
    """Which tensor goes into which file."""

    metadata: Mapping[str, str] = {"format": "pt"}

    def __init__(
        self, state: State, dtype: torch.dtype | None, experts: Experts, most: int
    ) -> None:
        self._state = state
        self._dtype = dtype
        self._writer = Writer(state.originals, experts)
        self.sizes: dict[str, int] = {}  # bytes by the name of a tensor
        self.dtypes: Counter[torch.dtype] = Counter()  # of numbers
        groups: list[list[str]] = [[]]
        in_file: dict[str, int] = {}
        size = 0
        for name, original in state.originals.items():
            if original.kind == "constant":
                continue
            whole = torch.empty(original.shape, dtype=original.dtype, device="meta")
            of = {key: self._cast(x) for key, x in self._writer.tensors(name, whole)}
            more = sum(x.nbytes for x in of.values())
            if groups[-1] and size + more > most:
                groups.append([])
                size = 0
            size += more
            groups[-1].append(name)
            for key, x in of.items():
                self.sizes[key], in_file[key] = x.nbytes, len(groups) - 1
                self.dtypes[x.dtype] += x.numel()
        count = len(groups)
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        names = names if count > 1 else [_WEIGHTS]
        self.originals = dict(zip(names, groups, strict=True))
        self.weight_map = {key: names[number] for key, number in in_file.items()}

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())

    def tensors(self, name: str, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
        """What is written of an original, on the CPU; nothing where it is not to be kept.

        All ranks call it together.
        """
        whole = self._state.whole(name)
        for key, x in self._writer.tensors(name, whole) if keep else ():
            yield key, self._cast(x).to("cpu").contiguous()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._dtype) if self._dtype and x.dtype.is_floating_point else x


class _Draft:
    """A folder that rank 0 writes, and of which all ranks learn that it could not."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self._folder = folder
        self._path = folder.with_name(f".{folder.name}-draft")
        self._mesh = mesh
        self.here = mesh.rank == 0

    def begin(self, size: int) -> None:
        """Make it, where there is room for `size` bytes and nothing in its place."""

        def start() -> None:
            if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
                raise FileExistsError("it is there already, and is not overwritten")
            shutil.rmtree(self._path, ignore_errors=True)  # of one that was killed
            self._path.mkdir(parents=True)
            free = shutil.disk_usage(self._path).free
            if free < size:
                raise OSError(f"the weights take {size} bytes, and {free} are free there")

        self._together(start)

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Let rank 0 write a file, or in the folder itself; RuntimeError on all if it cannot."""
        self._together(lambda: write(self._path / name))

    def finish(self) -> None:
        """Give it its name."""
        self._together(lambda: self._path.replace(self._folder))

    def clear(self) -> None:
        """Leave nothing of what is not complete."""
        if self.here:
            shutil.rmtree(self._path, ignore_errors=True)

    def _together(self, act: Callable[[], object]) -> None:
        problem: Exception | None = None
        try:
            if self.here:
                act()
        except (OSError, SafetensorError) as error:
            problem = error
        if not self._mesh.everywhere(problem is None):
            why = str(problem) if self.here else "rank 0 says why"
            raise RuntimeError(
                f"the weights could not be saved in {self._folder}, and nothing is left there:"
                f" {why}"
            ) from problem


def _writing(own: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[Path], None]:
    return lambda path: save_file(dict(own), path, metadata=dict(metadata))


def _write_rest(folder: Path, files: _Files, config: Mapping[str, Any] | None) -> None:
    texts: dict[str, object] = {} if config is None else {_CONFIG: config}
    if len(files.originals) > 1:
        index = {"metadata": {"total_size": files.total}, "weight_map": files.weight_map}
        texts[f"{_WEIGHTS}.index.json"] = index
    for name, content in texts.items():
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _with_dtype(config: Mapping[str, Any] | None, files: _Files) -> Mapping[str, Any] | None:
    """With the dtype of most weights, in which `transformers` will load them."""
    if config is None:
        return None
    real = [dtype for dtype, _ in files.dtypes.most_common() if dtype.is_floating_point]
    other = {name: value for name, value in config.items() if name != "torch_dtype"}
    return other | ({"dtype": str(real[0]).removeprefix("torch.")} if real else {})


# --- the configuration ---------------------------------------------------------------------------


def config_of(given: Config | None, module: type) -> Mapping[str, Any] | None:
    """The configuration as data; not given, that which the plan beside the `module`'s file names.

    None where the plan, if there is one, is not of a configuration.  Raises ValueError for what is
    none, and where that of the plan is gone.
    """
    if given is None:
        file = getattr(sys.modules.get(module.__module__), "__file__", None)
        plan = Path(file).with_name("plan.json") if file else None
        return _planned(plan) if plan is not None and plan.is_file() else None
    if isinstance(given, (str, Path)):
        return _read(Path(given))
    content: object = json.loads(given.to_json_string()) if isinstance(given, HasJson) else given
    if not isinstance(content, Mapping):
        raise ValueError(f"config is a path, a dict or a transformers config, got {shown(given)}")
    return cast("Mapping[str, Any]", content)


def _planned(plan: Path) -> Mapping[str, Any] | None:
    content: object = read_json(plan)
    request = cast("dict[str, Any]", content).get("request", {})
    path = Path(str(request.get("target", "")))
    if path.suffix != ".json" and not path.is_dir():
        return None
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(
            f"{plan} is of the configuration {path}, which is not there from here ({error}): give"
            " save_pretrained its path as config="
        ) from error


def _read(path: Path) -> Mapping[str, Any]:
    file = path / _CONFIG if path.is_dir() else path
    try:
        content: object = read_json(file)
    except DataError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a configuration is an object, got {shown(content)}")
    return cast("dict[str, Any]", content)


__all__ = ["Config", "HasJson", "config_of", "save_pretrained"]
