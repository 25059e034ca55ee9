"""Buffers and parameters that a forward pass changes: after several steps they are those of one
process."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import capture_graph
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.reference.interpret import interpret
from shardwright.loading import Loaded
from shardwright.runtime import RankPool
from tests.sharded import (
    assert_close,
    builder_of,
    flatten,
    import_source,
    mesh_of,
    random_decisions,
    source_of,
    whole_outputs,
    widened,
)

Pool = Callable[[int], RankPool]
BATCH, TOKENS, WIDTH, STEPS = 4, 8, 8, 3


class Norms(nn.Module):
    """Batch norms over (b, c) and (b, c, s), with and without weights, two in equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))
        self.flat, self.up = nn.BatchNorm1d(WIDTH, affine=False, momentum=0.3), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2)
        for norm in self.layers:
            x = x + torch.tanh(norm(x))
        return x + self.flat(x.mean(-1))[..., None]


class Averages(nn.Module):
    """An exponential moving average, changed in place and read afterwards, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.ones(WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        self.steps += 1
        return x * self.average + x / self.steps


class Table(nn.Module):
    """A table whose rows are filled as they are seen, and a buffer that is assigned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.zeros(2 * TOKENS, WIDTH))
        self.register_buffer("largest", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        self.table[: x.shape[1]] = x.detach().mean(0)
        self.largest = torch.maximum(self.largest, x.detach().amax((0, 1)))
        return x + self.table[: x.shape[1]] * self.largest


class Codebook(nn.Module):
    """Vector quantisation, whose codes follow the vectors that they stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("codes", torch.randn(16, WIDTH))
        self.register_buffer("sizes", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        rows = x.detach().flatten(0, 1)
        nearest = (rows[:, None] - self.codes).square().sum(-1).argmin(-1)
        chosen = F.one_hot(nearest, 16).to(x.dtype)
        if self.training:
            self.sizes.mul_(0.8).add_(0.2 * chosen.sum(0))
            means = chosen.t() @ rows / (chosen.sum(0)[:, None] + 1e-5)
            self.codes.lerp_(means, 0.2)
        quantised = (chosen @ self.codes).unflatten(0, x.shape[:2])
        return x + (quantised - x).detach() + 0.1 * x


class Queue(nn.Module):
    """Keys of earlier batches: read, for which backward needs them, and then changed.

    Layers share them, and a number besides.
    """

    keys: Tensor
    place: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(WIDTH, 12))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.layers = nn.ModuleList(Reading(self) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        keys, scale = self.keys.clone(), self.scale
        for layer in self.layers:
            x = x + layer(x, keys)
        with torch.no_grad():
            rows = (self.place + torch.arange(x.shape[0])) % 12
            self.keys.index_copy_(1, rows, torch.tanh(x.mean(1)).t())
            self.place.copy_((self.place + x.shape[0]) % 12)
            self.scale = 0.9 * scale + 0.1 * x.mean((0, 1))
        return x * scale


class Reading(nn.Module):
    """A layer of `Queue`, whose buffers it reads."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.scale_of = [queue]  # no part of this module

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        q = self.up(x) * self.scale_of[0].scale
        return (q @ keys).softmax(-1) @ keys.t()


class Bounded(nn.Module):
    """Parameters that are changed before they are read, whole and in part, once and twice, and one
    without a gradient that follows the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.unit, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.follows = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.weight.data.clamp_(-0.2, 0.2)
            x = x + torch.tanh(layer(x))
        with torch.no_grad():
            self.unit.weight.copy_(F.normalize(self.unit.weight, dim=1))
            self.follows.lerp_(x.mean((0, 1)), 0.1)
        self.scale.data[:3].mul_(0.5)
        self.scale.data = self.scale.data.clamp(min=-1)
        return self.unit(x) * self.scale + self.follows


MODELS: dict[str, Callable[[], nn.Module]] = {
    "norms": Norms, "averages": Averages, "table": Table, "codebook": Codebook,
    "queue": Queue, "bounded": Bounded,
}  # fmt: skip


def train(
    source: str, state: dict[str, Tensor], batches: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """In a rank: whole outputs of some steps of SGD, and the state afterwards."""
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs: list[Tensor] = []
    for x in batches:
        out = model(**model.shard_inputs(x=x))
        optimizer.zero_grad()
        local = flatten(out)[0][1]
        local.square().sum().backward()
        optimizer.step()
        outputs.append(flatten(whole_outputs(model, out))[0][1])
    return outputs, model.full_state_dict()


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.some(4)
def test_after_steps_they_are_those_of_one_process(
    pool: Pool, kind: str, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    batches = [torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64) for _ in range(STEPS)]
    graph = widened(capture_folded(model, {"x": batches[0]}, training=True))
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wanted: list[Tensor] = []
    for x in batches:
        out = model(x)
        optimizer.zero_grad()
        out.square().sum().backward()
        optimizer.step()
        wanted.append(out.detach())
    after = model.state_dict()
    for seed in range(3):
        builder = builder_of(graph, mesh_of(*sizes), recompute=seed == 2)
        source = source_of(builder, random_decisions(builder, seed))
        for outputs, found in pool(prod(sizes)).run(train, source, state, batches):
            for got, want in zip(outputs, wanted, strict=True):
                assert_close(got, want, 1e-9, "output")
            assert found.keys() == after.keys()
            for name, want in after.items():
                assert_close(found[name], want, 1e-9, name)


def evaluate(source: str, state: dict[str, Tensor], x: Tensor) -> str:
    """In a rank: why a module that was planned for training does not run in eval mode."""
    model: Any = import_source(source).ShardedModel.from_state_dict(state).eval()
    try:
        model(**model.shard_inputs(x=x))
    except RuntimeError as error:
        return str(error)
    return ""


def test_eval_mode_of_a_module_for_training_is_refused(pool: Pool) -> None:
    """Its norms take the statistics of the batch; a plan for prefill takes the running ones."""
    torch.manual_seed(0)
    model, x = Norms(), torch.randn(BATCH, TOKENS, WIDTH)
    builder = builder_of(capture_folded(model, {"x": x}, training=True), mesh_of(2))
    source = source_of(builder, random_decisions(builder, 0))
    for said in pool(2).run(evaluate, source, model.state_dict(), x):
        assert "in which it changes flat.num_batches_tracked; to evaluate, plan" in said
    serving = capture_folded(model, {"x": x}, training=False)
    assert len(serving.outputs) == 1
    wanted = model.eval()(x).detach()
    state = {name: t.detach() for name, t in model.state_dict().items()}
    assert_close(interpret(serving, state, {"x": x})[()], wanted, 1e-6, "eval")


def test_batch_norms_count_the_batch_that_comes(pool: Pool) -> None:
    """Running variances are those of one process, for batches of other sizes than planned, too."""
    torch.manual_seed(0)
    model = Norms().double()
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    batches = [torch.randn(rows, TOKENS, WIDTH, dtype=torch.float64) for rows in (4, 12, 8)]
    loaded = Loaded(model, {"x": batches[0]}, {"x": ("b", "s", "")}, None)
    builder = builder_of(widened(capture_graph(loaded, training=True)), mesh_of(2))
    source = source_of(builder, random_decisions(builder, 0))
    model.load_state_dict(state)
    with torch.no_grad():
        for x in batches:
            model(x)
    for found in pool(2).run(running, source, state, batches):
        for name, want in model.named_buffers():
            assert_close(found[name], want, 1e-9, name)


def running(source: str, state: dict[str, Tensor], batches: list[Tensor]) -> dict[str, Tensor]:
    """In a rank: the state after some forward passes."""
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    for x in batches:
        model(**model.shard_inputs(x=x))
    return model.full_state_dict()
