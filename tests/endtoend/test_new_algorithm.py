"""An algorithm of attention from outside is planned, run and verified like the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from math import prod
from typing import Any

import pytest

from shardwright.ir.graph import Graph
from shardwright.planner.plan.traffic import predicted_bytes
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.runtime import RankPool
from tests.endtoend import broadcast
from tests.endtoend.families import case
from tests.endtoend.test_families import Algorithms, ids, planned
from tests.endtoend.test_serving import (
    PROMPT,
    Cut,
    count_on_rank,
    graph_of,
    logits_after,
    model_of,
    prompts,
    serve_on_rank,
)
from tests.sharded import assert_close, builder_of, check, mesh_of, program_of, source_of

SIZES = ((2,), (2, 2))


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with broadcast.known():
        yield


class Knowing:
    """A pool whose ranks know the algorithm."""

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return self.pool.run(broadcast.knowing, function, *args)


def fresh(graph: Graph) -> Graph:
    """The graph without what is known of its nodes: their rules."""
    return deepcopy(graph)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("sizes", SIZES, ids=ids)
def test_training(pool: Any, sizes: tuple[int, ...], order: str) -> None:
    """Outputs, gradients and counted bytes of a model with windows and grouped heads."""
    of = case("mistral")
    made = builder_of(fresh(of.graph), mesh_of(*sizes), order=order)
    decisions = planned(made, Algorithms("broadcast"))
    assert any(choices[-1] == "broadcast" for choices in decisions.choices.values())
    assert 'algorithm="broadcast"' in source_of(made, decisions)
    ranks: Any = Knowing(pool(prod(sizes)))
    check(ranks, made, decisions, of.params, of.inputs, of.expected, tolerance=1e-9)


def test_the_planner_weighs_it() -> None:
    """As one more choice, the dearest: its messages are those of a ring, and nothing hides them."""
    made = builder_of(fresh(case("llama").graph), mesh_of(2))
    (node, *_) = (n for n in made.graph.nodes if n.op == "shardwright.attention")
    seconds = {name: made.work(node, (name,)).seconds for name in ("ring", "broadcast")}
    assert seconds["ring"] < seconds["broadcast"]


def served(sizes: tuple[int, ...], tokens: int) -> tuple[Builder, Decisions]:
    made = builder_of(fresh(graph_of("llama", tokens)), mesh_of(*sizes), training=False)
    return made, planned(made, Cut("broadcast"))


@pytest.mark.parametrize("sizes", SIZES, ids=ids)
def test_serving(pool: Any, sizes: tuple[int, ...]) -> None:
    """Prefill, append and decode over a cache."""
    made, decisions = served(sizes, PROMPT // 2)
    token_ids, state = prompts()[0], model_of("llama").state_dict()
    ranks, source = Knowing(pool(prod(sizes))), source_of(made, decisions)
    for logits in ranks.run(serve_on_rank, source, state, token_ids, [8, 4, 4]):
        for got, length in zip(logits, (8, 12, 16, 16), strict=True):
            want = logits_after(graph_of("llama", PROMPT), state, token_ids, length)
            assert_close(got, want, 1e-9, f"after {length} tokens")


@pytest.mark.parametrize("sizes", SIZES, ids=ids)
def test_bytes_of_serving(pool: Any, sizes: tuple[int, ...]) -> None:
    made, decisions = served(sizes, PROMPT)
    program = program_of(made, decisions)
    moved = dict(predicted_bytes(program, made.network.mesh))
    source, state = source_of(made, decisions), model_of("llama").state_dict()
    for counted in Knowing(pool(prod(sizes))).run(count_on_rank, source, state, prompts()[0]):
        assert counted == pytest.approx(moved, rel=1e-12)
