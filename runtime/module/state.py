"""The tensors of a module and those of the original model: in from checkpoints, and out again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...facts.blocks import blocks, local_shape
from ...facts.spec import is_shard, parse_spec
from ..mesh.mesh import Mesh, stable_seed
from ..mesh.parts import gather_whole
from ..training.pieces import Box, Piece, Whole
from .checkpoint import Experts, OwnNames, Source, StateDict, Writer
from .parameters import Original, Param
from .tree import find, owner_of


@dataclass(frozen=True, slots=True)
class State:
    """What a rank holds, under the names of `table` in `root`, of the tensors `originals`."""

    root: nn.Module
    table: Mapping[str, Param]
    originals: Mapping[str, Original]
    mesh: Mesh

    def local(self, name: str) -> Tensor:
        """This rank's slice of the parameter, buffer or constant of that name."""
        if name not in self.table and name in self.originals:
            parts = ", ".join(self.originals[name].params)
            raise KeyError(f"this module keeps `{name}` in parts: {parts}")
        return find(self.root, name)

    # --- in --------------------------------------------------------------------------------------

    def register(self, shared: State | None) -> None:
        """Make the tensors, zeros but for constants; or take those of `shared`.

        Raises ValueError where a layer has made one already, of another shape.
        """
        for name, param in self.table.items():
            tensor = self._made(name, param) if shared is None else shared.local(name)
            aliases = param.aliases if param.part is None else ()
            for key in (name, *aliases):
                owner, leaf = owner_of(self.root, key)
                if isinstance(tensor, nn.Parameter):
                    owner.register_parameter(leaf, tensor)
                else:
                    owner.register_buffer(leaf, tensor, persistent=param.kind == "buffer")
            if param.kind == "constant" and shared is None:
                data = torch.tensor(param.data, dtype=param.dtype).reshape(param.shape)
                self._fill(name, StateDict({name: data}), name)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """This rank's slices of full tensors, under the names of the original or similar ones.

        Raises ValueError listing everything that is missing, unexpected, given twice or of the
        wrong shape; then, one by one, what has the wrong dtype or differs from what it is tied to.
        """
        wanted = {n: o for n, o in self.originals.items() if o.kind != "constant"}
        named = OwnNames(source, wanted)
        given = set(named.names())
        keys = {
            name: [key for key in (name, *original.aliases) if key in given]
            for name, original in wanted.items()
        }
        problems = self._problems(named, keys)
        if problems:
            raise ValueError(
                f"{source.title} does not fit this module ({len(problems)} problems):\n  "
                + "\n  ".join(problems)
            )
        for name, (first, *others) in keys.items():
            self._fill(name, named, first)
            for key in others:
                self._check_tied(name, named, key)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Random weights that depend on `seed` and original names alone, not on mesh or specs.

        Matrices are normal with variance 1 / (last dim), vectors near 1, biases near 0.  Buffers
        are zero.
        """
        for name, original in self.originals.items():
            if original.kind == "constant":
                continue
            shape, dtype = original.shape, original.dtype
            whole = torch.zeros(shape, dtype=dtype, device=self.mesh.device)
            if original.kind == "parameter" and _continuous(dtype):
                generator = torch.Generator(self.mesh.device)
                generator.manual_seed(stable_seed(seed, name))
                spread = 0.02 if len(shape) < 2 else shape[-1] ** -0.5
                whole.normal_(0.0, spread, generator=generator)
                if len(shape) < 2 and not name.endswith("bias"):
                    whole += 1.0
            self._fill(name, StateDict({name: whole}), name)

    def _made(self, name: str, param: Param) -> Tensor:
        """The tensor that a layer has made for `name`, else a new one."""
        shape = local_shape(param.shape, parse_spec(param.spec), self.mesh.sizes)
        owner, leaf = owner_of(self.root, name)
        present: Tensor | None = getattr(owner, leaf, None)
        if present is not None:
            if tuple(present.shape) != shape:
                raise ValueError(
                    f"`{name}` was built with shape {tuple(present.shape)}, not {shape}"
                )
            return present
        tensor = torch.zeros(shape, dtype=param.dtype, device=self.mesh.device)
        if param.kind != "parameter":
            return tensor
        trained = param.trainable and _continuous(param.dtype)
        return nn.Parameter(tensor, requires_grad=trained)

    def _problems(self, source: OwnNames, keys: Mapping[str, Sequence[str]]) -> list[str]:
        """What stands in the way of loading the originals from their `keys`."""
        known = {key for name in keys for key in (name, *self.originals[name].aliases)}
        problems = [f"missing: {name}" for name, found in keys.items() if not found]
        problems += source.problems
        for key in sorted(set(source.names()) - known):
            constant = key in self.originals
            reason = " (the plan holds its values; leave it out)" if constant else ""
            problems.append(f"unexpected: {key}{reason}")
        for name, found in keys.items():
            wanted = self.originals[name].shape
            shapes = {key: source.shape(key) for key in found}
            problems += [
                f"wrong shape: {key} is {shape}, the plan has {wanted}"
                for key, shape in shapes.items()
                if shape != wanted
            ]
        return problems

    @torch.no_grad()
    def _fill(self, name: str, source: Source, key: str) -> None:
        """Copy this rank's slices of `key` into what holds the original `name`; padding is 0."""
        for part in self.originals[name].params:
            param, local = self.table[part], self.local(part)
            own = source.read(key, self._slices(param))
            kinds = [(t.is_floating_point, t.is_complex) for t in (own.dtype, param.dtype)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"{source.title}: {key} is {own.dtype}, the plan has {param.dtype}"
                )
            local.zero_()
            local[tuple(slice(0, rows) for rows in own.shape)] = own.to(local.device)

    def update(self, wholes: Mapping[str, Tensor]) -> None:
        """Give buffers and parameters whole new values, of which this rank keeps its slices.

        Buffers are new tensors: backward may need what was in the old ones, or bring it again.
        Parameters stay, as optimizers know them: they were read after they changed.
        """
        for name, whole in wholes.items():
            if self.originals[name].kind == "parameter":
                self._fill(name, StateDict({name: whole.detach()}), name)
                continue
            fresh = torch.empty_like(self.local(name))
            for key in (name, *self.table[name].aliases):
                setattr(*owner_of(self.root, key), fresh)
            self._fill(name, StateDict({name: whole.detach()}), name)

    def _check_tied(self, name: str, source: Source, key: str) -> None:
        for part in self.originals[name].params:
            own = source.read(key, self._slices(self.table[part]))
            local = self.local(part)[tuple(slice(0, rows) for rows in own.shape)]
            if not torch.equal(local, own.to(local)):
                raise ValueError(
                    f"{source.title}: {key} and {name} are one tensor in this module but differ "
                    "there"
                )

    def _slices(self, param: Param, coordinates: tuple[int, ...] | None = None) -> Box:
        """What this rank, or that at `coordinates`, holds of the original tensor that `param` is,
        or is part of."""
        spec, place = parse_spec(param.spec), coordinates or self.mesh.coordinates
        own = blocks(param.shape, spec, self.mesh.sizes, place)
        first = [0] * len(own)
        if param.part is not None:
            first[param.part.dim] = param.part.start
        return tuple(slice(n + b.start, n + b.stop) for n, b in zip(first, own, strict=True))

    # --- out -------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """What this rank holds of each parameter and persistent buffer."""
        return [
            self._piece(name, original, part)
            for name, original in self.originals.items()
            if original.kind != "constant"
            for part in original.params
        ]

    def wholes(self, names: Collection[str]) -> list[Whole]:
        """The trained parameters of those names that are here, as the mesh's ranks hold them."""
        return [
            self._whole(name, original)
            for name, original in self.originals.items()
            if name in names and any(self.local(part).requires_grad for part in original.params)
        ]

    def _whole(self, name: str, original: Original) -> Whole:
        params = [self.table[part] for part in original.params]
        specs = [parse_spec(param.spec) for param in params]
        return Whole(
            tuple(self._piece(name, original, part) for part in original.params),
            tuple(tuple(self._slices(p, place) for p in params) for place in self.mesh.places),
            tuple(
                tuple(axis for axis, state in enumerate(spec) if not is_shard(state))
                for spec in specs
            ),
            self.mesh.places,
        )

    def _piece(self, name: str, original: Original, part: str) -> Piece:
        param = self.table[part]
        own, spec = self._slices(param), parse_spec(param.spec)
        copy, copies = 0, 1
        for state, size, index in zip(spec, self.mesh.sizes, self.mesh.coordinates, strict=True):
            if not is_shard(state):
                copy, copies = copy * size + index, copies * size
        offsets = tuple(rows.start for rows in own)
        sizes = tuple(rows.stop - rows.start for rows in own)
        axes = zip(self.mesh.names, spec, strict=True)
        copied = tuple(axis for axis, state in axes if not is_shard(state))
        tensor = self.local(part)
        return Piece(name, tensor, original.shape, offsets, sizes, copies, copy, copied)

    @torch.no_grad()
    def full(self, experts: Experts) -> dict[str, Tensor]:
        """Original names (aliases too) -> full tensors, on this rank's device."""
        writer = Writer(self.originals, experts)
        tensors: dict[str, Tensor] = {}
        for name, original in self.originals.items():
            if original.kind == "constant":
                continue
            whole = self.whole(name)
            for key in (name, *original.aliases):
                tensors.update(writer.tensors(key, whole))
        return tensors

    @torch.no_grad()
    def whole(self, name: str) -> Tensor:
        """One full tensor of the original, on this rank's device."""
        original = self.originals[name]
        parts = [self.local(part).detach() for part in original.params]
        return self._gather(parts, original)

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor | None]:
        """Original names -> full gradients; None for parameters that have none."""
        gradients: dict[str, Tensor | None] = {}
        for name, original in self.originals.items():
            if original.kind != "parameter":
                continue
            local = [self.local(part) for part in original.params]
            if all(part.grad is None for part in local):
                gradients[name] = None
                continue
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in local]
            gradients[name] = self._gather(parts, original)
        return gradients

    def _gather(self, local: Sequence[Tensor], original: Original) -> Tensor:
        """The whole tensor from this rank's slices of its parts."""
        params = [self.table[name] for name in original.params]
        wholes = [
            gather_whole(x, parse_spec(param.spec), param.shape, self.mesh)
            for x, param in zip(local, params, strict=True)
        ]
        return torch.cat(wholes, original.dim) if len(wholes) > 1 else wholes[0]


class Gathered:
    """Full tensors of a module, a source for another on the same ranks: each in turn is gathered.

    All ranks read the same names in the same order.
    """

    def __init__(self, state: State) -> None:
        self.title = "the module that is loaded from"
        self._state = state
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        """All names, one for each tensor."""
        return [n for n, original in self._state.originals.items() if original.kind != "constant"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one full tensor."""
        return self._state.originals[name].shape

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A view of the slice, of a tensor that stays until another one is read."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._state.whole(name)
        return self._last[1][slices]


def _continuous(dtype: torch.dtype) -> bool:
    """Real or complex numbers, which are trained."""
    return dtype.is_floating_point or dtype.is_complex
