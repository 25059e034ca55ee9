"""Steps of generated modules are those of one process, though labels that count fall unevenly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Extent
from shardwright.planner.plan.traffic import predicted_bytes, predicted_messages
from shardwright.runtime import RankPool, count_collectives
from tests.sharded import (
    builder_of,
    import_source,
    mesh_of,
    program_of,
    random_decisions,
    source_of,
)

Pool = Callable[[int], RankPool]
ROWS, LENGTH, WIDTH, WORDS, MANY = 4, 6, 8, 10, 3


class Tokens(nn.Module):
    """A loss over the next tokens, padded as those of transformers, and another term."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(ids)))
        wanted = F.pad(labels, (0, 1), value=-100)[..., 1:]
        loss = F.cross_entropy(self.head(h).flatten(0, 1), wanted.flatten())
        return loss + 0.1 * h.square().mean()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (MANY * ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:ROWS] = -100  # none counts in the first micro-batch
    labels[ROWS + 1 :, 2:] = -100
    return {"ids": ids, "labels": labels}


class Deep(Tokens):
    """With layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return F.cross_entropy(self.head(self.mix(h)).flatten(0, 1), labels.flatten())


def counted_step(
    source: str, state: dict[str, Tensor], rows: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor | None], dict[Any, tuple[float, int]]]:
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    own = {name: model.data_shard.of(x) for name, x in rows.items()}
    with count_collectives() as counter:
        loss = model.step(**own)
    counted = {
        (k.op, k.axis, str(k.phase)): (c.bytes, c.messages) for k, c in counter.counts.items()
    }
    return loss, model.full_gradients(), counted


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_weights_kept_in_any_way(pool: Pool, sizes: tuple[int, ...], recompute: bool) -> None:
    """Loss and gradients of one process; bytes and messages of a step as predicted."""
    model, rows = Deep().double(), batch()
    parts = [dict(zip(rows, each, strict=True)) for each in zip(*(
        x.chunk(MANY) for x in rows.values()
    ), strict=True)]  # fmt: skip
    graph = capture_folded(model, parts[0], training=True)
    free = [replace(x, labels=("b", "s"), extents=(Extent(), None)) for x in graph.inputs]
    graph = replace(graph, inputs=tuple(free))
    builder = builder_of(graph, mesh_of(*sizes), micro_batches=MANY)
    builder = builder.recomputed(0) if recompute else builder
    total = sum(int((part["labels"] != -100).sum()) for part in parts)
    want = torch.zeros((), dtype=torch.float64)
    for part in parts:
        counts = int((part["labels"] != -100).sum())
        want = want + (model(**part) * counts / total if counts else 0.0)
    want.backward()
    late = kept = 0
    for seed in range(4):
        decisions = random_decisions(builder, seed)
        program, mesh = program_of(builder, decisions), builder.network.mesh
        late += sum(home.late for home in decisions.homes.values())
        kept += sum(weight.kept.kept for weight, _ in program.brought())
        moved, messages = predicted_bytes(program, mesh), predicted_messages(program, mesh)
        source = source_of(builder, decisions)
        results = pool(builder.network.mesh.ranks).run(
            counted_step, source, model.state_dict(), rows
        )
        for loss, gradients, counted in results:
            torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=0)
            for name, x in model.named_parameters():
                torch.testing.assert_close(gradients[name], x.grad, rtol=1e-9, atol=1e-12)
            assert {key: n for key, (_, n) in counted.items()} == messages
            assert {key: n for key, (n, _) in counted.items()} == pytest.approx(moved, rel=1e-12)
    assert late and kept


def take_step(source: str, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    rows = {name: model.data_shard.of(x) for name, x in batch().items()}
    loss = model.step(**rows, micro_batches=MANY)
    return loss, model.full_gradients()


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_the_mean_over_labels_that_count(pool: Pool, seed: int) -> None:
    model = Tokens().double()
    parts = [dict(zip(batch(), each, strict=True)) for each in zip(*(
        x.chunk(MANY) for x in batch().values()
    ), strict=True)]  # fmt: skip
    graph = capture_folded(model, parts[0], training=True)
    builder = builder_of(graph, mesh_of(2))
    source = source_of(builder, random_decisions(builder, seed))
    assert 'LABELS = Labels("labels", first=1)' in source
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    want = torch.zeros((), dtype=torch.float64)
    for part in parts:
        h = torch.tanh(model.mix(model.embed(part["ids"])))
        logits, wanted = model.head(h)[:, :-1], part["labels"][:, 1:]
        sums = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        want = want + sums / sum(counts) + 0.1 * h.square().mean() / MANY
    assert counts[0] == 0 < counts[2] < counts[1]
    want.backward()
    for loss, gradients in pool(2).run(take_step, source, model.state_dict()):
        torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=0)
        for name, x in model.named_parameters():
            torch.testing.assert_close(gradients[name], x.grad, rtol=1e-9, atol=1e-12, msg=name)
