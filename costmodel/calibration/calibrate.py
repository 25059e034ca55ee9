"""Fits the figures in `clusters/*.toml` on measurements.

    python -m shardwright.costmodel.calibration.calibrate FOLDER     # fits on a folder of CSV files

prints TOML lines to paste into a cluster file; `plan calibrate` measures the machine at hand.
Four fifths of the rows stay unseen by the fit (three fifths for the small tables of collectives);
`held_out` computes the errors on them.

The fit minimises the mean |log(predicted / measured)| over the logarithms of the parameters, by the
Nelder-Mead simplex: robust against outliers, with no gradient needed through `max` and `ceil`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..collective import AxisLink, collective_s, wire_bytes
from ..compute import context_s, decode_s, kernel_s, tiled_s
from ..machines.cluster import BUILT_IN, Cluster, Kernel, Link, Tiles, load_cluster

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_Part = TypeVar("_Part", Kernel, Tiles, Link)

_BF16 = 2  # bytes; all tables that are fitted are 16-bit
_SEED = 0  # of the split into fitted and held-out rows


class Errors(NamedTuple):
    """Absolute relative errors in percent over `rows` held-out rows."""

    median: float
    p90: float
    rows: int

    def __str__(self) -> str:
        return f"{self.median:5.1f} / {self.p90:5.1f} %  ({self.rows} rows)"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of one CSV as float arrays, with the measured seconds."""

    columns: dict[str, Floats]
    seconds: Floats
    fitted: Bools  # rows the fit may see

    def __getitem__(self, name: str) -> Floats:
        return self.columns[name]


def read_table(
    path: Path, keep: Callable[[dict[str, str]], bool] = lambda _: True, share: float = 0.2
) -> Table:
    """The rows of `path` for which `keep` holds; text columns are left out.

    `share` of the rows, drawn with a fixed seed, are marked for fitting.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if keep(row)]
    if not rows:
        raise ValueError(f"{path}: no row to fit on")
    names = [name for name, value in rows[0].items() if _is_number(value)]
    columns = {name: np.array([float(row[name]) for row in rows]) for name in names}
    seconds = columns.pop("latency_ms") * 1e-3
    drawn = np.random.default_rng(_SEED).random(len(rows)) < share
    return Table(columns, seconds, drawn)


def held_out(predicted: Floats, table: Table) -> Errors:
    """Errors on the rows that the fit has not seen."""
    rows = ~table.fitted
    error = np.abs(predicted[rows] / table.seconds[rows] - 1) * 100
    return Errors(float(np.median(error)), float(np.percentile(error, 90)), int(rows.sum()))


def gemm_table(folder: Path, device: str) -> Table:
    """Columns m, n, k of `gemm_bfloat16_<device>.csv`."""
    return read_table(folder / f"gemm_bfloat16_{device}.csv")


def context_table(folder: Path, device: str) -> Table:
    """Columns of `attn_context_<device>.csv`: causal self-attention."""
    return read_table(folder / f"attn_context_{device}.csv")


def decode_table(folder: Path, device: str) -> Table:
    """Columns of `attn_generation_<device>.csv`: one query row per sequence."""
    return read_table(folder / f"attn_generation_{device}.csv")


def collective_tables(folder: Path, device: str) -> dict[str, Table]:
    """Kind -> rows of `nccl_<device>.csv` in 16 bits, with columns num_gpus and bytes."""
    path = folder / f"nccl_{device}.csv"
    kinds = {"alltoall": "all_to_all"}
    return {
        kinds.get(name, name): read_table(
            path, lambda row, name=name: row["op_name"] == name and row["nccl_dtype"] == "half", 0.4
        )
        for name in ("all_gather", "reduce_scatter", "all_reduce", "alltoall")
    }


def gemm_work(table: Table) -> tuple[Floats, Floats]:
    """(FLOP, bytes moved) of each row of a gemm table."""
    m, n, k = table["m"], table["n"], table["k"]
    return 2 * m * n * k, _BF16 * (m * k + n * k + m * n)


def predict_matmul(table: Table, cluster: Cluster, kernel: Kernel) -> Floats:
    """Seconds by the roofline of `op_s`."""
    flops, moved = gemm_work(table)
    return kernel_s(flops, moved, cluster.peak("bf16"), cluster.bandwidth_bytes_per_s, kernel)


def predict_tiles(table: Table, cluster: Cluster, tiles: Tiles) -> Floats:
    """Seconds by `matmul_s`."""
    shape = (table["m"], table["n"], table["k"], np.ones_like(table["m"]))
    return tiled_s(
        shape, gemm_work(table)[1], cluster.peak("bf16"), cluster.bandwidth_bytes_per_s,
        cluster.processors, tiles,
    )  # fmt: skip


def predict_context(table: Table, cluster: Cluster, kernel: Kernel) -> Floats:
    """Seconds by `attention_s` of causal self-attention."""
    shape = (
        table["batch_size"], table["num_heads"], table["num_key_value_heads"],
        table["isl"], table["isl"], table["head_dim"],
    )  # fmt: skip
    return context_s(shape, cluster.peak("bf16"), cluster, _BF16, kernel, 0.5)


def predict_decode(table: Table, cluster: Cluster, kernel: Kernel) -> Floats:
    """Seconds by `attention_s` of one query row per sequence."""
    shape = (
        table["batch_size"], table["num_heads"], table["num_key_value_heads"],
        table["step"] + 1, table["head_dim"],
    )  # fmt: skip
    return decode_s(shape, cluster.peak("bf16"), cluster, _BF16, kernel)


def predict_collective(kind: str, table: Table, link: Link) -> Floats:
    """Seconds of one collective inside a node, groups of neighbours."""
    seconds = np.zeros_like(table.seconds)
    for count in np.unique(table["num_gpus"]):
        rows = table["num_gpus"] == count
        size = int(count)
        axis = AxisLink(size=size, nodes=1, local=size, span=size, intra=link, inter=link)
        seconds[rows] = collective_s(kind, table["bytes"][rows], axis)
    return seconds


def collective_errors(tables: dict[str, Table], link: Link) -> dict[str, Errors]:
    """Held-out errors by kind, and over all kinds together under `all`."""
    predicted = {kind: predict_collective(kind, table, link) for kind, table in tables.items()}
    errors = {kind: held_out(predicted[kind], table) for kind, table in tables.items()}
    together = Table(
        {},
        np.concatenate([table.seconds for table in tables.values()]),
        np.concatenate([table.fitted for table in tables.values()]),
    )
    return {**errors, "all": held_out(np.concatenate(list(predicted.values())), together)}


def nelder_mead(
    objective: Callable[[Floats], float], start: Floats, step: float = 0.2, rounds: int = 400
) -> Floats:
    """The point with the least `objective` that a simplex walk from `start` finds.

    1. Reflect the worst corner through the centre of the others; 2. go twice as far if that is the
    best so far; 3. otherwise stop half way; 4. if nothing helps, shrink towards the best corner.
    """
    corners = [start, *(start + step * unit for unit in np.eye(len(start)))]
    values = [objective(corner) for corner in corners]
    for _ in range(rounds):
        order = np.argsort(values)
        corners, values = [corners[i] for i in order], [values[i] for i in order]
        if values[-1] - values[0] < 1e-7:
            break
        centre = np.mean(corners[:-1], axis=0)
        reach = {1.0: 0.0}
        for factor in (1.0, 2.0, -0.5):
            if factor == 2.0 and reach[1.0] >= values[0]:
                continue
            if factor == -0.5 and min(reach.values()) < values[-2]:
                break
            reach[factor] = objective(centre + factor * (centre - corners[-1]))
        best = min(reach, key=lambda factor: reach[factor])
        if reach[best] < values[-1]:
            corners[-1], values[-1] = centre + best * (centre - corners[-1]), reach[best]
        else:
            corners = [corners[0], *((corners[0] + corner) / 2 for corner in corners[1:])]
            values = [values[0], *(objective(corner) for corner in corners[1:])]
    return corners[int(np.argmin(values))]


def fit(
    start: _Part, names: Sequence[str], objective: Callable[[_Part], float], walks: int = 3
) -> _Part:
    """`start` with the fields `names` moved to where `objective` is least."""

    def at(point: Floats) -> _Part:
        values = dict(zip(names, np.exp(point).tolist(), strict=True))
        for name in values.keys() & {"efficiency", "bandwidth_efficiency"}:
            values[name] = min(values[name], 1.0)
        if "overlap" in values:
            values["overlap"] = min(max(values["overlap"], 1.0), 16.0)
        return replace(start, **values)

    point = np.log([max(float(getattr(start, name)), 1e-9) for name in names])
    for _ in range(walks):
        point = nelder_mead(lambda x: objective(at(x)), point)
    return at(point)


def log_error(predicted: Floats, table: Table) -> float:
    """Mean |log(predicted / measured)| over the rows that a fit may see."""
    rows = table.fitted
    return float(np.mean(np.abs(np.log(predicted[rows] / table.seconds[rows]))))


_KERNEL = ("floor_s", "efficiency", "bandwidth_efficiency", "overlap")


def fit_matmul(table: Table, cluster: Cluster) -> Kernel:
    """The `matmul` kernel of the roofline."""
    start = Kernel(floor_s=3e-6, efficiency=0.7, bandwidth_efficiency=0.8, overlap=2.5)
    return fit(start, _KERNEL, lambda k: log_error(predict_matmul(table, cluster, k), table))


def fit_tiles(table: Table, cluster: Cluster) -> Tiles:
    """The tile model of `matmul_s`."""
    start = Tiles(
        floor_s=2.5e-6, efficiency=0.8, bandwidth_efficiency=0.85, overlap=2.4,
        wave_s=1e-7, split_s=3e-6, throttle=0.1,
    )  # fmt: skip
    names = tuple(field.name for field in fields(Tiles))
    return fit(start, names, lambda t: log_error(predict_tiles(table, cluster, t), table))


def fit_context(table: Table, cluster: Cluster) -> tuple[Kernel, float]:
    """The `attention` kernel and `small_head_cost` (1 where no head of 64 was measured)."""
    start = Kernel(floor_s=1.2e-5, efficiency=0.65, bandwidth_efficiency=0.4, overlap=1.2)
    best: tuple[float, Kernel, float] | None = None
    costs = (1.0, 1.2, 1.3, 1.4, 1.5, 1.6) if (table["head_dim"] <= 64).any() else (1.0,)
    for cost in costs:
        machine = replace(cluster, small_head_cost=cost)

        def error(kernel: Kernel, machine: Cluster = machine) -> float:
            return log_error(predict_context(table, machine, kernel), table)

        kernel = fit(start, _KERNEL, error, walks=2)
        if best is None or error(kernel) < best[0]:
            best = (error(kernel), kernel, cost)
    assert best is not None
    return best[1], best[2]


def fit_decode(table: Table, cluster: Cluster) -> tuple[Kernel, float]:
    """The `decode` kernel and `decode_pass_s`."""
    start = Kernel(floor_s=1e-5, efficiency=0.4, bandwidth_efficiency=0.85, overlap=1.2)
    best: tuple[float, Kernel, float] | None = None
    for pass_s in (0.5e-6, 1e-6, 1.5e-6, 2e-6, 2.5e-6, 3e-6, 3.5e-6, 4e-6):
        machine = replace(cluster, decode_pass_s=pass_s)

        def error(kernel: Kernel, machine: Cluster = machine) -> float:
            return log_error(predict_decode(table, machine, kernel), table)

        kernel = fit(start, _KERNEL, error, walks=2)
        if best is None or error(kernel) < best[0]:
            best = (error(kernel), kernel, pass_s)
    assert best is not None
    return best[1], best[2]


def fit_link(tables: dict[str, Table], start: Link) -> Link:
    """A link's figures, from all collectives together; the datasheet's rate stays as it is."""
    names = ["launch_s", "hop_s", "ramp_s_per_sqrt_byte"]
    names += ["exchange_s"] if start.exchange_s else []
    if start.group_bytes_per_s:
        counts = [count for count, _ in start.group_bytes_per_s]
        rates = _group_rates(tables, counts)
        start = replace(start, group_bytes_per_s=tuple(zip(counts, rates, strict=True)))
    else:
        names += ["efficiency", "copy_bytes_per_s"]
    if start.switch_reduce_bytes_per_s:
        names.append("switch_reduce_bytes_per_s")

    def error(link: Link) -> float:
        errors = [log_error(predict_collective(k, t, link), t) for k, t in tables.items()]
        return float(np.mean(errors))

    return fit(start, names, error)


def _group_rates(tables: dict[str, Table], counts: Sequence[int]) -> list[float]:
    """Median bytes/s received per GPU in messages of 4 MB and more, for each group size."""
    rates: list[float] = []
    for count in counts:
        seen: list[Floats] = []
        for kind, table in tables.items():
            rows = table.fitted & (table["num_gpus"] == count) & (table["bytes"] >= 2**22)
            wire = wire_bytes(kind, table["bytes"][rows], count)
            seen.append(wire / table.seconds[rows])
        rates.append(float(np.median(np.concatenate(seen))))
    return rates


def format_part(section: str, part: Kernel | Tiles | Link, source: str) -> str:
    """TOML lines, each with its source; a link's datasheet rate and unused fields are left out."""
    lines = [f"[{section}]"]
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, tuple):
            lines += [
                f"group_bytes_per_s.{count} = {rate:.4g}  # {source}" for count, rate in value
            ]
        elif field.name != "bytes_per_s" and value != field.default:
            lines.append(f"{field.name} = {value:.4g}  # {source}")
    return "\n".join(lines)


def report_fits(folder: Path, device: str, cluster: Cluster) -> str:
    """Everything that can be fitted for `cluster` on the tables of `device` in `folder`."""
    parts: list[str] = [f"# {cluster.name}"]
    if (folder / f"gemm_bfloat16_{device}.csv").exists():
        gemm = gemm_table(folder, device)
        source = f"fitted on gemm_bfloat16_{device}.csv"
        kernel, tiles = fit_matmul(gemm, cluster), fit_tiles(gemm, cluster)
        parts += [
            f"# held out: {held_out(predict_matmul(gemm, cluster, kernel), gemm)}",
            format_part("kernels.matmul", kernel, source),
            f"# held out: {held_out(predict_tiles(gemm, cluster, tiles), gemm)}",
            format_part("tiles", tiles, source),
        ]
    if (folder / f"attn_context_{device}.csv").exists():
        context, decode = context_table(folder, device), decode_table(folder, device)
        attention, cost = fit_context(context, cluster)
        cluster = replace(cluster, small_head_cost=cost)
        one, pass_s = fit_decode(decode, cluster)
        cluster = replace(cluster, decode_pass_s=pass_s)
        parts += [
            f"# held out: {held_out(predict_context(context, cluster, attention), context)}",
            f"small_head_cost = {cost}  # fitted on attn_context_{device}.csv",
            format_part("kernels.attention", attention, f"fitted on attn_context_{device}.csv"),
            f"# held out: {held_out(predict_decode(decode, cluster, one), decode)}",
            f"decode_pass_s = {pass_s:.3g}  # fitted on attn_generation_{device}.csv",
            format_part("kernels.decode", one, f"fitted on attn_generation_{device}.csv"),
        ]
    tables = collective_tables(folder, device)
    link = fit_link(tables, cluster.intra_node)
    for kind, table in tables.items():
        parts.append(
            f"# {kind}, held out: {held_out(predict_collective(kind, table, link), table)}"
        )
    parts.append(format_part("intra_node", link, f"fitted on nccl_{device}.csv"))
    return "\n".join(parts)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("e-", "", 1).isdigit()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="folder with the CSV files")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error("give a folder with measurements (nccl_h100_sxm.csv, ...)")
    for device in sorted(path.stem[5:] for path in options.folder.glob("nccl_*.csv")):
        name = device.removesuffix("_sxm")
        if name in BUILT_IN:
            print(report_fits(options.folder, device, load_cluster(name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
