"""The stages of a pipelined module: their tables, and how one runs on a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...facts.blocks import local_shape
from ...facts.spec import parse_spec
from ..mesh.batches import Input, look_up
from ..mesh.rows import data_axes, shard_rows
from ..module.module import ShardedModule
from ..module.parameters import Param
from ..training.step import WideGradients, loss_of
from .messages import Form


@dataclass(frozen=True, slots=True)
class Stage:
    """A row of the table of stages.

    `first` has by path of layers which of the model's layers the stage's own begin with.  `taken`
    are the inputs that the stage before sends, of which those in `constant` get no gradient back;
    `given` the outputs that go to the next one.
    """

    runs: type[ShardedModule]
    first: Mapping[str, int]
    taken: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()

    def module_class(self) -> type[ShardedModule]:
        """The class of the stage, with the names that its tensors have in the whole model."""
        moved = {path: n for path, n in self.first.items() if n}
        return _with_names(self.runs, moved) if moved else self.runs

    @property
    def own_inputs(self) -> dict[str, Input]:
        """The inputs that are the model's own."""
        return {name: x for name, x in self.runs.INPUTS.items() if name not in self.taken}

    @property
    def rows_over(self) -> list[int] | None:
        """Numbers of the mesh axes that cut the rows of its inputs; None where it has none."""
        own = {name: x for name, x in self.own_inputs.items() if 0 in x.free}
        return data_axes(own) if own else None

    def forms(self, names: Sequence[str]) -> list[Form]:
        """What these taken tensors are on each rank."""
        sizes = tuple(self.runs.MESH.values())
        rows = [self.runs.INPUTS[name] for name in names]
        return [Form(local_shape(x.shape, parse_spec(x.spec), sizes), x.dtype) for x in rows]

    @property
    def with_gradient(self) -> tuple[str, ...]:
        """What is taken of which a gradient goes back."""
        return tuple(name for name in self.taken if name not in self.constant)


def _with_names(runs: type[ShardedModule], moved: Mapping[str, int]) -> type[ShardedModule]:
    """A stage's class whose layers have other numbers than those that are written."""
    table = {
        _moved(name, moved): _moved_param(param, moved) for name, param in runs.PARAMETERS.items()
    }
    caches = {_moved(name, moved): cache for name, cache in runs.CACHES.items()}
    others = tuple(_moved(name, moved) for name in runs.NOT_MATRICES)
    named: dict[str, Any] = {
        "PARAMETERS": table, "NOT_MATRICES": others, "CACHES": caches, "FIRST_LAYERS": moved,
    }  # fmt: skip
    if runs.DECODE is not None:
        named["DECODE"] = _with_names(runs.DECODE, moved)
    return type(runs.__name__, (runs,), named)


def _moved(name: str, first: Mapping[str, int]) -> str:
    for path, number in first.items():
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            return f"{path}.{int(index) + number}.{rest}"
    return name


def _moved_param(param: Param, first: Mapping[str, int]) -> Param:
    aliases = tuple(_moved(alias, first) for alias in param.aliases)
    part = param.part and replace(param.part, name=_moved(param.part.name, first))
    return replace(param, aliases=aliases, part=part)


@dataclass(slots=True)
class _Running:
    """A micro-batch that waits for its backward."""

    taken: dict[str, Tensor]
    given: dict[str, Tensor]
    loss: Tensor | None


class RunningStage:
    """One stage of this rank, in one step."""

    def __init__(
        self, row: Stage, module: ShardedModule, following: Stage | None, *, trains: bool
    ) -> None:
        """`following`: the next stage, if there is one; `trains`: a backward comes."""
        self.row = row
        self.module = module
        self.last, self._trains = following is None, trains
        self._returned = () if following is None else following.with_gradient
        self._wide = WideGradients(tuple(module.parameters()))
        self._running: dict[int, _Running] = {}
        self.losses: list[Tensor] = []  # of micro-batches that have run forward, in a last stage

    def forward(
        self, batch: int, taken: Sequence[Tensor], rows: Mapping[str, Any], axes: Sequence[int]
    ) -> list[Tensor]:
        """Of a micro-batch with these rows of this rank; what goes to the next stage."""
        module, row = self.module, self.row
        inputs = dict(zip(row.taken, taken, strict=True))
        for name in row.with_gradient if self._trains else ():
            inputs[name].requires_grad_()
        own, local = {name: rows[name] for name in row.own_inputs}, dict[str, Any]()
        if own:
            local = shard_rows(row.own_inputs, own, module.mesh, module.FIXED, axes)
        out = module(**inputs, **local)
        given = {name: look_up(out, (name,)) for name in row.given}
        loss = loss_of(module.OUTPUTS, out, trains=self._trains) if self.last else None
        self.losses += [] if loss is None else [loss.detach()]
        if self._trains:
            self._running[batch] = _Running(inputs, given, loss)
        return list(given.values())

    def backward(self, batch: int, gradients: Sequence[Tensor], count: int) -> list[Tensor]:
        """Of a micro-batch of `count`, from gradients of what it gave; those of what it took."""
        running = self._running.pop(batch)
        if running.loss is not None:
            (running.loss / count).backward()
        else:
            wanted = [running.given[name] for name in self._returned]
            pairs = [(x, g) for x, g in zip(wanted, gradients, strict=True) if x.requires_grad]
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        found: list[Tensor] = []
        for name in self.row.with_gradient:
            x = running.taken[name]
            found.append(torch.zeros_like(x) if x.grad is None else x.grad)
        self._wide.take()
        return found

    def end(self) -> None:
        """The sums of gradients are in `.grad`."""
        self._wide.put_back()


__all__ = ["RunningStage", "Stage"]
