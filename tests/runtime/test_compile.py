"""When the layers of a module are compiled, and what is said where they can't be."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.runtime import Layer, ShardedModule
from shardwright.runtime.module.compiled import by_default


class Doubling(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Cut(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if bool(x.sum() > 0) else 3)


class Model(ShardedModule):
    MESH = {"dp": 1}
    PARAMETERS = {}
    INPUTS = {}
    OUTPUTS = ()
    LAYERS = {"layers": [Doubling] * 3}
    layers: nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class CutModel(Model):
    LAYERS = {"layers": [Doubling, Cut]}


def compiled() -> tuple[Model, list[Any]]:
    """A compiled model, and the graphs of its layers, which it makes when they run."""
    torch.compiler.reset()
    model, graphs = Model(), list[Any]()

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile_layers(backend)
    return model, graphs


def test_layers_of_a_class_share_a_graph_also_under_hooks() -> None:
    model, graphs = compiled()
    x = torch.ones(2)
    assert torch.equal(model(x), 8 * x)
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda m, _: seen.append(m))
    try:
        assert torch.equal(model(x), 8 * x)
    finally:
        hook.remove()
    assert len(graphs) == 1 and model.layers[2] in seen


def test_a_copy_is_not_compiled() -> None:
    model, graphs = compiled()
    copy = deepcopy(model)
    x = torch.ones(2)
    assert torch.equal(copy(x), 8 * x) and not graphs
    model(x)
    assert len(graphs) == 1


def test_by_default_on_cuda_alone() -> None:
    assert by_default(torch.device("cuda", 0)) and not by_default(torch.device("cpu"))
    torch.compiler.reset()
    assert torch.equal(CutModel()(torch.ones(2)), 4 * torch.ones(2))


def test_a_layer_that_cannot_be_compiled_says_so() -> None:
    torch.compiler.reset()
    model = CutModel(compile=False)
    model.compile_layers("eager")
    with pytest.raises(
        RuntimeError, match=r"layer `layers.1` \(Cut\) can't be compiled: .* with compile=False"
    ):
        model(torch.ones(2))
