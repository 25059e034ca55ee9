"""Two hosts on one machine: the planner's prices rank attention algorithms as they measure.

Each host is a network namespace with two gloo ranks; a virtual cable of 200 Mbit/s connects them.
The ranks measure their links, which makes a cluster file, and then run each algorithm.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.hosts import NoHostsError, run_ranks, two_hosts
from shardwright.calibrating import measured_here
from shardwright.costmodel.calibration.here import cluster_text
from shardwright.costmodel.machines.cluster import Cluster, load_cluster
from shardwright.facts.spec import S
from shardwright.ir.graph import TensorType
from shardwright.ir.ops.algorithms.part import Part
from shardwright.planner.strategies.conversion import Conversions
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.steps import Moving
from shardwright.runtime import (
    Layout,
    Mesh,
    ring_attention,
    tree_attention,
    ulysses_attention,
    usp_attention,
)
from tests.parts import seconds
from tests.sharded import mesh_of

RANKS, PER_HOST = 4, 2
BATCH, LENGTH, HEADS, KEY_HEADS, DIM = 8, 256, 8, 2, 64
CACHED = 16384  # tokens of one sequence, in the decoding part
ROUNDS = 7
TIE = 1.15  # times closer than this are equal


# --- in each rank --------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Measure links and algorithms, and write what was found to `folder`."""
    cluster = cluster_text(measured_here(PER_HOST, time_limit_s=40.0))
    measured = {name: _rounds(step) for name, step in _steps().items()}
    found = {"cluster": cluster, "seconds": measured}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def _rounds(step: Callable[[], object]) -> list[float]:
    step()
    found: list[float] = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def _steps() -> dict[str, Callable[[], Tensor]]:
    line, grid = Mesh.create({"cp": RANKS})["cp"], Mesh.create({"ring": 2, "ulysses": 2})
    zigzag = Layout.zigzag(LENGTH, RANKS)
    nested = Layout.zigzag(LENGTH, 2).split(2)
    whole = [torch.randn(BATCH, n, LENGTH, DIM) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (zigzag.shard(x, 2, line.rank) for x in whole)
    own = [nested.shard(x, 2, grid.rank) for x in whole]
    options: dict[str, Any] = {"group": line, "causal": True, "layout": zigzag}
    cache = Layout.contiguous(CACHED, RANKS)
    token = Layout.contiguous(1, RANKS, start=CACHED - 1)
    one = torch.randn(1, HEADS, 1, DIM)
    keys, values = torch.randn(2, 1, KEY_HEADS, CACHED // RANKS, DIM)
    decode: dict[str, Any] = {"group": line, "causal": True, "layout": cache}
    shard = token.shard(one, 2, line.rank)
    return {
        "ring": partial(ring_attention, q, k, v, **options),
        "ulysses": partial(ulysses_attention, q, k, v, **options),
        "tree": partial(tree_attention, whole[0], k, v, query_start=0, **options),
        "usp": partial(
            usp_attention, *own, ring=grid["ring"], ulysses=grid["ulysses"], causal=True,
            layout=nested,
        ),
        "decode tree": partial(tree_attention, one, keys, values, **decode),
        "decode ring": partial(ring_attention, shard, keys, values, query_layout=token, **decode),
    }  # fmt: skip


# --- in the test ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cluster, dict[str, float]]:
    """The cluster as the ranks measured it, and seconds of each algorithm's slowest rank."""
    folder = tmp_path_factory.mktemp("two_hosts")
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts(200))
        except NoHostsError as error:
            pytest.skip(str(error))
        run_ranks("tests.endtoend.test_two_hosts:serve", folder, RANKS, hosts, timeout_s=200.0)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    path = folder / "hosts.toml"
    path.write_text(ranks[0]["cluster"])
    times = {
        name: median(
            max(of_round) for of_round in zip(*(r["seconds"][name] for r in ranks), strict=True)
        )
        for name in ranks[0]["seconds"]
    }
    return load_cluster(path, gpus=RANKS), times


def priced(cluster: Cluster) -> dict[str, float]:
    """Seconds of each algorithm by the planner."""
    line, grid = Network(mesh_of(RANKS), cluster), Network(mesh_of(2, 2), cluster)
    rows = LENGTH // RANKS

    def local(
        algorithm: str,
        *,
        ranks: int = RANKS,
        batch: int = BATCH,
        heads: int = HEADS,
        kv_heads: int = KEY_HEADS,
        queries: int = rows,
        keys: int = rows,
        cached: bool = False,
    ) -> Part:
        return Part(
            batch=batch, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys, key_dim=DIM,
            value_dim=DIM, itemsize=4, causal=True, window=0, algorithm=algorithm, axis=0,
            ranks=ranks, zigzag=True, query_ways=1, cached=cached,
        )  # fmt: skip

    def forward_s(part: Part, on: Network) -> float:
        return seconds(part, "float32", on, backward=False)[0]

    # As the planner finds USP: heads over the inner axis by conversion, a ring over the outer one.
    tokens, heads = (S(2), S(2)), (S(2), S(1))
    moving = 0.0
    for n, a, b in (
        (HEADS, tokens, heads), (KEY_HEADS, tokens, heads), (KEY_HEADS, tokens, heads),
        (HEADS, heads, tokens),
    ):  # fmt: skip
        kind = TensorType((BATCH, n, LENGTH, DIM), torch.float32)
        moving += Conversions(Moving(kind, False), grid).seconds(a, b)
    ring_part = local(
        "ring", ranks=2, heads=HEADS // 2, kv_heads=KEY_HEADS // 2, queries=2 * rows, keys=2 * rows
    )
    part = CACHED // RANKS
    decode = partial(local, batch=1, queries=1, keys=part, cached=True)
    return {
        "ring": forward_s(local("ring"), line),
        "ulysses": forward_s(local("ulysses"), line),
        "tree": forward_s(local("tree", queries=LENGTH, cached=True), line),
        "usp": moving + forward_s(ring_part, grid),
        "decode tree": forward_s(decode("tree"), line),
        "decode ring": forward_s(decode("ring"), line),
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "names", [("usp", "ring", "ulysses", "tree"), ("decode tree", "decode ring")]
)
def test_prices_rank_algorithms_as_they_measure(
    measured: tuple[Cluster, dict[str, float]], names: tuple[str, ...]
) -> None:
    cluster, times = measured
    prices = priced(cluster)
    table = "\n".join(f"{n}: priced {prices[n]:.4f} s, measured {times[n]:.4f} s" for n in names)
    print(table)
    for a in names:
        for b in names:
            if times[b] > TIE * times[a]:
                assert prices[a] < TIE * prices[b], f"{a} is faster than {b}:\n{table}"
    assert max(times[n] for n in names) > TIE * min(times[n] for n in names), f"all tie:\n{table}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_measured_links_are_the_cable(measured: tuple[Cluster, dict[str, float]]) -> None:
    """200 Mbit/s between the hosts, shared by two pairs; far more inside."""
    cluster, _ = measured
    assert 9e6 < cluster.inter_node.bytes_per_s < 13.5e6
    assert cluster.intra_node.bytes_per_s > 4 * cluster.inter_node.bytes_per_s
