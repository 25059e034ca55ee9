"""Layers as compiled graphs: one for each class of layers, made when the first of them runs.

Weights move outside of what is compiled, and so do all layers of a class run the same graph.
Collectives of activations are inside.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from ...compat.torch import compile_failures
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
        layer.compile_forward(backend=backend, fullgraph=fullgraph)
        layer.explain_failures(_explained(path, type(layer).__name__))


def _explained(path: str, name: str) -> Callable[[], Any]:
    @contextmanager
    def around() -> Generator[None]:
        try:
            yield
        except compile_failures() as error:
            said = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"the layer `{path}` ({name}) can't be compiled as one graph: it runs what"
                " torch.compile can't look into (the routing of experts is such);"
                " compile_layers(fullgraph=False) may compile a part of it,"
                f" and without compile_layers it runs as it is. torch says: {said}"
            ) from error

    return around


__all__ = ["Backend", "compile_layers"]
