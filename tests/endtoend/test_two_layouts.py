"""Modules whose decoding reads its caches in another layout than prefill leaves them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.codegen.module import write_source
from shardwright.codegen.write import module_source
from shardwright.conversation import Step, by_graph, by_module
from shardwright.facts.mesh import Mesh
from shardwright.facts.phases import DECODE
from shardwright.facts.spec import Spec
from shardwright.ir.graph import Graph
from shardwright.ir.ops.caches import cache_spec
from shardwright.planner.plan.plan import PlanData, Request
from shardwright.planner.plan.recache import recached_bytes, recaches
from shardwright.planner.plan.store import plan_from_json, plan_to_json
from shardwright.planner.report.report import format_plan
from shardwright.planner.search.serving import make_serving_plan
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.planner.strategies.params import all_params
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool, count_collectives
from tests.endtoend import test_latent, test_serving
from tests.endtoend.test_serving import BATCH, NEW
from tests.ir.models import VOCABULARY
from tests.sharded import (
    Laid,
    assert_close,
    builder_of,
    import_source,
    job_of,
    mesh_of,
    program_of,
)

Pool = Callable[[int], RankPool]
PROMPT = 32  # two pages, one for each of two ranks
STEPS = [
    Step("prefill", [20, 9, 17, 1]),
    Step("decode", [1, 1, 1, 1]),
    Step("append", [3, 0, 10, 7]),
    Step("decode", [1, 1, 1, 1]),
    Step("decode", [1, 1, 1, 1]),
    Step("prefill", [2, 8, 5, 3]),
    Step("append", [8, 1, 8, 8]),
    Step("decode", [1, 1, 1, 1]),
]


def graph_of(name: str, tokens: int, context: int = 0) -> Graph:
    if name == "deepseek":
        return test_latent.graph_of(tokens, context)
    return test_serving.graph_of(name, tokens, context)


@cache
def state_of(name: str) -> dict[str, Tensor]:
    model = test_latent.deepseek() if name == "deepseek" else test_serving.model_of(name)
    return model.state_dict()


@cache
def builder(name: str, sizes: tuple[int, ...], tokens: int) -> Builder:
    return builder_of(graph_of(name, tokens, 8 - tokens), mesh_of(*sizes), training=False)


def random_decisions(
    builder: Builder, spec: str, seed: int, stored: Mapping[str, Spec] | None = None
) -> Decisions:
    """Any strategies that give this layout; parameters as `stored` or at random.

    Layers that share a page table must not run `tree` beside other algorithms.
    """
    rng = random.Random(seed)
    laid = Laid(spec, "tree" if stored is None else "")
    built = builder.build(laid)
    decisions = built.read([rng.randrange(node.costs.size) for node in built.nodes])
    assert all(
        cache_spec(node, decisions.choices[node.name]) == laid.spec_of(node)
        for node in builder.graph.nodes
        if node.op == "shardwright.cached_attention"
    )
    decisions.specs.update(stored or {})
    return decisions


def two_programs(name: str, sizes: tuple[int, ...], ours: str, theirs: str, seed: int) -> str:
    """A module with random programs for eight tokens and for one, and these layouts."""
    mesh, first, second = mesh_of(*sizes), builder(name, sizes, 8), builder(name, sizes, 1)
    prefill = random_decisions(first, ours, seed)
    names = zip(all_params(second.graph), all_params(first.graph), strict=True)
    stored = {a.param.value.name: prefill.specs[b.param.value.name] for a, b in names}
    decode = random_decisions(second, theirs, seed + 1, stored)
    found = recaches(first.graph, prefill, second.graph, decode, first.network)
    assert found
    return write_source(
        program_of(first, prefill),
        mesh,
        summary="A test.",
        phase="prefill",
        optimizer="none",
        decode=program_of(second, decode),
        recached={recache.node: recache.path for recache in found},
    )


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (BATCH, 40), generator=generator)


def talk_on_rank(source: str, state: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    return by_module(model, STEPS, ids)


@cache
def expected(name: str) -> dict[str, Tensor]:
    return by_graph(graph_of(name, 8), state_of(name), STEPS, tokens())


LAYOUTS = [
    ("llama", (2,), "S2", "S1"),
    ("mistral", (2,), "S1", "S2"),
    ("mistral", (1, 2), "R,S2", "R,S0"),
    ("llama", (2, 1), "R,R", "S2,R"),
    ("mistral", (2, 2), "S0,S2", "S2,S1"),
    ("llama", (2, 2), "S2,S1", "S0,S0"),
    ("llama", (2, 2), "S0,S0", "S1,S2"),
]
MORE = [
    ("gemma3", (2,), "S2", "S2|S1"),  # caches with windows stay as they are
    ("mistral", (2,), "S2", "S1"),
    ("llama", (2,), "S0", "S2"),
    ("mistral", (2,), "S2", "R"),
    ("llama", (1, 2), "R,S0", "R,S1"),
    ("mistral", (2, 2), "S1,S0", "R,S2"),
    ("llama", (2, 2), "R,S2", "S0,S1"),
    ("mistral", (2, 2), "S0,S1", "S2,R"),
    ("gemma3", (2, 2), "S0,S2|S0,S1", "S1,S2|S0,S1"),
]


@pytest.mark.parametrize("name, sizes, ours, theirs", LAYOUTS, ids=str)
@pytest.mark.some(2)
def test_random_programs(
    pool: Pool, name: str, sizes: tuple[int, ...], ours: str, theirs: str
) -> None:
    """Every logit of a conversation equals that of one process; caches go there and back."""
    check_random_programs(pool, name, sizes, ours, theirs, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name, sizes, ours, theirs", [*LAYOUTS, *MORE], ids=str)
def test_more_random_programs(
    pool: Pool, name: str, sizes: tuple[int, ...], ours: str, theirs: str, seed: int
) -> None:
    check_random_programs(pool, name, sizes, ours, theirs, seed)


def check_random_programs(
    pool: Pool, name: str, sizes: tuple[int, ...], ours: str, theirs: str, seed: int
) -> None:
    source = two_programs(name, sizes, ours, theirs, seed)
    results = pool(prod(sizes)).run(talk_on_rank, source, state_of(name), tokens())
    for rank, got in enumerate(results):
        for step, want in expected(name).items():
            assert_close(got[step], want, 1e-9, f"{name}, rank {rank}, {step}")


@pytest.mark.parametrize(
    "sizes, ours, theirs",
    [
        ((2,), "R", "S2"),
        ((2,), "S2", "S0"),
        pytest.param((2, 2), "S0,S2", "R,S0", marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_latents(pool: Pool, sizes: tuple[int, ...], ours: str, theirs: str) -> None:
    """Caches of latents, which have one head and no values."""
    check_random_programs(pool, "deepseek", sizes, ours, theirs, seed=3)


# --- plans ---------------------------------------------------------------------------------------


def serving_plan(name: str, sizes: tuple[int, ...], ours: str, theirs: str) -> PlanData:
    """Prefill and decode planned together, with these layouts."""
    prefill, decode = graph_of(name, PROMPT), graph_of(name, 1, PROMPT + NEW - 2)
    request = Request(
        "", prod(sizes), "cpu", "serve", BATCH, PROMPT, "float64", "none", 1e9, (), 0, NEW
    )

    def restriction(graph: Graph, mesh: Mesh) -> Restriction:
        return Laid(ours if graph is prefill else theirs)

    return make_serving_plan(prefill, decode, job_of(request, mesh_of(*sizes), restriction))


def convert_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor
) -> tuple[dict[tuple[str, str, str], float], Tensor]:
    """Bytes that the conversion of the prompts' caches moves, and an answer."""
    model: Any = import_source(source).ShardedModel.from_state_dict(state).eval()
    model.new_cache(len(ids), PROMPT + NEW)
    model.prefill(ids)
    with count_collectives() as counter:
        model.serving.lay_out(DECODE)
    moved = {(k.op, k.axis, str(k.phase)): c.bytes for k, c in counter.counts.items()}
    return moved, model.generate(ids, NEW, lengths=[PROMPT, 9, 17, 1])


@pytest.mark.parametrize(
    "sizes, ours, theirs",
    [
        ((2,), "S2", "S1"),
        ((2,), "S0", "S2"),
        ((2, 2), "S0,S2", "S0,S1"),
        ((2, 2), "S2,S1", "S0,S0"),
        ((2, 2), "S0,S0", "R,S2"),
        ((2, 2), "S1,S2", "R,R"),
    ],
    ids=str,
)
@pytest.mark.some(2)
def test_what_is_moved(pool: Pool, sizes: tuple[int, ...], ours: str, theirs: str) -> None:
    """A conversion moves the bytes that the plan says, and answers are those of one process."""
    plan = serving_plan("llama", sizes, ours, theirs)
    assert plan.decode is not None and len(plan.recached) == 1
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    conversion = plan.recached[0]
    assert conversion.name == "model.layers.*.self_attn.kv" and conversion.count == 3
    assert plan.answer_s == pytest.approx(
        plan.seconds + conversion.seconds + (NEW - 1) * plan.decode.seconds, rel=1e-12
    )
    predicted = dict(recached_bytes(plan))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, PROMPT), generator=generator)
    want = test_serving.greedy("llama", ids, [PROMPT, 9, 17, 1])
    results = pool(prod(sizes)).run(convert_on_rank, module_source(plan), state_of("llama"), ids)
    for moved, answer in results:
        assert moved == pytest.approx(predicted, rel=1e-12)
        assert torch.equal(answer[:, PROMPT:], want)


def test_the_report_names_the_conversion() -> None:
    plan = serving_plan("llama", (2, 2), "S0,S2", "S0,S1")
    text = format_plan(plan)
    assert "conversion of the KV caches" in text and "One set of weights serves both" in text
    moved = "dp: batch, cp: tokens -> dp: batch, cp: heads (cp all-to-all"
    assert f"3 x model.layers.*.self_attn.kv: {moved}"
    alike = format_plan(serving_plan("llama", (2, 2), "S0,S1", "S0,S1"))
    assert "One set of weights and one cache layout serve both phases." in alike
    assert "conversion" not in alike
