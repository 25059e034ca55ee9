"""All-gather of keys and values."""

from __future__ import annotations

from collections.abc import Iterator

from ....facts.traffic import Traffic
from .algorithm import AttentionAlgorithm, Steps, steps_over
from .part import Part


class Gather(AttentionAlgorithm):
    """Keys and values of all ranks at once; a reduce-scatter of their gradients in float32."""

    name = "gather"
    words = "sequence, K/V gathered"
    over_shards = over_cache = balanced = True
    tells = "keys"

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """Nothing hides it."""
        axes, p = (part.axis,), part.ranks
        yield Traffic("all_gather", axes, float(part.kv_bytes * p))
        yield Traffic("all_gather", axes, float(part.kv_bytes * p), backward=True)
        yield Traffic("reduce_scatter", axes, float(part.gradient_bytes * p), backward=True)

    def steps(self, part: Part) -> Steps:
        """One, over everything."""
        if part.cached:
            share = part.cached_share(part.queries * part.ranks)
        else:
            share = sum(part.ring_shares()) / part.ranks
        return steps_over(part, (share,), times=part.ranks)

    def buffers(self, part: Part) -> float:
        """The keys and values of all ranks."""
        return float(part.kv_bytes * part.ranks)


__all__ = ["Gather"]
