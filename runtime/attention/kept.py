"""What attention keeps for backward besides its inputs, by shapes: for compilers, which ask ahead.

It must agree with what `save` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from .held import Held
from .partial import wide
from .ulysses import Heads
from .window import halos, size_of


class Asked(NamedTuple):
    """A call: inputs, of which only shapes and dtypes count, and who takes part."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    up: Tensor | None
    window: int
    rank: int
    ranks: int


Made: TypeAlias = Callable[[Asked], Sequence[Tensor]]


def like_result(
    q: Tensor, k: Tensor, v: Tensor | None, up: Tensor | None, values_in_keys: int = 0
) -> Tensor:
    """The result (b, hq, sq, dv), laid out with its heads side by side as fused kernels do."""
    value_dim = Held.of(q, k, v, up, values_in_keys).value_dim
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], value_dim)).transpose(1, 2)


def _lse(asked: Asked) -> list[Tensor]:
    q = asked.q
    return [q.new_empty(q.shape[:3], dtype=wide(q.dtype))]


def _with_halos(asked: Asked) -> list[Tensor]:
    """The shards' rows that other ranks sent stay."""
    q, k, v = asked.q, asked.k, asked.v
    assert v is not None
    before = [
        halo for halo in halos(asked.window, k.shape[2], asked.ranks) if halo.distance <= asked.rank
    ]
    return [*_lse(asked), *(q.new_empty(size_of(halo, k, v)) for halo in before)]


def _exchanged(asked: Asked) -> list[Tensor]:
    """All is of the rank's own heads, and of all rows."""
    q, k, v = asked.q, asked.k, asked.v
    assert v is not None
    heads = Heads(q.shape[1], k.shape[1], asked.ranks)
    queries, keys = heads.queries(asked.rank), heads.keys(asked.rank)

    def of(x: Tensor, own: slice) -> Tensor:
        count, rows = own.stop - own.start, x.shape[2] * asked.ranks
        return q.new_empty((x.shape[0], count, rows, x.shape[3]))

    made = of(q, queries), of(k, keys), of(v, keys)
    out = q.new_empty((*made[0].shape[:3], v.shape[3]))
    return [*made, out, out.new_empty(out.shape[:3], dtype=wide(q.dtype))]


EXCHANGED = "ulysses"
"""The algorithm that keeps what it made of its inputs, and not these."""

_MADE: dict[str, Made] = {"window": _with_halos, EXCHANGED: _exchanged}


def made(algorithm: str, asked: Asked) -> Sequence[Tensor]:
    """What is kept besides inputs and result: log-sum-exps, and more for some algorithms."""
    return _MADE.get(algorithm, _lse)(asked)


__all__ = ["EXCHANGED", "Asked", "like_result", "made"]
