"""`benchmarks/gpu.py` from plans to figures, with tiny models on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*words: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(case: str, folder: Path) -> dict[str, Any]:
    where = ("--folder", str(folder), case)
    benchmark("--prepare", "--tiny", *where)
    return json.loads(benchmark("--one", *where).splitlines()[-1])


@pytest.mark.slow
def test_a_rank_among_pretended_ones_is_timed(tmp_path: Path) -> None:
    found = figures("70b decode on 8", tmp_path)
    assert found["eager"] > 0 and found["captured"] is None and not found["failed"]
    prepared = json.loads((tmp_path / "70b_decode_on_8" / "predicted.json").read_text())
    assert prepared["seconds"] > 0 and prepared["bytes"] > 0


@pytest.mark.slow
def test_transformers_runs_beside_with_the_same_weights(tmp_path: Path) -> None:
    found = figures("8b prefill", tmp_path)
    assert found["theirs"] > 0 and found["difference"] < 3e-2
    found = figures("1b train", tmp_path)
    assert found["compiled"] > 0 and found["difference"] < 3e-2 and not found["failed"]
