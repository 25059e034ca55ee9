"""Dropout, tied weights, buffers and checkpoints of generated modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.unfuse import unfuse
from shardwright.runtime import RankPool
from tests.endtoend.families import build, example_module, inputs_of
from tests.sharded import (
    assert_close,
    builder_of,
    flatten,
    import_source,
    mesh_of,
    random_decisions,
    source_of,
    whole_outputs,
)

Pool = Callable[[int], RankPool]


def sources(model: nn.Module, inputs: dict[str, Tensor], seeds: range) -> list[str]:
    """Generated modules of the model on 2 x 2 ranks under random decisions."""
    graph = unfuse(fold(capture(model, inputs, training=True)))
    made = builder_of(graph, mesh_of(2, 2))
    return [source_of(made, random_decisions(made, seed)) for seed in seeds]


def outputs(source: str, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """In a rank: the last output, whole, of two training passes and of one in eval mode."""
    torch.manual_seed(0)
    model = import_source(source).ShardedModel.from_state_dict(state)
    results: list[Tensor] = []
    for training in (True, True, False):
        out = model.train(training)(**model.shard_inputs(**inputs))
        results.append(flatten(whole_outputs(model, out))[-1][1])
    return results


class Dropped(nn.Module):
    """Dropout of what a matrix product gives: 16 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48, 16))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.dropout(F.linear(hidden, self.weight), 0.25, self.training)


@pytest.mark.parametrize("seed", range(6))
def test_dropout_keeps_its_statistics(pool: Pool, seed: int) -> None:
    model, inputs = Dropped(), {"hidden": torch.ones(32, 64, 16)}
    (source,) = sources(model, inputs, range(seed, seed + 1))
    results = pool(4).run(outputs, source, model.state_dict(), inputs)
    first, second, evaluated = results[0]
    assert_close(evaluated, torch.full((32, 64, 48), 16.0), 1e-6, "eval")
    for out in (first, second):
        dropped = out == 0
        assert_close(out[~dropped], torch.full_like(out[~dropped], 16 / 0.75), 1e-6, "kept")
        assert abs(dropped.float().mean().item() - 0.25) < 0.01
        for dim in range(3):  # no rank has the mask of another
            left, right = dropped.chunk(2, dim)
            assert 0.3 < (left != right).float().mean().item() < 0.45  # 2 p (1 - p) = 0.375
    assert not torch.equal(first, second)
    for others in results[1:]:  # the same value is the same on all ranks
        assert all(torch.equal(a, b) for a, b in zip(others, results[0], strict=True))


def test_dropout_in_a_model(pool: Pool) -> None:
    example = example_module("gpt")
    torch.manual_seed(0)
    model = example.GPT(example.GPTConfig(61, 12, layers=2, heads=4, width=32, dropout=0.3))
    inputs = inputs_of("gpt")
    wanted = model.eval()(**inputs)["logits"].detach()
    for source in sources(model, inputs, range(3)):
        results = pool(4).run(outputs, source, model.state_dict(), inputs)
        first, second, evaluated = results[0]
        assert_close(evaluated, wanted, 1e-4, "eval")
        assert (first - wanted).abs().max() > 0.1 and (first - second).abs().max() > 0.1
        for others in results[1:]:
            assert_close(others[0], first, 1e-4, "the same dropout on all ranks")


class Buffered(nn.Module):
    """A persistent buffer, one that no state dict has, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.arange(1.0, 9.0))
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(self.first(hidden) * self.scale + self.shift)


def through_checkpoint(source: str, path: str, folder: str) -> dict[str, Tensor]:
    """In a rank: load the file; rank 0 writes what it has into `folder`."""
    model = import_source(source).ShardedModel.from_checkpoint(path)
    whole = model.full_state_dict()
    if model.mesh.rank == 0:
        save_file({n: t.clone() for n, t in whole.items()}, f"{folder}/again.safetensors")
    return whole


@pytest.mark.parametrize("name", ["buffered", "gpt", "gpt2", "phi3", "bert"])
@pytest.mark.some(2)
def test_state_goes_in_and_out(pool: Pool, tmp_path: Path, name: str) -> None:
    if name == "buffered":
        model, inputs = Buffered(), {"hidden": torch.randn(4, 6, 8)}
    else:
        model, inputs = build(name).float(), inputs_of(name)
    state = model.state_dict()
    path = tmp_path / "model.safetensors"
    save_file({n: t.clone() for n, t in state.items()}, path)
    for source in sources(model, inputs, range(2)):
        wholes = pool(4).run(through_checkpoint, source, str(path), str(tmp_path))
        for whole in (*wholes, load_file(tmp_path / "again.safetensors")):
            assert whole.keys() == state.keys()
            assert all(torch.equal(whole[n], t) for n, t in state.items())


def random_weights(source: str) -> dict[str, Tensor]:
    """In a rank: what `reset_parameters` gives."""
    model = import_source(source).ShardedModel()
    model.reset_parameters(seed=5)
    return model.full_state_dict()


def test_random_weights_are_the_same_whole_and_in_parts(pool: Pool) -> None:
    model, inputs = build("gpt2").float(), inputs_of("gpt2")
    whole = fold(capture(model, inputs, training=True))
    apart = unfuse(whole)
    assert apart != whole
    first, second = (pool(4).run(random_weights, one_source(graph))[0] for graph in (whole, apart))
    assert first.keys() == second.keys() == model.state_dict().keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def one_source(graph: Graph) -> str:
    """A module of the graph on 2 x 2 ranks."""
    made = builder_of(graph, mesh_of(2, 2))
    return source_of(made, random_decisions(made, 1))


class TiedInLayer(nn.Module):
    """A layer with one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class TiedInLayers(nn.Module):
    """Layers that are folded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TiedInLayer() for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_ties_inside_layers(pool: Pool, tmp_path: Path) -> None:
    model, inputs = TiedInLayers(), {"hidden": torch.randn(4, 6, 8)}
    state, path = model.state_dict(), tmp_path / "model.safetensors"
    save_file({n: t.clone() for n, t in state.items()}, path)
    (source,) = sources(model, inputs, range(1))
    assert "{0..2}" in source
    for whole in pool(4).run(through_checkpoint, source, str(path), str(tmp_path)):
        assert whole.keys() == state.keys()
        assert all(torch.equal(whole[n], t) for n, t in state.items())


def test_buffers_and_ties_compute_the_same(pool: Pool) -> None:
    model, inputs = Buffered(), {"hidden": torch.randn(4, 6, 8)}
    wanted = model(**inputs).detach()
    for source in sources(model, inputs, range(4)):
        for results in pool(4).run(outputs, source, model.state_dict(), inputs):
            assert_close(results[2], wanted, 1e-5, "output")
