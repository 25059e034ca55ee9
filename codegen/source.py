"""Lines of Python: wrapping at 100 columns, in the way that ruff formats them."""

from __future__ import annotations

import ast

WIDTH = 100


def statement(text: str, indent: int, comment: str = "") -> list[str]:
    """One statement with a trailing comment, wrapped if it is too long.

    >>> statement("x = f(a, b)", 1, "[b, s]")
    ['    x = f(a, b)  # [b, s]']
    """
    pad = "    " * indent
    tail = f"  # {comment}" if comment else ""
    if len(pad + text + tail) <= WIDTH:
        return [pad + text + tail]
    above = [f"{pad}# {comment}"] if comment else []
    if len(pad + text) <= WIDTH:
        return [*above, pad + text]
    return [*above, *_wrapped(text, indent)]


def _wrapped(text: str, indent: int) -> list[str]:
    """Break the outermost call or bracket: its items on one line, else one to a line."""
    pad, inner = "    " * indent, "    " * (indent + 1)
    bracket = _last_bracket(text)
    if bracket is None:
        return [pad + text]
    start, items = bracket
    close = text[-1] if text[-1] in ")]}" else ")"
    head = text[: start + 1]
    line = inner + ", ".join(items)
    if len(line) <= WIDTH:
        return [pad + head, line, pad + close]
    lines = [pad + head]
    for item in items:
        lines += [inner + item + ","]
    return [*lines, pad + close]


def _last_bracket(text: str) -> tuple[int, list[str]] | None:
    """Position of the opening bracket that the final one closes, and the items between them."""
    if not text or text[-1] not in ")]}":
        return None
    depth, quote, start = 0, "", -1
    opened: list[int] = []
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            opened.append(i)
            depth += 1
        elif char in ")]}":
            start = opened.pop()
            depth -= 1
    items = _split(text[start + 1 : -1])
    return (start, items) if items else None


def _split(text: str) -> list[str]:
    items: list[str] = []
    depth, quote, current = 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if char == "," and depth == 0 and not quote:
            items.append(current.strip())
            current = ""
        else:
            current += char
    return [*items, current.strip()] if current.strip() else items


def check(source: str) -> str:
    """`source`, after making sure that it is valid Python."""
    ast.parse(source)
    return source


def bytes_text(n: float) -> str:
    """`67.1 MB`: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def seconds_text(s: float) -> str:
    """`12.3 ms`: three digits.

    >>> seconds_text(0.0123), seconds_text(2e-6)
    ('12.3 ms', '2 us')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if s * scale >= 1.0:
            return f"{s * scale:.3g} {unit}"
    return f"{s * 1e6:.3g} us"
