"""Generated modules serve DeepSeek-V3 from its latent cache, as transformers generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.codegen.write import module_source
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph, Input
from shardwright.ir.ops.registry import local_of, operator_of
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.latent import absorbed, expanded
from shardwright.ir.passes.serving import serving_graph
from shardwright.ir.reference.widen import widened
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.plan import Request
from shardwright.planner.plan.store import plan_from_json, plan_to_json
from shardwright.planner.plan.traffic import predicted_bytes
from shardwright.planner.search.serving import make_serving_plan
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.planner.strategies.pins import pinned
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool, count_collectives
from shardwright.runtime.cache.cache import KVCache
from tests import sharded
from tests.endtoend.test_moe import Way, case_of, check, planned
from tests.ir.models import VOCABULARY
from tests.ir.test_latent import trained
from tests.ir.test_moe import model_of
from tests.sharded import (
    builder_of,
    import_source,
    job_of,
    mesh_of,
    program_of,
    reference,
    source_of,
)

Pool = Callable[[int], RankPool]
BATCH, PROMPT, NEW = 4, 16, 5
FORMS = {"absorbed": absorbed, "expanded": expanded}
WAYS = ("g", "b", "ring", "gather", "pass_q", "tree")  # g: query heads, over one latent head


@cache
def deepseek() -> Any:
    return model_of("deepseek_v3").eval()


@cache
def graph_of(tokens: int, context: int = 0, form: str = "absorbed") -> Graph:
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    folded = fold(capture(deepseek(), inputs, training=False, serving=True))
    named = tuple(Input(item.name, item.value, ("b", "s")) for item in folded.inputs)
    graph = Graph(folded.name, named, folded.params, folded.body, folded.outputs)
    return FORMS[form](widened(serving_graph(graph, context)))


class Cut(Restriction):
    """Every attention over a cache runs `choice` on the last axis."""

    def __init__(self, choice: str) -> None:
        self.choice = choice

    def allows(self, region: Region, strategy: Strategy) -> bool:
        pairs = zip(region.nodes, strategy.choices, strict=True)
        cached = [c for node, c in pairs if node.op == "shardwright.cached_attention"]
        return all(choices[-1] == self.choice for choices in cached)


@cache
def decided(
    tokens: int, sizes: tuple[int, ...], choice: str, form: str
) -> tuple[Builder, Decisions]:
    graph = graph_of(tokens, form=form)
    builder = builder_of(graph, mesh_of(*sizes), training=False)
    built = builder.build(Cut(choice))
    solution = solve(built.problem(), solver="highs", time_limit_s=60.0)
    assert solution.assignment is not None
    return builder, built.read(solution.assignment)


def prompts() -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (BATCH, PROMPT), generator=generator), [16, 9, 12, 1]


def serve_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor, lengths: list[int]
) -> tuple[Tensor, list[tuple[int, ...]], dict[tuple[str, str, str], float]]:
    """What one prefill of `ids` moves, the shapes of a token in each cache, and an answer."""
    module = import_source(source)
    model = module.ShardedModel.from_state_dict(state).eval()
    caches: list[KVCache] = []
    set_cache = model.set_cache

    def kept(name: str, layer: KVCache | None) -> None:
        caches.extend([layer] if layer is not None else [])
        set_cache(name, layer)

    model.set_cache = kept
    model.new_cache(len(ids), int(ids.shape[1]))
    assert all(layer.nbytes == layer.keys.nbytes for layer in caches)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    local = model.shard_inputs(input_ids=ids, position_ids=positions)
    with torch.no_grad(), count_collectives() as counter:
        model(**local)
    moved = {(k.op, k.axis, str(k.phase)): c.bytes for k, c in counter.counts.items()}
    shapes = [tuple(layer.keys.shape[1:]) for layer in caches]
    return model.generate(ids, NEW, lengths=lengths), shapes, moved


@cache
def answers() -> Tensor:
    """The new tokens (b, NEW) of transformers' own `generate`, sequence by sequence."""
    ids, lengths = prompts()
    found = [
        deepseek().generate(
            ids[row : row + 1, :length], max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=True,
        )[:, length:]
        for row, length in enumerate(lengths)
    ]  # fmt: skip
    return torch.cat(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.some(4)
def test_generation_equals_transformers(pool: Pool, choice: str, form: str) -> None:
    """Each way to cut attention serves from 24 numbers per token, and moves what is predicted."""
    builder, decisions = decided(PROMPT, (2,), choice, form)
    source = source_of(builder, decisions)
    assert "values_in_keys=True" in source
    assert max(map(len, source.splitlines())) <= 100
    ids, lengths = prompts()
    predicted = dict(predicted_bytes(program_of(builder, decisions), builder.network.mesh))
    results = pool(2).run(serve_on_rank, source, deepseek().state_dict(), ids, lengths)
    for out, shapes, moved in results:
        assert torch.equal(out[:, PROMPT:], answers())
        assert shapes == [(1, 24)] * 4
        assert moved == pytest.approx(predicted, rel=1e-12)


@pytest.mark.parametrize("choice", ("g", "b", "ring", "tree"))
@pytest.mark.some(1)
def test_prompts_longer_than_planned(pool: Pool, choice: str) -> None:
    """Keys and values made from latents, of chunks that attend what earlier ones cached, on 2x2."""
    builder, decisions = decided(PROMPT // 2, (2, 2), choice, "expanded")
    source = source_of(builder, decisions)
    assert "up=" in source
    ids, lengths = prompts()
    results = pool(4).run(generate_on_rank, source, deepseek().state_dict(), ids, lengths)
    for out in results:
        assert torch.equal(out[:, PROMPT:], answers())


def generate_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor, lengths: list[int]
) -> Tensor:
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    return model.generate(ids, NEW, lengths=lengths)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", WAYS)
def test_memory_of_the_cache(choice: str, form: str) -> None:
    """Priced are the numbers of one key per token; what cuts no tokens keeps all of them."""
    builder, decisions = decided(PROMPT, (2,), choice, form)
    nodes = [n for n in builder.graph.nodes if n.op == "shardwright.cached_attention"]
    tokens = BATCH * PROMPT // (1 if choice == "g" else 2)
    for node in nodes:
        local = local_of(node, decisions.choices[node.name], (2,))
        assert operator_of(node).remembered(local) == tokens * 24 * 8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.some(1)
def test_two_programs_serve_together(pool: Pool, form: str) -> None:
    """Prefill and decode planned as one problem, over one cache of latents."""
    request = Request("", 2, "cpu", "serve", BATCH, PROMPT, "float64", "none", 1e9, (), 0, NEW)
    job = job_of(request, mesh_of(2), pinned(()))
    prefill, decode = graph_of(PROMPT, form=form), graph_of(1, PROMPT + NEW - 2)
    plan = make_serving_plan(prefill, decode, job)
    source = module_source(plan)
    assert "DECODE = Decoding" in source and "values_in_keys=True" in source
    assert ("up=" in source) == (form == "expanded")
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    ids, lengths = prompts()
    for out, shapes, _ in pool(2).run(serve_on_rank, source, deepseek().state_dict(), ids, lengths):
        assert torch.equal(out[:, PROMPT:], answers()) and shapes == [(1, 24)] * 4


# --- training ------------------------------------------------------------------------------------

TRAINED = {
    "ring": Way(("dispatch_i1",), (2,), attention=("ring",)),
    "gather, sharded": Way(("dispatch_i1",), (2,), sharded=True, attention=("gather",)),
    "queries alone": Way(("dispatch_i1",), (2,), attention=("q",)),
    "batch x ring": Way(("dispatch_i0", "i1"), (2, 2), attention=("b", "ring")),
    "heads x ring, sharded": Way(("e", "i1"), (2, 2), sharded=True, attention=("g", "ring")),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.some(2)
def test_training_over_latents(pool: Pool, name: str) -> None:
    """Loss and all gradients are those of one process that attends over the keys of all heads;
    latents and their gradients are what is moved, as predicted."""
    plain, way = case_of("deepseek_v3"), TRAINED[name]
    case = replace(plain, graph=expanded(plain.graph))
    builder, decisions = planned(case, way)
    assert "up=" in source_of(builder, decisions)
    check(pool(builder.network.mesh.ranks), case, builder, decisions)


@pytest.mark.parametrize("choice", ["ring", "gather"])
def test_training_over_latents_in_zigzag_order(pool: Pool, choice: str) -> None:
    model, plain, inputs = trained("", tokens=16)
    params = dict(model.state_dict())
    builder = builder_of(expanded(plain), mesh_of(2), order="zigzag")
    built = builder.build(Way((), (2,), attention=(choice,)))
    solution = solve(built.problem(), solver="highs", time_limit_s=60.0)
    assert solution.assignment is not None
    decisions = built.read(solution.assignment)
    assert f'algorithm="{choice}",axis=x,zigzag=True' in "".join(
        source_of(builder, decisions).split()
    )
    expected = reference(plain, params, inputs)
    sharded.check(pool(2), builder, decisions, params, inputs, expected, tolerance=1e-10)
