"""Pipelines on ranks: loss and all gradients are those of one process, messages as predicted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from examples import encoder_decoder, gpt, llama
from shardwright.codegen.pipeline import Row, write_pipeline
from shardwright.facts.mesh import Mesh
from shardwright.facts.schedules import default_stages
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from shardwright.ir.passes.stages import Stage, cut_into_stages, layer_count
from shardwright.planner.plan.program import Program
from shardwright.runtime import RankPool, count_collectives

from ..sharded import builder_of, import_source, mesh_of, program_of, random_decisions

ROWS = 4  # of a micro-batch


def _llama() -> nn.Module:
    return llama.Llama(llama.LlamaConfig(64, 4, 32, 4, 2, 48))


def _gpt() -> nn.Module:
    return gpt.GPT(gpt.GPTConfig(64, 16, 4, 4, 32))


def _two() -> nn.Module:
    sizes = encoder_decoder.Seq2SeqConfig(64, 16, 2, 2, 32, 4, 48)
    return encoder_decoder.EncoderDecoder(sizes)


def _batch(names: Sequence[str], rows: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randint(64, (rows, 8)) for name in names}


def _source(
    graph: Graph,
    layers: Sequence[int],
    ranks: int,
    schedule: str,
    micro_batches: int,
) -> str:
    """The module of stages of one rank each, which need no solver."""
    stages = cut_into_stages(graph, layers)
    kinds: list[Stage] = []
    rows: list[Row] = []
    for stage in stages:
        same = [n for n, kind in enumerate(kinds) if kind.graph == stage.graph]
        if not same:
            kinds.append(stage)
        values = {each.name: each.value for each in stage.graph.inputs}
        constant = tuple(name for name in stage.taken if not values[name].differentiable)
        kind = same[0] if same else len(kinds) - 1
        rows.append(Row(kind, stage.first, stage.taken, stage.given, constant))
    mesh = mesh_of(1)
    programs = [_program(kind.graph, mesh, micro_batches) for kind in kinds]
    return write_pipeline(
        programs, rows, mesh, ranks=ranks, schedule=schedule, micro_batches=micro_batches,
        summary="A test.", optimizer="none",
    )  # fmt: skip


def _program(graph: Graph, mesh: Mesh, micro_batches: int) -> Program:
    builder = builder_of(graph, mesh, micro_batches=micro_batches)
    return program_of(builder, random_decisions(builder, 0))


def _alone(
    model: nn.Module, parts: Sequence[dict[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of one process: the mean over all labels of all parts that count."""
    model.zero_grad()
    labels = [part["labels"][..., :] for part in parts]
    counts = [int((x != -100).sum()) for x in labels]
    losses: list[Tensor] = []
    for part, own in zip(parts, counts, strict=True):
        out = model(**part)
        loss = (out["loss"] if isinstance(out, dict) else out[0]) * own / sum(counts)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum(), {n: p.grad for n, p in model.named_parameters()}


def step_on_rank(
    source: str, state: dict[str, Tensor], rows: dict[str, Tensor], times: int
) -> tuple[Tensor, dict[str, Tensor | None], float, float, list[str]]:
    """In one rank: `times` steps of a pipelined module; what the last gives, and moves."""
    model = import_source(source).ShardedModel.from_state_dict(state)
    loss, counter = torch.zeros(()), None
    for _ in range(times):
        model.zero_grad(set_to_none=True)
        with count_collectives() as counter:
            loss = model.step(**model.shard_rows_of(**rows))
    assert counter is not None
    ahead, back = (counter.bytes("send_recv", "pp", way) for way in ("forward", "backward"))
    names = [name for name, _ in model.named_parameters()]
    whole = model.full_state_dict()
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[name], state[name]) for name in state)
    norm = model.clip_grad_norm_(1e9)
    own = model.full_gradients()
    parts = [g.square().sum() for g in own.values() if g is not None]
    assert torch.allclose(norm.double(), torch.stack(parts).sum().sqrt(), rtol=1e-6)
    return loss, own, ahead, back, names


@pytest.mark.parametrize(
    ("build", "ranks", "schedule", "count"),
    [
        (_llama, 2, "1f1b", 4),
        (_llama, 2, "interleaved", 2),
        (_gpt, 2, "gpipe", 3),
        (_two, 2, "1f1b", 2),
        (_gpt, 4, "1f1b", 2),
    ],
)
def test_a_pipeline_takes_the_step_of_one_process(
    build: Callable[[], nn.Module],
    ranks: int,
    schedule: str,
    count: int,
    pool: Callable[[int], RankPool],
) -> None:
    torch.manual_seed(0)
    model = build().double()
    names = list(inspect.signature(model.forward).parameters)
    graph = capture_folded(model, _batch(names, ROWS), training=True)
    stages = ranks * default_stages(schedule)
    layers = [layer_count(graph) // stages] * stages
    layers[-1] += layer_count(graph) - sum(layers)
    source = _source(graph, layers, ranks, schedule, count)
    whole = _batch(names, ROWS * count)
    whole["labels"][0, 2:] = -100  # labels of unequal numbers
    parts = [{n: x.chunk(count)[k] for n, x in whole.items()} for k in range(count)]
    loss, gradients = _alone(model, parts)
    state = {n: x.detach() for n, x in model.state_dict().items()}
    for rank, found in enumerate(pool(ranks).run(step_on_rank, source, state, whole, 2)):
        assert torch.allclose(found[0], loss, rtol=1e-9, atol=0), rank
        for name, want in gradients.items():
            got = found[1][name]
            assert want is not None and got is not None, name
            assert (got - want).abs().max() <= 1e-9 * want.abs().max().clamp(min=1e-12), name
