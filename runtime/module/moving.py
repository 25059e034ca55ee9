"""Which weights of a model move for which layer, and whether the model is still as planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import nn

from ...facts.spec import P, Spec, V, parse_spec
from ..gathering.chains import chains
from ..gathering.schedule import Schedule
from ..gathering.weights import Home, Item, Unit, Ways, Weight
from ..mesh.mesh import Mesh
from .layers import Layer
from .parameters import Param


def make_schedule(
    model: nn.Module,
    mesh: Mesh,
    parameters: Mapping[str, Param],
    weights: Mapping[str, Weight],
    paths: Iterable[str],
    reduced: torch.dtype | None = None,
    numbers: Mapping[str, int] = MappingProxyType({}),
) -> Schedule:
    """The units of a model whose loops run the layers under `paths`; its layers bring theirs.

    `numbers` has by path the number of the first of its layers, where that is not 0.

    `parameters` is the table of the whole model, `weights` that of what is in no layer; gradients
    are reduced in dtype `reduced` (None: that in which they come).
    """
    item = partial(_item, parameters=parameters, mesh=mesh, reduced=reduced)
    loops = [list(model.get_submodule(path).children()) for path in paths]
    stages: list[list[tuple[Item, int]]] = [[] for _ in range(len(loops) + 1)]
    for name, weight in weights.items():
        first, last = weight.stages
        if not (one := item(model, "", name, weight)).is_plain:
            stages[first].append((one, last))
    units: list[list[Unit]] = []
    for path, layers in zip(paths, loops, strict=True):
        units.append([])
        for index, layer in enumerate(layers, numbers.get(path, 0)):
            assert isinstance(layer, Layer)
            prefix, rows = f"{path}.{index}.", layer.WEIGHTS.items()
            unit = (item(layer, prefix, name, weight) for name, weight in rows)
            units[-1].append(tuple(one for one in unit if not one.is_plain))
    if not any((*stages, *(unit for loop in units for unit in loop))):
        return Schedule([[]], [])  # nothing comes or goes, so no layer need say when it runs
    schedule = Schedule(stages, units, mesh.everywhere)
    for loop, layers in enumerate(loops):
        for index, layer in enumerate(layers):
            assert isinstance(layer, Layer)
            layer.bring_weights(partial(schedule.layer, loop, index))
    return schedule


def _item(
    root: nn.Module,
    prefix: str,
    name: str,
    weight: Weight,
    *,
    parameters: Mapping[str, Param],
    mesh: Mesh,
    reduced: torch.dtype | None,
) -> Item:
    """A row of the table of `root`, whose own name in the model is `prefix`."""
    stored = weight.of or name
    param = parameters[prefix + stored]
    if param.spec != weight.stored:
        raise ValueError(
            f"`{prefix}{stored}` is stored as {param.spec} in PARAMETERS but as {weight.stored} in"
            " WEIGHTS"
        )
    home = weight.home or Home(weight.stored, kept=False)
    to_home = _path(weight.stored, home.via, home.spec)
    to_use = _path(home.spec, weight.via, weight.used)
    steps = [states for step in pairwise([*to_home, *to_use]) for states in zip(*step, strict=True)]
    if any(a == P != b for a, b in steps):  # sums of several weights would lie in one storage
        raise ValueError(f"`{prefix}{name}` comes by way of partial sums: {weight}")
    if any(b not in (a, V) for a, b in zip(to_home[0], to_home[-1], strict=True)):
        raise ValueError(
            f"`{prefix}{name}` is at home as {home.spec}, stored as {weight.stored}: a home is on"
            " each axis as the parameter is stored, or V"
        )
    used = weight.dtype or param.dtype
    back = used if used.is_complex else reduced
    shape = param.shape
    there, from_home = chains(to_home, shape, used, mesh, home.by, back)
    onward, from_use = chains(to_use, shape, used, mesh, weight.by, back)
    if weight.home is not None and not home.kept and any(leg.collective for leg in there):
        raise ValueError(
            f"`{prefix}{name}` is made at each use of what is stored as {weight.stored}, but ranks"
            f" exchange it on the way home to {home.spec}: keep it there, or give it no home"
        )
    ways = Ways(there, onward, from_use, from_home, weight.dtype, back)
    return Item(_place(root, stored), _place(root, name), ways, home.kept, home.late)


def _path(first: str, via: Sequence[str], last: str) -> list[Spec]:
    return [parse_spec(spec) for spec in (first, *via, last)]


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


class AsPlanned:
    """The parameters of a model, and the modules that hold them, when it was made."""

    def __init__(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._owners = {name: _place(model, name)[0] for name in names}

    def refuse_changes(self, model: nn.Module) -> None:
        """Raises ValueError naming every parameter that has come, gone or changed hands."""
        now = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        modules = dict(model.named_modules(remove_duplicate=False))
        problems = [f"`{name}` is new" for name in now if name not in self._owners]
        for name, owner in self._owners.items():
            path = name.rpartition(".")[0]
            found = modules.get(path)
            if found is not owner:
                what = "gone" if found is None else f"a new {type(found).__name__}"
                problems.append(f"`{path}` is {what}")
            elif name not in now:
                problems.append(f"`{name}` is gone")
        if problems:
            raise ValueError(
                "this module is not as it was planned, so that the layout of its weights is not"
                " known; change the original model (adapters, too) and plan again:\n  "
                + "\n  ".join(dict.fromkeys(problems))
            )
