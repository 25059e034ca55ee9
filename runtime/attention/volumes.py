"""What every algorithm moves, as pure functions: the one place, which counters are held against.

Bytes and messages are those that one rank receives, as `CollectiveCounter` counts them: collectives
as if done by rings, padding included.  Nothing is counted where there is one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from ..mesh.counter import Phase
from .ulysses import Heads
from .window import halos

# (operation, phase) -> (bytes, messages)
Volume: TypeAlias = dict[tuple[str, Phase], tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The shards of one rank: q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv).

    `itemsize` is bytes per number; gradients and log-sum-exps have `wide_size` bytes.
    """

    batch: int
    query_heads: int
    key_heads: int
    q_rows: int
    k_rows: int
    head_dim: int
    v_dim: int
    itemsize: int

    @property
    def wide_size(self) -> int:
        """Bytes of a float32, or of a float64 where the tensors are."""
        return max(4, self.itemsize)

    @property
    def query(self) -> int:
        """Numbers in q."""
        return self.batch * self.query_heads * self.q_rows * self.head_dim

    @property
    def out(self) -> int:
        """Numbers in the result."""
        return self.batch * self.query_heads * self.q_rows * self.v_dim

    @property
    def lse(self) -> int:
        """Rows of queries, over all heads."""
        return self.batch * self.query_heads * self.q_rows

    @property
    def kv(self) -> int:
        """Numbers in k and v."""
        return self.batch * self.key_heads * self.k_rows * (self.head_dim + self.v_dim)


def ring_volume(sizes: Sizes, ranks: int) -> Volume:
    """p-1 hops of keys and values; in backward again, and as many of their gradients."""
    hops = ranks - 1
    there = hops * sizes.kv * sizes.itemsize
    back = hops * sizes.kv * (sizes.itemsize + sizes.wide_size)
    return _moved(
        {
            ("send_recv", "forward"): (there, hops),
            ("send_recv", "backward"): (back, 2 * hops),
        }
    )


def gather_kv_volume(sizes: Sizes, ranks: int, stride: int = 0) -> Volume:
    """One all-gather per `stride` key heads; in backward again, and one reduce-scatter."""
    strides = -(-sizes.key_heads // (stride or sizes.key_heads))
    moved, messages = (ranks - 1) * sizes.kv, strides * (ranks - 1)
    return _moved(
        {
            ("all_gather", "forward"): (moved * sizes.itemsize, messages),
            ("all_gather", "backward"): (moved * sizes.itemsize, messages),
            ("reduce_scatter", "backward"): (moved * sizes.wide_size, messages),
        }
    )


def pass_q_volume(sizes: Sizes, ranks: int) -> Volume:
    """p-1 hops of queries and one all-to-all of partial results; backward is the ring's."""
    hops = ranks - 1
    partials = hops * (sizes.out * sizes.itemsize + sizes.lse * sizes.wide_size)
    backward = ring_volume(sizes, ranks).get(("send_recv", "backward"), (0, 0))
    return _moved(
        {
            ("send_recv", "forward"): (hops * sizes.query * sizes.itemsize, hops),
            ("all_to_all", "forward"): (partials, hops),
            ("send_recv", "backward"): backward,
        }
    )


def tree_volume(sizes: Sizes, ranks: int) -> Volume:
    """Two all-reduces of replicated queries; in backward one of their gradient."""
    share, messages = 2 * (ranks - 1) / ranks * sizes.wide_size, 2 * (ranks - 1)
    forward = sizes.lse + sizes.out + sizes.lse
    return _moved(
        {
            ("all_reduce", "forward"): (share * forward, 2 * messages),
            ("all_reduce", "backward"): (share * sizes.query, messages),
        }
    )


def ulysses_volume(sizes: Sizes, ranks: int, rank: int = 0) -> Volume:
    """An all-to-all of q, k and v and one of the result; backward sends the gradients back.

    Ranks differ in backward only where key heads go to several of them.
    """
    heads = [key_heads_of(sizes, ranks, peer) for peer in range(ranks)]
    per_key_head = sizes.kv // sizes.key_heads
    queries = (ranks - 1) * (sizes.query + sizes.out) // ranks
    there = queries + (ranks - 1) * heads[rank] * per_key_head
    back = queries + (sum(heads) - heads[rank]) * per_key_head
    messages = 2 * (ranks - 1)
    return _moved(
        {
            ("all_to_all", "forward"): (there * sizes.itemsize, messages),
            ("all_to_all", "backward"): (back * sizes.itemsize, messages),
        }
    )


def key_heads_of(sizes: Sizes, ranks: int, rank: int) -> int:
    """Key heads that the query heads of a rank attend, in Ulysses."""
    own = Heads(sizes.query_heads, sizes.key_heads, ranks).keys(rank)
    return own.stop - own.start


def usp_volume(sizes: Sizes, ulysses: int, ring: int, rank: int = 0) -> tuple[Volume, Volume]:
    """(over the Ulysses group, over the ring) for the rank of that number in Ulysses."""
    inner = replace(
        sizes,
        query_heads=sizes.query_heads // ulysses,
        key_heads=key_heads_of(sizes, ulysses, rank),
        q_rows=sizes.q_rows * ulysses,
        k_rows=sizes.k_rows * ulysses,
    )
    return ulysses_volume(sizes, ulysses, rank), ring_volume(inner, ring)


def window_volume(sizes: Sizes, ranks: int, window: int, rank: int) -> Volume:
    """A message from each neighbour whose last keys the window reaches; gradients back."""
    per_row = sizes.kv // sizes.k_rows if sizes.k_rows else 0
    found = halos(window, sizes.k_rows, ranks)
    before = [halo.rows for halo in found if halo.distance <= rank]
    after = [halo.rows for halo in found if halo.distance < ranks - rank]
    return _moved(
        {
            ("send_recv", "forward"): (sum(before) * per_row * sizes.itemsize, len(before)),
            ("send_recv", "backward"): (sum(after) * per_row * sizes.wide_size, len(after)),
        }
    )


def _moved(volume: Volume) -> Volume:
    """Without the rows in which nothing is moved."""
    return {key: row for key, row in volume.items() if row[0]}
