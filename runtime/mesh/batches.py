"""Batches in and results out: what a program takes and returns, cut for the ranks and put together.

A program states its `INPUTS` and `OUTPUTS` in tables.  Full tensors are those of the original
model; local ones are this rank's part of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ...facts.blocks import local_shape
from ...facts.given import shown
from ...facts.nested import (
    Constant,
    Path,
    is_same,
    leaves,
    nested,
    spelled,
    spelled_all,
    with_leaves,
)
from ...facts.spec import Spec, parse_spec, zigzag_dims
from .mesh import Mesh
from .parts import gather_whole, own_part, ways

Fixed: TypeAlias = Mapping[Path, Constant]  # inputs that are no tensors, as they were planned
_NONE_FIXED: Fixed = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that the original model's forward takes: planned full shape, how it is sharded.

    `path` says where in the arguments it stands; `()` is for an argument of the table's name.
    Dims in `free` may have other sizes than planned: multiples of `step`, from `least` to `most`
    (0: no limit), each of one number per dim.  Integers are below `high` where it is not 0: they
    are indices.  `gradient`: each rank gets that of its part.
    """

    spec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    free: tuple[int, ...] = ()
    high: int = 0
    step: tuple[int, ...] = ()
    path: Path = ()
    least: tuple[int, ...] = ()
    most: tuple[int, ...] = ()
    gradient: bool = False


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
    inputs: Mapping[str, Input],
    batch: Mapping[str, object],
    mesh: Mesh,
    fixed: Fixed = _NONE_FIXED,
) -> dict[str, Any]:
    """`batch`, the arguments by name, with this rank's parts of its tensors, on its device.

    Raises ValueError naming the input whose name, value, dtype or shape does not fit the plan.
    """
    tensors = tensors_of(inputs, batch, fixed)
    local = {
        path_of(name, wanted): _shard(spelled(path_of(name, wanted)), wanted, tensors[name], mesh)
        for name, wanted in inputs.items()
    }
    return with_leaves(dict(batch), local)


def tensors_of(
    inputs: Mapping[str, Input], arguments: Mapping[str, object], fixed: Fixed = _NONE_FIXED
) -> dict[str, Tensor]:
    """The tensors in arguments of any form, by the names of `inputs`.

    Raises ValueError for what is missing, unknown or no tensor, and for other values than `fixed`.
    """
    paths = {name: path_of(name, wanted) for name, wanted in inputs.items()}
    found = dict(leaves(arguments))
    _check_paths([*paths.values(), *fixed], found)
    for path, planned in fixed.items():
        if not is_same(found[path], planned):
            raise ValueError(
                f"input `{spelled(path)}` is {shown(found[path])}; the plan has {shown(planned)},"
                " which is fixed in its module: plan again for another value"
            )
    for name, path in paths.items():
        if not isinstance(found[path], Tensor):
            wanted = inputs[name]
            raise ValueError(
                f"input `{spelled(path)}` is {shown(found[path])}; the plan has a tensor there,"
                f" {wanted.dtype} {wanted.shape}"
            )
    return {name: cast(Tensor, found[path]) for name, path in paths.items()}


def arguments_of(
    inputs: Mapping[str, Input], tensors: Mapping[str, Tensor], fixed: Fixed = _NONE_FIXED
) -> dict[str, Any]:
    """Arguments that have the tensors of these names, and what is fixed; dicts for containers."""
    entries = {path_of(name, inputs[name]): tensor for name, tensor in tensors.items()}
    return nested({**entries, **fixed})


def path_of(name: str, wanted: Input) -> Path:
    """Where in the arguments an input of the table stands."""
    return wanted.path or (name,)


def wants_gradient(item: object) -> bool:
    """Is a tensor that wants a gradient in arguments of any form?"""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for _, leaf in leaves(item))


def refuse_gradients(inputs: Mapping[str, Input], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor that wants a gradient which was not planned: each rank would
    get its own summand of it."""
    for name, x in tensors.items():
        if x.requires_grad and not inputs[name].gradient:
            place = spelled(path_of(name, inputs[name]))
            raise ValueError(
                f"input `{place}` wants a gradient, and was planned without one, so that ranks"
                " would get parts of it: plan with example inputs that have `requires_grad`, or"
                f" give `{place}.detach()`"
            )


def _check_paths(planned: Sequence[Path], found: Mapping[Path, object]) -> None:
    """Raises ValueError unless the arguments have a leaf at each of these paths, and no other."""
    known = set(planned)
    missing = [path for path in planned if path not in found]
    unknown = [path for path in found if path not in known]
    for path in missing:
        if any(other[: len(path)] == path for other in unknown):
            raise ValueError(
                f"input `{spelled(path)}` is a container; the plan has one tensor or value there"
            )
    if missing or unknown:
        raise ValueError(
            f"the module takes the inputs {', '.join(map(spelled, planned)) or 'none'};"
            + (f" missing: {spelled_all(missing)}" if missing else "")
            + (f" unknown: {spelled_all(unknown)}" if unknown else "")
        )


def random_batch(inputs: Mapping[str, Input]) -> dict[str, Tensor]:
    """A full batch of the planned sizes, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {name: _random(wanted, generator) for name, wanted in inputs.items()}


def _random(wanted: Input, generator: torch.Generator) -> Tensor:
    if wanted.dtype.is_complex:
        return torch.randn(wanted.shape, generator=generator, dtype=wanted.dtype)
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
        free = free or " (the comment at INPUTS says why no dim may differ)"
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
    least = wanted.least[dim] if wanted.least else 0
    most = wanted.most[dim] if wanted.most else 0
    if (size < least or 0 < most < size) and size != wanted.shape[dim]:
        raise ValueError(
            f"input `{name}` dim {dim} has size {size}; the model computes with this size, and the"
            f" module holds for {least} to {most or 'any'} (it was planned for"
            f" {wanted.shape[dim]}): plan again for others"
        )


def named_arguments(
    forward: Callable[..., Any], args: Sequence[object], batch: Mapping[str, object]
) -> dict[str, object]:
    """Arguments of `forward` by name.  Raises ValueError for too many, and what is given twice."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [n for n, p in inspect.signature(forward).parameters.items() if p.kind is kind]
    if len(args) > len(names):
        raise ValueError(
            f"{len(args)} inputs are given by position; forward takes"
            f" {', '.join(names) or 'none'} so"
        )
    given = dict(zip(names, args, strict=False))
    if twice := [name for name in batch if name in given]:
        raise ValueError(f"input `{twice[0]}` is given by position and by name")
    return {**given, **batch}


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


def gather_outputs(outputs: Sequence[Output], out: Any, mesh: Mesh) -> Any:
    """What the original model would return: full tensors, with gradients."""
    return _rebuild({output.path: gather_output(output, out, mesh) for output in outputs})


def gather_output(output: Output, out: Any, mesh: Mesh) -> Tensor:
    """One full tensor of what a program returned on all ranks."""
    local, spec = look_up(out, output.path), parse_spec(output.spec)
    if mesh.size == 1:
        return local
    shape = _true_shape(local, spec, mesh, output.shape)
    return gather_whole(local, spec, shape, mesh, zigzag_dims(output.spec))


def _true_shape(local: Tensor, spec: Spec, mesh: Mesh, planned: Sequence[int]) -> tuple[int, ...]:
    """Full shape of an output: as planned where that explains the local size, else its multiple."""
    expected = local_shape(planned, spec, mesh.sizes)
    return tuple(
        planned[dim] if size == expected[dim] else size * ways(spec, mesh, dim)
        for dim, size in enumerate(local.shape)
    )


def _rebuild(entries: Mapping[Path, Tensor]) -> Any:
    """The nested structure that has each tensor at its path: tuples for numbers, else Outputs.

    In the place of what was left out is None.
    """
    if () in entries:
        return entries[()]
    groups: dict[str | int, dict[Path, Tensor]] = {}
    for path, tensor in entries.items():
        groups.setdefault(path[0], {})[path[1:]] = tensor
    places = [key for key in groups if isinstance(key, int)]
    if len(places) == len(groups):
        parts = (groups.get(place) for place in range(max(places, default=-1) + 1))
        return tuple(None if part is None else _rebuild(part) for part in parts)
    return Outputs({str(key): _rebuild(group) for key, group in groups.items()})
