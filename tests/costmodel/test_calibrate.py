"""The fitter on known answers; the shipped figures against measurements, where at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardwright.costmodel.calibration import calibrate
from shardwright.costmodel.calibration.calibrate import Errors, held_out, nelder_mead
from shardwright.costmodel.machines.cluster import Kernel, load_cluster

_FOLDER = Path(__file__).parents[2].parent / "shared" / "data" / "silicon"
measured = pytest.mark.skipif(
    not _FOLDER.is_dir(), reason=f"no measurements: {_FOLDER} does not exist"
)


def test_nelder_mead_finds_a_minimum() -> None:
    point = nelder_mead(lambda x: float((x[0] - 3) ** 2 + 10 * (x[1] + 1) ** 2), np.zeros(2))
    np.testing.assert_allclose(point, [3, -1], atol=1e-2)


def test_fit_recovers_the_parameters(tmp_path: Path) -> None:
    truth = Kernel(floor_s=5e-6, efficiency=0.6, bandwidth_efficiency=0.7, overlap=2.0)
    h100 = load_cluster("h100")
    sizes = [2**i for i in range(5, 14)]
    path = tmp_path / "gemm.csv"
    rows = [f"{m},{n},{k},1.0" for m in sizes for n in sizes for k in sizes]
    path.write_text("\n".join(["m,n,k,latency_ms", *rows]))
    table = calibrate.read_table(path)
    seconds = calibrate.predict_matmul(table, h100, truth)
    lines = [f"{row.rsplit(',', 1)[0]},{s * 1e3:.9f}" for row, s in zip(rows, seconds, strict=True)]
    path.write_text("\n".join(["m,n,k,latency_ms", *lines]))
    table = calibrate.read_table(path)
    found = calibrate.fit_matmul(table, h100)
    assert found.efficiency == pytest.approx(truth.efficiency, rel=0.02)
    assert found.floor_s == pytest.approx(truth.floor_s, rel=0.02)
    assert held_out(calibrate.predict_matmul(table, h100, found), table).p90 < 2


def test_empty_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("m,n,k,latency_ms\n")
    with pytest.raises(ValueError, match="no row to fit on"):
        calibrate.read_table(path)


@measured
@pytest.mark.parametrize("name, tiled, plain", [("h100", (8, 20), (10, 30)),
                                                ("a100", (10, 25), (12, 32))])  # fmt: skip
def test_matmul_held_out(name: str, tiled: tuple[int, int], plain: tuple[int, int]) -> None:
    cluster = load_cluster(name)
    table = calibrate.gemm_table(_FOLDER, f"{name}_sxm")
    assert cluster.tiles is not None
    _below(held_out(calibrate.predict_tiles(table, cluster, cluster.tiles), table), *tiled)
    _below(held_out(calibrate.predict_matmul(table, cluster, cluster.matmul), table), *plain)


@measured
@pytest.mark.parametrize("name, context, decode", [("h100", (10, 30), (10, 25)),
                                                   ("a100", (15, 45), (15, 50))])  # fmt: skip
def test_attention_held_out(name: str, context: tuple[int, int], decode: tuple[int, int]) -> None:
    cluster = load_cluster(name)
    table = calibrate.context_table(_FOLDER, f"{name}_sxm")
    _below(held_out(calibrate.predict_context(table, cluster, cluster.attention), table), *context)
    table = calibrate.decode_table(_FOLDER, f"{name}_sxm")
    _below(held_out(calibrate.predict_decode(table, cluster, cluster.decode), table), *decode)


@measured
@pytest.mark.parametrize(
    "name, device, bounds",
    [("h100", "h100_sxm", (10, 25)), ("a100", "a100_sxm", (10, 25)), ("l40s", "l40s", (15, 45))],
)
def test_collectives_held_out(name: str, device: str, bounds: tuple[int, int]) -> None:
    link = load_cluster(name).intra_node
    errors = calibrate.collective_errors(calibrate.collective_tables(_FOLDER, device), link)
    _below(errors["all"], *bounds)
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        assert errors[kind].median < 15, kind


def _below(errors: Errors, median: float, p90: float) -> None:
    assert errors.rows >= 100
    assert errors.median < median and errors.p90 < p90, str(errors)
