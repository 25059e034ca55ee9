"""Ulysses: an all-to-all turns shards of the sequence into shards of heads, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ....facts.traffic import Traffic
from .algorithm import AttentionAlgorithm, Steps
from .part import Part


class Ulysses(AttentionAlgorithm):
    """All-to-alls of q, k, v and of the result; the same of the gradients.

    With fewer key heads than ranks each rank is sent those that its query heads attend.
    """

    name = "ulysses"
    words = "sequence, exchanged for heads"
    over_shards = by_heads = True

    def suits(self, whole: Part) -> bool:
        """Latents are one key head, and are only sent whole."""
        return whole.latent is None and whole.heads % whole.kv_heads == 0

    def fits(self, sizes: Mapping[str, int], ranks: int) -> bool:
        """Do all ranks get as many query heads, and need as many key heads?"""
        heads, kv_heads = sizes["n"] * sizes["g"], sizes["n"]
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """Nothing hides it."""
        rows = part.rows * part.itemsize
        for back in (False, True):
            yield Traffic("all_to_all", (part.axis,), _there(part), backward=back)
            yield Traffic("all_to_all", (part.axis,), float(rows * part.value_dim), backward=back)

    def steps(self, part: Part) -> Steps:
        """One, of its heads over the whole sequence."""
        heads, keys = part.heads // part.ranks, part.keys * part.ranks
        queries = part.queries * part.ranks
        return Steps(heads, _kv_heads(part), queries, keys, (part.share(keys, 2),), made=0)

    def buffers(self, part: Part) -> float:
        """What it sends of q, k and v."""
        return _there(part) if part.ranks > 1 else 0.0


def _there(part: Part) -> float:
    """Bytes of q, k and v for all ranks."""
    per_key_head = part.kv_bytes // part.kv_heads
    queries = part.rows * part.key_dim * part.itemsize
    return float(queries + per_key_head * _kv_heads(part) * part.ranks)


def _kv_heads(part: Part) -> int:
    """Key heads that a rank needs when it computes its share of the query heads."""
    return max(1, part.kv_heads // part.ranks)


__all__ = ["Ulysses"]
