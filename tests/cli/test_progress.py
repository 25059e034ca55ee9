"""Progress: a bar on a terminal for what takes longer than a second, plain lines in a log."""

from __future__ import annotations

import io
import time

import pytest

from shardwright import cli


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by the test itself: pytest exchanges stderr between a fixture and its test."""
    stream = Terminal()
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_a_terminal_shows_no_bar_for_quick_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli._Progress, "_QUIET_S", 60.0)
    terminal = use_terminal(monkeypatch)
    with cli._Progress() as progress:
        progress("solve")
        progress("solve", 0.5)
    assert terminal.getvalue() == ""


def test_a_terminal_shows_a_bar_for_slow_work_and_clears_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(cli._Progress, "_QUIET_S", 0.05)
    with cli._Progress() as progress:
        progress("solve")
        deadline = time.monotonic() + 20
        while "solve" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    text = terminal.getvalue()
    assert "solve" in text
    assert text.endswith("\x1b[2K")  # the bar's line is erased, only results stay


def test_a_log_gets_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with cli._Progress() as progress:
        progress("capture")
        progress("solve")
        for tenth in range(10):
            progress("solve", tenth / 10)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "plan: capture\nplan: solve\n")


def test_the_bar_is_gone_before_an_error_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(cli._Progress, "_QUIET_S", 0.0)
    with pytest.raises(ValueError, match="no such model"), cli._Progress() as progress:
        progress("capture")
        deadline = time.monotonic() + 20
        while "capture" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        raise ValueError("no such model")
    length = len(terminal.getvalue())
    assert length > 0
    time.sleep(0.3)
    assert len(terminal.getvalue()) == length
