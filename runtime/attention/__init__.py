"""Attention over a sequence that is sharded over ranks, each algorithm usable on its own.

| function | what moves | wins for |
|---|---|---|
| `ring_attention` | keys and values, hidden behind computing | training, prefill |
| `gather_kv_attention` | keys and values, at once | few key heads, short sequences |
| `pass_q_attention` | queries and partial results | few new queries over a long cache |
| `tree_attention` | partial results of replicated queries | decoding |
| `ulysses_attention` | heads for tokens and back | fast links, no more ranks than heads |
| `usp_attention` | Ulysses in one group, a ring in another | several nodes |
| `window_attention` | the keys just before the own ones | sliding windows |

`shared_prefix_attention` is for one rank: one block of keys that all sequences of a batch attend.
Tensors are shards (batch, heads, sequence, head_dim); `Layout` says which tokens a shard holds.
All of them merge `Partial` results, whose kernels never make a score matrix.
"""

from .gather import gather_kv_attention
from .partial import Partial, merge
from .pass_q import pass_q_attention
from .prefix import shared_prefix_attention
from .ring import ring_attention
from .scores import Mask
from .tokens import Layout
from .tree import tree_attention
from .ulysses import ulysses_attention, usp_attention
from .window import window_attention

__all__ = [
    "Layout", "Mask", "Partial", "gather_kv_attention", "merge", "pass_q_attention",
    "ring_attention", "shared_prefix_attention", "tree_attention", "ulysses_attention",
    "usp_attention", "window_attention",
]  # fmt: skip
