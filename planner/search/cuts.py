"""How layers are shared out over the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

_STEPS = 60  # of a bisection: enough for any double


def even_layers(count: int, stages: int) -> list[int]:
    """Numbers of layers that differ by one at most; ends, which do more besides, have fewer.

    >>> even_layers(10, 4)
    [2, 3, 3, 2]
    """
    least, more = divmod(count, stages)
    inner = sorted(range(stages), key=lambda n: (min(n, stages - 1 - n) == 0, n))
    return [least + (n in inner[:more]) for n in range(stages)]


def balanced_layers(
    work: Sequence[float], besides: Sequence[float], paces: Sequence[float]
) -> list[int]:
    """Numbers of layers, one at least, with which the slowest stage takes as little as it can.

    `work` is that of each layer in its order; a stage takes `besides`, and for its layers their
    work times its pace.  Of equally good ones that with most layers in the last stages, since the
    first keep most micro-batches.

    >>> balanced_layers([1.0] * 8, [0.0, 0.0, 3.0], [1.0, 1.0, 1.0])
    [3, 4, 1]
    """
    low, high = 0.0, max(besides) + max(paces) * sum(work)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _filled(work, besides, paces, middle) else (middle, high)
    found = _filled(work, besides, paces, high)
    assert found is not None  # all layers fit the time of all
    return found


def improved_layers(
    layers: Sequence[int], seconds: Callable[[Sequence[int]], float]
) -> Sequence[int]:
    """Numbers of layers with which `seconds` is less, found by giving one layer of a stage to
    another, and those between them on by one stage; those of the start where none is."""
    best, now = tuple(layers), seconds(layers)
    for _ in range(len(layers)):
        tried = {way: seconds(way) for way in _near(best)}
        way = min(tried, key=lambda each: tried[each], default=best)
        if tried.get(way, now) >= now * (1 - 1e-9):
            break
        best, now = way, tried[way]
    return best


def _near(layers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """One stage has one layer less, another one more."""
    for giver, own in enumerate(layers):
        for taker in range(len(layers)):
            if own > 1 and taker != giver:
                moved = list(layers)
                moved[giver] -= 1
                moved[taker] += 1
                yield tuple(moved)


def stage_seconds(
    layers: Sequence[int],
    work: Sequence[float],
    besides: Sequence[float],
    paces: Sequence[float],
) -> list[float]:
    """What stages take that have so many layers each; see `balanced_layers`."""
    found: list[float] = []
    first = 0
    for own, other, pace in zip(layers, besides, paces, strict=True):
        found.append(other + pace * sum(work[first : first + own]))
        first += own
    return found


def _filled(
    work: Sequence[float], besides: Sequence[float], paces: Sequence[float], most: float
) -> list[int] | None:
    """Layers of stages none of which takes longer than `most`, the last stages filled first; None
    where there is no such way."""
    left = len(work)
    layers: list[int] = []
    for number in reversed(range(len(besides))):
        seconds, own = besides[number], 0
        while left > number:  # each stage before has a layer
            seconds += paces[number] * work[left - 1]
            if seconds > most:
                break
            left, own = left - 1, own + 1
        if not own:
            return None
        layers.append(own)
    return None if left else layers[::-1]


__all__ = ["balanced_layers", "even_layers", "improved_layers", "stage_seconds"]
