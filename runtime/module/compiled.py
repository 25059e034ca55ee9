"""Layers as compiled graphs: one for each class of layers, made when the first of them runs.

Weights move outside of what is compiled, and so do all layers of a class run the same graph.
Collectives of activations are inside.  The routing of experts, random draws and states of earlier
tokens are in no graph: a layer that has them is cut there, and what is between them compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from ...compat.torch import compile_failures
from ..mesh.opaque import breaks
from .layers import Layer

Backend: TypeAlias = str | Callable[..., Any]


def compile_layers(model: nn.Module, backend: Backend, *, fullgraph: bool) -> None:
    """Let every layer of `model` run compiled, by a backend of `torch.compile`.

    Raises ValueError if the model has no layers.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Layer)}
    if not layers:
        raise ValueError(
            "this module has no repeated layers that could be compiled; compile the modules in it"
            " with `torch.compile`"
        )
    for path, layer in layers.items():
        cut = bool(breaks_of(layer))
        layer.compile_forward(parts=not cut, backend=backend, fullgraph=fullgraph and not cut)
        layer.explain_failures(_explained(path, type(layer).__name__))


def by_default(device: torch.device) -> bool:
    """Are layers compiled where nobody says whether they should be?"""
    return device.type == "cuda"


def breaks_of(layer: nn.Module) -> set[str]:
    """For what a layer is cut in several graphs: what its modules call that no graph holds."""
    called = {name for m in layer.modules() for name in _names(type(m).forward)}
    return {breaks[name] for name in called & breaks.keys()}


def _names(forward: Any) -> tuple[str, ...]:
    code = getattr(forward, "__code__", None)  # what is written in C has none
    return () if code is None else code.co_names


def _explained(path: str, name: str) -> Callable[[], Any]:
    @contextmanager
    def around() -> Generator[None]:
        try:
            yield
        except compile_failures() as error:
            said = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"the layer `{path}` ({name}) can't be compiled: {said}; with compile=False, where"
                " the module is made, it runs as it is (--eager in a demonstration), and"
                " compile_layers(fullgraph=False) compiles what can be"
            ) from error

    return around


__all__ = ["Backend", "compile_layers"]
