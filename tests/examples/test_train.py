"""The training loop that people copy: a plan beside one process, and a run that goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN, LLAMA = str(ROOT / "examples" / "train.py"), str(ROOT / "examples" / "llama.py")
TEXT = ("--text", str(ROOT / "README.md"), "--warmup", "2")


def run(*command: str, folder: Path) -> None:
    words = [sys.executable, *command]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def losses(path: Path) -> list[list[float]]:
    return [[float(x) for x in line.split(",")] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_plan_trains_as_one_process_does_and_goes_on(tmp_path: Path) -> None:
    planned = ("--gpus", "2", "--cluster", "cpu", "--batch", "2", "--seq", "32")
    run("-m", "shardwright.cli", LLAMA, *planned, folder=tmp_path)
    own = ("plan_out", *TEXT, "--accumulate", "2")
    run(TRAIN, *own, "--steps", "5", "--alone", LLAMA, "--out", "alone", folder=tmp_path)
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", TRAIN, *own, "--out", "run")
    steps = ("--weights", "alone/initial.safetensors", "--steps", "5", "--save-every", "3")
    run(*ranks, *steps, folder=tmp_path)
    want, found = losses(tmp_path / "alone" / "losses.csv"), losses(tmp_path / "run" / "losses.csv")
    assert len(want) == 5
    for one, other in zip(found, want, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    # from the checkpoint after step 3, on
    run(*ranks, "--steps", "5", "--resume", folder=tmp_path)
    again = losses(tmp_path / "run" / "losses.csv")[5:]
    assert [step for step, *_ in again] == [3, 4]
    for one, other in zip(again, found[3:], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
