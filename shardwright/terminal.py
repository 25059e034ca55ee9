"""Printing, whatever the text came from and wherever it goes."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TextIO

PIPED_WIDTH = 100
"""Columns of a report that goes to no terminal."""
_LEAST_WIDTH = 60
_RULE = re.compile(r" *-+(  -+)+")  # below the head of a table
_UNUSUAL = re.compile(r"[^\n -~]")


def printable(text: str) -> str:
    r"""`text` with all that moves a cursor, colours, or turns around what is read, as escapes.

    >>> print(printable("a\x1b[2Jb\u202e" + chr(13) + "c\nd"))
    a\x1b[2Jb\u202e\rc
    d
    """
    return _UNUSUAL.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, to stdout by default, as `printable` has them."""
    stream = sys.stdout if file is None else file
    for line in lines:
        print(printable(str(line)), file=stream, flush=stream is sys.stderr)


def say_report(report: object, *, full: bool = False) -> None:
    """Print a report as wide as the terminal is, `PIPED_WIDTH` columns where there is none.

    `full`: as wide as its widest line.  On a terminal heads are bold.
    """
    terminal = sys.stdout.isatty()
    width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns) if terminal else PIPED_WIDTH
    text = printable(str(report))
    lines = text.split("\n") if full else list(fitted(text, width))
    if not terminal:
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for i, line in enumerate(lines):
        head = i == 0 or any(_RULE.fullmatch(below) for below in lines[i + 1 : i + 2])
        style = "bold" if head else "dim" if _RULE.fullmatch(line) else ""
        console.print(Text(line, style))


def fitted(text: str, width: int) -> Iterator[str]:
    """The lines of a report in at most `width` columns, where words and columns allow it.

    Cells of a table are broken between words, the widest column first, other lines likewise with
    what follows set in.
    """
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        if at + 1 < len(lines) and _RULE.fullmatch(lines[at + 1]):
            end = at + 2
            while end < len(lines) and lines[end].startswith("  "):
                end += 1
            yield from _fitted_table(lines[at:end], width)
            at = end
        else:
            yield from _fitted_line(lines[at], width)
            at += 1


def _fitted_line(line: str, width: int) -> list[str]:
    margin = line[: len(line) - len(line.lstrip())]
    if len(line) <= width:
        return [line]
    return wrap(
        line.strip(), width, initial_indent=margin, subsequent_indent=f"{margin}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _fitted_table(lines: Sequence[str], width: int) -> Iterator[str]:
    """A table whose second line has a rule for each column."""
    spans = [found.span() for found in re.finditer("-+", lines[1])]
    rows = [[line[a:b].strip() for a, b in spans] for line in (lines[0], *lines[2:])]
    widths = [b - a for a, b in spans]
    least = [
        max((len(word) for row in rows for word in row[i].split()), default=1)
        for i in range(len(spans))
    ]
    margin = spans[0][0]
    while margin + sum(widths) + 2 * (len(widths) - 1) > width:
        wide = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i])] -= 1
    for number, row in enumerate(rows):
        yield from _fitted_row(row, widths, margin)
        if number == 0:
            yield " " * margin + "  ".join("-" * w for w in widths)


def _fitted_row(row: Sequence[str], widths: Sequence[int], margin: int) -> Iterator[str]:
    cells = [
        wrap(cell, w, break_long_words=False, break_on_hyphens=False) or [""]
        for cell, w in zip(row, widths, strict=True)
    ]
    for number in range(max(map(len, cells))):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        padded = (part.ljust(w) for part, w in zip(parts, widths, strict=True))
        yield (" " * margin + "  ".join(padded)).rstrip()


def print_everywhere() -> None:
    """From now on what a terminal's encoding lacks is printed as an escape, and is no error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


__all__ = ["PIPED_WIDTH", "fitted", "print_everywhere", "printable", "say", "say_report"]
