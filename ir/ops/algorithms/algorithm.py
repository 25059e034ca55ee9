"""What is declared of an algorithm of attention: the base of all declarations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ....facts.traffic import Traffic
from .part import Part


@dataclass(frozen=True, slots=True)
class Steps:
    """What the busiest rank computes: `shares` of queries x keys of so many heads, step by step.

    From latents it makes heads for `made` tokens of a sequence in the first step and, where it
    makes them `again`, in every other step that computes something.
    """

    heads: int
    kv_heads: int
    queries: int
    keys: int
    shares: tuple[float, ...]
    made: int
    again: bool = False


class AttentionAlgorithm:
    """How the ranks of an axis that cuts a sequence attend together; here, one rank alone.

    `runtime.attention` has the function of the same name that does it, over shards of a sequence,
    over a cache, or both.
    """

    name = ""
    words = ""  # what the report calls a sequence that is cut so
    over_shards = False  # without a cache, where the axis cuts queries and keys alike
    over_cache = False
    # Over a cache: every rank has all new tokens, and caches those that it owns.  Else the axis
    # cuts the new tokens, and each rank caches its own.
    whole = False
    tells = "nothing"  # over a cache, of what ranks tell each other positions: `keys`, `queries`
    orders: tuple[str, ...] = ("contiguous", "zigzag")  # of the tokens that ranks may hold
    by_heads = False  # does each rank attend whole sequences, of some heads?
    balanced = False  # does zigzag order give the ranks equal shares of a causal mask?

    def suits(self, whole: Part) -> bool:
        """Can it run an attention of these sizes, which no axis cuts yet?"""
        return True

    def fits(self, sizes: Mapping[str, int], ranks: int) -> bool:
        """May it run over so many ranks?  `sizes` of key heads `n` and their groups `g`."""
        return True

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """What a rank sends, forward and, without a cache, backward.

        Messages that are `hidden` run behind its steps; all others are waited for.
        """
        yield from ()

    def steps(self, part: Part) -> Steps:
        """What the busiest rank computes."""
        if part.cached:
            share = part.cached_share(part.queries)
        else:
            share = part.share(part.keys, 2 * part.query_ways)
        return steps_over(part, (share,))

    def buffers(self, part: Part) -> float:
        """Bytes of what it sends and receives, as far as a rank holds them at once."""
        return 0.0


def steps_over(
    part: Part, shares: tuple[float, ...], *, times: int = 1, again: bool = False
) -> Steps:
    """Steps of all heads and queries of a rank, each over the keys of `times` ranks."""
    made = part.cached_rows() * times
    kv_heads = part.heads if part.latent else part.kv_heads
    return Steps(part.heads, kv_heads, part.queries, part.keys * times, shares, made, again)


__all__ = ["AttentionAlgorithm", "Steps", "steps_over"]
