"""A stand-in for what the command line calls, so that these tests are about the command line.

`FakeApi` takes the place of `shardwright.api` and `planner.errors`; it records each call and
answers with a plan that writes small files.  What the real ones do is tested in their own rooms.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from shardwright import cli


class InfeasibleError(ValueError):
    """Stands in for `planner.errors.InfeasibleError`."""


@dataclass
class FakePlan:
    """Writes files that tests can recognise; `fails_at` names the method that breaks."""

    text: str = "8.1 ms per step, 1.4x faster than FSDP"
    fails_at: str = ""

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> dict[str, object]:
        return {"schema": "shardwright.plan/3", "text": self.text}

    def module_source(self) -> str:
        self._fail("module_source")
        return f"# {self.text}\n"

    def dump(self, stage: str) -> str:
        return f"the {stage} of {self.text}"

    def dump_problem(self, path: Path) -> None:
        path.write_text('{"problem": {}}')
        self._fail("dump_problem")

    def launch_command(self, module: str) -> str:
        return f"torchrun --nproc-per-node 8 {module}"

    def _fail(self, method: str) -> None:
        if self.fails_at == method:
            raise OSError(28, "No space left on device")


@dataclass
class FakeVerification:
    ok: bool

    def __str__(self) -> str:
        return f"largest error: {'1e-12' if self.ok else '0.3'}"


@dataclass
class FakeApi:
    """The calls made, and what to answer: a plan, or an error to raise."""

    answer: FakePlan | Exception = field(default_factory=FakePlan)
    verified: bool = True
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def plan_file(self, target: str, **options: Any) -> FakePlan:
        progress = options.pop("progress")
        self.calls.append((target, options))
        progress("solve", 0.5)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def load_plan(self, path: Path) -> FakePlan:
        self.calls.append(("load_plan", {"path": path}))
        return FakePlan(json.loads(path.read_text())["text"])

    def verify(self, folder: Path, ranks: int | None, model: str | None) -> FakeVerification:
        self.calls.append(("verify", {"folder": folder, "ranks": ranks, "model": model}))
        return FakeVerification(self.verified)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApi:
    """The fake `shardwright.api`, in an empty current folder."""
    fake = FakeApi()
    module = ModuleType("shardwright.api")
    for name in ("plan_file", "load_plan", "verify"):
        setattr(module, name, getattr(fake, name))
    errors = ModuleType("shardwright.planner.errors")
    errors.InfeasibleError = InfeasibleError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shardwright.api", module)
    monkeypatch.setitem(sys.modules, "shardwright.planner.errors", errors)
    monkeypatch.setattr(cli, "versions_in_use", lambda: {})  # whatever these tests run on
    monkeypatch.chdir(tmp_path)
    return fake


class Ran(NamedTuple):
    """What a command line gave."""

    code: int
    out: str
    err: str


class Run:
    """`run("model.py --gpus 8")` runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Ran:
        words = arguments[0].split() if len(arguments) == 1 else arguments
        with pytest.raises(SystemExit) as exit_info:
            cli.main(words)
        code = exit_info.value.code
        assert isinstance(code, int | None)
        return Ran(code or 0, *self._capsys.readouterr())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)
