"""When what happens in a step, as the memory of a problem counts it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .regions import Modes, Region, Scope, Unit

_Around: TypeAlias = tuple[Unit | None, Unit | None]


@dataclass(frozen=True, slots=True)
class Window:
    """The times of one run of a scope (a layer, or what is outside), a time for each region.

    `done` runs of the scope came before, in the same direction.  `coming` are the weights on their
    way meanwhile, those that are used next; in backward gradients of `leaving` are on theirs.
    """

    times: range
    done: int
    coming: Unit | None
    leaving: Unit | None = None


class Times:
    """When what happens in a step: regions run forward at 1, 2, ..., in training then backward.

    Of the layers of a loop not all have times.  In forward there is a window for each unit of
    weights that may be on its way meanwhile.  In backward activations go while gradients come, in
    equal steps from one layer to the next: so of the layers that have the same units on their way
    the first and the last have windows, and memory in those between is never above both.  Where
    some layers keep what they have made and others are recomputed, so have those where that ends.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        units: Sequence[Unit],
        weighty: Collection[Unit],
        *,
        training: bool,
        modes: Callable[[Scope], Modes] | None = None,
    ) -> None:
        """`units` as often as they are used, in their order; those in `weighty` have weights.

        `modes`: how many runs of a scope keep all that they have made, which come first in
        backward, and how many a part.
        """
        around = _around(units, weighty)
        self._forward: dict[int, tuple[Window, ...]] = {}
        self._backward: dict[int, tuple[Window, ...]] = {}
        members: dict[int, list[Region]] = {}
        for region in regions:
            members.setdefault(id(region.scope), []).append(region)
        self._place = {id(r): i for each in members.values() for i, r in enumerate(each)}
        self._now = 1
        for scope, inside in members.items():
            self._forward[scope] = self._ahead(len(inside), around[inside[0].scope.unit])
        for scope, inside in reversed(members.items()) if training else ():
            of = inside[0].scope
            turns = () if modes is None else _turns(modes(of))
            self._backward[scope] = self._back(len(inside), around[of.unit][::-1], turns)
        self.horizon = self._now + 1  # the optimizer's step comes last

    def _ahead(self, size: int, around: Sequence[_Around]) -> tuple[Window, ...]:
        coming = [after for _, after in around]
        return tuple(
            Window(self._take(size), coming.index(unit), unit) for unit in dict.fromkeys(coming)
        )

    def _back(
        self, size: int, around: Sequence[_Around], turns: Collection[int]
    ) -> tuple[Window, ...]:
        last = {pair: done for done, pair in enumerate(around)}
        beside = {done for at in turns if 0 < at < len(around) for done in (at - 1, at)}
        runs = sorted({*map(around.index, last), *last.values(), *beside})
        return tuple(Window(self._take(size), done, *around[done]) for done in runs)

    def _take(self, count: int) -> range:
        self._now += count
        return range(self._now - count, self._now)

    def ahead(self, scope: Scope) -> tuple[Window, ...]:
        """The windows of a scope in forward."""
        return self._forward[id(scope)]

    def back(self, scope: Scope) -> tuple[Window, ...]:
        """The windows of a scope in backward; none if there is no backward."""
        return self._backward.get(id(scope), ())

    def start(self, scope: Scope) -> int:
        """The first time of a scope."""
        return self.ahead(scope)[0].times.start

    def forward(self, region: Region) -> tuple[int, ...]:
        """The forward times of a region."""
        place = self._place[id(region)]
        return tuple(window.times[place] for window in self.ahead(region.scope))

    def backward(self, region: Region) -> tuple[int, ...]:
        """The backward times of a region."""
        place = self._place[id(region)]
        return tuple(window.times[-1 - place] for window in self.back(region.scope))


def _turns(modes: Modes) -> tuple[int, int]:
    """After how many runs in backward others come."""
    return modes.kept, modes.kept + modes.part


def _around(units: Sequence[Unit], weighty: Collection[Unit]) -> dict[Unit, list[_Around]]:
    """By unit the ones with weights before and after each of its runs."""
    before, after = _last_of(units, weighty), _last_of(reversed(units), weighty)[::-1]
    found: dict[Unit, list[_Around]] = {}
    for at, unit in enumerate(units):
        found.setdefault(unit, []).append((before[at], after[at]))
    return found


def _last_of(units: Iterable[Unit], weighty: Collection[Unit]) -> list[Unit | None]:
    """What came last with weights, before each of `units`."""
    found: list[Unit | None] = []
    last: Unit | None = None
    for unit in units:
        found.append(last)
        last = unit if unit in weighty else last
    return found


__all__ = ["Times", "Window"]
