"""Sizes of a graph's dims and how they hang together, for graphs with smaller sizes.

Factor rules tie the dims of a node's operands and results together; what they leave free is said by
`Operator.ties`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd

from ..graph import Value

# Ratios between a dim and its parts above this are taken for differences.
RATIO = 8


@dataclass(eq=False, slots=True)
class Size:
    """A size; it may turn out to equal another's (`same`), or to be a product (`parts`)."""

    size: int
    fixed: bool = False
    same: Size | None = None
    parts: tuple[Size, ...] = ()


@dataclass(slots=True)
class Sizes:
    """The sizes of every dim of every value; `sums` holds (a, b, c) for a = b + c."""

    dims: dict[tuple[str, int], Size] = field(default_factory=dict)
    sums: list[tuple[Size, Size, int]] = field(default_factory=list)

    def dim(self, value: Value, dim: int) -> Size:
        """The size of one dim."""
        dim %= len(value.type.shape)
        return self.dims.setdefault((value.name, dim), Size(value.type.shape[dim]))

    def all_of(self, value: Value) -> list[Size]:
        """The sizes of all dims."""
        return [self.dim(value, i) for i in range(len(value.type.shape))]

    def flat(self, items: Sequence[Size]) -> list[Size]:
        """What the product of `items` is made of, major to minor; sizes of 1 are left out."""
        out: list[Size] = []
        for item in items:
            while item.same is not None:
                item = item.same
            if item.parts:
                out += self.flat(item.parts)
            elif item.size != 1:
                out.append(item)
        return out

    def fix(self, *items: Size) -> None:
        """These sizes stay."""
        for size in self.flat(items):
            size.fixed = True

    def equate(self, left: Sequence[Size], right: Sequence[Size]) -> None:
        """Two products are the same number, made up in the same order; else both stay."""
        a, b = self.flat(left), self.flat(right)
        while a and b:
            x, y = a.pop(), b.pop()
            if x.same is not None or x.parts or y.same is not None or y.parts:
                a += self.flat([x])  # changed by an earlier round
                b += self.flat([y])
            elif x.size == y.size:
                if x is not y:
                    y.same, x.fixed = x, x.fixed or y.fixed
            elif not x.size or not y.size:
                self.fix(x, y, *a, *b)  # empty: a product that says nothing of its other sizes
                return
            elif x.size % y.size == 0:
                a.append(_split(x, y))
            elif y.size % x.size == 0:
                b.append(_split(y, x))
            else:
                self.fix(x, y, *a, *b)
                return
        self.fix(*a, *b)

    def alike(self, a: Value, b: Value) -> None:
        """Two values have the same shape."""
        for x, y in zip(self.all_of(a), self.all_of(b), strict=True):
            self.equate([x], [y])

    def ratio(self, size: Size, times: int, unit: Size) -> None:
        """`size` is `times` units, for good."""
        self.equate([size], [Size(times, fixed=True), unit])

    def add_up(self, whole: Size, parts: Sequence[Size]) -> None:
        """`whole` is the sum of `parts`: multiples of a common unit, or one part and a few rows."""
        unit = gcd(*(part.size for part in parts))
        largest = max(parts, key=lambda part: part.size)
        if whole.size // unit <= 2 * RATIO:
            shared = Size(unit)
            for item in (whole, *parts):
                self.ratio(item, item.size // unit, shared)
        elif whole.size - largest.size <= RATIO:
            self.fix(*(part for part in parts if part is not largest))
            self.sums.append((whole, largest, whole.size - largest.size))
        else:
            self.fix(whole, *parts)


def _split(size: Size, minor: Size) -> Size:
    """Make `size` a product whose minor part is `minor`; gives the major part."""
    major = Size(size.size // minor.size, size.fixed)
    minor.fixed = minor.fixed or size.fixed
    size.parts = (major, minor)
    return major


@dataclass(frozen=True, slots=True)
class Resizing:
    """New sizes for a graph: the `shape` of every value, and the windows of attention.

    `windows` are those before and after, the same in all graphs of a model; new ones are noted
    there.  `shortens`: contexts that were planned for become short ones.
    """

    shape: Callable[[Value], tuple[int, ...]]
    windows: dict[int, int]
    shortens: bool = True


__all__ = ["RATIO", "Resizing", "Size", "Sizes"]
