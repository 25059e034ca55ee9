"""Ring pass-KV: keys and values travel from rank to rank, queries stay."""

from __future__ import annotations

from collections.abc import Iterator

from ....facts.traffic import Traffic
from .algorithm import AttentionAlgorithm, Steps, steps_over
from .part import Part


class Ring(AttentionAlgorithm):
    """p - 1 hops of keys and values, and back with them their gradients in float32.

    Hops hide behind the compute.  Steps in which mask and order of the tokens leave nothing to
    compute still pass the keys on.
    """

    name = "ring"
    words = "sequence, ring of K/V"
    over_shards = over_cache = balanced = True
    tells = "keys"

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """In backward keys travel again, their gradients one rank behind them."""
        axes, hops, kv = (part.axis,), part.ranks - 1, float(part.kv_bytes)
        yield Traffic("send_recv", axes, kv, times=hops, hidden=True)
        yield Traffic("send_recv", axes, kv, times=hops, hidden=True, backward=True)
        gradients = float(part.gradient_bytes)
        yield Traffic("send_recv", axes, gradients, times=hops, hidden=True, backward=True)

    def steps(self, part: Part) -> Steps:
        """One per rank; heads are made of the latents that each brings."""
        if part.cached:
            shares = (part.cached_share(part.queries * part.ranks),) * part.ranks
        else:
            shares = part.ring_shares()
        return steps_over(part, shares, again=True)

    def buffers(self, part: Part) -> float:
        """What is sent, and what is received."""
        return 2.0 * part.kv_bytes


__all__ = ["Ring"]
