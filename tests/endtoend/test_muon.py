"""Muon over parts of matrices is torch.optim.Muon of the original's, AdamW's the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import shardwright as sw
from shardwright.facts.orthogonal import newton_schulz_flops
from shardwright.facts.units import format_bytes
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from shardwright.ir.passes.unfuse import unfuse
from shardwright.planner.strategies.orthogonal import received_bytes
from shardwright.runtime import RankPool, count_collectives
from shardwright.runtime.training.muon import orthogonal
from tests.sharded import builder_of, import_source, mesh_of, random_decisions, source_of

Pool = Callable[[int], RankPool]
WORDS, WIDTH, HIDDEN, HEADS, EXPERTS = 12, 16, 24, 4, 4
STEPS = 3
MUON: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9}
ADAMW: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}


class Block(nn.Module):
    """Attention with one weight for q, k and v; a tall and a wide matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(x)))


class Words(nn.Module):
    """Embedding, blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)[:, :-1]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())}


class Routed(nn.Module):
    """A layer of experts, whose matrices are stacked, with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        y = sw.moe(x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1), self.up, self.down,
                   activation="gelu")  # fmt: skip
        logits = self.head(x + y.view_as(x))[:, :-1]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())}


MATRICES: dict[type[nn.Module], set[str]] = {
    Words: {f"layers.{n}.{name}.weight" for n in (0, 1) for name in ("qkv", "out", "up", "down")},
    Routed: {"router.weight", "up", "down"},
}


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"ids": torch.randint(WORDS, (8, 8), generator=generator)}


def alone(kind: type[nn.Module], steps: int = STEPS) -> dict[str, Tensor]:
    """Parameters after some steps of one process; those of experts one matrix each."""
    model = kind().double()
    named = dict(model.named_parameters())
    matrices = [named[name] for name in named if name in MATRICES[kind]]
    apart = {p: [nn.Parameter(m.detach()) for m in p] for p in matrices if p.ndim == 3}
    own = [m for p in matrices for m in apart.get(p, [p])]
    muon = torch.optim.Muon(own, **MUON)
    adamw = torch.optim.AdamW([p for p in named.values() if p not in set(matrices)], **ADAMW)
    for step in range(steps):
        model.zero_grad()
        model(**batch(step))["loss"].backward()
        for p, parts in apart.items():
            assert p.grad is not None
            for part, gradient in zip(parts, p.grad, strict=True):
                part.grad = gradient  # and it shares the memory of the stack
        muon.step()
        adamw.step()
    return {name: p.detach() for name, p in named.items()}


@cache
def graph_of(kind: type[nn.Module], *, apart: bool = False) -> Graph:
    graph = capture_folded(kind().double(), batch(0), training=True)
    return unfuse(graph) if apart else graph


def trained(source: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Parameters after some steps; bytes that came in optimizers' steps."""
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    optimizer = model.optimizer("muon", adamw=ADAMW, **MUON)
    moved = 0.0
    for step in range(STEPS):
        model.zero_grad()
        model(**model.shard_inputs(**batch(step))).loss.backward()
        with count_collectives() as counter:
            optimizer.step()
        assert counter.bytes() == counter.bytes("all_to_all", phase="step")
        moved += counter.bytes()
    return model.full_state_dict(), moved


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "apart", "sizes"),
    [
        (Words, True, (2,)), (Routed, False, (2, 2)),
        pytest.param(Words, False, (2, 2), marks=pytest.mark.slow),
        pytest.param(Words, False, (2,), marks=pytest.mark.slow),
        pytest.param(Words, True, (2, 2), marks=pytest.mark.slow),
        pytest.param(Routed, False, (4,), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_steps_are_those_of_one_process(
    pool: Pool, kind: type[nn.Module], apart: bool, sizes: tuple[int, ...], seed: int
) -> None:
    """However parameters lie, and with the bytes that are predicted."""
    want, state = alone(kind), kind().double().state_dict()
    graph = graph_of(kind, apart=apart)
    assert apart == any(p.part for block in graph.loops for p in block.blocks[0].params)
    builder = builder_of(graph, mesh_of(*sizes))
    decisions = random_decisions(builder, seed)
    source = source_of(builder, decisions)
    results = pool(builder.network.mesh.ranks).run(trained, source, state)
    for got, _ in results:
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-11, msg=name)
    bytes_each = received_bytes(graph, decisions.specs, sizes)
    total = sum(n_bytes for _, n_bytes in results)
    assert 0 < total == pytest.approx(STEPS * len(results) * bytes_each, rel=1e-12)


def resumed(source: str, state: dict[str, Tensor], folder: Path, steps: range) -> dict[str, Tensor]:
    """Parameters after some steps, from the start or from where the last ones were saved."""
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    optimizer = model.optimizer("muon", adamw=ADAMW, **MUON)
    if steps.start:
        assert model.load_checkpoint(folder, optimizer).step == steps.start
    for step in steps:
        model.zero_grad()
        model.step(**{name: model.data_shard.of(x) for name, x in batch(step).items()})
        optimizer.step()
    model.save_checkpoint(folder, optimizer, step=steps.stop)
    model.wait_for_checkpoint()
    return model.full_state_dict()


@cache
def source_by_name(layout: str) -> str:
    plan = sw.plan(
        Words().double(), batch(0), cluster="cpu", layout=layout, optimizer="muon", micro_batches=2
    )
    return plan.module_source()


@pytest.mark.parametrize(("before", "after"), [
    ("zero1=2,tp=2", "ddp=2"),
    *(pytest.param(*both, marks=pytest.mark.slow) for both in (
        ("fsdp=4", "zero1=4"), ("tp=2", "fsdp=2,tp=2"), ("pp=2,ddp=2", "fsdp=2"),
        ("ddp=2", "pp=2,tp=2"),
    )),
])  # fmt: skip
def test_a_run_goes_on_under_another_plan(
    pool: Pool, before: str, after: str, tmp_path: Path
) -> None:
    want, state = alone(Words), Words().double().state_dict()
    for layout, steps in ((before, range(2)), (after, range(2, STEPS))):
        ranks = prod(int(size) for size in re.findall(r"\d+$|\d+(?=,)", layout))
        results = pool(ranks).run(resumed, source_by_name(layout), state, tmp_path, steps)
    for got in results:
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-11, msg=name)


@cache
def planned(optimizer: str) -> sw.Plan:
    return sw.plan(Words(), batch(0), cluster="h100", layout="fsdp=4", optimizer=optimizer)


def test_memory_time_and_words_of_a_plan() -> None:
    """Momentum alone for matrices, all else as AdamW has it."""
    sizes = {name: p.numel() for name, p in Words().named_parameters()}
    matrices = sum(sizes[name] for name in MATRICES[Words])
    muon, adamw = planned("muon"), planned("adamw")
    less = adamw.memory.optimizer - muon.memory.optimizer
    assert less == 4 * matrices / 4  # bytes a number, ranks
    assert muon.seconds > adamw.seconds
    received = 2 * 2 * matrices / 4 * (1 - 1 / 4)  # bytes a number, there and back
    words = (
        f"8 matrices orthogonal, each on one GPU, for which each receives {format_bytes(received)}"
    )
    assert words in " ".join(str(muon).split())


@pytest.mark.parametrize("shape", [(32, 24), (24, 32), (3, 24, 32)])
def test_flops_are_those_that_torch_counts(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        orthogonal(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert counter.get_total_flops() == prod(shape[:-2]) * newton_schulz_flops(*shape[-2:])


def one_rank(options: dict[str, Any]) -> torch.optim.Optimizer:
    builder = builder_of(graph_of(Words), mesh_of(1))
    source = source_of(builder, random_decisions(builder, 0))
    assert 'NOT_MATRICES = ("embed.weight", "head.weight")' in source
    return import_source(source).ShardedModel().optimizer("muon", **options)


def test_groups_say_what_else_is_no_matrix() -> None:
    groups = {"*qkv*": {"kind": "adamw", "eps": 1e-6}, "layers.1.*": {"weight_decay": 0.0}}
    made = one_rank({"lr": 0.1, "adjust_lr_fn": "match_rms_adamw", "groups": groups}).param_groups
    found = [(g["kind"], len(g["params"]), g["weight_decay"], g["eps"], g["lr"]) for g in made]
    assert found == [
        ("adamw", 5, 0.01, 1e-8, 0.1),  # of layer 0 a norm and a bias; embedding and head
        ("muon", 3, 0.1, 1e-7, 0.1),
        ("adamw", 4, 0.01, 1e-6, 0.1),
        ("adamw", 3, 0.0, 1e-8, 0.1),
        ("muon", 3, 0.0, 1e-7, 0.1),
    ]


@pytest.mark.parametrize(("options", "error", "why"), [
    ({"lr": 0.1}, ValueError, r"at another rate: give that as adamw="),
    ({"lr": 0.1, "adamw": {"betas": (2, 2)}}, ValueError, r"Invalid beta"),
    ({"lr": 0.1, "adamw": {}, "adjust_lr_fn": "other"}, ValueError, r"is one of original, match"),
    ({"lr": 0.1, "adamw": {}, "ns_steps": 0}, ValueError, r"ns_steps 1 to 99"),
    ({"lr": 0.1, "adamw": {}, "groups": {"*norm*": {"kind": "muon"}}}, ValueError,
     r"`layers.0.norm.weight` of shape \(16,\)"),
    ({"lr": 0.1, "adamw": {}, "groups": {"*norm*": {"kind": "lion"}}}, ValueError, r"or adamw"),
    ({"lr": 0.1, "adamw": {}, "groups": {"*": {"kind": "adamw"}}}, ValueError, r"is a matrix that"),
    ({"lr": 0.1, "adamw": {}, "betas": (0.9, 0.9)}, TypeError, r"betas"),
])  # fmt: skip
def test_refusals(options: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        one_rank(options)
