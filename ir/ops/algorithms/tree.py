"""Tree attention: every rank has all queries and a part of the cached keys."""

from __future__ import annotations

from collections.abc import Iterator

from ....facts.traffic import Traffic
from .algorithm import AttentionAlgorithm
from .part import Part


class Tree(AttentionAlgorithm):
    """All-reduces of the largest score and of the partial results, in float32."""

    name = "tree"
    words = "cached tokens, tree"
    over_cache = whole = True

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """Nothing of it depends on the number of keys."""
        axes, numbers = (part.axis,), float(part.rows * part.wide)
        yield Traffic("all_reduce", axes, numbers)
        yield Traffic("all_reduce", axes, numbers * (part.value_dim + 1))


__all__ = ["Tree"]
