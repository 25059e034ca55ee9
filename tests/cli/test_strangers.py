"""Plans and models from others: what is run, and what reaches the terminal."""

from __future__ import annotations

import doctest
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardwright import terminal

if TYPE_CHECKING:
    from .conftest import Run

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import torch
from torch import nn

print("model file runs")

def build_model():
    return nn.Sequential(nn.Linear(8, 8))

def example_inputs(batch, seq):
    return {"input": torch.zeros(batch, seq, 8)}
"""
SMALL = "--gpus 2 --cluster cpu --batch 2 --seq 4 --dtype float32 --mesh 2 --out out".split()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)


def as_sent_by_another() -> None:
    """The same plan, but not these bytes: as if written elsewhere."""
    Path("out/plan.json").write_text(Path("out/plan.json").read_text() + "\n")


def test_verify_runs_no_file_that_a_strangers_plan_names(run: Run) -> None:
    assert run("model.py", *SMALL).code == 0
    own = run("verify", "out")
    assert own.code == 0 and "Sequential itself from model.py" in own.out
    assert "model file runs" in own.err and "model file runs" not in own.out
    as_sent_by_another()
    other = run("verify", "out")
    assert other.code == 0 and "itself from" not in other.out
    assert "model.py was not run: this plan was not written here by you; --model" in other.out
    assert "model file runs" not in other.out + other.err
    asked = run("verify", "out", "--model", "model.py")
    assert asked.code == 0 and "Sequential itself from model.py" in asked.out


def test_an_edited_module_beside_a_strangers_plan_is_not_run(run: Run) -> None:
    assert run("model.py", *SMALL).code == 0
    module = Path("out/sharded_model.py")
    module.write_text(module.read_text() + "\nopen('proof', 'w')\n")
    assert run("verify", "out").code == 0 and Path("proof").exists()  # this user's own edit
    Path("proof").unlink()
    as_sent_by_another()
    refused = run("verify", "out")
    assert refused.code == 2 and "is not what its plan generates" in refused.err
    assert not Path("proof").exists()


def test_a_file_that_ends_the_process(run: Run) -> None:
    Path("model.py").write_text("import sys\nsys.exit(0)\n" + MODEL)
    ran = run("model.py", *SMALL)
    assert ran.code == 2 and "model.py:2: importing the file failed: SystemExit: 0" in ran.err


def test_what_a_model_prints_does_not_break_json(run: Run) -> None:
    ran = run("model.py", *SMALL, "--json")
    assert json.loads(ran.out)["schema"] == "shardwright.plan/3"
    assert "model file runs" in ran.err


NAMES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(8, 8) for name in NAMES})

    def forward(self, x):
        for name in NAMES:
            x = self.heads[name](x)
        return x

def build_model():
    return Net()

def example_inputs(batch, seq):
    return {"x": torch.zeros(batch, seq, 8)}
"""


def test_parts_with_any_name(run: Run) -> None:
    """Numbers, keywords, marks, words of Python and of the generated module."""
    names = ["a-b", "class", "0", "torch", "ops", "F", "self", "x", "generate"]
    Path("model.py").write_text(f"NAMES = {names}\n{NAMES}")
    assert run("model.py", *SMALL).code == 0
    assert run("verify", "out").code == 0
    text = Path("out/sharded_model.py").read_text()
    assert 'self.get_submodule("heads.a-b")(' in text and "self.heads.torch(" in text


def test_a_part_whose_name_the_module_needs(run: Run) -> None:
    Path("model.py").write_text(f"NAMES = ['mesh']\n{NAMES}")
    ran = run("model.py", *SMALL)
    assert ran.code == 2 and "Net has a part `heads.mesh.weight`; generated modules have" in ran.err


def test_a_thread_does_not_keep_planning_alive() -> None:
    Path("model.py").write_text(
        "import threading, time\nthreading.Thread(target=lambda: time.sleep(900)).start()\n" + MODEL
    )
    ran = subprocess.run(
        [sys.executable, "-c", "from shardwright.cli import main; main()", "model.py", *SMALL],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ran.returncode == 0 and "plan verify out" in ran.stdout, ran.stderr


@pytest.mark.slow
def test_files_in_the_current_folder_are_no_libraries() -> None:
    for name in ("pickle", "typing", "socket"):
        Path(f"{name}.py").write_text("open('proof', 'w')\n")
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]\n"
        "import numpy as np\n"
        "from shardwright.planner.ilp.problem import ProblemNode, ShardingProblem\n"
        "from shardwright.planner.ilp.solve import solve\n"
        "from shardwright.runtime import run_ranks\n"
        "if __name__ == '__main__':\n"
        "    problem = ShardingProblem('p', (ProblemNode('x', np.array([2.0, 1.0])),), (), None)\n"
        "    assert solve(problem, solver='pyomo', presolve=False).assignment == (1,)\n"
        "    assert run_ranks(abs, 2, -3) == [3, 3]\n"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not Path("proof").exists()


def test_a_plan_that_is_told_to_end_cleans_up() -> None:
    slow = "import time, os, signal\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n"
    Path("model.py").write_text(slow + MODEL)
    ran = subprocess.run(
        [sys.executable, "-c", "from shardwright.cli import main; main()", "model.py", *SMALL],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ran.returncode == 128 + signal.SIGTERM and not Path("out").exists()


def test_printable() -> None:
    result = doctest.testmod(terminal)
    assert result.attempted and not result.failed
    assert terminal.printable("größer ≥ 1\t") == "größer ≥ 1\\t"


def test_a_terminal_that_knows_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    terminal.print_everywhere()
    terminal.say("größer")
    out.flush()
    assert out.buffer.getvalue() == b"gr\\xf6\\xdfer\n"  # type: ignore[attr-defined]


OPERATOR = """
import torch
from torch import Tensor, nn

print("operator file runs")

@torch.library.custom_op("stranger::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x

double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, grad: 2 * grad)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return double(self.up(x))

def build_model():
    return Net()

def example_inputs(batch, seq):
    return {"x": torch.zeros(batch, seq, 8)}
"""


@pytest.mark.slow
def test_verify_imports_no_file_that_a_strangers_plan_needs(run: Run) -> None:
    """A file that defines operators runs for this user's plans, and where it is named."""
    Path("model.py").write_text(OPERATOR)
    assert run("model.py", *SMALL).code == 0
    own = run("verify", "out")
    assert own.code == 0 and "Net itself from model.py" in own.out
    as_sent_by_another()
    other = run("verify", "out")
    assert other.code == 2 and "plan was not written here by you: nothing is run" in other.err
    assert "operator file runs" not in other.out + other.err
    assert run("show", "out").code == 0
    Path("another.py").write_text(MODEL)
    assert run("verify", "out", "--model", "another.py").code == 2
    asked = run("verify", "out", "--model", "model.py")
    assert asked.code == 0 and "operator file runs" in asked.err


@pytest.mark.parametrize("place", ["os;", "os; x.py", 'a.py")\nprint("', "a'.py", "../x.txt"])
def test_text_of_a_plan_cannot_become_an_import(run: Run, place: str) -> None:
    Path("model.py").write_text(OPERATOR)
    assert run("model.py", *SMALL).code == 0
    text = Path("out/plan.json").read_text()
    assert json.dumps(str(Path("model.py").resolve())) in text
    changed = text.replace(json.dumps(str(Path("model.py").resolve())), json.dumps(place))
    Path("out/plan.json").write_text(changed)
    ran = run("verify", "out", "--model", "model.py")
    assert ran.code == 2 and ("must be" in ran.err or "`plan.graph.body" in ran.err)
    assert "operator file runs" not in ran.err
