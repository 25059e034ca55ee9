"""Flags of a command line, or keys of a configuration, as they were given to another tool."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...planner.errors import PlanError

_NUMBER = re.compile(r"-\d+")


@dataclass(slots=True)
class Flags:
    """Flags by name, without dashes in front, `-` for `_` inside; `before` are other words.

    What has been asked for is `used`; `others` names flags that nobody asked for.
    """

    given: Mapping[str, tuple[str, ...]]
    before: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set[str])

    @staticmethod
    def of(text: str) -> Flags:
        """From a command line, or a file with some in each line; `#` begins a comment.

        >>> Flags.of("run.py --tp-size 8 --sequence_parallel --x=1").given
        {'tp-size': ('8',), 'sequence-parallel': (), 'x': ('1',)}
        """
        try:
            words = shlex.split(text.replace("\\\n", " "), comments=True)
        except ValueError as error:
            raise PlanError(f"the flags cannot be read: {error}") from error
        found: dict[str, tuple[str, ...]] = {}
        before: list[str] = []
        name = ""
        for word in words:
            if word.startswith("-") and not _NUMBER.fullmatch(word):
                name, sign, value = word.lstrip("-").partition("=")
                name = name.replace("_", "-")
                found[name] = (value,) if sign else ()
            elif name:
                found[name] += (word,)
            else:
                before.append(word)
        return Flags(found, tuple(before))

    def text(self, *names: str) -> str | None:
        """The first value of a flag that has one of these names; None where it is not there."""
        found = None
        for name in names:
            self.used.add(name)
            if self.given.get(name):
                found = self.given[name][0]
        return found

    def number(self, *names: str, default: int = 1) -> int:
        """A whole number above 0.  Raises PlanError for another value."""
        text = self.text(*names)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**12):
            raise PlanError(f"--{names[0]} {text}: expected a whole number above 0")
        return int(text)

    def is_set(self, name: str) -> bool:
        """Is a flag without a value there?"""
        self.used.add(name)
        return name in self.given

    def others(self, pattern: str) -> Iterator[str]:
        """As they were given, those that were not asked for and whose names the pattern finds."""
        for name, values in self.given.items():
            if name not in self.used and re.search(pattern, name):
                yield " ".join([f"--{name}", *values])


__all__ = ["Flags"]
