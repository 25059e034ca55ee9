"""What is told at once, so that less has to be built and solved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.planner.ilp.problem import least_cost
from shardwright.planner.ilp.solve import solve
from shardwright.planner.search.search import most_kept
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.setting import Restriction
from tests.endtoend.test_families import builder


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "encoder_decoder"])
@pytest.mark.some(2)
def test_edges_never_make_a_plan_cheaper(name: str, recompute: bool) -> None:
    """A problem has none if its nodes alone cost the ceiling, and whole it costs no less."""
    made: Builder = builder(name, (2, 2))
    made = made.recomputed(0) if recompute else made
    whole = made.build(Restriction())
    nodes = len(made.build(Restriction(), 0.0).nodes)
    least = least_cost(whole.nodes[:nodes])
    assert 0 < least <= solve(whole.problem()).cost
    assert not made.build(Restriction(), least).edges
    assert len(made.build(Restriction(), 1.001 * least).edges) == len(whole.edges) > 0


@given(
    steps=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=40), room=st.floats(0.0, 500.0)
)  # fmt: skip
def test_the_most_layers_that_memory_has_room_for(steps: list[float], room: float) -> None:
    """Beside trying them all: bytes grow with the number of layers, the steeper the more."""
    bytes_of = [sum(sorted(steps)[:kept]) for kept in range(len(steps) + 1)]
    asked: list[int] = []

    def least(kept: int) -> float:
        asked.append(kept)
        return bytes_of[kept]

    layers = len(steps)
    fits = [kept for kept in range(layers) if bytes_of[kept] <= room]
    assert most_kept(least, layers, room) == max(fits, default=0)
