"""When what happens in a training step, as the memory of a problem counts it."""

from __future__ import annotations

from collections.abc import Sequence

from .regions import Region, Scope


class Times:
    """When what happens in a training step: regions run forward at 1, 2, ..., then backward.

    The layers of a loop share their forward times.  In backward there are two windows for them:
    in the first the last layer runs, when all layers' activations are there and no other layer's
    gradients; in the last it is the other way round.  Between them memory goes from one to the
    other in equal steps, so it is never above both.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._start: dict[int, int] = {}
        self._windows: dict[int, tuple[range, range]] = {}
        self._backward: dict[int, tuple[int, ...]] = {}
        members: dict[int, list[int]] = {}
        for time, region in enumerate(regions, start=1):
            members.setdefault(id(region.scope), []).append(time)
        now = len(regions) + 1
        for scope, times in reversed(members.items()):
            repeated = regions[times[0] - 1].scope.weight > 1
            size = len(times)
            first = range(now, now + size)
            last = range(first.stop, first.stop + size) if repeated else first
            now = last.stop
            self._start[scope] = times[0]
            self._windows[scope] = (first, last)
            for time, *at in zip(reversed(times), first, last, strict=True):
                self._backward[time] = tuple(dict.fromkeys(at))
        self.horizon = now + 1  # the optimizer's step comes last

    def start(self, scope: Scope) -> int:
        """The forward time of the first region of a scope."""
        return self._start[id(scope)]

    def windows(self, scope: Scope) -> tuple[range, range]:
        """The backward times of a scope's first and of its last run; the same if it runs once."""
        return self._windows[id(scope)]

    def backward(self, time: int) -> tuple[int, ...]:
        """The backward times of the region that runs forward at `time`."""
        return self._backward[time]


__all__ = ["Times"]
