"""Printing, whatever the text came from and wherever it goes."""

from __future__ import annotations

import re
import sys
from typing import TextIO

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


def print_everywhere() -> None:
    """From now on what a terminal's encoding lacks is printed as an escape, and is no error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


__all__ = ["print_everywhere", "printable", "say"]
