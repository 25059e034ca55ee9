"""Mixtures of experts as generated modules: experts cut, tokens sent, on 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture import capture
from shardwright.ir.fold import fold
from shardwright.ir.graph import Graph, Param
from shardwright.ir.spec import Spec, is_shard
from shardwright.ir.unfuse import unfuse
from shardwright.ir.widen import widened
from shardwright.planner.build import Builder, Decisions, Restriction
from shardwright.planner.regions import Region, Strategy
from shardwright.planner.solvers import solve
from shardwright.planner.traffic import predicted_bytes
from shardwright.runtime import RankPool
from tests.ir.models import batch
from tests.ir.test_moe import FAMILIES, model_of, operators
from tests.sharded import (
    assert_close,
    builder_of,
    mesh_of,
    program_of,
    random_decisions,
    reference,
    run_module,
    source_of,
)

from .families import example_module

Pool = Callable[[int], RankPool]
Expected = tuple[dict[str, Tensor], dict[str, Tensor | None]]
Case = tuple[Graph, dict[str, Tensor], dict[str, Tensor], Expected]


@cache
def case_of(family: str) -> Case:
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


def check(pool: RankPool, case: Case, builder: Builder, decisions: Decisions) -> None:
    """Results and all gradients are those of one process; bytes that no router decides are
    those predicted."""
    _, params, inputs, expected = case
    source = source_of(builder, decisions)
    assert "ops.moe(" in source
    moved = predicted_bytes(program_of(builder, decisions), builder.network.mesh)
    for rank, result in enumerate(pool.run(run_module, source, params, inputs)):
        outputs, gradients, counted = result
        for path, want in expected[0].items():
            assert_close(outputs[path], want, 1e-9, f"rank {rank} output {path}\n{source}")
        for name, want in expected[1].items():
            if want is not None and name in gradients:
                got = gradients[name]
                assert got is not None
                assert_close(got, want, 1e-9, f"rank {rank} gradient of {name}\n{source}")
        assert _fixed(counted) == pytest.approx(_fixed(moved), rel=1e-12), f"rank {rank}\n{source}"


def _fixed(moved: Mapping[Any, float]) -> dict[tuple[str, ...], float]:
    """What is moved otherwise than by all-to-all; keys are (operation, axis, phase)."""
    return {tuple(key): n for key, n in moved.items() if key[0] != "all_to_all"}


WAYS = {"dispatch": ("dispatch_i0", "dispatch_i1"), "own experts": ("e",)}


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4"])
def test_hidden_units_on_two_ranks(pool: Pool, family: str) -> None:
    """Gate and up are parts of one parameter, whose gradient is that of the whole."""
    builder = builder_of(unfuse(case_of(family)[0]), mesh_of(2))
    check(pool(2), case_of(family), builder, decisions_with(builder, ("f",), 0))


@pytest.mark.parametrize("family", ["example", *FAMILIES])
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks(pool: Pool, family: str, way: str) -> None:
    builder = builder_of(case_of(family)[0], mesh_of(2))
    check(pool(2), case_of(family), builder, decisions_with(builder, WAYS[way], 0))


@pytest.mark.parametrize("family", ["example", "gpt_oss"])
def test_four_ranks_on_two_axes(pool: Pool, family: str) -> None:
    builder = builder_of(case_of(family)[0], mesh_of(2, 2))
    for start in (0, 1000):
        check(pool(4), case_of(family), builder, decisions_with(builder, WAYS["dispatch"], start))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_four_ranks(pool: Pool, family: str, way: str) -> None:
    for mesh in (mesh_of(4), mesh_of(2, 2)):
        builder = builder_of(case_of(family)[0], mesh)
        for start in (0, 1000, 2000):
            check(pool(4), case_of(family), builder, decisions_with(builder, WAYS[way], start))


# ---- planned: one way for all layers of experts, the rest as the solver likes ------------------


@dataclass(frozen=True)
class Way(Restriction):
    """All experts run so, one choice per mesh axis; parameters are kept in slices if `sharded`."""

    choices: tuple[str, ...]
    sizes: tuple[int, ...]
    sharded: bool = False
    parts: bool = False  # gate and up as two parameters where they lie one after the other

    def allows(self, region: Region, strategy: Strategy) -> bool:
        return all(
            choices == self.choices
            for node, choices in zip(region.nodes, strategy.choices, strict=True)
            if node.op == "shardwright.moe"
        )

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        return not self.sharded or all(is_shard(state) for state in spec)

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        raise AssertionError(f"{self.choices} is no strategy of {region.name}")


QUICK = {
    "EP": Way(("dispatch_i0",), (2,)),
    "EP, summands": Way(("e",), (2,)),
    "DP, sharded": Way(("i0",), (2,), sharded=True),
}
FOUR = {
    "EP x DP": Way(("i0", "dispatch_i0"), (2, 2)),
    "EP over two axes": Way(("dispatch_i0", "dispatch_i0"), (2, 2)),
    "EP of sequence parts, sharded": Way(("dispatch_i1", "i0"), (2, 2), sharded=True),
    "EP x TP": Way(("dispatch_i0", "f"), (2, 2), parts=True),
}
SLOW = {
    "EP on 4": Way(("dispatch_i0",), (4,)),
    "EP, summands, on 4": Way(("e",), (4,)),
    "EP over two axes, sharded": Way(("dispatch_i0", "dispatch_i0"), (2, 2), sharded=True),
    "EP over two axes, summands": Way(("e", "e"), (2, 2)),
    "EP, summands, x DP": Way(("i0", "e"), (2, 2), sharded=True),
    "EP, summands, x TP": Way(("e", "f"), (2, 2), parts=True),
    "TP x EP": Way(("f", "dispatch_i0"), (2, 2), parts=True),
    "EP, width": Way(("dispatch_i0", "o"), (2, 2)),
}


def planned(case: Case, way: Way) -> tuple[Builder, Decisions]:
    """The optimum in which experts run in this way."""
    builder = builder_of(unfuse(case[0]) if way.parts else case[0], mesh_of(*way.sizes))
    built = builder.build(way)
    solution = solve(built.problem(), solver="highs", time_limit_s=60.0)
    assert solution.assignment is not None
    decisions = built.read(solution.assignment)
    assert {decisions.choices[node.name] for node in operators(builder.graph)} == {way.choices}
    return builder, decisions


def check_way(pool: Pool, case: Case, way: Way) -> None:
    check(pool(prod(way.sizes)), case, *planned(case, way))


@pytest.mark.parametrize("family", ["example", *FAMILIES])
@pytest.mark.parametrize("way", QUICK)
def test_planned_on_two_ranks(pool: Pool, family: str, way: str) -> None:
    check_way(pool, case_of(family), QUICK[way])


# Each way once; all families in the slow test
@pytest.mark.parametrize(
    ("way", "family"),
    list(zip(FOUR, ("mixtral", "qwen3_moe", "gpt_oss", "llama4"), strict=True)),
)
def test_planned_on_four_ranks(pool: Pool, family: str, way: str) -> None:
    check_way(pool, case_of(family), FOUR[way])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["example", *FAMILIES])
@pytest.mark.parametrize("way", [*FOUR, *SLOW])
def test_planned_on_four_ranks_all(pool: Pool, family: str, way: str) -> None:
    check_way(pool, case_of(family), (FOUR | SLOW)[way])


# ---- routers that send most tokens to few ranks ------------------------------------------------


def skewed(family: str) -> Case:
    """The case with other routers: all tokens to experts 0 and 1 (GPT-OSS), to the first group's
    (DeepSeek's groups are chosen first), or each to the first two or the last two (Mixtral)."""
    graph, params, inputs, _ = case_of(family)
    params = {name: t.clone() for name, t in params.items()}
    routers = 0
    for name, t in params.items():
        if name.endswith(("router.bias", "e_score_correction_bias")):
            t[: 2 if family == "gpt_oss" else 4] = 100.0
            routers += 1
        elif family == "mixtral" and name.endswith("gate.weight"):
            t[:2], t[2:6], t[6:] = 5.0 * t[0], 0.01 * t[2:6], -5.0 * t[0]
            routers += 1
    assert routers >= 3
    return graph, params, inputs, reference(graph, params, inputs)


@pytest.mark.parametrize(
    ("family", "way"),
    [("gpt_oss", "EP"), ("mixtral", "EP x DP"), ("deepseek_v3", "EP over two axes")],
)
def test_skewed_routers(pool: Pool, family: str, way: str) -> None:
    """Ranks may have no token for their experts, or all of them."""
    check_way(pool, skewed(family), (QUICK | FOUR)[way])
