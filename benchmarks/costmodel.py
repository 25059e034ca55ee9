"""How far the cost model is from measured kernels and collectives.

    python benchmarks/costmodel.py [FOLDER]

Prints median / 90th percentile of the absolute error on rows that no fit has seen, beside the naive
datasheet roofline (full peak, full bandwidth, no floor) and beside a plain alpha-free ring at the
link's full rate.  FOLDER holds the CSV files; by default `shared/data/silicon` beside the
repository.  Then, from `h100_torch/kernels.csv` beside FOLDER, the kernels that PyTorch itself
runs, as a plan prices them: every second row of a kind (the others were fitted on) of what keeps
the device busy for 15 us at its peaks (what is shorter shows the host).
"""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from shardwright.costmodel.calibration import calibrate
from shardwright.costmodel.calibration.calibrate import Errors, held_out
from shardwright.costmodel.compute import attention_s, elementwise_s, matmul_s, op_s
from shardwright.costmodel.machines.cluster import Cluster, Kernel, Link, load_cluster

# Of the bytes of a row what is moved, and whether rows are added up or formats changed: kind, mode
_MOVED = {
    ("add", "eager"): (1.0, False),
    ("silu", "eager"): (1.0, False),
    ("mul_fp32", "eager"): (2 / 3, False),  # by a number: the row counts a second operand
    ("cast_bf16_fp32", "eager"): (1.0, True),
    ("rms_norm", "eager"): (1.0, True),
    ("layer_norm", "eager"): (1.0, True),
    ("rms_norm", "eager_backward"): (5 / 3, True),  # x and the gradient are read twice
    ("rms_norm_parts", "compiled"): (1.0, False),
    ("swiglu", "compiled"): (1.0, False),
    ("swiglu", "eager"): (5 / 3, False),  # silu and mul
    ("rope", "compiled"): (1.0, False),
    ("embedding", "eager"): (1.0, False),
    ("gather_rows", "eager"): (1.0, False),
    ("adamw", "fused"): (1.0, True),
}
_SHORT_S = 15e-6
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


def torch_kernels(path: Path) -> None:
    """Kernels of PyTorch on an H100, by what they are."""
    cluster = load_cluster("h100")
    seen: dict[tuple[str, str], int] = {}
    ratios: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            kind, mode, seconds = row["kind"], row["mode"], float(row["median_s"])
            what, predicted = _predicted(kind, mode, row, cluster)
            traffic = float(row["bytes"]) / cluster.bandwidth_bytes_per_s
            if not what or max(traffic, float(row["flops"]) / cluster.peak("bf16")) < _SHORT_S:
                continue
            seen[kind, mode] = seen.get((kind, mode), 0) + 1
            if seen[kind, mode] % 2 == 0:  # the others were fitted on
                ratios.setdefault(what, []).append(predicted / seconds)
    every = [ratio for found in ratios.values() for ratio in found]
    for what, found in (*ratios.items(), ("all", every)):
        error = np.abs(np.array(found) - 1) * 100
        median, p90 = float(np.median(error)), float(np.percentile(error, 90))
        print(f"h100 torch, {what:<22}{median:6.1f} / {p90:5.1f}{len(found):32d}")


def _predicted(kind: str, mode: str, row: dict[str, str], cluster: Cluster) -> tuple[str, float]:
    """What a row is, "" for what a plan has no law for, and its seconds as a plan counts them."""
    sizes = [int(size) for size in row["shape"].split("x")]
    if (kind, mode) in _MOVED:
        share, mixed = _MOVED[kind, mode]
        what = "casts, norms, adamw" if mixed else "elementwise, rows"
        return what, float(elementwise_s(share * float(row["bytes"]), cluster, mixed=mixed))
    if kind == "linear":
        m, n, k = sizes
        shapes = [(m, n, k)] if mode == "eager" else [(m, k, n), (k, n, m)]
        each = (matmul_s(a, b, c, 1, "bf16", cluster, burst=True) for a, b, c in shapes)
        return "products", sum(map(float, each))
    if kind == "grouped_mm":
        experts, tokens, k, n = sizes
        size = tokens // experts
        return "products", float(matmul_s(size, n, k, experts, "bf16", cluster, burst=True))
    if kind.startswith("attention") and mode.startswith("cudnn"):
        backward, share = mode.endswith("backward"), 0.5 if "causal" in kind else 1.0
        b, hq, hk, sq, sk, d = sizes
        once = attention_s(b, hq, hk, sq, sk, d, "bf16", cluster, share, backward=backward)
        return "attention", float(once) * (2.5 if backward else 1.0)
    return "", 0.0


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
    if (kernels_csv := folder.parent / "h100_torch" / "kernels.csv").exists():
        torch_kernels(kernels_csv)
    speed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
