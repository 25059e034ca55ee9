"""Generated modules serve: every phase on a sharded cache equals transformers, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.codegen.write import module_source
from shardwright.facts.mesh import Mesh
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.serving import serving_graph
from shardwright.ir.reference.interpret import Caches, interpret
from shardwright.ir.reference.widen import widened
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.plan import PlanData, Request
from shardwright.planner.plan.store import plan_from_json, plan_to_json
from shardwright.planner.plan.traffic import predicted_bytes
from shardwright.planner.search.serving import make_serving_plan
from shardwright.planner.strategies.build import Decisions
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool, count_collectives
from tests.ir import test_moe
from tests.ir.models import VOCABULARY, huggingface_configs, huggingface_model
from tests.runtime.test_decoding import no_host
from tests.sharded import (
    assert_close,
    builder_of,
    import_source,
    job_of,
    mesh_of,
    program_of,
    random_decisions,
    source_of,
)

Pool = Callable[[int], RankPool]
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "mistral", "gemma2", "gpt_neox")
EXPERTS: dict[str, dict[str, Any]] = {  # with changes to their configs
    "mixtral": {}, "qwen3_moe": {}, "deepseek_v3": {}, "gpt_oss": {},
    # attention in chunks; where it is not, queries grow with the logarithm of their position
    "llama4": {"attention_chunk_size": 6, "floor_scale": 4},
}  # fmt: skip
# The others' answers are compared in the slow tests; their steps always are.
QUICK = {"llama", "qwen3", "gpt2"}
ALGORITHMS = ("ring", "gather", "pass_q", "tree")
BATCH, PROMPT, NEW = 4, 16, 6


@cache
def model_of(name: str) -> Any:
    if name in EXPERTS:
        return test_moe.model_of(name, **EXPERTS[name]).eval()
    return huggingface_model(name, huggingface_configs()[name]).eval()


@cache
def graph_of(name: str, tokens: int, context: int = 0) -> Graph:
    """The served graph of a tiny model, its casts to float32 widened."""
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    labels = ("b", "s")
    flat = capture(model_of(name), inputs, training=False, serving=True)
    folded = fold(flat)
    named = tuple(type(item)(item.name, item.value, labels) for item in folded.inputs)
    graph = Graph(folded.name, named, folded.params, folded.body, folded.outputs)
    return widened(serving_graph(graph, context))


class Cut(Restriction):
    """Every attention over a cache runs one algorithm over the last axis."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm

    def allows(self, region: Region, strategy: Strategy) -> bool:
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            if node.op == "shardwright.cached_attention" and choices[-1] != self.algorithm:
                return False
        return True


def decided(
    name: str, tokens: int, sizes: tuple[int, ...], algorithm: str
) -> tuple[Any, Decisions]:
    builder = builder_of(graph_of(name, tokens), mesh_of(*sizes), training=False)
    built = builder.build(Cut(algorithm))
    solution = solve(built.problem(), solver="highs", time_limit_s=60.0)
    assert solution.assignment is not None
    decisions = built.read(solution.assignment)
    nodes = [n for n in builder.graph.nodes if n.op == "shardwright.cached_attention"]
    assert nodes and all(decisions.choices[n.name][-1] == algorithm for n in nodes)
    return builder, decisions


def prompts() -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, PROMPT), generator=generator)
    return ids, [16, 9, 12, 1]


def serve_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor, chunks: list[int]
) -> list[Tensor]:
    """Logits after each chunk of tokens, and again of the last token alone."""
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    model.new_cache(len(ids), int(ids.shape[1]))
    logits: list[Tensor] = []
    at = 0
    for width in chunks:
        step = model.prefill if at == 0 else model.append
        logits.append(step(ids[:, at : at + width]))
        at += width
    model.truncate([at - 1] * len(ids))
    logits.append(model.decode(ids[:, at - 1]))
    return logits


def count_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor
) -> dict[tuple[str, str, str], float]:
    """Bytes that one run of the program moves."""
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    model.new_cache(len(ids), int(ids.shape[1]))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    local = model.shard_inputs(input_ids=ids, position_ids=positions)
    with torch.no_grad(), count_collectives() as counter:
        model(**local)
    return {(k.op, k.axis, str(k.phase)): c.bytes for k, c in counter.counts.items()}


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        *(("mistral", way) for way in (*ALGORITHMS, "b", "n", "g")),
        *(("gpt_oss", way) for way in (*ALGORITHMS, "n", "g")),
        *(("llama4", way) for way in ("pass_q", "tree")),
    ],
)
@pytest.mark.some(5)
def test_prefill_append_and_decode(pool: Pool, name: str, algorithm: str) -> None:
    """Against the interpreter with a plain cache; all have grouped heads, Mistral has windows,
    GPT-OSS windows in half of its layers and sinks, Llama 4 chunks in most of its layers.

    `g` cuts the two query heads of each key head, after another axis has cut the key heads.
    """
    sizes = (2, 2) if algorithm == "g" else (2,)
    builder, decisions = decided(name, PROMPT // 2, sizes, algorithm)
    ids, chunks = prompts()[0], [8, 4, 4]
    state = model_of(name).state_dict()
    source = source_of(builder, decisions)
    results = pool(prod(sizes)).run(serve_on_rank, source, state, ids, chunks)
    whole = graph_of(name, PROMPT)
    for rank, logits in enumerate(results):
        for got, length in zip(logits, (8, 12, 16, 16), strict=True):
            want = logits_after(whole, state, ids, length)
            assert_close(got, want, 1e-9, f"rank {rank} after {length} tokens")


def logits_after(graph: Graph, state: dict[str, Tensor], ids: Tensor, length: int) -> Tensor:
    """Logits (b, v) of the token at `length` - 1, in one go: what follows is padding."""
    positions = torch.arange(ids.shape[1]).expand_as(ids).clone()
    positions[:, length:] = -1
    caches: Caches = {}
    outputs = interpret(graph, state, {"input_ids": ids, "position_ids": positions}, caches)
    return next(iter(outputs.values()))[:, 0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_predicted_bytes(pool: Pool, algorithm: str) -> None:
    """A prefill of the planned size moves what the planner says."""
    builder, decisions = decided("llama", PROMPT, (2, 2), algorithm)
    ids = prompts()[0]
    source, state = source_of(builder, decisions), model_of("llama").state_dict()
    moved = dict(predicted_bytes(program_of(builder, decisions), builder.network.mesh))
    for counted in pool(4).run(count_on_rank, source, state, ids):
        assert counted == pytest.approx(moved, rel=1e-12)


def serving_plan(name: str, sizes: tuple[int, ...], ways: tuple[str, str] | None) -> PlanData:
    """Prefill and decode of a tiny model planned together; `ways` fixes both's attention."""
    prefill, decode = graph_of(name, PROMPT), graph_of(name, 1, PROMPT + NEW - 2)
    request = Request(
        "", prod(sizes), "cpu", "serve", BATCH, PROMPT, "float64", "none", 1e9, (), 0, NEW
    )

    def restriction(graph: Graph, mesh: Mesh) -> Restriction:
        return Cut(ways[0] if graph is prefill else ways[1]) if ways else Restriction()

    return make_serving_plan(prefill, decode, job_of(request, mesh_of(*sizes), restriction))


WAYS = (("ring", "tree"), ("pass_q", "tree"), ("n", "n"), None)


@pytest.mark.parametrize(
    ("name", "ways"), [*(("llama", ways) for ways in WAYS), ("gpt_oss", ("ring", "tree"))], ids=str
)
@pytest.mark.some(2)
def test_two_programs_serve_together(pool: Pool, name: str, ways: tuple[str, str] | None) -> None:
    """One module with a program for each phase, over one set of weights and one cache."""
    plan = serving_plan(name, (2, 2), ways)
    assert plan.decode is not None and plan.decode.mesh == plan.mesh
    assert plan.decode.decisions.specs.keys() & plan.decisions.specs.keys()
    source = module_source(plan)
    assert "DECODE = Decoding" in source
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    ids, lengths = prompts()
    state = model_of(name).state_dict()
    want = greedy(name, ids, lengths)
    for got in pool(4).run(generate_on_rank, source, state, ids, {"lengths": lengths}):
        assert torch.equal(got[:, PROMPT:], want)


@pytest.mark.slow
def test_serving_minimises_the_whole_answer() -> None:
    """No other pair of plans with the same weights answers sooner, whatever its caches."""
    best = serving_plan("llama", (2, 2), None)
    for ways in (("ring", "tree"), ("n", "n"), ("b", "b"), ("ring", "n"), ("b", "tree")):
        assert best.answer_s <= serving_plan("llama", (2, 2), ways).answer_s + 1e-12
    for row in best.baselines:
        assert row.seconds is None or best.answer_s <= row.seconds + 1e-12


def generate_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor, options: dict[str, Any]
) -> Tensor:
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    return model.generate(ids, NEW, **options)


def greedy(name: str, ids: Tensor, lengths: list[int]) -> Tensor:
    """The new tokens (b, NEW) of transformers' own `generate`, sequence by sequence."""
    answers = [
        model_of(name).generate(
            ids[row : row + 1, :length], max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=True,
        )[:, length:]
        for row, length in enumerate(lengths)
    ]  # fmt: skip
    return torch.cat(answers)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (*FAMILIES, *EXPERTS)
    ],
)
@pytest.mark.some(1)
def test_generation_equals_transformers(pool: Pool, name: str) -> None:
    """Greedy, a batch of different lengths, under random decisions for eight tokens at a time."""
    ids, lengths = prompts()
    reference, want = model_of(name), greedy(name, ids, lengths)
    builder = builder_of(graph_of(name, 8), mesh_of(2, 2), training=False)
    state = reference.state_dict()
    for seed in range(3):
        source = source_of(builder, random_decisions(builder, seed))
        for got in pool(4).run(generate_on_rank, source, state, ids, {"lengths": lengths}):
            assert torch.equal(got[:, PROMPT:], want), f"{name} seed {seed}"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decode_step_asks_no_host(name: str) -> None:
    """All of a generated module's step, of tokens and positions that are on the device."""
    builder = builder_of(graph_of(name, 1), mesh_of(1), training=False)
    source = source_of(builder, random_decisions(builder, 0))
    ids, lengths = prompts()
    with no_host() as seen:
        got = generate_on_rank(source, model_of(name).state_dict(), ids, {"lengths": lengths})
    assert torch.equal(got[:, PROMPT:], greedy(name, ids, lengths)) and len(seen) > 100
