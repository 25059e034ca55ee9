"""Where pipelines win on large clusters, and where they do not; and how long that takes to find."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shardwright.api import Plan, plan_file

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
# Nodes of eight H100 that share one card of 100 Gb/s.
ONE_CARD = """
base = "h100"
device = "H100 nodes with one card each"
[inter_node]
bytes_per_s = 1.5625e9  # 12.5 GB/s of a node, shared by its 8 GPUs
"""


def _plan(config: str, gpus: int, seq: int, batch: int, cluster: str = "h100") -> Plan:
    return plan_file(
        str(CONFIGS / config), gpus=gpus, cluster=cluster, phase="train", batch=batch, seq=seq,
        dtype=None, memory_bytes=None, mesh=None, pins=(), optimizer="adamw", solver="highs",
        time_limit_s=60.0, outputs=("loss",),
    )  # fmt: skip


def _row_with_stages(plan: Plan) -> float:
    """Seconds of the best ordinary pipeline."""
    (row,) = (each for each in plan.baselines if each.name.startswith("PP"))
    assert row.seconds is not None
    return row.seconds


@pytest.mark.slow
def test_405b_on_16384_gpus_is_a_pipeline_found_within_minutes() -> None:
    """16M tokens a step: the published layout, TP8 PP16 DP128 (2407.21783, table 4), or a better.

    It takes 6.2 s there (400 TFLOP/s a GPU), without recomputing layers.
    """
    started = time.process_time()
    plan = _plan("llama3-405b", 16384, 8192, 2048)
    assert time.process_time() - started < 100
    assert plan.pipeline is not None and 6.2 < plan.seconds < 9.0
    assert plan.seconds <= _row_with_stages(plan)
    ordinary = [row.seconds for row in plan.baselines if "PP" not in row.name and row.seconds]
    assert plan.seconds < 0.8 * min(ordinary)


@pytest.mark.slow
def test_slow_links_between_nodes_bring_stages(tmp_path: Path) -> None:
    cluster = tmp_path / "one_card.toml"
    cluster.write_text(ONE_CARD)
    plan = _plan("llama3-70b", 256, 4096, 256, str(cluster))
    assert plan.pipeline is not None and plan.mesh.sizes[0] >= 8
    ordinary = [row.seconds for row in plan.baselines if "PP" not in row.name and row.seconds]
    assert plan.seconds < 0.3 * min(ordinary)


@pytest.mark.slow
def test_one_domain_of_nvlink_has_no_stages() -> None:
    plan = _plan("llama3-70b", 64, 8192, 64, "gb200-nvl72")
    assert plan.pipeline is None
    assert any("pipelines were considered" in note for note in plan.notes)


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [64, 512])
def test_70b_on_fast_links_shards_parameters(gpus: int) -> None:
    """One sequence of 4096 tokens for each GPU: stages come close, and are no faster."""
    plan = _plan("llama3-70b", gpus, 4096, gpus)
    assert plan.pipeline is None
    assert plan.seconds < _row_with_stages(plan) < 1.2 * plan.seconds
