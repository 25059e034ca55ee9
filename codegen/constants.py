"""Numbers that a model holds: written where they are used if they are few, else under a name."""

from __future__ import annotations

import itertools
import re
import textwrap

from ..ir.graph import Param
from .source import WIDTH, number_text

_FEW = 80  # characters of a constant that may stand in a table


class Constants:
    """Gives names to the constants of a class that are too long for its table of parameters."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}  # by name

    def text(self, param: Param) -> str:
        """The data of a parameter as an expression: its numbers or their name."""
        text = data_text(param.data)
        if len(text) <= _FEW:
            return text
        path = [re.sub(r"\W", "_", part).upper() for part in param.name.split(".")]
        ends = ["_".join(path[i:]) for i in reversed(range(len(path)))]
        numbered = (f"{ends[-1]}_{n}" for n in itertools.count(2))
        names = (f"{end}_VALUES" for end in itertools.chain(ends, numbered))
        name = next(name for name in names if self._texts.get(name, text) == text)
        self._texts[name] = text
        return name

    def lines(self) -> list[str]:
        """The statements that bind the names, as many numbers to a line as it takes."""
        found: list[str] = []
        for name, text in self._texts.items():
            inside = text[1:-1] if text[0] + text[-1] == "()" else text
            rows = textwrap.wrap(inside, WIDTH - 8, break_on_hyphens=False, break_long_words=False)
            found += [f"    {name} = (", *(f"        {row}" for row in rows), "    )  # fmt: skip"]
        return found


def data_text(data: object) -> str:
    """A constant as an expression: `(0,) * 512`, `tuple(range(512))`, or number by number.

    All digits stand there, also of single precision: `verify` runs modules in double precision.

    >>> data_text(((1,) * 12, (2,) * 12)), data_text((1, 2))
    ('((1,) * 12, (2,) * 12)', '(1, 2)')
    """
    if not isinstance(data, tuple):
        return number_text(data)
    items: list[str] = [data_text(item) for item in data]
    if len(items) > 8 and len(set(items)) == 1:
        return f"({items[0]},) * {len(items)}"
    if len(items) > 8 and items == [str(i) for i in range(len(items))]:
        return f"tuple(range({len(items)}))"
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


__all__ = ["Constants", "data_text"]
