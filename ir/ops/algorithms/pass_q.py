"""Ring pass-Q: queries travel from rank to rank, keys and values stay."""

from __future__ import annotations

from collections.abc import Iterator

from ....facts.traffic import Traffic
from .algorithm import AttentionAlgorithm, Steps, steps_over
from .part import Part


class PassQ(AttentionAlgorithm):
    """p - 1 hops of queries behind the compute; an all-to-all brings partial results back."""

    name = "pass_q"
    words = "sequence, ring of queries"
    over_cache = True
    tells = "queries"

    def traffic(self, part: Part) -> Iterator[Traffic]:
        """A partial result is the values' mean and, in float32, the logarithm of the weights."""
        axes, queries = (part.axis,), part.rows * part.key_dim * part.itemsize
        yield Traffic("send_recv", axes, float(queries), times=part.ranks - 1, hidden=True)
        yield Traffic("all_to_all", axes, _partials(part))

    def steps(self, part: Part) -> Steps:
        """One per rank's queries; heads are made once of the latents that stay."""
        share = part.cached_share(part.queries * part.ranks)
        return steps_over(part, (share,) * part.ranks)

    def buffers(self, part: Part) -> float:
        """The partial results of all ranks' queries."""
        return _partials(part)


def _partials(part: Part) -> float:
    return float(part.ranks * part.rows * (part.value_dim * part.itemsize + part.wide))


__all__ = ["PassQ"]
