"""Two hosts on one machine: the planner's prices rank attention algorithms as they measure.

Each host is a network namespace with two gloo ranks; a virtual cable of 200 Mbit/s connects them.
The ranks measure their links, which makes a cluster file, and then run each algorithm.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.costmodel.calibration.measure import measure_hosts
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

ROOT = Path(__file__).parents[2]
RANKS, PER_HOST = 4, 2
BATCH, LENGTH, HEADS, KEY_HEADS, DIM = 8, 256, 8, 2, 64
CACHED = 16384  # tokens of one sequence, in the decoding part
ROUNDS = 7
TIE = 1.15  # times closer than this are equal


# --- in each rank --------------------------------------------------------------------------------


def serve(rank: int, folder: Path) -> None:
    """Measure links and algorithms, and write what was found to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    cluster = measure_hosts(PER_HOST)
    measured = {name: _rounds(step) for name, step in _steps().items()}
    (folder / f"{rank}.json").write_text(json.dumps({"cluster": cluster, "seconds": measured}))
    dist.barrier()
    dist.destroy_process_group()


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


@dataclass(frozen=True)
class Hosts:
    """Two namespaces, and the name of the device that connects each to the other."""

    names: tuple[str, str]
    devices: tuple[str, str]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def two_hosts() -> Generator[Hosts]:
    """Namespaces joined by a cable of 200 Mbit/s each way; removed in any case."""
    tag = f"{os.getpid() % 10**6}"
    names, devices = (f"sw{tag}a", f"sw{tag}b"), (f"sw{tag}va", f"sw{tag}vb")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(
            "link", "add", devices[0], "netns", names[0],
            "type", "veth", "peer", "name", devices[1], "netns", names[1],
        )  # fmt: skip
        for number, (name, device) in enumerate(zip(names, devices, strict=True), start=1):
            inside = ("netns", "exec", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
            shape = ("root", "tbf", "rate", "200mbit", "burst", "64kb", "latency", "400ms")
            _ip(*inside, "tc", "qdisc", "add", "dev", device, *shape)
        yield Hosts(names, devices)
    finally:
        for name in names:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cluster, dict[str, float]]:
    """The cluster as the ranks measured it, and seconds of each algorithm's slowest rank."""
    if shutil.which("ip") is None or shutil.which("tc") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the commands `ip` and `tc`")
    folder = tmp_path_factory.mktemp("two_hosts")
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel lets no namespaces be joined and shaped: {error.stderr}")
        _run_ranks(hosts, folder, timeout_s=150.0)
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


def _run_ranks(hosts: Hosts, folder: Path, timeout_s: float) -> None:
    """`serve` on two ranks in each namespace; kills all of them if one fails or is late."""
    running: list[subprocess.Popen[str]] = []
    deadline = time.monotonic() + timeout_s
    try:
        for rank in range(RANKS):
            host = rank // PER_HOST
            environment = {
                **os.environ, "GLOO_SOCKET_IFNAME": hosts.devices[host], "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            script = (
                "import sys; from tests.endtoend.test_two_hosts import main; main(*sys.argv[1:])"
            )
            command = ["ip", "netns", "exec", hosts.names[host], sys.executable, "-c", script]
            with (folder / f"{rank}.log").open("w") as log:
                process = subprocess.Popen(
                    [*command, str(rank), str(folder)], cwd=ROOT, env=environment, text=True,
                    stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
            running.append(process)
        while any(process.poll() is None for process in running):
            failed = [i for i, process in enumerate(running) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()
    for rank, process in enumerate(running):
        text = (folder / f"{rank}.log").read_text()
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{text}"


def main(rank: str, folder: str) -> None:
    """What a rank's process runs."""
    serve(int(rank), Path(folder))


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
@pytest.mark.timeout(240)
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
@pytest.mark.timeout(240)
def test_the_measured_links_are_the_cable(measured: tuple[Cluster, dict[str, float]]) -> None:
    """200 Mbit/s between the hosts, for one rank as for both; far more inside."""
    cluster, _ = measured
    assert 18e6 < cluster.inter_node.bytes_per_s < 27e6
    assert 18e6 < cluster.inter_node.node_bytes_per_s < 27e6
    assert cluster.intra_node.bytes_per_s > 4 * cluster.inter_node.bytes_per_s
