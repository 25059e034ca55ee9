"""Where full tensors come from: a state dict, or safetensors files read slice by slice.

Generated modules have the names of transformers 5, where one tensor stacks the experts of a layer.
Most published checkpoints have a tensor for each expert and matrix instead, some under older names:

    model.layers.0.mlp.experts.gate_up_proj (e, 2f, h), model.layers.0.mlp.experts.down_proj
    model.layers.0.mlp.experts.3.gate_proj.weight (f, h), ....up_proj.weight, ....down_proj.weight
    model.layers.0.block_sparse_moe.experts.3.w1.weight, ....w3.weight, ....w2.weight

`OwnNames` reads any of these as the first, and `Writer` writes any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...facts.files import read_json
from ...facts.given import shown
from ..mesh.given import check_tensor
from .parameters import Original, Stack, expert_stacks

Slices: TypeAlias = tuple[slice, ...]
Experts: TypeAlias = Literal["stacked", "separate", "mixtral"]

# What published checkpoints call things.  Source: transformers 5.23, `conversion_mapping.py`, under
# the families named here; it also lists the families with the names of `qwen2_moe` or `mixtral`.
MATRICES: Mapping[str, Mapping[str, str]] = {  # of one expert, by role
    "separate": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},  # qwen2_moe
    "mixtral": {"gate": "w1", "up": "w3", "down": "w2"},
}
MIXTRAL_BLOCK = (".mlp.", ".block_sparse_moe.")
RENAMES = (  # (name in the module, name in the checkpoint)
    MIXTRAL_BLOCK,
    (".mlp.router.weight", ".block_sparse_moe.gate.weight"),  # phimoe
    (".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),  # exaone_moe
    (".experts.gate_up_proj", ".input_linear.weight"),  # granitemoe
    (".experts.down_proj", ".output_linear.weight"),  # granitemoe
    (".router.weight", ".router.layer.weight"),  # granitemoe
)


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
        if not isinstance(cast(object, tensors), Mapping):
            raise TypeError(f"a state dict maps names to tensors, got {shown(tensors)}")
        for name, tensor in tensors.items():
            check_tensor(f"state dict: {name}", tensor)
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


class OwnNames:
    """A source under the names of a module that wants the tensors `wanted`, experts stacked.

    `problems` lists what stands in the way of stacking.  Names that mean nothing stay as they are.
    """

    def __init__(self, source: Source, wanted: Mapping[str, Original]) -> None:
        self.title = source.title
        self.problems: list[str] = []
        self._source = source
        self._given = set(source.names())
        self._keys = self._renamed(wanted)
        self._stacks: dict[str, tuple[Stack, list[list[str]]]] = {}
        self._claimed = set(self._keys.values())
        for name, stack in expert_stacks(wanted).items():
            self._find_experts(name, stack)

    def names(self) -> list[str]:
        """All names."""
        unknown = self._given - self._claimed
        return [*self._keys, *(n for n in self._stacks if n not in self._keys), *sorted(unknown)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one full tensor."""
        if name in self._keys or name not in self._stacks:
            return self._source.shape(self._keys.get(name, name))
        return self._stacks[name][0].shape

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """One slice; of experts, what it takes of each matrix is read and no more."""
        if name in self._keys:
            return self._source.read(self._keys[name], slices)
        stack, keys = self._stacks[name]
        experts, *inner = slices
        nothing = self._source.read(keys[0][0], (slice(0, 0),) * len(inner))
        whole = nothing.new_empty([part.stop - part.start for part in slices])
        for own, row in zip(whole, keys[experts], strict=True):
            for number, there, here in _cuts(stack, inner):
                matrix = self._source.read(row[number], there)
                if matrix.dtype != whole.dtype:
                    raise ValueError(
                        f"{self.title}: {row[number]} is {matrix.dtype}, {keys[0][0]} is "
                        f"{whole.dtype}; convert all experts of a layer to one dtype first"
                    )
                own[here] = matrix.T if stack.transposed else matrix
        return whole

    def _renamed(self, wanted: Mapping[str, Original]) -> dict[str, str]:
        """Names in the module -> names in the source."""
        own = {key for name, original in wanted.items() for key in (name, *original.aliases)}
        found = {key: key for key in own & self._given}
        free = self._given - own
        for key in sorted(own - self._given):
            match = next((other for other in _spellings(key) if other in free), None)
            if match is not None:
                found[key] = match
                free.remove(match)
        return found

    def _find_experts(self, name: str, stack: Stack) -> None:
        """Note the tensors that `name` is made of, if there are any, and all that is wrong."""
        firsts = [self._keys[name]] if name in self._keys else []
        for module, matrices in product(_spellings(f"{stack.module}."), MATRICES.values()):
            keys = _keys_of(stack, module, matrices)
            present = [key for row in keys for key in row if key in self._given]
            if present:
                self._claimed.update(present)
                self._stacks[name] = (stack, keys)
                firsts.append(present[0])
        if name not in self._stacks:
            return
        if len(firsts) > 1:
            self.problems.append(f"given twice: {name}, by {' and by '.join(firsts)}; keep one")
        elif stack.unclear:
            self.problems.append(
                f"cannot stack: {name} from {firsts[0]} and others ({stack.unclear}; give it as "
                "the original model's state_dict() has it)"
            )
        else:
            self._check_experts(name, *self._stacks[name])

    def _check_experts(self, name: str, stack: Stack, keys: list[list[str]]) -> None:
        shape = stack.matrix_shape()
        for key in (key for row in keys for key in row):
            if key not in self._given:
                self.problems.append(f"missing: {key} (of {name})")
            elif self._source.shape(key) != shape:
                self.problems.append(
                    f"wrong shape: {key} is {self._source.shape(key)}, the plan has {shape} (of "
                    f"{name})"
                )


class Writer:
    """Full tensors by name in the form `experts`; one tensor after the other.

    Raises ValueError for a form that does not exist, and for experts of which names and shapes do
    not tell how they are stacked.
    """

    def __init__(self, table: Mapping[str, Original], experts: Experts) -> None:
        if experts not in ("stacked", *MATRICES):
            known = ", ".join(("stacked", *MATRICES))
            raise ValueError(f"experts are written as one of {known}; got {experts!r}")
        self._form = experts
        self._stacks = {} if experts == "stacked" else expert_stacks(table)
        self._blocks = tuple({s.module.removesuffix("experts") for s in self._stacks.values()})
        unclear = [f"{n} ({s.unclear})" for n, s in self._stacks.items() if s.unclear]
        if unclear:
            raise ValueError(
                'cannot take experts apart; ask for experts="stacked":\n  ' + "\n  ".join(unclear)
            )
        if experts != "stacked" and not self._stacks:
            raise ValueError(
                "this module has no tensors `<...>.experts.gate_up_proj` to take apart; ask for "
                'experts="stacked"'
            )

    def tensors(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What to write for `whole`: itself, or a tensor of its own for each expert's matrix."""
        stack = self._stacks.get(name)
        if stack is None:
            yield self._written(name), whole
            return
        module = self._written(f"{stack.module}.")
        keys = _keys_of(stack, module, MATRICES[self._form])
        for row, expert in zip(keys, whole, strict=True):
            for key, matrix in zip(row, expert.split(stack.rows, stack.dim - 1), strict=True):
                own = matrix.T if stack.transposed else matrix
                yield key, own.clone(memory_format=torch.contiguous_format)

    def _written(self, name: str) -> str:
        mixtral = self._form == "mixtral" and name.startswith(self._blocks)
        return name.replace(*MIXTRAL_BLOCK) if mixtral else name


def _spellings(name: str) -> list[str]:
    """What checkpoints may call `name`, itself first."""
    return [name, *(name.replace(own, other) for own, other in RENAMES if own in name)]


def _keys_of(stack: Stack, module: str, matrices: Mapping[str, str]) -> list[list[str]]:
    """For each expert the names of its matrices, in the order in which they are stacked."""
    return [
        [f"{module}{number}.{matrices[role]}.{stack.kind}" for role in stack.roles]
        for number in range(stack.shape[0])
    ]


def _cuts(stack: Stack, inner: Sequence[slice]) -> Iterator[tuple[int, Slices, Slices]]:
    """For each matrix of an expert that `inner` overlaps: (number, what it takes, where that goes).

    `inner` has the dims of the stack but the first; what it takes, the dims of the matrix.
    """
    dim = stack.dim - 1
    taken = inner[dim]
    for number in range(len(stack.roles)):
        begin = number * stack.rows
        start, stop = max(taken.start, begin), min(taken.stop, begin + stack.rows)
        if start < stop:
            there, here = list(inner), [slice(None)] * len(inner)
            there[dim] = slice(start - begin, stop - begin)
            here[dim] = slice(start - taken.start, stop - taken.start)
            yield number, tuple(there[::-1] if stack.transposed else there), tuple(here)


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
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: path for name in handle.keys()}  # noqa: SIM118 (a handle is no mapping)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path}: not in the safetensors format: {error}") from error


def _names_in_index(index: Path) -> dict[str, Path]:
    content: object = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"checkpoint {index}: no `weight_map` from tensor names to files")
    files = {str(name): index.parent / Path(str(file)).name for name, file in weight_map.items()}
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise FileNotFoundError(f"checkpoint {index}: it names files that are not there: {missing}")
    return files
