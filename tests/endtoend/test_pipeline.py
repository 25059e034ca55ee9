"""Pipelines on ranks: loss and all gradients are those of one process, messages as predicted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import shardwright
from examples import encoder_decoder, gpt, llama
from shardwright.codegen.pipeline import Row, write_pipeline
from shardwright.facts.mesh import Mesh
from shardwright.facts.schedules import default_stages
from shardwright.facts.spec import R
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from shardwright.ir.passes.stages import Stage, cut_into_stages, layer_count
from shardwright.ir.reference.interpret import interpret
from shardwright.ir.reference.widen import widened
from shardwright.planner.plan.program import Program
from shardwright.planner.plan.tied import tied_parameters
from shardwright.runtime import RankPool, count_collectives

from ..ir.models import TinyGPT
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
    made = random_decisions(builder, 0)
    ends = {each.value.name: (R,) for each in graph.inputs}
    stored = {param.value.name: (R,) for param in graph.params}
    outputs = {name: (R,) for name in made.outputs}
    specs = {**made.specs, **ends, **stored}
    return program_of(builder, replace(made, specs=specs, outputs=outputs, homes={}))


def _alone(
    graph: Graph, state: dict[str, Tensor], parts: Sequence[dict[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process: the mean over all labels of all parts that count."""
    leaves = {name: x.clone().requires_grad_() for name, x in state.items()}
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    losses: list[Tensor] = []
    for part, own in zip(parts, counts, strict=True):
        loss = interpret(graph, leaves, part)[("loss",)] * own / sum(counts)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum(), {n: x.grad for n, x in leaves.items() if x.grad is not None}


def _compare(found: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> None:
    """All gradients, each on the scale of its largest entry, or of a part of the largest of all:
    that of a bias of keys is nothing but rounding."""
    floor = 1e-3 * max(float(x.abs().max()) for x in wanted.values())
    for name, want in wanted.items():
        got = found[name]
        assert got is not None, name
        assert (got - want).abs().max() <= 1e-9 * max(float(want.abs().max()), floor), name


def _ends(stages: int) -> tuple[list[int], list[int]]:
    """The stages that get an activation, and those that get a gradient."""
    return list(range(1, stages)), list(range(stages - 1))


def step_on_rank(
    source: str, state: dict[str, Tensor], rows: dict[str, Tensor], times: int
) -> tuple[Tensor, dict[str, Tensor | None], float, float, list[str], float]:
    """In one rank: `times` steps of a pipelined module; what the last gives, and moves, also for
    parameters of several stages."""
    model = import_source(source).ShardedModel.from_state_dict(state)
    own_rows = model.shard_rows_of(**rows)
    for _ in range(times - 1):
        model.step(**own_rows)
        model.zero_grad(set_to_none=True)
    with count_collectives() as counter:
        loss = model.step(**own_rows)
    tied = counter.bytes("all_reduce", "pp", "backward")
    ahead, back = (counter.bytes("send_recv", "pp", way) for way in ("forward", "backward"))
    evaluated = model.eval().evaluate(**own_rows)
    assert torch.allclose(evaluated, loss, rtol=1e-9, atol=0) and not evaluated.requires_grad
    names = [name for name, _ in model.named_parameters()]
    whole = model.full_state_dict()
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[name], state[name]) for name in state)
    norm = model.clip_grad_norm_(1e9)
    own = model.full_gradients()
    parts = [g.square().sum() for g in own.values() if g is not None]
    assert torch.allclose(norm.double(), torch.stack(parts).sum().sqrt(), rtol=1e-6)
    return loss, own, ahead, back, names, tied


@pytest.mark.parametrize(
    ("build", "ranks", "schedule", "count"),
    [
        (_llama, 2, "interleaved", 2),
        (_llama, 2, "gpipe", 4),
        (_gpt, 2, "1f1b", 3),
        (_two, 2, "1f1b", 2),
        (_gpt, 4, "1f1b", 2),
    ],
)
@pytest.mark.some(2)
def test_a_pipeline_takes_the_step_of_one_process(
    build: Callable[[], nn.Module],
    ranks: int,
    schedule: str,
    count: int,
    pool: Callable[[int], RankPool],
) -> None:
    torch.manual_seed(0)
    model = build().double()
    names = [n for n in inspect.signature(model.forward).parameters if n != "position_ids"]
    graph = widened(capture_folded(model, _batch(names, ROWS), training=True))
    stages = ranks * default_stages(schedule)
    layers = [layer_count(graph) // stages] * stages
    layers[-1] += layer_count(graph) - sum(layers)
    source = _source(graph, layers, ranks, schedule, count)
    whole = _batch(names, ROWS * count)
    whole["labels"][0, 2:] = -100  # labels of unequal numbers
    parts = [{n: x.chunk(count)[k] for n, x in whole.items()} for k in range(count)]
    state = {n: x.detach() for n, x in model.state_dict().items()}
    loss, gradients = _alone(graph, state, parts)
    for rank, found in enumerate(pool(ranks).run(step_on_rank, source, state, whole, 2)):
        assert torch.allclose(found[0], loss, rtol=1e-9, atol=0), rank
        if build is _llama:  # one tensor of (rows, 8 tokens, 32) in float64 goes each way
            crossed = count * ROWS * 8 * 32 * 8
            ahead, back = (sum(r % ranks == rank for r in each) for each in _ends(stages))
            assert found[2:4] == (ahead * crossed, back * crossed), rank
        _compare(found[1], gradients)


@pytest.mark.parametrize(
    ("layout", "count"), [("pp=2,fsdp=2", 3), ("pp=2,tp=2", 1), ("pp=2,zero1=2,vpp=2", 2)]
)
@pytest.mark.some(1)
def test_a_planned_pipeline_takes_the_step_of_one_process(
    layout: str, count: int, pool: Callable[[int], RankPool]
) -> None:
    torch.manual_seed(0)
    model = TinyGPT(layers=4).double()
    whole = _batch(("ids", "labels"), ROWS * count)
    whole["labels"][0, 2:] = -100
    plan = shardwright.plan(model, whole, layout=layout, cluster="cpu", micro_batches=count)
    shares = (whole["labels"] != -100).view(count, -1).sum(1)
    total = torch.zeros(())
    for k in range(count):
        loss = model(**{n: x.chunk(count)[k] for n, x in whole.items()})["loss"]
        loss = loss * shares[k] / shares.sum()
        loss.backward()
        total = total + loss.detach()
    state = {n: x.detach() for n, x in model.state_dict().items()}
    source, pipeline = plan.module_source(), plan.pipeline
    assert pipeline is not None
    (tied,) = tied_parameters(pipeline.table(count), pipeline.stages, pipeline.kinds)
    assert (tied.name, tied.stages) == ("tokens.weight", (0, len(pipeline.stages) - 1))
    assert "Stages 0 and " in str(plan) and "have `tokens.weight`: its gradients" in str(plan)
    for rank, found in enumerate(pool(4).run(step_on_rank, source, state, whole, 2)):
        assert found[5] == tied.received_bytes > 0
        assert torch.allclose(found[0], total.double(), rtol=1e-9, atol=0), rank
        _compare(found[1], {n: x.grad for n, x in model.named_parameters() if x.grad is not None})
