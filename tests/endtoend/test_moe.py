"""Mixtures of experts as generated modules: experts cut, tokens sent, on 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture import capture
from shardwright.ir.fold import fold
from shardwright.ir.graph import Graph
from shardwright.ir.unfuse import unfuse
from shardwright.ir.widen import widened
from shardwright.planner.build import Builder, Decisions
from shardwright.runtime import RankPool
from tests.ir.models import batch
from tests.ir.test_moe import FAMILIES, model_of, operators
from tests.sharded import (
    assert_close,
    builder_of,
    mesh_of,
    random_decisions,
    reference,
    run_module,
    source_of,
)

from .families import example_module

Pool = Callable[[int], RankPool]
Expected = tuple[dict[str, Tensor], dict[str, Tensor | None]]


@cache
def case_of(family: str) -> tuple[Graph, dict[str, Tensor], dict[str, Tensor], Expected]:
    """(graph in float64, parameters, inputs, what one process computes)."""
    if family == "example":
        torch.manual_seed(0)
        example = example_module("moe")
        sizes = {"layers": 2, "width": 32, "heads": 4, "experts": 8, "expert_width": 12}
        model: nn.Module = example.MoETransformer(example.MoEConfig(vocab_size=64, **sizes))
        inputs = batch(4, 8, "tokens", "labels")
    else:
        model = model_of(family)
        inputs = batch(4, 8, "input_ids", "labels")
    graph = widened(fold(capture(model, inputs, training=True)))
    params = {name: t.double() for name, t in model.state_dict().items()}
    return graph, params, inputs, reference(graph, params, inputs)


def decisions_with(builder: Builder, wanted: tuple[str, ...], start: int) -> Decisions:
    """Random decisions in which some experts run as one of `wanted`."""
    names = {node.name for node in operators(builder.graph)}
    for seed in range(start, start + 400):
        decisions = random_decisions(builder, seed)
        if any(choice in wanted for name in names for choice in decisions.choices[name]):
            return decisions
    raise AssertionError(f"400 random decisions without {wanted}")


def check(pool: RankPool, family: str, builder: Builder, decisions: Decisions) -> None:
    """Results and all gradients are those of one process."""
    _, params, inputs, expected = case_of(family)
    source = source_of(builder, decisions)
    assert "ops.moe(" in source
    for rank, (outputs, gradients, _) in enumerate(pool.run(run_module, source, params, inputs)):
        for path, want in expected[0].items():
            assert_close(outputs[path], want, 1e-9, f"rank {rank} output {path}\n{source}")
        for name, want in expected[1].items():
            if want is not None and name in gradients:
                got = gradients[name]
                assert got is not None
                assert_close(got, want, 1e-9, f"rank {rank} gradient of {name}\n{source}")


WAYS = {"dispatch": ("dispatch_i0", "dispatch_i1"), "own experts": ("e",)}


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4"])
def test_hidden_units_on_two_ranks(pool: Pool, family: str) -> None:
    """Gate and up are parts of one parameter, whose gradient is that of the whole."""
    builder = builder_of(unfuse(case_of(family)[0]), mesh_of(2))
    check(pool(2), family, builder, decisions_with(builder, ("f",), 0))


@pytest.mark.parametrize("family", ["example", *FAMILIES])
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks(pool: Pool, family: str, way: str) -> None:
    builder = builder_of(case_of(family)[0], mesh_of(2))
    check(pool(2), family, builder, decisions_with(builder, WAYS[way], 0))


@pytest.mark.parametrize("family", ["example", "gpt_oss"])
def test_four_ranks_on_two_axes(pool: Pool, family: str) -> None:
    builder = builder_of(case_of(family)[0], mesh_of(2, 2))
    for start in (0, 1000):
        check(pool(4), family, builder, decisions_with(builder, WAYS["dispatch"], start))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_four_ranks(pool: Pool, family: str, way: str) -> None:
    for mesh in (mesh_of(4), mesh_of(2, 2)):
        builder = builder_of(case_of(family)[0], mesh)
        for start in (0, 1000, 2000):
            check(pool(4), family, builder, decisions_with(builder, WAYS[way], start))
