"""The mesh of running ranks: named axes with their process groups.

Words: an *axis* belongs to the mesh, a *dim* to a tensor, a *rank* is a process.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from math import prod

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...compat.torch import flattened
from . import transport
from .collectives import Axis
from .keeping import Each
from .opaque import not_compiled


@dataclass(slots=True)
class _Groups:
    """The process groups of one grid, shared by all meshes of that shape."""

    world: ProcessGroup | None
    device_mesh: DeviceMesh | None
    by_axis: dict[str, ProcessGroup] = field(default_factory=dict[str, ProcessGroup])

    def forget(self) -> None:
        """Let go of all process groups."""
        self.world = self.device_mesh = None
        self.by_axis.clear()


# torch keeps every group (gloo: sockets and threads) until torch.distributed is shut down, so a
# process that makes a mesh per model must use the groups again.  A group that outlives torch's
# shutdown aborts the process, hence `_close` empties this at exit; groups are held nowhere else.
_known: dict[tuple[object, ...], _Groups] = {}


class WrongRanks(RuntimeError):
    """Another number of ranks was started than the mesh has."""


class Mesh:
    """This rank's view of a grid of ranks; made by `Mesh.create`.

    `mesh["tp"]` is an `Axis`; `mesh["dp", "tp"]` one axis over both, `dp` major (names in mesh
    order).  The first use of a combination makes its process group, so all ranks must ask
    for combinations in the same order.
    """

    def __init__(
        self, axes: Mapping[str, int], device: torch.device, groups: _Groups | None
    ) -> None:
        self.names = tuple(axes)
        self.sizes = tuple(axes.values())
        self.size = prod(self.sizes)
        self.device = device
        self.rank = 0 if groups is None else dist.get_rank()
        self.coordinates = _unravel(self.rank, self.sizes)
        self._groups = groups
        self._axes: dict[tuple[str, ...], Axis] = {}
        self._generators: dict[tuple[str, ...], torch.Generator] = {}
        self._seed: int | None = None
        for name in self.names:
            self[name]

    @staticmethod
    def create(axes: Mapping[str, int], device: torch.device | str | None = None) -> Mesh:
        """The mesh of `axes` (outermost first) over all ranks that torchrun started.

        Initialises torch.distributed from torchrun's environment where nobody has yet: NCCL if
        this machine has CUDA, else gloo.  A mesh of one rank needs no torchrun.

        Raises RuntimeError if the number of ranks is not the product of the axes' sizes.
        """
        _check_axes(axes)
        ranks = prod(axes.values())
        started = _started_ranks()
        if started != ranks:
            layout = " x ".join(f"{name}={size}" for name, size in axes.items())
            raise WrongRanks(
                f"this module was planned for {ranks} ranks ({layout}), but torchrun started"
                f" {started}: run `torchrun --nproc-per-node {ranks} ...` or plan again with"
                f" --gpus {started}"
            )
        _check_order()
        place = _own_device(device)
        if ranks == 1:
            return Mesh(axes, place, None)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
            atexit.register(_shut_down)
        return Mesh(axes, place, _groups_of(axes, place.type))

    def inner(self) -> Mesh:
        """The mesh of all axes but the outermost, of the ranks that are at this rank's place there.

        It has the process groups of this one, all of which are made now: later its ranks may do
        what others do not.  Its random numbers are its own.
        """
        names, sizes = self.names[1:], self.sizes[1:]
        if not names:
            raise ValueError(f"mesh {self} has no axis but {self.names[0]}")
        inner = Mesh(dict(zip(names, sizes, strict=True)), self.device, self._groups)
        inner.rank = self.rank % inner.size
        inner.coordinates = _unravel(inner.rank, sizes)
        inner._axes.clear()  # which the wrong coordinates have made
        for count in range(1, len(names) + 1):
            for key in combinations(names, count):
                inner[key]
        inner.manual_seed(stable_seed(self.seed, self.names[0], self.coordinates[0]))
        return inner

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, outermost first."""
        return tuple(self[name] for name in self.names)

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """The coordinates of every rank."""
        return tuple(_unravel(rank, self.sizes) for rank in range(self.size))

    def __getitem__(self, names: str | tuple[str, ...]) -> Axis:
        key = (names,) if isinstance(names, str) else names
        axis = self._axes.get(key)
        if axis is None:
            axis = self._axes[key] = self._make_axis(key)
        return axis

    def __str__(self) -> str:
        return " x ".join(
            f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True)
        )

    def group(self, name: str) -> ProcessGroup:
        """The process group of the axis called `name` (`dp`, or `dp_tp` for two flattened)."""
        group = None if self._groups is None else self._groups.by_axis.get(name)
        if group is None:
            raise RuntimeError(f"axis `{name}` of mesh {self} has no process group any more")
        return group

    @not_compiled("random draws that ranks agree on")
    def everywhere(self, here: bool) -> bool:
        """Is it so on all ranks?  They exchange a number, which no counter is told."""
        x = torch.tensor([0 if here else 1], device=self.device)
        for axis in self.axes:
            if axis.size > 1:
                x = transport.all_reduce(x, axis.group, "max")
        return not int(x)

    def generator(self, sharded_axes: Sequence[str] = ()) -> torch.Generator:
        """Random numbers that differ along `sharded_axes` and agree along all others.

        Every call with the same axes gives the same generator, which goes on where it stopped.
        All ranks must make the first call of a mesh together (it shares the seed).
        """
        key = tuple(name for name in self.names if name in sharded_axes)
        unknown = sorted(set(sharded_axes) - set(self.names))
        if unknown:
            raise ValueError(f"mesh {self} has no axis {', '.join(unknown)}")
        if key not in self._generators:
            indices = [self[name].rank for name in key]
            generator = torch.Generator(self.device)
            generator.manual_seed(stable_seed(self.seed, key, indices))
            self._generators[key] = generator
        return self._generators[key]

    def replayed_randomness(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for a first run and its repetition, which draws the same random numbers."""
        before: dict[tuple[str, ...], torch.Tensor] = {}

        @contextmanager
        def first() -> Generator[None]:
            before.update({key: g.get_state() for key, g in self._generators.items()})
            yield

        @contextmanager
        def second() -> Generator[None]:
            now = {key: g.get_state() for key, g in self._generators.items()}
            for key, generator in self._generators.items():
                if key in before:
                    generator.set_state(before[key])
                else:  # made in the first run
                    generator.manual_seed(generator.initial_seed())
            try:
                yield
            finally:
                for key, state in now.items():
                    self._generators[key].set_state(state)

        return first(), Each(second)

    def manual_seed(self, seed: int) -> None:
        """Start all generators of this mesh anew from `seed`, the same on every rank."""
        self._seed = seed
        self._generators.clear()

    @property
    def seed(self) -> int:
        """Of the mesh's random numbers: what `manual_seed` said, else rank 0's
        `torch.initial_seed()`, so that `torch.manual_seed` there decides.
        """
        if self._seed is None:
            seed = torch.tensor([torch.initial_seed() % 2**62], device=self.device)
            if self.size > 1:
                dist.broadcast(seed, 0)
            self._seed = int(seed.item())
        return self._seed

    def _make_axis(self, key: tuple[str, ...]) -> Axis:
        unknown = [name for name in key if name not in self.names]
        if unknown or not key:
            raise KeyError(f"mesh {self} has no axis {', '.join(unknown) or '()'}")
        numbers = [self.names.index(name) for name in key]
        if numbers != sorted(set(numbers)):
            raise KeyError(f"name axes once and in the order of mesh {self}, got {key}")
        name = "_".join(key)
        if self._groups is not None and name not in self._groups.by_axis:
            device_mesh = self._groups.device_mesh
            assert device_mesh is not None, "the mesh outlived the process's shutdown"
            device_mesh = device_mesh[key]
            if len(key) > 1:
                device_mesh = flattened(device_mesh, name)
            self._groups.by_axis[name] = device_mesh.get_group()
        sizes = tuple(self.sizes[number] for number in numbers)
        parts = tuple(self[part] for part in key) if len(key) > 1 else ()
        return Axis(self, name, sizes, tuple(self.coordinates[i] for i in numbers), parts)


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts' text alone, in every process and version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _check_axes(axes: Mapping[str, int]) -> None:
    if not axes:
        raise ValueError("a mesh needs at least one axis")
    if not all(name.isidentifier() for name in axes):
        raise ValueError(f"mesh axis names must be identifiers, got {list(axes)}")
    if any(size < 1 for size in axes.values()):
        raise ValueError(f"mesh axis sizes must be at least 1, got {dict(axes)}")


def _started_ranks() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_order() -> None:
    """Raises WrongRanks where ranks of one machine do not follow one another.

    Inner axes then would go over machines, at other prices than planned.
    """
    rank, local, here = (
        os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if not (rank.isdigit() and local.isdigit() and here.isdigit()) or int(here) == 0:
        return  # not started by torchrun
    if int(rank) % int(here) != int(local):
        raise WrongRanks(
            f"rank {rank} is number {local} of {here} ranks on its machine: number ranks machine"
            " by machine (torchrun does; with Slurm, --distribution=block), so that the inner axes"
            " of the mesh lie inside one"
        )


def _own_device(device: torch.device | str | None) -> torch.device:
    """This rank's device: the one asked for, else its own GPU, else the CPU."""
    if device is not None:
        place = torch.device(device)
    elif dist.is_initialized():
        place = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    else:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index  # pyright: ignore[reportUnnecessaryComparison]
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
    return place


def _unravel(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Index along each axis.

    >>> _unravel(5, (2, 4))
    (1, 1)
    """
    indices: list[int] = []
    for size in reversed(sizes):
        rank, index = divmod(rank, size)
        indices.append(index)
    return tuple(reversed(indices))


def _groups_of(axes: Mapping[str, int], device_type: str) -> _Groups:
    """The groups for a grid over all ranks, made once while torch.distributed stays up."""
    world = dist.group.WORLD
    for key, groups in list(_known.items()):
        if groups.world is not world:  # torch.distributed was shut down and started again
            groups.forget()
            del _known[key]
    key = (device_type, *axes.items())
    if key not in _known:
        sizes, names = tuple(axes.values()), tuple(axes)
        _known[key] = _Groups(world, init_device_mesh(device_type, sizes, mesh_dim_names=names))
    return _known[key]


@atexit.register
def _close() -> None:
    for groups in _known.values():
        groups.forget()
    _known.clear()


def _shut_down() -> None:
    """End torch.distributed at exit, unless the process ends by an exception.

    Then the other ranks may be inside a collective that this rank will never join,
    and an orderly shutdown would wait for them instead of letting torchrun report the error.
    """
    _close()
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        dist.destroy_process_group()
