"""Sliding windows: a rank fetches the few keys before its own from its neighbours."""

from __future__ import annotations

from collections.abc import Iterator

from ....facts.traffic import Traffic
from .algorithm import AttentionAlgorithm, Steps
from .part import Part


class Window(AttentionAlgorithm):
    """The last window - 1 rows of keys and values from the left; their gradients back in float32.

    The messages hide behind the compute of the own block.
    """

    name = "window"
    words = "sequence, window's K/V from the neighbours"
    over_shards = True
    orders = ("contiguous",)

    def suits(self, whole: Part) -> bool:
        """A causal window, over keys that are no latents."""
        return bool(whole.window) and whole.causal and whole.latent is None

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """A message from each neighbour that the window reaches."""
        for rows in _halos(part):
            for back, whole in ((False, part.kv_bytes), (True, part.gradient_bytes)):
                n_bytes = float(rows * whole // part.keys)
                yield Traffic("send_recv", (part.axis,), n_bytes, hidden=True, backward=back)

    def steps(self, part: Part) -> Steps:
        """One, over its own keys and those before them."""
        keys = min(part.keys + _halo(part), part.keys * part.ranks)
        share = min(1.0, part.window / keys)
        return Steps(part.heads, part.kv_heads, part.queries, keys, (share,), made=0)

    def buffers(self, part: Part) -> float:
        """What is received."""
        return float(part.kv_bytes // part.keys * _halo(part))


def _halo(part: Part) -> int:
    """Rows of keys that a window reaches to the left of this rank's own."""
    return min(part.window - 1, part.keys * (part.ranks - 1))


def _halos(part: Part) -> list[int]:
    """Rows from each neighbour to the left, the nearest first."""
    left, rows = _halo(part), list[int]()
    while left > 0:
        rows.append(min(left, part.keys))
        left -= part.keys
    return rows


__all__ = ["Window"]
