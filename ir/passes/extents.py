"""Which sizes inputs may have for one module.

Python computes with sizes while a model is captured: `7.0 / x.shape[1]`, `if tokens > 512`.  What
comes of that is in the graph as if it were always so.  So the model is captured again, with batches
and sequences of one, and with very large ones: where both give the same module, any size will do.
Else dims keep their captured size, or the sizes around it for which captures give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..graph import Extent, Graph, Input
from ..ops.registry import operator_of
from .alike import Difference, differences, kinds
from .serving import ServingError

Again: TypeAlias = Callable[[Mapping[str, int]], Graph]
"""The graph for other sizes: of the least dim with each label, by the label."""

# Primes, which no size of a model is and no cut divides: whatever depends on one differs then.
_LARGE = {"b": 1021, "s": 262147}
_WORDS = {"b": "batch", "s": "sequence"}


def with_extents(graph: Graph, again: Again) -> Graph:
    """`graph` with the extents of its inputs, and with what bounds them in words."""
    return _Trials(graph, again, _base(graph)).with_extents()


def served_extents(graph: Graph, again: Again) -> Graph:
    """The same for a graph of serving, whose sequences have any number of new tokens.

    Numbers of rows may be those that were captured, and there may be a largest: there is padding,
    and long prompts go in several runs.  Raises ServingError where anything else is made of sizes.
    """
    base = _base(graph)
    varied = dict(base)
    if "s" in base and _keeps_states(graph):
        _check_steps(graph, again, base)
        if _Trials(graph, again, base).unlike(dict.fromkeys(base, 1)):
            del varied["s"]  # steps or chunks are written out, more for more tokens
    trials = _Trials(graph, lambda sizes: again({**base, **sizes}), varied)
    for sizes in (dict.fromkeys(varied, 1), {label: trials.large(label) for label in varied}):
        found = (each for each in trials.found(sizes) if not each.counts)
        if (wrong := next(found, None)) is not None:
            raise _computes_with_sizes(graph, said(wrong))
    return replace(trials.with_extents(), bounds=())


def _keeps_states(graph: Graph) -> bool:
    """Does it remember more than keys and values?"""
    operators = [operator_of(node) for node in graph.nodes]
    return any(each.remembers and not each.attends for each in operators)


def extents_as_in(known: Graph, graph: Graph) -> Graph:
    """`graph` of one model with `known`, which differs in the number of tokens, with the extents of
    its inputs."""
    extents = {item.name: item.extents for item in known.inputs}
    inputs = tuple(replace(item, extents=extents.get(item.name, ())) for item in graph.inputs)
    return replace(graph, inputs=inputs)


def _base(graph: Graph) -> dict[str, int]:
    return base_sizes((item.labels, item.value.type.shape) for item in graph.inputs)


def _check_steps(graph: Graph, again: Again, base: Mapping[str, int]) -> None:
    """Raise ServingError if recurrences that are written out compute with the number of tokens."""
    tokens = base["s"] + 1 + (base["s"] + 1 == base.get("b"))
    before, after = kinds(graph), kinds(again({**base, "s": tokens}))
    for kind in before.keys() ^ after.keys():
        loc = before.get(kind) or after[kind]
        raise _computes_with_sizes(graph, f"{loc}: {kind}")


def _computes_with_sizes(graph: Graph, where: str) -> ServingError:
    return ServingError(
        f"{where}: {graph.name} computes with the number of tokens or sequences that it is given,"
        " and a served model is given any; compute with positions instead, or plan phase train"
    )


def resized(size: int, base: int, new: int) -> int:
    """The size of a dim where the least one of its label, `base`, is `new`.

    Multiples stay multiples, others differ from it by as much as before.

    >>> resized(64, 64, 10), resized(128, 64, 10), resized(65, 64, 10)
    (10, 20, 11)
    """
    return size // base * new if size % base == 0 else size + new - base


def base_sizes(inputs: Iterable[tuple[Sequence[str], Sequence[int]]]) -> dict[str, int]:
    """The least size with each label, from (labels, shape) of each input; sizes of 1 stay."""
    found: dict[str, int] = {}
    for labels, shape in inputs:
        for label, size in zip(labels, shape, strict=False):
            if label and size > 1:
                found[label] = min(size, found.get(label, size))
    return found


@dataclass(slots=True)
class _Trials:
    """Captures at other sizes; `bounds` are sentences on what was found."""

    graph: Graph
    again: Again
    base: dict[str, int]
    bounds: list[str] = field(default_factory=list[str])
    _known: dict[tuple[tuple[str, int], ...], list[Difference] | str] = field(
        default_factory=dict[tuple[tuple[str, int], ...], "list[Difference] | str"]
    )

    def with_extents(self) -> Graph:
        """The graph with what is found."""
        found = self.extents() if self.base else {}
        inputs = tuple(
            replace(item, extents=tuple(_extents(item, self.base, found)))
            for item in self.graph.inputs
        )
        return replace(self.graph, inputs=inputs, bounds=(*self.graph.bounds, *self.bounds))

    def extents(self) -> dict[str, Extent]:
        """Sizes of the least dim with each label; labels without others than the captured one are
        left out."""
        ones, large = dict.fromkeys(self.base, 1), {label: self.large(label) for label in self.base}
        small = not self.unlike(ones)
        if small and not self.unlike(large):
            return dict.fromkeys(self.base, Extent())
        each = {label: self.extent(label, small) for label in self.base}
        found = {label: extent for label, extent in each.items() if extent is not None}
        for corner in (
            {label: extent.least for label, extent in found.items()},
            {
                label: extent.most or large[label] // extent.step * extent.step
                for label, extent in found.items()
            },
        ):
            if why := self.unlike(corner):
                self.bounds = [self.stays(label, why) for label in self.base]
                return {}
        return found

    def extent(self, label: str, small: bool) -> Extent | None:
        """Sizes of the dims with one label, where others stay; `small`: a size of 1 is known to do.

        What bounds them is noted.
        """
        base = self.base[label]
        below = "" if small else self.unlike({label: 1})
        step = self.step(label) if below else 1
        if not step:
            self.bounds.append(self.stays(label, below))
            return None
        least = self.least(label, step) if below else 1
        above = self.unlike({label: self.large(label) // step * step})
        most = self.most(label, step) if above else 0
        if below or above:
            until = f"to {most}" if most else "on"
            steps = f" in steps of {step}" if step > 1 else ""
            self.bounds.append(
                f"the {_WORDS.get(label, label)} of {base} may have sizes from {least} {until}"
                f"{steps}: {below or above}"
            )
        return Extent(least, most, step)

    def stays(self, label: str, why: str) -> str:
        """The sentence on sizes that must be as they were captured."""
        return f"the {_WORDS.get(label, label)} stays {self.base[label]}: {why}"

    # ---- one label, others as they are ------------------------------------------------------

    def large(self, label: str) -> int:
        """A very large size."""
        return max(_LARGE.get(label, 1021), 2 * self.base[label] + 1)

    def step(self, label: str) -> int:
        """The least number by which a size may grow; 0 if it may not be twice as large."""
        base = self.base[label]
        twos = [2**k for k in range(base.bit_length()) if base % 2**k == 0]
        steps = sorted({*twos, base}, reverse=True)
        fitting = self.fitting(label, [base + step for step in steps])
        return fitting[-1] - base if fitting else 0

    def least(self, label: str, step: int) -> int:
        """The least size that will do, of a half, a quarter and so on."""
        base = self.base[label]
        halves = [base // 2**k // step * step for k in range(1, base.bit_length())]
        return [base, *self.fitting(label, [size for size in halves if size > 1])][-1]

    def most(self, label: str, step: int) -> int:
        """The largest size that will do, of multiples and of rows of the model's tables."""
        base, limit = self.base[label], self.large(label)
        sizes = {size for param in self.graph.params for size in param.value.type.shape}
        sizes |= {base * 2**k for k in range(1, limit.bit_length())}
        larger = sorted(size for size in sizes if base < size < limit and size % step == 0)
        return [base, *self.fitting(label, larger)][-1]

    def fitting(self, label: str, sizes: Sequence[int]) -> list[int]:
        """The first of `sizes` that will do; they are further and further off."""
        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            if self.unlike({label: sizes[middle]}):
                high = middle
            else:
                low = middle + 1
        return list(sizes[:low])

    def unlike(self, sizes: Mapping[str, int]) -> str:
        """What other sizes change in the module, and where; empty if nothing."""
        found = self.compared(sizes)
        return found if isinstance(found, str) else said(found[0]) if found else ""

    def found(self, sizes: Mapping[str, int]) -> list[Difference]:
        """The differences for other sizes; none where the model does not take these."""
        found = self.compared(sizes)
        return [] if isinstance(found, str) else found

    def compared(self, sizes: Mapping[str, int]) -> list[Difference] | str:
        """The differences for other sizes, or why the model does not take these."""
        key = tuple(sorted({**self.base, **sizes}.items()))
        if key not in self._known:
            self._known[key] = self._captured(dict(key))
        return self._known[key]

    def _captured(self, sizes: Mapping[str, int]) -> list[Difference] | str:
        try:
            other = self.again(sizes)
        except Exception as error:  # the user's code may raise anything for another size
            return " ".join(str(error).split())[:500] or type(error).__name__
        return list(differences(self.graph, other))


def said(found: Difference) -> str:
    """A difference in words, with its place."""
    return f"{found.loc}: {found.what}"


def _extents(
    item: Input, base: Mapping[str, int], found: Mapping[str, Extent]
) -> Iterator[Extent | None]:
    """Of each dim of an input."""
    shape = item.value.type.shape
    for label, size in zip(item.labels or [""] * len(shape), shape, strict=True):
        extent = found.get(label) if size > 1 else None
        if extent is None:
            yield None
            continue
        whole = size % base[label] == 0
        yield Extent(
            resized(size, base[label], extent.least),
            extent.most and resized(size, base[label], extent.most),
            extent.step * (size // base[label]) if whole else 1,
        )


__all__ = ["Again", "base_sizes", "resized", "said", "with_extents"]
