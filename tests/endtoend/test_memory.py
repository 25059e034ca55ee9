"""The memory that a plan predicts is what a rank's tensors take, in a step with AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.capturing import capture_graph
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts import logits
from shardwright.ir.graph import Graph
from shardwright.ir.passes.masters import with_masters
from shardwright.ir.passes.returned import returning
from shardwright.loading import Loaded
from shardwright.planner.ilp.problem import evaluate
from shardwright.planner.ilp.solve import solve
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Setting
from shardwright.runtime import RankPool
from shardwright.runtime.live import LiveBytes
from tests.endtoend.families import example_module
from tests.sharded import import_source, mesh_of, source_of

Pool = Callable[[int], RankPool]
SIZES = {
    "vocab_size": 1024,
    "layers": 6,
    "width": 256,
    "heads": 8,
    "kv_heads": 4,
    "mlp_width": 704,
}
SEQ = 128
WITHIN = 0.05


def batch_of(batch: int) -> dict[str, Tensor]:
    tokens = torch.zeros(batch, SEQ, dtype=torch.int64)
    return {"tokens": tokens, "labels": tokens}


@cache
def graph(batch: int, *, mixed: bool = False, **sizes: int) -> Graph:
    """The example's Llama; `mixed`: in bfloat16, its parameters stored in float32."""
    example = example_module("llama")
    with torch.device("meta"):
        model = example.Llama(example.LlamaConfig(**(SIZES | sizes)))
        model = model.bfloat16() if mixed else model
    inputs = batch_of(batch)
    made = capture_graph(
        Loaded(model, inputs, dict.fromkeys(inputs, ("b", "s")), None), training=True
    )
    return with_masters(made) if mixed else made


def predicted(
    role: str, model: Graph, *, recompute: bool = False, micro_batches: int = 1, mixed: bool = False
) -> tuple[str, float, tuple[float, ...]]:
    """The module of an ordinary plan, its peak in bytes, and the kinds that are no state."""
    mesh = mesh_of(2)
    setting = Setting(
        True, "adamw", None, recompute, micro_batches=micro_batches,
        reduced=torch.float32 if mixed else None,
    )  # fmt: skip
    builder = Builder(model, Network(mesh, load_cluster("cpu")), setting)
    built = builder.build(Roles([role], builder.graph, mesh))
    problem = built.problem()
    assignment = solve(problem).assignment
    assert assignment is not None
    evaluation = evaluate(problem, assignment)
    live = built.memory_at(assignment, evaluation.peak_time)
    parts = live["gradient"], live["kept"], live["running"]
    decisions = built.read(assignment)
    return source_of(builder, decisions), evaluation.peak_usage, parts


def measured(source: str, batch: int, way: str = "") -> int:
    """Most bytes of tensors alive in the second step, when the optimizer has its states; it steps
    one parameter after another, or in the `way` of torch's that is named."""
    model = import_source(source).ShardedModel()
    model.reset_parameters()
    local = model.shard_inputs(**batch_of(batch))
    ways: dict[str, Any] = {way: True} if way else {"foreach": False}
    optimizer = torch.optim.AdamW(model.parameters(), **ways)
    with LiveBytes([*model.parameters(), *local.values()]) as live:
        for _ in range(2):
            live.reset_peak()
            out = model(**local)
            out["loss"].backward()
            del out
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak


def measured_in_steps(source: str, rows: int) -> int:
    """Most bytes of tensors alive in the second step of a module with micro-batches."""
    model = import_source(source).ShardedModel()
    model.reset_parameters()
    own = {name: model.data_shard.of(x) for name, x in batch_of(rows).items()}
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with LiveBytes([*model.parameters(), *own.values()]) as live:
        for _ in range(2):
            live.reset_peak()
            model.step(**own)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize(
    ("role", "micro_batches", "mixed"),
    [
        ("zero1", 2, False),
        ("fsdp", 1, True),
        pytest.param("zero2", 1, False, marks=pytest.mark.slow),
        pytest.param("ddp", 2, True, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_steps(pool: Pool, role: str, micro_batches: int, mixed: bool) -> None:
    """Copies at home, sums of gradients over micro-batches, float32 beside bfloat16."""
    rows = 4
    source, peak, parts = predicted(
        role, graph(rows, mixed=mixed, layers=4), micro_batches=micro_batches, mixed=mixed
    )
    assert all(part >= 0 for part in parts) and sum(parts) < peak
    for taken in pool(2).run(measured_in_steps, source, micro_batches * rows):
        assert peak == pytest.approx(taken, rel=WITHIN)


QUICK = [("tp", 4, False), ("fsdp", 4, True), ("ddp", 4, False)]
REST = [
    pytest.param(role, batch, recompute, marks=pytest.mark.slow)
    for role in ("tp", "fsdp", "ddp")
    for batch in (2, 16)  # gradients and states weigh more, then activations
    for recompute in (False, True)
]


@pytest.mark.parametrize(("role", "batch", "recompute"), [*QUICK, *REST])
def test_peak_memory(pool: Pool, role: str, batch: int, recompute: bool) -> None:
    source, peak, parts = predicted(role, graph(batch), recompute=recompute)
    assert all(part >= 0 for part in parts) and sum(parts) < peak
    for taken in pool(2).run(measured, source, batch):
        assert peak == pytest.approx(taken, rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fused", "foreach"])
def test_peak_memory_whatever_way_the_optimizer_steps(pool: Pool, way: str) -> None:
    """Its temporaries come when activations are gone."""
    source, peak, _ = predicted("fsdp", graph(16))
    for taken in pool(2).run(measured, source, 16, way):
        assert peak == pytest.approx(taken, rel=WITHIN)


def small_chunks(patch: pytest.MonkeyPatch) -> None:
    """A twentieth of the logits at a time, and a tenth of that in a wide format."""
    patch.setattr(logits, "CHUNK_BYTES", 2**20)
    patch.setattr(logits, "BLOCK_NUMBERS", 2**15)


def measured_in_chunks(source: str, batch: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch)
        return measured(source, batch)


@pytest.mark.parametrize("role", ["ddp", "tp"])
def test_peak_memory_of_a_loss_alone(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """Where logits would be most of the memory, a model that returns the loss has a chunk."""
    small_chunks(monkeypatch)
    whole = graph(8, vocab_size=8192, width=64, layers=2, mlp_width=128)
    source, peak, _ = predicted(role, returning(whole, ["loss"]), recompute=False)
    _, with_logits, _ = predicted(role, whole, recompute=False)
    logits_bytes = 8 * SEQ * 8192 * 4 / 2  # half of them on a rank
    assert with_logits - peak > 1.5 * logits_bytes  # they and their gradients
    for taken in pool(2).run(measured_in_chunks, source, 8):
        assert peak == pytest.approx(taken, rel=WITHIN)


def test_live_bytes_are_those_of_storages() -> None:
    given = torch.zeros(100)
    with LiveBytes([given, given.view(10, 10)]) as live:
        assert live.now == 400
        a = given + 1
        b = a.view(10, 10)
        assert live.now == 800
        del a
        assert live.now == 800
        c = b.sum()
        del b, c
        assert (live.now, live.peak) == (400, 804)
        live.reset_peak()
        assert live.peak == 400
