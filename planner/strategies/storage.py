"""How parameters are kept: where they lie between steps, and where between their uses.

A parameter, its gradient and its optimizer's states lie as they are `stored`.  What uses it may
take it from there each time.  Or it has a `Home`, on each axis stored so or whole with summands of
the gradient (`V`), to which it comes once a step, and from which its uses take it as it is there:

| stored | home | | known as |
|---|---|---|---|
| `S` | none | gathered for each use, gradients reduce-scattered | FSDP, ZeRO-3 |
| `S` | `V` | gathered once a step, gradients reduce-scattered in each backward | ZeRO-2 |
| `S` | `V`, late | and reduce-scattered once a step | ZeRO-1 |
| `R` | none | gradients all-reduced in each backward | DDP |
| `R` | `V`, late | and all-reduced once a step | DDP with `no_sync` |

each on some axes.  Where its dtype is another than that of its uses, it is cast on the way: once a
step to what is gathered then, else for each use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ...facts.spec import Spec, V, format_spec, is_shard
from .lattice import Floats


@dataclass(frozen=True, slots=True)
class Home:
    """Where a weight is between its uses.

    `late`: its gradients are summed there over the micro-batches of a step, and reduced to where it
    is stored once.
    """

    spec: Spec
    late: bool = False

    def __str__(self) -> str:
        """`V,S1 late`."""
        return format_spec(self.spec) + " late" * self.late


@dataclass(frozen=True, slots=True)
class Storage:
    """How a parameter is kept; without a home it comes from where it is stored for each use."""

    stored: Spec
    home: Home | None = None

    @property
    def spec(self) -> Spec:
        """From where it comes to its uses."""
        return self.stored if self.home is None else self.home.spec

    @property
    def kept(self) -> bool:
        """Does a copy of it stay for its uses?"""
        return bool(self.gathered)

    @property
    def late(self) -> bool:
        """Is its gradient reduced once for all micro-batches?"""
        return self.home is not None and self.home.late

    @property
    def homebound(self) -> tuple[int, ...]:
        """The axes on which it has a home: its uses take it as it is there."""
        pairs = zip(self.stored, self.spec, strict=True)
        return tuple(axis for axis, (a, b) in enumerate(pairs) if a != b)

    @property
    def gathered(self) -> tuple[int, ...]:
        """The axes over which it is gathered once a step."""
        return tuple(axis for axis in self.homebound if is_shard(self.stored[axis]))


def storages(
    stored: Sequence[Spec],
    allowed: Callable[[Storage], bool],
    seconds: Callable[[Spec, Spec], float],
    *,
    several: bool,
) -> list[Storage]:
    """The ways to keep a trained parameter that are stored in one of some specs.

    `seconds` are those between two specs: of the ways that differ in nothing else the one that
    comes home fastest is enough.  `several`: a step has more than one micro-batch.
    """
    plain = [Storage(spec) for spec in stored]
    found: dict[tuple[object, ...], Storage] = {}
    for storage in (s for spec in stored for s in _with_homes(spec, several)):
        if not allowed(storage):
            continue
        key = (storage.home, storage.gathered)
        known = found.get(key)
        if known is None or _way(seconds, storage) < _way(seconds, known):
            found[key] = storage
    reachable = [s for s in found.values() if np.isfinite(_way(seconds, s))]
    return [s for s in plain if allowed(s)] + reachable


def _way(seconds: Callable[[Spec, Spec], float], storage: Storage) -> float:
    return seconds(storage.stored, storage.spec)


def _with_homes(stored: Spec, several: bool) -> Iterator[Storage]:
    """The homes of what is stored so; `several`: a step has more than one micro-batch."""
    for spec in product(*((state, V) for state in stored)):
        home = [a for a, b in zip(stored, spec, strict=True) if a != b]
        if not home:
            continue
        if all(map(is_shard, home)):
            yield Storage(stored, Home(spec))
        if several:
            yield Storage(stored, Home(spec, late=True))


@dataclass(frozen=True, slots=True)
class Held:
    """What a weight takes on one rank beside what it is stored as, by the numbers of its elements
    as it is `stored`, at `home` and `used` there; arrays are of one shape.

    `kept`, `late` as in `Storage`; `stored_in`, `used_in` and `reduced_in` are bytes of an element
    of the parameter, of the weight that is used, and of its gradient on its way.
    """

    stored: Floats
    home: Floats
    used: Floats
    kept: np.ndarray
    late: np.ndarray
    stored_in: int
    used_in: int
    reduced_in: int

    @property
    def copies(self) -> Floats:
        """Bytes of the copy that is kept."""
        return self.home * self.kept * self.used_in

    @property
    def sums(self) -> Floats:
        """Bytes of the float32 sums of gradients over micro-batches."""
        return self.home * self.late * 4.0

    def cast_bytes(self, uses: float, gradients: int, micro_batches: int) -> Floats:
        """Bytes that casts and sums of a step read and write, where a micro-batch uses the weight
        `uses` times and gives `gradients` gradients."""
        found = np.zeros_like(self.used)
        if self.stored_in != self.used_in:
            times = np.where(self.kept, 1, uses * micro_batches)
            found = found + times * self.stored * (self.stored_in + self.used_in)
        if gradients and self.reduced_in != self.used_in:
            found = found + micro_batches * self.used * (self.used_in + self.reduced_in)
        if gradients and micro_batches > 1:  # another term is read, the sum read and written
            late = self.home * (self.reduced_in + 8.0)
            early = self.stored * 3.0 * self.stored_in
            found = found + (micro_batches - 1) * np.where(self.late, late, early)
        return found


__all__ = ["Held", "Home", "Storage", "storages"]
