"""A rank that is lost in the middle of a schedule: all others end, and say who waited for what."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import shardwright

from ..ir.models import TinyGPT

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 60.0  # from the start of the processes; they take most of that to import torch
SCRIPT = """
import os, sys, threading
from datetime import timedelta
import torch
import torch.distributed as dist

rank, lost = int(os.environ["RANK"]), int(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from module import ShardedModel

model = ShardedModel()
model.reset_parameters()
rows = {name: torch.zeros(8, 8, dtype=torch.int64) for name in ("ids", "labels")}
model.step(**rows)
dist.barrier()
print("started", flush=True)
seen = []

def leave(*_):
    seen.append(1)
    if len(seen) == 2:  # in the forward of its second micro-batch
        os._exit(7)

if rank == lost:
    model.stages[0].register_forward_pre_hook(leave)
model.step(**rows)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 2])
def test_every_rank_ends_with_who_waited_for_what(lost: int, tmp_path: Path) -> None:
    """Three stages; the rank of the one in the middle is lost, or that of the last."""
    torch.manual_seed(0)
    inputs = {name: torch.zeros(8, 8, dtype=torch.int64) for name in ("ids", "labels")}
    plan = shardwright.plan(
        TinyGPT(layers=3), inputs, layout="pp=3", cluster="cpu", micro_batches=4
    )
    (tmp_path / "module.py").write_text(plan.module_source())
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(lost)],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            },
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        ends = [
            process.communicate(timeout=WITHIN_S - (time.monotonic() - started))
            for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
    assert all("started" in out for out, _ in ends), ends
    assert processes[lost].returncode == 7
    for rank, (_, said) in enumerate(ends):
        if rank == lost:
            continue
        assert processes[rank].returncode == 1, said
        last = [line for line in said.splitlines() if "RuntimeError: rank" in line][-1]
        assert f"rank {rank} of the pipeline" in last and "micro-batch" in last, said
    # the one before waits for a gradient
    before = ends[lost - 1][1]
    assert f"that stage {lost} makes from rank {lost}" in before, before
