"""Batches in and results out: what a program takes and returns, cut for the ranks and put together.

A program states its `INPUTS` and `OUTPUTS` in tables.  Full tensors are those of the original
model; local ones are this rank's part of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...facts.blocks import local_shape
from ...facts.spec import Spec, parse_spec, zigzag_dims
from .mesh import Mesh
from .parts import gather_whole, own_part, ways

Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """A keyword of the original model's forward: planned full shape, and how it is sharded.

    Dims in `free` may have other sizes than planned: multiples of `step`, which has one number per
    dim (default: 1).  Integers are below `high` where it is not 0: they are indices.
    """

    spec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    free: tuple[int, ...] = ()
    high: int = 0
    step: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor in what the original model returns, by its path of keys, `()` if it is bare."""

    path: Path
    spec: str
    shape: tuple[int, ...]


class Outputs(dict[str, Any]):
    """A dictionary whose entries are attributes, too: `out["loss"]` is `out.loss`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output `{name}`; there are {list(self)}") from None


# --- in ------------------------------------------------------------------------------------------


def shard_inputs(
    inputs: Mapping[str, Input], batch: Mapping[str, Tensor], mesh: Mesh
) -> dict[str, Tensor]:
    """This rank's part of a full batch, on its device.

    Raises ValueError naming the input whose name, dtype or shape does not fit the plan.
    """
    missing = [name for name in inputs if name not in batch]
    unknown = [name for name in batch if name not in inputs]
    if missing or unknown:
        raise ValueError(
            f"the module takes the inputs {', '.join(inputs) or 'none'};"
            + (f" missing: {', '.join(missing)}" if missing else "")
            + (f" unknown: {', '.join(unknown)}" if unknown else "")
        )
    return {name: _shard(name, inputs[name], batch[name], mesh) for name in inputs}


def random_batch(inputs: Mapping[str, Input]) -> dict[str, Tensor]:
    """A full batch of the planned sizes, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {name: _random(wanted, generator) for name, wanted in inputs.items()}


def _random(wanted: Input, generator: torch.Generator) -> Tensor:
    if wanted.dtype.is_floating_point:
        return torch.randn(wanted.shape, generator=generator).to(wanted.dtype)
    if wanted.dtype == torch.bool:
        return torch.ones(wanted.shape, dtype=torch.bool)
    return torch.randint(0, wanted.high or 2, wanted.shape, generator=generator).to(wanted.dtype)


def _shard(name: str, wanted: Input, x: Tensor, mesh: Mesh) -> Tensor:
    _check_planned(name, wanted, x)
    if x.device.type == "cpu":  # where looking does not wait for a queue of kernels
        check_indices(name, x, wanted.high)
    spec, zigzag = parse_spec(wanted.spec), zigzag_dims(wanted.spec)
    for dim in range(x.ndim):
        _check_divides(name, wanted, x, dim, mesh)
    return own_part(x, spec, mesh, zigzag).to(mesh.device).contiguous()


def check_indices(name: str, x: Tensor, high: int) -> None:
    """Raise ValueError where integers are not below `high`; 0: whatever they are.

    Where a table is cut over ranks, no rank has such a row, and none would fail.
    """
    if high and x.numel() and int(x.max()) >= high:
        raise ValueError(f"`{name}` holds {int(x.max())}; the model takes numbers below {high}")


def _check_planned(name: str, wanted: Input, x: Tensor) -> None:
    shape = tuple(x.shape)
    fits = len(shape) == len(wanted.shape) and all(
        dim in wanted.free or size == planned
        for dim, (size, planned) in enumerate(zip(shape, wanted.shape, strict=True))
    )
    if not fits or x.dtype != wanted.dtype:
        free = f" (dims {list(wanted.free)} may differ)" if wanted.free else ""
        raise ValueError(
            f"input `{name}` is {x.dtype} {shape}; the plan has {wanted.dtype} {wanted.shape}{free}"
        )


def _check_divides(name: str, wanted: Input, x: Tensor, dim: int, mesh: Mesh) -> None:
    """Raise ValueError if the axes do not divide a dim, or its size is none that may be."""
    size, spec = x.shape[dim], parse_spec(wanted.spec)
    zigzag = dim in zigzag_dims(wanted.spec)
    if size % (ways(spec, mesh, dim) * (2 if zigzag else 1)):
        axes = zip(mesh.axes, spec, strict=True)
        names = " x ".join(f"{axis.name}={axis.size}" for axis, state in axes if state == dim)
        twice = " in zigzag order (two chunks per rank)" if zigzag else ""
        raise ValueError(
            f"input `{name}` dim {dim} has size {size}, which {names}{twice} does not divide"
        )
    if wanted.step and size % wanted.step[dim] and size != wanted.shape[dim]:
        raise ValueError(
            f"input `{name}` dim {dim} has size {size}; the plan cuts what is computed"
            f" from it, so it must be a multiple of {wanted.step[dim]}"
        )


# --- out -----------------------------------------------------------------------------------------


def pack(outputs: Sequence[Output], tensors: Sequence[Tensor]) -> Any:
    """The structure that the original model returns, with one tensor for each output."""
    paths = [output.path for output in outputs]
    return _rebuild(dict(zip(paths, tensors, strict=True)))


def look_up(out: Any, path: Path) -> Tensor:
    """The tensor at `path` of what a program returned."""
    for key in path:
        out = out[key]
    return out


@torch.no_grad()
def gather_outputs(outputs: Sequence[Output], out: Any, mesh: Mesh) -> Any:
    """What the original model would return: full tensors, without gradients."""
    return _rebuild({output.path: gather_output(output, out, mesh) for output in outputs})


@torch.no_grad()
def gather_output(output: Output, out: Any, mesh: Mesh) -> Tensor:
    """One full tensor of what a program returned on all ranks."""
    local, spec = look_up(out, output.path), parse_spec(output.spec)
    shape = _true_shape(local, spec, mesh, output.shape)
    return gather_whole(local.detach(), spec, shape, mesh, zigzag_dims(output.spec))


def _true_shape(local: Tensor, spec: Spec, mesh: Mesh, planned: Sequence[int]) -> tuple[int, ...]:
    """Full shape of an output: as planned where that explains the local size, else its multiple."""
    expected = local_shape(planned, spec, mesh.sizes)
    return tuple(
        planned[dim] if size == expected[dim] else size * ways(spec, mesh, dim)
        for dim, size in enumerate(local.shape)
    )


def _rebuild(entries: Mapping[Path, Tensor]) -> Any:
    """The nested structure that has each tensor at its path: tuples for numbers, else Outputs."""
    if () in entries:
        return entries[()]
    groups: dict[str | int, dict[Path, Tensor]] = {}
    for path, tensor in entries.items():
        groups.setdefault(path[0], {})[path[1:]] = tensor
    if all(isinstance(key, int) for key in groups):
        return tuple(_rebuild(group) for _, group in sorted(groups.items()))
    return Outputs({str(key): _rebuild(group) for key, group in groups.items()})
