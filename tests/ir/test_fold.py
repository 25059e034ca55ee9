"""Which stacks of blocks fold into loops, and that folding keeps the meaning."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture, capture_folded
from shardwright.ir.graph import Graph, Loop, Node
from shardwright.ir.passes.fold import fold
from shardwright.ir.reference.interpret import interpret

from .models import TinyGPT, batch


class Layer(nn.Module):
    """A residual block with two streams, or one that reads an extra value."""

    def __init__(self, width: int = 8, wide: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, wide)
        self.down = nn.Linear(wide, width)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.down(torch.tanh(self.up(x)))
        return x + (y if extra is None else y * extra)


class Stack(nn.Module):
    """Layers called as `kind` says."""

    def __init__(self, kind: str, layers: int = 4) -> None:
        super().__init__()
        self.kind = kind
        wide = [32 if kind == "widths" and i % 2 else 16 for i in range(layers)]
        self.layers = nn.ModuleList(Layer(wide=w) for w in wide)
        self.scales = nn.Parameter(torch.randn(layers, 8))
        self.embed = nn.Parameter(torch.randn(8), requires_grad=kind != "frozen")

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = x * self.embed
        first, seen = x, list[Tensor]()
        for i, layer in enumerate(self.layers):
            if self.kind == "outside scales":
                x = layer(x, self.scales[i])
            elif self.kind == "same scale":
                x = layer(x, self.scales)
            elif self.kind == "long skip":
                x = layer(x, first if i == 3 else None)
            else:
                x = layer(x)
            seen.append(x)
        if self.kind == "twice":
            for layer in self.layers:
                x = layer(x)
        if self.kind == "all states":
            return seen
        return x + first if self.kind == "first" else x


def graphs(model: nn.Module) -> tuple[Graph, Graph, dict[str, Tensor]]:
    width = 4 if isinstance(model, Stack) and model.kind == "same scale" else 3
    inputs = {"x": torch.randn(width, 8, dtype=torch.float64)}
    graph = capture(model, inputs, training=True)
    return graph, fold(graph), inputs


def check_folding_keeps_the_meaning(model: nn.Module) -> Graph:
    flat, folded, inputs = graphs(model)
    results: list[list[Tensor]] = []
    for graph in (flat, folded):
        state = {name: p.detach().clone() for name, p in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            state[name].requires_grad_(parameter.requires_grad)
        outputs = list(interpret(graph, state, inputs).values())
        sum(o.square().sum() for o in outputs).backward()  # type: ignore[union-attr]
        grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in state.values()]
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    return folded


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("plain", (0, 0, 0, 0)),
        ("first", (0, 0, 0, 0)),
        ("frozen", (0, 0, 0, 0)),
        ("same scale", (0, 0, 0, 0)),
        ("widths", (0, 1, 0, 1)),
        ("long skip", (0, 0, 0, 1)),
    ],
)
def test_stacks_that_fold(kind: str, order: tuple[int, ...]) -> None:
    folded = check_folding_keeps_the_meaning(Stack(kind).double())
    (loop,) = folded.loops
    assert (loop.path, loop.order) == ("layers", order)
    assert all(block.class_name == "Layer" for block in loop.blocks)
    names = [param.name for block in loop.blocks for param in block.params]
    assert names == ["up.weight", "up.bias", "down.weight", "down.bias"] * len(loop.blocks)
    assert not any(param.name.startswith("layers.") for param in folded.params)


@pytest.mark.parametrize("kind", ["outside scales", "twice", "all states"])
def test_stacks_that_stay(kind: str) -> None:
    folded = check_folding_keeps_the_meaning(Stack(kind).double())
    assert not folded.loops


def test_two_carried_values() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            memory = memory * 0.5 + self.linear(x)
            return x + torch.tanh(memory), memory

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Pair() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            memory = x * 2
            for block in self.blocks:
                x, memory = block(x, memory)
            return x * memory

    (loop,) = check_folding_keeps_the_meaning(Pairs().double()).loops
    assert (len(loop.carried), loop.order) == (2, (0, 0, 0))


def test_encoder_and_decoder_are_two_loops() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x)) @ memory.T @ memory

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(Layer() for _ in range(5))
            self.decoder = nn.ModuleList(Cross() for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            memory = x
            for layer in self.encoder:
                memory = layer(memory)
            for layer in self.decoder:
                x = layer(x, memory)
            return x

    folded = check_folding_keeps_the_meaning(Both().double())
    assert [(loop.path, len(loop.order)) for loop in folded.loops] == [
        ("encoder", 5),
        ("decoder", 6),
    ]
    encoder, decoder = folded.loops
    assert decoder.invariants == encoder.outputs
    with torch.device("meta"):
        model = Both()
    short = capture_folded(model, {"x": torch.empty(3, 8, device="meta")}, training=True)
    assert [loop.order for loop in short.loops] == [(0,) * 5, (0,) * 6]


@pytest.mark.parametrize("kind", ["outside scales", "twice", "all states", "long skip", "plain"])
def test_captured_from_few_layers_only_where_the_others_repeat(kind: str) -> None:
    with torch.device("meta"):
        model = Stack(kind, layers=6)
    inputs = {"x": torch.empty(3, 8, device="meta")}
    short = capture_folded(model, inputs, training=True)
    whole = fold(capture(model, inputs, training=True))
    assert len(short.body) == len(whole.body)
    assert [loop.order for loop in short.loops] == [loop.order for loop in whole.loops]


def test_layers_that_behave_by_their_number_are_not_cut() -> None:
    class Numbered(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return x + (torch.relu(y) if self.number % 4 == 3 else torch.tanh(y))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Numbered(i) for i in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with torch.device("meta"):
        model = Model()
    graph = capture_folded(model, {"x": torch.empty(3, 8, device="meta")}, training=True)
    assert graph.loops[0].order == (0, 0, 0, 1) * 3


def test_value_names_are_unique() -> None:
    folded = fold(capture(TinyGPT(), batch(2, 12, "ids", "labels"), training=True))
    names = [item.value.name for item in (*folded.inputs, *folded.params)]
    for item in folded.body:
        if isinstance(item, Node):
            names += [value.name for value in item.outputs]
            continue
        names += [value.name for value in item.outputs]
        for block in item.blocks:
            names += [param.value.name for param in block.params]
            names += [value.name for value in block.inputs]
            names += [value.name for node in block.nodes for value in node.outputs]
    assert len(names) == len(set(names))


def test_folding_twice_is_an_error() -> None:
    folded = fold(capture(TinyGPT(), batch(2, 12, "ids"), training=True))
    assert any(isinstance(item, Loop) for item in folded.body)
    with pytest.raises(ValueError, match="flat graph"):
        fold(folded)


def test_folding_is_fast() -> None:
    flat = capture(Stack("plain", layers=126), {"x": torch.randn(3, 8)}, training=True)
    start = time.perf_counter()
    (loop,) = fold(flat).loops
    assert len(loop.order) == 126 and time.perf_counter() - start < 1
