"""`plan calibrate`: where it writes, and what is told of a machine that is not measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardwright import calibrating
from shardwright.costmodel.calibration.here import BusyError

if TYPE_CHECKING:
    from .conftest import Run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_is_measured_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, ...]] = []

    def calibrate(*args: object) -> str:
        given.append(args[:3])
        return "# Measured today\n"

    monkeypatch.setattr(calibrating, "calibrate", calibrate)
    words = "calibrate --out here.toml --ranks 3 --time-limit 9 --spread 0.5"
    ran = run(*words.split())
    assert ran.code == 0, ran.err
    assert run(*words.split()).code == 0  # its own file is measured again
    assert given == [(3, 9.0, 0.5)] * 2
    assert Path("here.toml").read_text() == "# Measured today\n"
    assert "plan MODEL --cluster here.toml" in ran.out


def test_other_ranks_of_torchrun_write_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "calibrate", lambda *_: None)
    assert run("calibrate", "--out", "here.toml").out == ""
    assert not Path("here.toml").exists()


def test_a_file_of_ones_own_is_not_overwritten(run: Run) -> None:
    Path("mine.toml").write_text('base = "h100"\n')
    for words, said in (
        ("--out mine.toml", "`plan calibrate` has not written it"),
        ("--out here.txt", "is not named as a cluster's file is: here.toml"),
    ):
        ran = run("calibrate", *words.split())
        assert ran.code == 2 and said in ran.err, ran.err
    assert Path("mine.toml").read_text() == 'base = "h100"\n'


def test_a_busy_machine_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> str:
        raise BusyError("this machine is too busy to be measured: 45%")

    monkeypatch.setattr(calibrating, "calibrate", busy)
    ran = run("calibrate", "--out", "here.toml")
    assert ran.code == 2 and "too busy to be measured: 45%" in ran.err
    assert not Path("here.toml").exists()
