"""The folder of a plan: whole or as it was, one writer at a time, and nothing else overwritten."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shardwright.folder import (
    check_output,
    module_is_the_plans,
    write_folder,
    write_module,
    write_plan,
)
from shardwright.written import wrote

ROOT = Path(__file__).resolve().parents[2]


class Made:
    """A plan with a number in it."""

    def __init__(self, number: int, size: int = 10) -> None:
        self.number, self.size = number, size

    def to_json(self) -> dict[str, Any]:
        return {"schema": "shardwright.plan/3", "number": self.number, "x": "x" * self.size}

    def module_source(self) -> str:
        return f"class ShardedModel(ShardedModule):  # {self.number}{' ' * self.size}\n"

    def dump_problem(self, path: Path) -> None:
        path.write_text('{"problem": {}}')


def test_an_edited_module_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan, module = write_folder(Made(1), out, None)
    assert module_is_the_plans(out) and wrote(plan) and wrote(module)
    write_folder(Made(2), out, None)
    module.write_text(module.read_text() + "# mine\n")
    assert not module_is_the_plans(out) and not wrote(module)
    with pytest.raises(ValueError, match="was changed since it was written; it is not overwritten"):
        write_folder(Made(3), out, None)
    assert json.loads(plan.read_text())["number"] == 2


def test_single_files_replace_their_like_alone(tmp_path: Path) -> None:
    for write, name in ((write_plan, "plan.json"), (write_module, "model.py")):
        path = tmp_path / name
        write(Made(1), path)
        write(Made(2), path)
        assert "2" in path.read_text()
        path.write_text("import torch\n")
        with pytest.raises(FileExistsError, match="is not overwritten; name another file"):
            write(Made(3), path)
        assert path.read_text() == "import torch\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.py", "plan.json"]


@pytest.mark.parametrize("inside", [True, False])
def test_the_problem_is_written_with_the_plan(tmp_path: Path, inside: bool) -> None:
    problem = tmp_path / ("out" if inside else "other") / "p.json"
    assert len(write_folder(Made(1), tmp_path / "out", problem)) == 3
    assert problem.read_text() == '{"problem": {}}'


SIZE = 200_000  # characters, so that writing takes a while
WRITER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.cli.test_folder import SIZE, Made
from shardwright.folder import write_folder
print("ready", flush=True)
for number in range(10**6):
    write_folder(Made(number, SIZE), Path(sys.argv[1]), None)
"""


def writer(out: Path) -> subprocess.Popen[str]:
    """A process that writes one plan after the other to `out`."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER.format(root=str(ROOT)), str(out)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What is left is the plan and its module, or is told from them; the next plan is written."""
    moments = random.Random(0)
    out = tmp_path / "out"
    for _ in range(20):
        process = writer(out)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        process.stdout.close()
        check_output(out)  # a new plan may go there
        if (out / "plan.json").exists() and module_is_the_plans(out):
            number = json.loads((out / "plan.json").read_text())["number"]
            assert (out / "sharded_model.py").read_text() == Made(number, SIZE).module_source()
    write_folder(Made(-1), out, None)
    assert module_is_the_plans(out)
    assert sorted(path.name for path in out.iterdir()) == ["plan.json", "sharded_model.py"]


def test_two_writers_take_turns(tmp_path: Path) -> None:
    processes = [writer(tmp_path / "out") for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
    finally:
        for process in processes:
            assert process.poll() is None  # neither has failed
            process.kill()
            process.communicate()
    check_output(tmp_path / "out")
