"""A machine whose laws are known measures itself: its cluster file has them again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardwright.calibrating import calibrate
from shardwright.costmodel.calibration.here import (
    Attended,
    BusyError,
    Figure,
    Found,
    Streamed,
    check_calm,
    cluster_text,
)
from shardwright.costmodel.collective import AxisLink, collective_s, joint_link
from shardwright.costmodel.compute import attention_s, kernel_s
from shardwright.costmodel.machines.cluster import Cluster, Kernel, load_cluster
from shardwright.facts.mesh import Mesh

PEAK, BANDWIDTH = 4e10, 5e9
PRODUCTS = [(64, 64, 64), (256, 256, 256), (1024, 1024, 1024), (1024, 64, 256)]
LAWS = {
    "matmul": Kernel(floor_s=2e-5, efficiency=0.8, bandwidth_efficiency=1.0, overlap=1.0),
    "attention": Kernel(floor_s=3e-5, efficiency=0.4, bandwidth_efficiency=1.0, overlap=1.0),
    "attention_backward": Kernel(
        floor_s=1e-5, efficiency=0.25, bandwidth_efficiency=1.0, overlap=1.0
    ),
    "decode": Kernel(floor_s=1e-5, efficiency=1.0, bandwidth_efficiency=0.5, overlap=1.0),
    "memory": Kernel(floor_s=4e-6, efficiency=1.0, bandwidth_efficiency=1.0, overlap=1.0),
    "mixed": Kernel(floor_s=1e-5, efficiency=1.0, bandwidth_efficiency=0.3, overlap=1.0),
    "optimizer": Kernel(floor_s=1e-6, efficiency=1.0, bandwidth_efficiency=0.1, overlap=1.0),
}
ROWS = {1024: 1e-4, 65536: 3e-4, 1048576: 4.1e-3}


def figure(seconds: object) -> Figure:
    return Figure(float(np.asarray(seconds)), 0.05)


def machine() -> Cluster:
    cpu = load_cluster("cpu")
    return replace(cpu, bandwidth_bytes_per_s=BANDWIDTH, flops=(("fp32", PEAK),), **LAWS)


def product_s(m: int, n: int, k: int) -> float:
    moved = np.asarray(4.0 * (m * k + k * n + m * n))
    flops = np.asarray(2.0 * m * n * k)
    return 3 * float(kernel_s(flops, moved, PEAK, BANDWIDTH, LAWS["matmul"]))


def streamed_s(kind: str, streamed: Streamed) -> float:
    law = LAWS[kind]
    return streamed.kernels * law.floor_s + streamed.bytes / (law.bandwidth_efficiency * BANDWIDTH)


def attended_s(each: Attended) -> float:
    one = attention_s(
        each.batch, each.heads, each.heads, each.queries, each.keys, each.dim, "fp32", machine(),
        0.5 if each.queries > 1 else 1.0, backward=each.backward,
    )  # fmt: skip
    return float(one) * (2.5 if each.backward else 1.0)


def found() -> Found:
    """What a machine of these laws measures, 4 ranks on 2 hosts."""
    streams = [Streamed(1e4, 4), Streamed(1e6, 4), Streamed(1e8, 4)]
    attention = [Attended(2, 4, n, n, 32, backward=b) for n in (64, 512) for b in (False, True)]
    attention += [Attended(1, 4, 1, n, 64) for n in (64, 4096)]
    row = {size: figure(seconds) for size, seconds in ROWS.items()}
    across = {size: figure(10 * seconds) for size, seconds in ROWS.items()}
    kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
    return Found(
        ranks=4, per_node=2, memory_bytes=16e9, machine="a test", when="2026-01-02 03:04",
        products={shape: figure(product_s(*shape)) for shape in PRODUCTS},
        rates={"fp32": (512, figure(2 * 512**3 / PEAK)), "bf16": (256, figure(2 * 256**3 / 1e9))},
        streams={
            kind: {s: figure(streamed_s(kind, s)) for s in streams}
            for kind in ("memory", "mixed", "optimizer")
        },
        attention={each: figure(attended_s(each)) for each in attention},
        groups={
            (2, 1): dict.fromkeys(kinds, row), (2, 2): dict.fromkeys(kinds, across),
        },
        beside=(figure(1e-3), figure(2e-3), figure(1.5e-3)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    path = tmp_path_factory.mktemp("here") / "mine.toml"
    path.write_text(cluster_text(found(), "mine"))
    return load_cluster(path, 4)


def test_every_figure_has_a_source_and_a_spread() -> None:
    text = cluster_text(found())
    assert text.startswith("# Measured 2026-01-02 03:04 by `plan calibrate` on a test:")
    assert "# 100 us, 262 MB/s, spread 5%" in text  # (1048576 - 1024) bytes in 4 ms
    figures = [line for line in text.splitlines() if " = " in line and "floor_s" not in line]
    unsourced = [line for line in figures if "#" not in line]
    assert all(line.split()[0] in ("device", "ranks", "nodes", "efficiency",
               "bandwidth_efficiency") for line in unsourced)  # fmt: skip


@pytest.mark.parametrize("kind", LAWS)
def test_laws_are_found_again(kind: str, measured: Cluster) -> None:
    """Up to what the whole machine's peak and bandwidth are said to be."""
    law, is_ = LAWS[kind], getattr(measured, kind)
    assert is_.floor_s == pytest.approx(law.floor_s, rel=0.1)
    streams = kind in ("memory", "mixed", "optimizer", "decode")
    if streams:
        rate = is_.bandwidth_efficiency * measured.bandwidth_bytes_per_s
        assert rate == pytest.approx(law.bandwidth_efficiency * BANDWIDTH, rel=0.05)
    else:
        rate = is_.efficiency * measured.peak("fp32")
        assert rate == pytest.approx(law.efficiency * PEAK, rel=0.1)
    assert measured.contention == pytest.approx(0.25)
    assert measured.memory_bytes == pytest.approx(6.8e9) and measured.gpus_per_node == 2


def test_collectives_take_what_was_measured(measured: Cluster) -> None:
    outer, inner = (joint_link(Mesh((("x", 2), ("y", 2))), measured, (axis,)) for axis in (0, 1))
    for kind in ("all_gather", "all_reduce", "send_recv"):
        for size, seconds in ROWS.items():
            assert collective_s(kind, size, inner) == pytest.approx(seconds)
            assert collective_s(kind, size, outer) == pytest.approx(10 * seconds)
    between = (1024 + 65536) / 2
    assert collective_s("all_gather", between, inner) == pytest.approx(2e-4)
    slope = (4.1e-3 - 3e-4) / (1048576 - 65536)
    assert collective_s("all_gather", 2e6, inner) == pytest.approx(4.1e-3 + slope * (2e6 - 1048576))
    assert collective_s("all_gather", 8.0, inner) == pytest.approx(1e-4)
    assert collective_s("all_gather", 0.0, inner) == 0.0


def test_groups_that_were_not_measured_have_the_links_law(measured: Cluster) -> None:
    whole = joint_link(Mesh((("x", 4),)), measured, (0,))
    assert whole.measured is None and whole.inter is measured.inter_node
    pair = found().groups[2, 2]["send_recv"]
    rate = (1048576 - 1024) / (pair[1048576].seconds - pair[1024].seconds)
    assert measured.inter_node.bytes_per_s == pytest.approx(rate, rel=0.01)


def test_faster_links_keep_their_latency(measured: Cluster) -> None:
    faster = measured.changed(links=2.0, between_nodes=2.0)

    def link(cluster: Cluster, axis: int) -> AxisLink:
        return joint_link(Mesh((("x", 2), ("y", 2))), cluster, (axis,))

    large = 1048576
    assert collective_s("all_gather", 1024, link(faster, 1)) == pytest.approx(1e-4)
    assert collective_s("all_gather", large, link(faster, 1)) == pytest.approx(1e-4 + 2e-3)
    assert collective_s("all_gather", large, link(faster, 0)) == pytest.approx(1e-3 + 1e-2)


def test_a_busy_machine_is_refused_with_its_spread() -> None:
    assert Figure.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Figure(2.0, 1.0)
    calm = found()
    check_calm(calm, 0.06)
    products = {shape: replace(f, spread=0.5) for shape, f in calm.products.items()}
    streams = {
        kind: {s: replace(f, spread=0.5) for s, f in of.items()}
        for kind, of in calm.streams.items()
    }
    busy = replace(calm, products=products, streams=streams)
    with pytest.raises(BusyError, match="half of the rounds are 50% apart or more, 30% is allowed"):
        check_calm(busy, 0.3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    heard: list[tuple[str, float | None]] = []
    text = calibrate(2, 10.0, 100.0, lambda step, done=None: heard.append((step, done)))
    assert text is not None and "LOCAL_WORLD_SIZE" not in os.environ
    assert heard[0] == ("measure 2 ranks", None) and len(heard) > 3
    assert [done for _, done in heard[1:]] == sorted(done or 0.0 for _, done in heard[1:])
    path.write_text(text)
    cluster = load_cluster(path, 2)
    assert cluster.peak("fp32") > 1e8 and cluster.between(2, 1) is not None
    small, large = (
        collective_s("all_gather", size, joint_link(Mesh((("x", 2),)), cluster, (0,)))
        for size in (1024, 1 << 22)
    )
    assert 0 < small <= large


def test_ranks_of_torchrun_are_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started its ranks already"):
        calibrate(2, 1.0, 0.3)
