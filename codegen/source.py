"""Lines of Python: wrapping at 100 columns, in the way that ruff formats them."""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Collection, Sequence

from ..facts.users import Import
from .allowed import check_module

WIDTH = 100
_METHOD = re.compile(r"(?<=\))\.\w+(\([^()]*\))?$")
_CALLED = re.compile(r"[\w)\]]$")  # in front of a bracket: a call or a subscript, no tuple or list


def statement(text: str, indent: int, comment: str = "") -> list[str]:
    """One statement with a trailing comment, wrapped if it is too long.

    >>> statement("x = f(a, b)", 1, "[b, s]")
    ['    x = f(a, b)  # [b, s]']
    """
    pad = "    " * indent
    tail = f"  # {comment}" if comment else ""
    if len(pad + text + tail) <= WIDTH:
        return [pad + text + tail]
    above = comment_lines(comment, indent)
    if len(pad + text) <= WIDTH:
        return [*above, pad + text]
    row = text.removesuffix(",")  # of a table
    return [*above, *_wrapped(row, indent, text[len(row) :])]


def signature(name: str, arguments: Sequence[str], returned: str, indent: int) -> list[str]:
    """`def name(...) -> returned:`, its arguments on one line if they fit, else each on its own.

    >>> signature("forward", ["self", "x: Tensor"], "Tensor", 1)
    ['    def forward(self, x: Tensor) -> Tensor:']
    """
    pad, inner = "    " * indent, "    " * (indent + 1)
    head = f"{pad}def {name}({', '.join(arguments)}) -> {returned}:"
    if len(head) <= WIDTH:
        return [head]
    joined = inner + ", ".join(arguments)
    rows = [joined] if len(joined) <= WIDTH else [f"{inner}{argument}," for argument in arguments]
    return [f"{pad}def {name}(", *rows, f"{pad}) -> {returned}:"]


def comment_lines(comment: str, indent: int) -> list[str]:
    """`comment` in lines of its own."""
    pad = "    " * indent
    return [f"{pad}# {line}" for line in _comment_lines(comment, WIDTH - len(pad) - 2)]


def _comment_lines(comment: str, width: int) -> list[str]:
    """`comment` in lines of at most `width`, broken after semicolons.

    >>> _comment_lines("[b, s]; 4 kB; 3 us", 13)
    ['[b, s]; 4 kB;', '3 us']
    """
    lines: list[str] = []
    for part in comment.split("; "):
        if lines and len(f"{lines[-1]}; {part};") <= width:
            lines[-1] += f"; {part}"
        else:
            lines.append(part)
    return [f"{line};" for line in lines[:-1]] + lines[-1:] if comment else []


def _wrapped(text: str, indent: int, tail: str = "") -> list[str]:
    """`text` + `tail` in one line, else with the outermost last bracket opened, inside out.

    The arguments of a call stand on one line if they fit, else each on its own with a comma, as
    the items of a tuple or list always do.  What does not end in a bracket, such as
    `x = f(a) * b`, is put into one, an operand a line; so is what has several links,
    `x = a[0].b[1].c(d)`.
    """
    pad, inner = "    " * indent, "    " * (indent + 1)
    if len(pad + text + tail) <= WIDTH:
        return [pad + text + tail]
    begin, value = _taken(text)
    if begin and len(links := _links(value)) > 2:
        parts = [value] if len(inner + value) <= WIDTH else links
        lines = [line for part in parts for line in _wrapped(part, indent + 1)]
        return [f"{pad}{begin}(", *lines, f"{pad}){tail}"]
    bracket, method = _last_bracket(text), _METHOD.search(text)
    if method and (bracket is None or len(pad + text[: bracket[0] + 1]) > WIDTH):
        # `f(a, b).to(torch.float32)`: open the call before
        text, tail = text[: method.start()], method.group() + tail
        bracket = _last_bracket(text)
    if bracket is None or len(pad + text[: bracket[0] + 1]) > WIDTH:
        if not begin:
            return [pad + text + tail]
        parts = [value] if len(inner + value) <= WIDTH else _operands(value)
        lines = [line for part in parts for line in _wrapped(part, indent + 1)]
        return [f"{pad}{begin}(", *lines, f"{pad}){tail}"]
    start, items = bracket
    lines = [inner + ", ".join(items)]
    alone = len(items) == 1 and not text[:-1].endswith(",")
    listed = not _CALLED.search(text[:start]) and not (text[start] == "(" and alone)
    if listed or len(lines[0]) > WIDTH:
        lines = [line for item in items for line in _wrapped(item, indent + 1, ",")]
    return [pad + text[: start + 1], *lines, pad + text[-1] + tail]


def _taken(text: str) -> tuple[str, str]:
    """`x = f(a)` -> `x = `, `f(a)`; no beginning where the value goes nowhere."""
    if text.startswith("return "):
        return "return ", text.removeprefix("return ")
    name, equals, value = text.partition(" = ")
    return (name + equals, value) if equals else ("", text)


def _links(text: str) -> list[str]:
    """`a[0].b[1].c(d)` -> `a[0]`, `.b[1]`, `.c(d)`: apart where something of a bracket is taken.

    A sum or product is one, since it is broken at its operators first.
    """
    if _operands(text) != [text]:
        return [text]
    depth, quote, cuts = 0, "", [0]
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
            if depth == 0 and char == "." and text[i - 1] in ")]":
                cuts.append(i)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], None], strict=True)]


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


def _operands(text: str) -> list[str]:
    """`a @ f(b + c) + d` -> `a @ f(b + c)`, `+ d`: apart at its loosest operators."""
    for operators in ((" + ", " - "), (" * ", " / ", " @ ")):
        depth, cuts = 0, [0]
        for i, char in enumerate(text):
            depth += (char in "([{") - (char in ")]}")
            if depth == 0 and text[i : i + 3] in operators:
                cuts.append(i)
        if len(cuts) > 1:
            return [text[a:b].strip() for a, b in zip(cuts, [*cuts[1:], None], strict=True)]
    return [text]


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


def number_text(number: object) -> str:
    """A number as an expression, infinities and complex ones too.

    >>> number_text(0.5), number_text(float("-inf")), number_text(1 - 2j)
    ('0.5', 'float("-inf")', '(1-2j)')
    """
    if isinstance(number, complex) and not cmath.isfinite(number):
        return f"complex({number_text(number.real)}, {number_text(number.imag)})"
    if isinstance(number, float) and not math.isfinite(number):
        return f'float("{number}")'
    return repr(number)


def check(source: str, imports: Collection[Import]) -> str:
    """`source`, after making sure that it holds what generated modules hold and nothing else.

    It may have `imports` of what is the user's.
    """
    check_module(source, imports)
    return source
