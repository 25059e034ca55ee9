"""Graphs in stages: one after another they are the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import encoder_decoder, llama
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from shardwright.ir.graph.check import check_graph
from shardwright.ir.passes.stages import (
    Stage,
    cut_into_stages,
    layer_count,
    shared_params,
    stage_params,
)
from shardwright.ir.reference.interpret import interpret


class Layer(nn.Module):
    """Two products, and what the model was given first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, scale: Tensor, first: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * scale + first


class Tied(nn.Module):
    """Layers with one table of tokens at both ends; each adds what the first embedding was."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        first = x * 0.5
        scale = torch.arange(8, dtype=torch.float32).cos()
        for layer in self.layers:
            x = layer(x, scale, first)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _tied() -> tuple[nn.Module, dict[str, Any]]:
    ids = torch.arange(12).view(2, 6) % 16
    return Tied(), {"ids": ids, "labels": ids.roll(1, 1)}


def _example(module: Any) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return module.build_model(), module.example_inputs(2, 8)


def _run(stages: Sequence[Stage], state: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
    """Each stage on what the one before gives; the outputs of the last."""
    sent: dict[str, Tensor] = {}
    found: dict[Any, Tensor] = {}
    for stage in stages:
        check_graph(stage.graph)
        first = dict(stage.first)
        own = dict(state)
        for loop in stage.graph.loops:
            at = first[loop.path]
            for index in range(len(loop.order)):
                here, there = f"{loop.path}.{index}.", f"{loop.path}.{at + index}."
                own |= {
                    here + name.removeprefix(there): x
                    for name, x in state.items()
                    if name.startswith(there)
                }
        found = interpret(stage.graph, own, {**inputs, **sent})
        assert set(stage.taken) == set(sent)
        sent = {str(path[0]): x for path, x in found.items()} if stage is not stages[-1] else sent
    return found


@pytest.mark.parametrize(
    "make", [lambda: _example(llama), _tied, lambda: _example(encoder_decoder)]
)
def test_stages_one_after_another_are_the_graph(make: Any) -> None:
    model, inputs = make()
    graph: Graph = capture_folded(model, inputs, training=True)
    state = dict(model.state_dict())
    trained = {name: x for name, x in model.named_parameters()}
    want = interpret(graph, {**state, **trained}, inputs)
    count = layer_count(graph)
    assert count >= 4
    for layers in ([count], [2, count - 2], [1, count - 2, 1], [1] * count):
        stages = cut_into_stages(graph, layers)
        assert [sum(len(each.order) for each in s.graph.loops) for s in stages] == layers
        got = _run(stages, {**state, **trained}, inputs)
        assert got.keys() == want.keys()
        for path, x in want.items():
            assert torch.equal(got[path], x), (layers, path)
        names = {p.name for s in stages for p in stage_params(s) if p.kind == "parameter"}
        assert names == set(trained)


def test_what_is_made_of_inputs_alone_is_made_again_and_not_sent() -> None:
    model, inputs = _example(llama)
    first, last = cut_into_stages(capture_folded(model, inputs, training=True), [1, 3])
    assert (first.taken, first.given) == ((), ("hidden_states",))
    assert (last.taken, last.given) == (("hidden_states",), ())
    assert [each.name for each in last.graph.inputs] == ["hidden_states", "labels"]
    assert last.first == (("layers", 1),)


def test_what_later_layers_use_is_passed_on_from_stage_to_stage() -> None:
    model, inputs = _tied()
    stages = cut_into_stages(capture_folded(model, inputs, training=True), [1, 1, 1, 1])
    assert [stage.given for stage in stages[:3]] == [("hidden_states", "passed_1")] * 3
    assert stages[1].graph == stages[2].graph  # one kind
    assert shared_params(stages) == {"embed.weight": (0, 3)}


def test_parameters_that_nothing_uses_are_in_a_stage() -> None:
    """Checkpoints have them."""
    model, inputs = _tied()
    model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    graph = capture_folded(model, inputs, training=True)
    stages = cut_into_stages(graph, (2, 2))
    found = [{param.name for param in stage_params(stage)} for stage in stages]
    assert found[0] | found[1] >= dict(model.named_parameters()).keys()
    assert "spare" in found[0] - found[1]


def test_more_stages_than_layers_are_refused() -> None:
    model, inputs = _tied()
    graph = capture_folded(model, inputs, training=True)
    assert layer_count(graph) == 4
    with pytest.raises(ValueError, match="Tied has 4 repeated layers, which 5 stages of 1"):
        cut_into_stages(graph, [1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="each stage has one or more"):
        cut_into_stages(graph, [4, 0])
