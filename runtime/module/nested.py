"""Modules inside generated modules: the user's own, each a class that names what it holds.

    class DecoderLayer(Sharded):
        attention: Attention
        gate: nn.Linear

An annotation with a class of modules is a declaration: each `DecoderLayer` has an `Attention` and
a linear layer of its own under these names.  `MODULES` does the same for paths that are no names,
such as `experts.3`; `OPTIONS` has what torch's own modules are told, such as the eps of a norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..mesh.mesh import Mesh
from .leaves import LEAVES
from .tree import owner_of


class Sharded(nn.Module):
    """A module of the user's as one rank runs it.

    Its parameters are registered by the model that owns it.
    """

    MODULES: ClassVar[Mapping[str, type[nn.Module]]] = {}
    OPTIONS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        install_modules(self, mesh)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.mesh.device

    def generator(self, *sharded_axes: str) -> torch.Generator:
        """Random numbers that differ along `sharded_axes` and agree along all others."""
        return self.mesh.generator(sharded_axes)


def install_modules(module: nn.Module, mesh: Mesh) -> None:
    """Give `module` the modules that its class, or one that it inherits from, declares."""
    declared: dict[str, object] = {}
    options: dict[str, Mapping[str, Any]] = {}
    for cls in reversed(type(module).__mro__):
        declared |= inspect.get_annotations(cls) | dict(cls.__dict__.get("MODULES", {}))
        options |= dict(cls.__dict__.get("OPTIONS", {}))
    for path, kind in declared.items():
        if not isinstance(kind, type):
            continue
        owner, leaf = owner_of(module, path)
        if issubclass(kind, Sharded):
            owner.add_module(leaf, kind(mesh))
        elif kind in LEAVES:
            owner.add_module(leaf, LEAVES[kind](**options.get(path, {})))
