"""Functions that a model calls are functions of its generated module, where they can be."""

from __future__ import annotations

import ast
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardwright.facts.mesh import Mesh
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph.serialize import graph_from_json, graph_to_json
from shardwright.planner.strategies.roles import Roles
from shardwright.runtime import RankPool
from tests.endtoend.test_families import planned
from tests.sharded import builder_of, check, mesh_of, random_decisions, reference, source_of

Pool = Callable[[int], RankPool]
WIDTH = 8


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def squash(x: Tensor, gate: Tensor) -> Tensor:
    y = torch.tanh(gate) * x
    return y / (1 + y.abs())


def halves(x: Tensor, turn: float = 0.5) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, -1)
    return squash(a, b), a * b.cos() * turn


def mean_free(x: Tensor) -> Tensor:  # its sum goes over ranks
    return (x - x.mean(-1, keepdim=True)) * x.std(-1, keepdim=True)


def weighted(x: Tensor, weight: Tensor) -> Tensor:  # a parameter is no tensor that it is given
    return (x @ weight).relu() + x


def both(x: Tensor, y: Tensor) -> Tensor:
    return x.sigmoid() * y.tanh()


JOIN: dict[str, Callable[[list[Tensor]], Tensor]] = {"both": lambda parts: both(*parts)}


class Model(nn.Module):
    """Calls them in layers, twice, in one another, in a comprehension and in a lambda."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, c)
        x = weighted(mean_free(x), self.weight)
        first, second = halves(x)
        parts = [both(part, part) for part in (first, second)]
        return JOIN["both"](parts).square().mean()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cond = nn.Linear(WIDTH, 2 * WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.cond(c).chunk(2, -1)
        h = modulate(x, shift, scale)
        return x + self.down(squash(self.up(h), self.gate(h)))


def captured() -> tuple[Model, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Model().double()
    return model, {
        "x": torch.randn(4, 6, WIDTH, dtype=torch.float64),
        "c": torch.randn(4, WIDTH, dtype=torch.float64),
    }


def functions_of(source: str) -> dict[str, str]:
    """By name, the text of each function of a module, without its docstring."""
    tree = ast.parse(source)
    found = [item for item in tree.body if isinstance(item, ast.FunctionDef)]
    return {
        item.name: "\n".join([ast.unparse(item.args), *map(ast.unparse, item.body[1:])])
        for item in found
    }


def test_they_read_as_the_users() -> None:
    """With its names, arguments in its order; what needs ranks or weights stays where it is."""
    model, inputs = captured()
    graph, mesh = capture_folded(model, inputs, training=True), Mesh((("dp", 2),))
    builder = builder_of(graph, mesh)
    source = source_of(builder, planned(builder, Roles(("ddp",), graph, mesh)))
    assert functions_of(source) == {
        "modulate": "x: Tensor, shift: Tensor, scale: Tensor\n"
        "return x * (scale.unsqueeze(1) + 1) + shift.unsqueeze(1)",
        "squash": "x: Tensor, gate: Tensor\n"
        "y = torch.tanh(gate) * x\nreturn y / (torch.abs(y) + 1)",
        "mean_free": "x: Tensor\nreturn (x - x.mean(-1, keepdim=True)) * x.std(-1, keepdim=True)",
        "halves": "x: Tensor\n"
        "a, b = x.chunk(2, dim=-1)\nreturn (squash(a, b), a * torch.cos(b) * 0.5)",
    }
    assert (
        "h = modulate(x, shift, scale)" in source and "squash(self.up(h), self.gate(h))" in source
    )
    assert "first, second = halves(x)" in source


def test_ranks_compute_what_the_model_does(pool: Pool) -> None:
    """Under any decisions; a function that ranks have to talk in is written where it is called."""
    model, inputs = captured()
    graph = capture_folded(model, inputs, training=True)
    builder = builder_of(graph, mesh_of(2, 2))
    params = dict(model.named_parameters())
    expected = reference(graph, params, inputs)
    loss = model(**inputs)
    assert torch.allclose(next(iter(expected[0].values())), loss)
    for seed in range(2):
        decisions = random_decisions(builder, seed)
        check(pool(4), builder, decisions, params, inputs, expected, tolerance=1e-9)


def test_they_are_kept_with_the_plan() -> None:
    model, inputs = captured()
    graph = capture_folded(model, inputs, training=True)
    called = {call.name for node in graph.nodes for call in node.loc.functions}
    assert called >= {"modulate", "squash", "halves", "mean_free", "weighted"}
    assert graph_from_json(graph_to_json(graph)) == graph
