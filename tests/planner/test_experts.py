"""Prices of layers of experts: balanced routing is what random routers do, and prices follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardwright.costmodel.collective import wire_bytes
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.ir.ops.moe import Layer, exchanges, kernels, usual_imbalance
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.pricing import pass_seconds
from shardwright.runtime import Mesh as RuntimeMesh
from shardwright.runtime import RankPool, count_collectives, moe

Pool = Callable[[int], RankPool]
EIGHT = Network(Mesh((("x", 8),)), load_cluster("h100"))
# What every rank would hold and compute with one rank alone: sizes of Qwen3-30B-A3B's layers
WHOLE = Layer(
    tokens=32768, choices=8, experts=128, all_experts=128, width=2048, hidden=768, out=2048,
    matrices=2, itemsize=2, axes=(), ranks=1, sends=False, imbalance=1.0,
    dtype="torch.bfloat16",
)  # fmt: skip


def dispatched(local: Layer, ranks: int, imbalance: float) -> Layer:
    """Tokens and experts cut over the mesh's axis, tokens sent to their experts."""
    return replace(
        local, tokens=local.tokens // ranks, experts=local.experts // ranks, axes=(0,), ranks=ranks,
        sends=True, imbalance=imbalance,
    )  # fmt: skip


def hidden_cut(local: Layer, ranks: int) -> Layer:
    """Tensor parallelism: every expert's hidden units cut."""
    return replace(local, hidden=local.hidden // ranks)


def routed(generator: torch.Generator, tokens: int, experts: int, choices: int) -> Tensor:
    """Choices (tokens, choices) of a balanced router: any experts, each once."""
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices]


# ---- what routers do ---------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [8, 32, 128, 256])
def test_usual_imbalance_has_bounds_and_grows_with_ranks(experts: int) -> None:
    """One rank has the mean load; the busiest of p cannot have more than p times the mean."""
    ranks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= experts]
    loads = [usual_imbalance(experts, n) for n in ranks]
    assert loads[0] == 1.0
    assert all(1.0 < load <= n for n, load in zip(ranks[1:], loads[1:], strict=True))
    assert loads == sorted(loads)


def test_usual_imbalance_falls_with_experts_per_rank() -> None:
    loads = [usual_imbalance(experts, 8) for experts in (8, 16, 64, 256)]
    assert loads == sorted(loads, reverse=True) and loads[-1] < loads[0]


def test_usual_imbalance_is_what_shuffled_experts_have() -> None:
    """The mean over random placements of power-law experts on ranks, within a tenth."""
    generator = torch.Generator().manual_seed(0)
    for experts, ranks in ((64, 4), (128, 8), (256, 8)):
        popularity = torch.arange(1, experts + 1, dtype=torch.float64) ** -0.5
        popularity /= popularity.sum()
        busiest = [
            popularity[torch.randperm(experts, generator=generator)].view(ranks, -1).sum(1).max()
            for _ in range(400)
        ]
        load = float(torch.stack(busiest).mean()) * ranks
        assert usual_imbalance(experts, ranks) == pytest.approx(load, rel=0.1)


@pytest.mark.parametrize(("experts", "choices", "ranks"), [(8, 2, 4), (64, 6, 8), (32, 4, 2)])
def test_rows_sent_are_those_of_balanced_routing(experts: int, choices: int, ranks: int) -> None:
    """Each token goes once to each rank that has one of its experts."""
    tokens = 20_000
    local = dispatched(
        replace(
            WHOLE, tokens=tokens * ranks, choices=choices, experts=experts, all_experts=experts
        ),
        ranks,
        1.0,
    )
    owners = routed(torch.Generator().manual_seed(0), tokens, experts, choices)
    goes = torch.zeros(tokens, ranks).scatter_(1, owners // (experts // ranks), 1.0)
    assert local.rows_sent == pytest.approx(float(goes.sum()), rel=0.01)
    assert local.pairs == tokens * choices


TINY = Layer(
    tokens=64, choices=3, experts=4, all_experts=16, width=6, hidden=4, out=6, matrices=2,
    itemsize=8, axes=(0,), ranks=4, sends=True, imbalance=1.0,
    dtype="torch.float64",
)  # fmt: skip
RUNS = 60


def moved_on_rank() -> dict[str, float]:
    """In one rank: bytes that a layer received, by phase, the mean of many random routers."""
    mesh = RuntimeMesh.create({"ep": TINY.ranks})
    generator = torch.Generator().manual_seed(mesh["ep"].rank)
    x = torch.randn(TINY.tokens, TINY.width, dtype=torch.float64, requires_grad=True)
    up = torch.randn(TINY.experts, 2 * TINY.hidden, TINY.width, dtype=torch.float64)
    down = torch.randn(TINY.experts, TINY.out, TINY.hidden, dtype=torch.float64)
    weights = torch.rand(TINY.tokens, TINY.choices, dtype=torch.float64, requires_grad=True)
    with count_collectives() as counter:
        for _ in range(RUNS):
            chosen = routed(generator, TINY.tokens, TINY.all_experts, TINY.choices)
            moe(x, chosen, weights, up, down, expert_axis=mesh["ep"]).sum().backward()
    moved = {"forward": 0.0, "backward": 0.0}
    for key, count in counter.counts.items():
        moved[str(key.phase)] += count.bytes / RUNS
    return moved


def test_expected_bytes_are_the_mean_of_those_counted(pool: Pool) -> None:
    results = pool(TINY.ranks).run(moved_on_rank)
    for phase in ("forward", "backward"):
        sent = [t for t in exchanges(TINY, backward=True) if t.backward == (phase == "backward")]
        expected = sum(float(wire_bytes(t.kind, t.bytes, TINY.ranks)) for t in sent)
        mean = sum(moved[phase] for moved in results) / TINY.ranks
        assert mean == pytest.approx(expected, rel=0.02), phase


# ---- what follows for prices -------------------------------------------------------------------


def spent(local: Layer, *, backward: bool = True) -> float:
    work, moved = kernels(local, backward=backward), exchanges(local, backward=backward)
    forward, _ = pass_seconds(work.forward, [t for t in moved if not t.backward], EIGHT)
    return forward + pass_seconds(work.backward, [t for t in moved if t.backward], EIGHT)[0]


def test_small_experts_are_sent_tokens_rather_than_cut() -> None:
    """128 experts of 768 units: a rank's eighth of each, 96, makes thin products.

    Tensor parallelism also has to gather all tokens and add up results, which is not counted here.
    """
    sent = dispatched(WHOLE, 8, usual_imbalance(128, 8))
    assert spent(sent) < spent(hidden_cut(WHOLE, 8))


def test_experts_as_many_as_ranks_suffer_from_imbalance() -> None:
    """One of Mixtral's eight experts on each rank: cutting them all is as fast as balanced routing
    would be, and the usual imbalance decides."""
    mixtral = replace(
        WHOLE, choices=2, experts=8, all_experts=8, width=4096, hidden=14336, out=4096
    )
    usual = usual_imbalance(8, 8)
    assert usual > 1.5
    assert spent(dispatched(mixtral, 8, 1.0)) < 1.1 * spent(hidden_cut(mixtral, 8))
    assert spent(hidden_cut(mixtral, 8)) < spent(dispatched(mixtral, 8, usual))


def test_imbalance_raises_time_and_memory() -> None:
    loads = [dispatched(WHOLE, 8, load) for load in (1.0, 1.25, 2.0, 8.0)]
    assert [one.saved_bytes / loads[0].saved_bytes for one in loads] == [1.0, 1.25, 2.0, 8.0]
    times = [spent(one) for one in loads]
    assert all(a < b for a, b in zip(times, times[1:], strict=False))
    compute, whole = times[-1] / times[0], 8.0
    assert 0.5 * whole < compute < 1.1 * whole


def test_few_tokens_read_the_weights_of_their_experts() -> None:
    """One token in decoding takes as long as reading its eight experts, not all 128."""
    one, expert_bytes = replace(WHOLE, tokens=1), 3 * 2048 * 768 * 2
    rate = EIGHT.cluster.bandwidth_bytes_per_s
    took = spent(one, backward=False)
    assert 8 * expert_bytes / rate < took < 3 * 8 * expert_bytes / rate
    many = spent(replace(WHOLE, tokens=256), backward=False)
    assert 128 * expert_bytes / rate < many < 2 * 128 * expert_bytes / rate
    # while weights are what is read, twice the tokens are free once all experts are in use
    assert spent(replace(WHOLE, tokens=512), backward=False) < 1.3 * many


def test_exchanged_bytes_of_a_layer_without_sending_are_none() -> None:
    own = replace(dispatched(WHOLE, 8, 1.0), sends=False)
    assert exchanges(own, backward=True) == ()
    assert own.pairs == own.tokens * own.choices / 8
