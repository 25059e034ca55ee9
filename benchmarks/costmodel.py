"""How far the cost model is from measured kernels and collectives.

    python benchmarks/costmodel.py [FOLDER]

Prints median / 90th percentile of the absolute error on rows that no fit has seen, beside the naive
datasheet roofline (full peak, full bandwidth, no floor) and beside a plain alpha-free ring at the
link's full rate.  FOLDER holds the CSV files; by default `shared/data/silicon` beside the
repository.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from shardwright.costmodel.calibration import calibrate
from shardwright.costmodel.calibration.calibrate import Errors, held_out
from shardwright.costmodel.compute import op_s
from shardwright.costmodel.machines.cluster import Kernel, Link, load_cluster

_NAIVE = Kernel(floor_s=0.0, efficiency=1.0, bandwidth_efficiency=1.0, overlap=16.0)


def _row(what: str, ours: Errors, naive: Errors) -> None:
    print(
        f"{what:<34}{ours.median:6.1f} / {ours.p90:5.1f}"
        f"{naive.median:14.1f} / {naive.p90:5.1f}{ours.rows:10d}"
    )


def kernels(folder: Path, name: str) -> None:
    """Matmul and attention of one cluster."""
    cluster, device = load_cluster(name), f"{name}_sxm"
    naive = replace(cluster, small_head_cost=1.0, decode_pass_s=0.0)
    table = calibrate.gemm_table(folder, device)
    base = held_out(calibrate.predict_matmul(table, naive, _NAIVE), table)
    assert cluster.tiles is not None
    tiled = calibrate.predict_tiles(table, cluster, cluster.tiles)
    _row(f"{name} matmul, tiles (matmul_s)", held_out(tiled, table), base)
    plain = calibrate.predict_matmul(table, cluster, cluster.matmul)
    _row(f"{name} matmul, roofline (op_s)", held_out(plain, table), base)
    table = calibrate.context_table(folder, device)
    _row(
        f"{name} attention, context",
        held_out(calibrate.predict_context(table, cluster, cluster.attention), table),
        held_out(calibrate.predict_context(table, naive, _NAIVE), table),
    )
    table = calibrate.decode_table(folder, device)
    _row(
        f"{name} attention, decode",
        held_out(calibrate.predict_decode(table, cluster, cluster.decode), table),
        held_out(calibrate.predict_decode(table, naive, _NAIVE), table),
    )


def collectives(folder: Path, name: str, device: str) -> None:
    """All collectives of one cluster."""
    link = load_cluster(name).intra_node
    naive = Link(bytes_per_s=link.bytes_per_s, efficiency=1.0, launch_s=0.0, hop_s=0.0)
    tables = calibrate.collective_tables(folder, device)
    ours = calibrate.collective_errors(tables, link)
    base = calibrate.collective_errors(tables, naive)
    for kind, errors in ours.items():
        _row(f"{name} {kind}", errors, base[kind])


def speed() -> None:
    """How fast the planner's entry point prices strategies."""
    cluster = load_cluster("h100")
    flops = np.random.default_rng(0).uniform(1e9, 1e13, 1000)
    start = time.perf_counter()
    for _ in range(100):
        op_s(flops, flops / 100, "bf16", cluster)
    seconds = (time.perf_counter() - start) / 100
    print(f"\nop_s on 1,000 strategies at once: {seconds * 1e6:.0f} us")


def main() -> int:
    """Prints the table; exit code 1 without measurements."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "silicon"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    if not folder.is_dir():
        print(f"no measurements in {folder}; give the folder with gemm_*.csv", file=sys.stderr)
        return 1
    print(f"{'absolute error in %, median / p90':<34}{'ours':>14}{'datasheet':>22}{'rows':>10}")
    for name in ("h100", "a100"):
        kernels(folder, name)
    for name, device in (("h100", "h100_sxm"), ("a100", "a100_sxm"), ("l40s", "l40s")):
        collectives(folder, name, device)
    speed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
