"""The algorithms by the names that plans and generated modules call them: the one list.

A new one is a file like `ring.py`, a line here, and its declaration for the planner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .algorithm import Algorithm
from .gather import GATHER, gather_kv_attention
from .pass_q import PASS_Q, pass_q_attention
from .ring import RING, ring_attention
from .tree import TREE
from .ulysses import ulysses_attention
from .window import window_attention

# Over shards of a sequence, for `ops.attention`: functions with the options of `ring_attention`.
OVER_SHARDS: dict[str, Callable[..., Tensor]] = {
    "ring": ring_attention,
    "gather": gather_kv_attention,
    "pass_q": pass_q_attention,
    "ulysses": ulysses_attention,
    "window": window_attention,
}

# Over a cache, for `ops.cached_attention`.
OVER_A_CACHE: dict[str, Algorithm] = {way.name: way for way in (RING, GATHER, PASS_Q, TREE)}

# One rank alone: a ring that sends nothing.
LOCAL = replace(RING, name="local", travels="nothing")
