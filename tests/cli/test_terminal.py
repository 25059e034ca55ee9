"""Reports fit the terminal, or a hundred columns."""

from __future__ import annotations

import re
import sys

import pytest

from shardwright.terminal import fitted, say_report

ROW = "tp all-gather 8.39 MB 44.7 us, dp backward all-reduce 16.8 MB 86.9 us, dp inside 1.5 ms"
BEST = "the best " * 9
HEAD = "communication".ljust(len(ROW))
REPORT = f"""Net on 8 x h100, mesh dp=8: 346 ms per step (predicted), 1.03x faster: {BEST}plan.

  op       strategy  {HEAD}  time
  -------  --------  {"-" * len(ROW)}  -------
  k_proj   dp: rows  {ROW}  278 us
  experts            {" " * len(ROW)}  3.23 ms

Short."""


def test_lines_are_broken_between_words() -> None:
    lines = list(fitted(REPORT, 60))
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()).startswith("Net on 8 x h100, mesh dp=8: 346 ms per")
    assert lines[-1] == "Short."
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("op "))
    assert lines[at + 1].split() == ["-" * len(part) for part in lines[at + 1].split()]
    first, *more = lines[at + 2 : next(i for i, x in enumerate(lines) if "experts" in x)]
    assert first.split()[:3] == ["k_proj", "dp:", "rows"] and first.endswith("278 us")
    start = lines[at].index("communication")
    said = " ".join(line[start:].removesuffix("278 us").strip() for line in (first, *more))
    assert said == ROW and all(not line[:start].strip() for line in more)


def test_what_fits_stays() -> None:
    assert list(fitted(REPORT, 200)) == REPORT.split("\n")


def test_a_pipe_has_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    say_report(REPORT)
    piped = capsys.readouterr().out
    assert 80 < max(map(len, piped.splitlines())) <= 100
    say_report(REPORT, full=True)
    assert capsys.readouterr().out == REPORT + "\n"


def test_a_terminal_has_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "72")
    say_report(REPORT.replace("Short", "\x1b[2JShort"))
    out = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)  # bold and dim
    assert max(map(len, out.splitlines())) <= 72 and "\\x1b[2JShort." in out
