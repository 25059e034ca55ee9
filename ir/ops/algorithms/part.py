"""One rank's part of an attention, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# Partial results and gradients are added up in 32 bits or more.
_WIDE = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of an attention, and the algorithm that joins the parts.

    Sizes are those of one rank: q (batch, heads, queries, key_dim), k (batch, kv_heads, keys,
    key_dim), v (batch, kv_heads, keys, value_dim).  With `cached`, keys are those of the cache, of
    which the last `queries` are new.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int
    itemsize: int
    causal: bool
    window: int
    algorithm: str  # "" where no axis cuts queries and keys together
    axis: int
    ranks: int
    zigzag: bool
    query_ways: int  # how many ways the queries alone are cut
    cached: bool
    values_in_keys: bool = False  # values are the first `value_dim` numbers of the keys
    # (r, rope) if latents of these sizes are held, of which a rank makes the keys and values of
    # its heads: `kv_heads` is 1, the other sizes are those of the heads
    latent: tuple[int, int] | None = None

    @property
    def wide(self) -> int:
        """Bytes of a number of a partial result or of a gradient."""
        return max(_WIDE, self.itemsize)

    @property
    def rows(self) -> int:
        """Queries of all heads and sequences."""
        return self.batch * self.heads * self.queries

    @property
    def kv_bytes(self) -> int:
        """Bytes of this rank's keys and values, or of the latents of which they are made."""
        rows = self.batch * self.kv_heads * self.keys
        values = 0 if self.values_in_keys else self.value_dim
        numbers = sum(self.latent) if self.latent else self.key_dim + values
        return rows * numbers * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of this rank's keys and values."""
        return self.kv_bytes // self.itemsize * self.wide

    @property
    def made_dim(self) -> int:
        """Numbers of a head's key and value that are made from a latent."""
        return self.key_dim - self.latent[1] + self.value_dim if self.latent else 0

    def cached_rows(self, run: int = 0) -> int:
        """Tokens of a sequence that one rank holds; what a window drops is not.

        A window keeps its own tokens and the new ones: those of this phase, or the `run` tokens of
        another that shares the cache.
        """
        if not self.window or not self.cached:
            return self.keys
        return min(self.keys, self.window + max(self.queries, -(-run // self.ranks)))

    def cache_bytes(self, run: int = 0) -> int:
        """Bytes of the KV cache that one rank keeps; `run` as in `cached_rows`."""
        return self.kv_bytes // self.keys * self.cached_rows(run) if self.cached else 0

    # --- the share of all scores that the busiest rank computes --------------------------------

    def share(self, keys: int, cut: int) -> float:
        """The share of its queries x `keys`, where it has all keys of a sequence.

        Causal attention computes the lower triangle.  With queries cut in p contiguous blocks the
        last rank has the longest rows, 1 - 1 / (2p) of them (`cut` = 2p); in zigzag order all have
        half (`cut` = 2).  A causal window of w keys bounds each row by w.
        """
        share = 1.0 - 1.0 / cut if self.causal else 1.0
        if self.causal and 0 < self.window < keys:
            share = min(share, self.window / keys)
        return share

    def cached_share(self, new: int) -> float:
        """Of `new` queries x all keys of a cache; new tokens are in an order that gives every rank
        as many."""
        keys = self.keys * self.ranks
        share = 1.0 - (new - 1) / 2 / keys
        return min(share, self.window / keys) if self.window else share

    def ring_shares(self) -> tuple[float, ...]:
        """The share of its queries x the keys of each rank in turn; see `ring_shares`."""
        return ring_shares(self.keys, self.ranks, self.causal, self.window, self.zigzag)


@lru_cache(maxsize=1024)
def ring_shares(
    rows: int, ranks: int, causal: bool, window: int, zigzag: bool
) -> tuple[float, ...]:
    """Share of its queries x one rank's keys that the busiest rank computes in each step of a ring.

    Every rank holds `rows` tokens; in step s it has the keys of the rank s before it.  The busiest
    is the last rank, which attends most or, in zigzag order, has the two chunks in the middle, and
    without a causal mask or zigzag order the first, to which a window leaves all later keys.
    """
    chunk = -(-rows // 2) if zigzag else rows

    def chunks(rank: int) -> tuple[int, ...]:
        return (rank, 2 * ranks - 1 - rank) if zigzag else (rank,)

    busiest = ranks - 1 if causal or zigzag else 0
    return tuple(
        sum(
            _pairs((q - k) * chunk, chunk, causal, window)
            for q in chunks(busiest)
            for k in chunks((busiest - step) % ranks)
        )
        / (chunk * len(chunks(busiest))) ** 2
        for step in range(ranks)
    )


def _pairs(ahead: int, rows: int, causal: bool, window: int) -> int:
    """Pairs that attend, of `rows` queries and `rows` keys; the first query is `ahead` of the first
    key."""

    def at_least(distance: int) -> int:
        """Pairs whose query is so far or further ahead of its key: sum of 1, 2, ..., rows, rows."""

        def up_to(last: int) -> int:
            ramp = min(max(last, 0), rows)
            return ramp * (ramp + 1) // 2 + max(last - rows, 0) * rows

        return up_to(rows + ahead - distance) - up_to(ahead - distance)

    return (at_least(0) if causal else rows * rows) - (at_least(window) if window else 0)


__all__ = ["Part", "ring_shares"]
