"""The algorithms by name: the one list that rules, prices, orders and reports go by.

A new one is a file like `ring.py` and a line here, and its function in `runtime.attention`.
"""

from __future__ import annotations

from .algorithm import AttentionAlgorithm
from .gather import Gather
from .part import Part
from .pass_q import PassQ
from .ring import Ring
from .tree import Tree
from .ulysses import Ulysses
from .window import Window

ALGORITHMS: dict[str, AttentionAlgorithm] = {
    each.name: each for each in (Ring(), Gather(), Ulysses(), Window(), PassQ(), Tree())
}
ALONE = AttentionAlgorithm()


def algorithm_of(part: Part) -> AttentionAlgorithm:
    """The algorithm that joins `part` with those of other ranks."""
    return ALGORITHMS[part.algorithm] if part.algorithm else ALONE


__all__ = ["ALGORITHMS", "ALONE", "algorithm_of"]
