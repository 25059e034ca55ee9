"""Scripts for many machines: what they say, and that two agents of torchrun run one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.launching import Launch
from shardwright.runtime import Mesh
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]


def launch(mesh: dict[str, int], per_node: int, **given: Any) -> Launch:
    options: dict[str, Any] = {"nodes": None, "time_limit": "1-00:30:00", "max_restarts": 2}
    program = ["my loop.py", "--resume"]
    return Launch.of("Net", mesh, per_node, program=program, **(options | given))


def test_slurm() -> None:
    text = launch({"dp": 4, "tp": 8}, 8).script("slurm")
    for line in ("#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --time=1-00:30:00"):
        assert f"\n{line}\n" in text
    assert "srun --kill-on-bad-exit torchrun --nnodes 4 --nproc-per-node 8" in text
    assert text.endswith(" --max-restarts 2 'my loop.py' --resume\n")
    assert "so that tp lies inside one." in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_torchrun() -> None:
    text = launch({"tp": 4}, 2).script("torchrun")
    assert "timeout --kill-after=60 88200 torchrun --nnodes 2 --nproc-per-node 2" in text
    assert "so that tp goes over neighbouring ones." in text
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode != 0 and "set HOST to the address" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nodes": 2}, "the plan is for 4 nodes of 2 GPUs"),
        ({"time_limit": "a day"}, "expected HH:MM:SS"),
        ({"per_node": 3}, "not whole nodes of 3"),
    ],
)
def test_refusals(given: dict[str, Any], said: str) -> None:
    per_node = given.pop("per_node", 2)
    with pytest.raises(ValueError, match=said):
        launch({"dp": 8}, per_node, **given)


def test_command_line(run: Run, tmp_path: Path) -> None:
    assert run(f"launch {tmp_path}").code == 2
    assert run("launch", str(tmp_path), "--slurm", "--torchrun").code == 2


def test_ranks_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm numbers tasks with --distribution=cyclic."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match="number ranks machine by machine"):
        Mesh.create({"dp": 2, "tp": 2})


@pytest.mark.slow
def test_two_agents_run_a_generated_module(tmp_path: Path) -> None:
    model, rows = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8)
    module = tmp_path / "sharded_model.py"
    plan = sw.plan(model, (rows,), cluster="cpu", layout="ddp=2", phase="prefill")
    plan.write_module(module)
    script = tmp_path / "launch.sh"
    text = Launch("Net", {"dp": 2}, 2, 1, [str(module)], "00:02:00", 0).script("torchrun")
    script.write_text(text.replace("torchrun", f"{sys.executable} -m torch.distributed.run"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "HOST": "127.0.0.1", "PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    agents = [
        subprocess.Popen(
            ["bash", script], env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # `timeout`, which ends what it runs
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("step 1:" in text for text in said) == 1  # rank 0 speaks, of one machine
