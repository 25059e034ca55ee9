"""Generated modules serve DeepSeek-V3 from its latent cache, as transformers generates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.ir.capture import capture
from shardwright.ir.fold import fold
from shardwright.ir.graph import Graph, Input
from shardwright.ir.latent import absorbed
from shardwright.ir.serving import serving_graph
from shardwright.ir.widen import widened
from shardwright.planner.build import Builder, Decisions, Restriction
from shardwright.planner.regions import Region, Strategy
from shardwright.planner.solvers import solve
from shardwright.planner.traffic import predicted_bytes
from shardwright.runtime import RankPool, count_collectives
from tests.ir.models import VOCABULARY
from tests.ir.test_moe import model_of
from tests.sharded import builder_of, import_source, mesh_of, program_of, source_of

Pool = Callable[[int], RankPool]
BATCH, PROMPT, NEW = 4, 16, 5
WAYS = ("g", "b", "ring", "gather", "pass_q", "tree")  # g: query heads, over one latent head


@cache
def deepseek() -> Any:
    return model_of("deepseek_v3").eval()


@cache
def graph_of(tokens: int) -> Graph:
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    folded = fold(capture(deepseek(), inputs, training=False, serving=True))
    named = tuple(Input(item.name, item.value, ("b", "s")) for item in folded.inputs)
    graph = Graph(folded.name, named, folded.params, folded.body, folded.outputs)
    return absorbed(widened(serving_graph(graph, 0)))


class Cut(Restriction):
    """Every attention over a cache runs `choice` on the last axis."""

    def __init__(self, choice: str) -> None:
        self.choice = choice

    def allows(self, region: Region, strategy: Strategy) -> bool:
        pairs = zip(region.nodes, strategy.choices, strict=True)
        cached = [c for node, c in pairs if node.op == "shardwright.cached_attention"]
        return all(choices[-1] == self.choice for choices in cached)


def decided(tokens: int, sizes: tuple[int, ...], choice: str) -> tuple[Builder, Decisions]:
    builder = builder_of(graph_of(tokens), mesh_of(*sizes), training=False)
    built = builder.build(Cut(choice))
    solution = solve(built.problem(), solver="highs", time_limit_s=60.0)
    assert solution.assignment is not None
    return builder, built.read(solution.assignment)


def prompts() -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (BATCH, PROMPT), generator=generator), [16, 9, 12, 1]


def generate_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor, lengths: list[int]
) -> tuple[Tensor, set[tuple[str, tuple[int, ...]]], dict[tuple[str, str, str], float]]:
    """The answer, the shapes of the layers' memory, and what one prefill of `ids` moves."""
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    out = model.generate(ids, NEW, lengths=lengths)
    serving = model.new_cache(len(ids), int(ids.shape[1]))
    del serving
    shapes = {
        (title, tuple(pool.shape[1:]))
        for path, _ in model.CACHES.items()
        for title, pool in [("keys", model.get_cache(path).keys)]
    }
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    local = model.shard_inputs(input_ids=ids, position_ids=positions)
    with torch.no_grad(), count_collectives() as counter:
        model(**local)
    moved = {(k.op, k.axis, str(k.phase)): c.bytes for k, c in counter.counts.items()}
    return out, shapes, moved
