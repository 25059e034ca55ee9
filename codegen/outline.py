"""Which statements of a flat body make up the call of which function, as the user nested them.

`outline` takes a body as it is computed, one item after another, each with the calls that it ran
in when the model was captured, and gives the tree of these calls.  Items move, as far as what they
read allows, so that those of one call stand together.  A call is given up, and its items written in
its caller, where that cannot be: when something that it needs depends on what it made before.

It knows no ops and no specs; a value is anything hashable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias, TypeVar

import networkx as nx

V = TypeVar("V", bound=Hashable)
C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Item(Generic[V, C]):
    """A statement: what it reads and makes, and the calls that it ran in, outermost first.

    One that `floats`, such as a conversion, ran in no call: it stands where it suits.
    """

    reads: tuple[V, ...]
    makes: tuple[V, ...]
    calls: tuple[C, ...] = ()
    floats: bool = False


@dataclass(frozen=True, slots=True)
class Outline(Generic[V, C]):
    """A function: numbers of items, and calls of functions, in order; `call` is None at the top.

    `inputs` are made outside and read inside, in the order of their first use; `outputs` are made
    inside and read outside.
    """

    call: C | None
    body: tuple[int | Outline[V, C], ...]
    inputs: tuple[V, ...]
    outputs: tuple[V, ...]

    def flat(self) -> tuple[int, ...]:
        """All items in the order in which they run."""
        return tuple(
            number
            for part in self.body
            for number in ((part,) if isinstance(part, int) else part.flat())
        )


def outline(
    items: Sequence[Item[V, C]],
    results: Collection[V],
    *,
    everywhere: Collection[V] = (),
    form_of: Callable[[V], Hashable] = lambda value: value,
    least: int = 2,
) -> Outline[V, C]:
    """The tree of calls of a body that returns `results`.

    What is `everywhere` (parameters) is no input of a call.  Values of one `form_of` are the same
    in different forms: a conversion stands in the caller unless the call reads another form, too.
    Calls of fewer than `least` items that do not float are written in their caller.
    """
    placed = _place(items, set(results), everywhere, form_of)
    return _Builder(placed, set(results), everywhere, least).function(None, range(len(placed)), 0)


# ---- where conversions stand -------------------------------------------------------------------


def _place(
    items: Sequence[Item[V, C]],
    results: Collection[V],
    everywhere: Collection[V],
    form_of: Callable[[V], Hashable],
) -> list[Item[V, C]]:
    """`items` with calls for those that float: between the one that makes and those that read."""
    placed = list(items)
    readers: defaultdict[V, list[int]] = defaultdict(list)
    maker: dict[V, int] = {}
    for number, item in enumerate(items):
        for value in item.reads:
            readers[value].append(number)
        maker.update(dict.fromkeys(item.makes, number))

    def among(number: int, calls: tuple[C, ...]) -> bool:
        return placed[number].calls[: len(calls)] == calls

    def reads_another_form(number: int, calls: tuple[C, ...]) -> bool:
        """Do `calls` take what a floating item reads, in this or another form, anyway?"""
        forms = {form_of(value) for value in items[number].reads}
        values = [v for form in forms for v in of_form[form] if v not in items[number].makes]
        return any(
            among(reader, calls)
            for value in values
            if value not in maker or not among(maker[value], calls)
            for reader in readers[value]
            if reader != number
        )

    of_form: defaultdict[Hashable, list[V]] = defaultdict(list)
    for value in readers:
        of_form[form_of(value)].append(value)
    floating = [number for number, item in enumerate(items) if item.floats]
    for number in reversed(floating):
        made = items[number].makes
        calls = [placed[n].calls for value in made for n in readers[value]]
        shared = () if any(value in results for value in made) else _common(calls)
        placed[number] = replace(items[number], calls=shared)
    for number in floating:
        item = placed[number]
        if all(value in everywhere for value in item.reads):
            continue
        makers = [placed[maker[v]].calls if v in maker else () for v in item.reads]
        place = _common([*makers, item.calls])
        while len(place) < len(item.calls):
            inner = item.calls[: len(place) + 1]
            if not reads_another_form(number, inner):
                break
            place = inner
        placed[number] = replace(item, calls=place)
    return placed


def _common(calls: Iterable[tuple[C, ...]]) -> tuple[C, ...]:
    """What all of them begin with."""
    common: list[C] = []
    for level in zip(*calls, strict=False):
        if any(call != level[0] for call in level):
            break
        common.append(level[0])
    return tuple(common)


# ---- the tree ----------------------------------------------------------------------------------

_Key: TypeAlias = tuple[bool, Hashable]  # of a call, or of the number of an item


class _Builder(Generic[V, C]):
    def __init__(
        self, items: list[Item[V, C]], results: set[V], everywhere: Collection[V], least: int
    ) -> None:
        self.items = items
        self.results = results
        self.everywhere = everywhere
        self.least = least

    def function(self, call: C | None, numbers: Iterable[int], depth: int) -> Outline[V, C]:
        """The function that runs the items `numbers`; its call is number `depth` of theirs."""
        mine = list(numbers)
        groups = self._groups(mine, depth)
        order = nx.lexicographical_topological_sort(
            self._depends(groups), key=lambda key: groups[key][0]
        )
        body: list[int | Outline[V, C]] = []
        for key in order:
            members = groups[key]
            if key[0]:
                inner = self.items[members[0]].calls[depth]
                body.append(self.function(inner, members, depth + 1))
            else:
                body.append(members[0])
        return Outline(call, tuple(body), *self._border(mine))

    def _groups(self, numbers: list[int], depth: int) -> dict[_Key, list[int]]:
        """The items by the call that they stand in; calls that cannot be are given up."""
        while True:
            groups: defaultdict[_Key, list[int]] = defaultdict(list)
            for number in numbers:
                calls = self.items[number].calls
                inside = len(calls) > depth
                groups[inside, calls[depth] if inside else number].append(number)
            given_up = [key for key in groups if key[0] and not self._worth(groups[key])]
            given_up = given_up or self._in_circles(groups)
            if not given_up:
                return groups
            for number in (number for key in given_up for number in groups[key]):
                item = self.items[number]
                calls = (*item.calls[:depth], *item.calls[depth + 1 :])
                self.items[number] = replace(item, calls=calls)

    def _worth(self, numbers: list[int]) -> bool:
        """Is a call made of enough items, and does it give anything?"""
        fixed = sum(not self.items[number].floats for number in numbers)
        return fixed >= self.least and bool(self._border(numbers)[1])

    def _in_circles(self, groups: dict[_Key, list[int]]) -> list[_Key]:
        """Of each circle of calls and items that need each other, the smallest call to give up.

        If there is one without which nothing is a circle any more, it is that.
        """
        found: list[_Key] = []
        for circle in nx.strongly_connected_components(self._depends(groups)):
            calls = sorted(
                (key for key in circle if key[0]), key=lambda key: (len(groups[key]), groups[key])
            )
            within = {key: groups[key] for key in circle}
            if len(circle) > 1:
                found.append(next((c for c in calls if self._opens(within, c)), calls[0]))
        return found

    def _opens(self, circle: dict[_Key, list[int]], call: _Key) -> bool:
        """Is it no circle any more if one of its calls is given up?"""
        others = {key: numbers for key, numbers in circle.items() if key != call}
        loose: dict[_Key, list[int]] = {(False, number): [number] for number in circle[call]}
        return nx.is_directed_acyclic_graph(self._depends({**others, **loose}))

    def _depends(self, groups: dict[_Key, list[int]]) -> nx.DiGraph[_Key]:
        """An edge from what makes a value to what reads it."""
        made = {v: key for key, numbers in groups.items() for v in self._makes(numbers)}
        graph: nx.DiGraph[_Key] = nx.DiGraph()
        graph.add_nodes_from(groups)
        for key, numbers in groups.items():
            sources = {made[v] for n in numbers for v in self.items[n].reads if v in made}
            graph.add_edges_from((source, key) for source in sources if source != key)
        return graph

    def _makes(self, numbers: Iterable[int]) -> list[V]:
        return [value for number in numbers for value in self.items[number].makes]

    def _border(self, numbers: list[int]) -> tuple[tuple[V, ...], tuple[V, ...]]:
        """What these items read and do not make, and what they make for others."""
        mine, made = set(numbers), self._makes(numbers)
        read = dict.fromkeys(v for n in numbers for v in self.items[n].reads)
        others = (item for number, item in enumerate(self.items) if number not in mine)
        outside = {value for item in others for value in item.reads} | self.results
        inputs = tuple(v for v in read if v not in made and v not in self.everywhere)
        return inputs, tuple(v for v in made if v in outside)


__all__ = ["Item", "Outline", "outline"]
