"""What generated modules import: collectives with gradients, sharded ops, checkpoints."""

from . import ops
from .attention import (
    Layout,
    Mask,
    Partial,
    gather_kv_attention,
    merge,
    pass_q_attention,
    ring_attention,
    tree_attention,
    ulysses_attention,
    usp_attention,
    window_attention,
)
from .collectives import Axis
from .counter import CollectiveCounter, count_collectives
from .launch import RankError, RankPool, run_ranks
from .layers import Layer, per_layer
from .mesh import Mesh
from .module import Input, Namespace, Output, Outputs, Param, ShardedModule
from .moe import moe
from .ops import attention, cross_entropy, dropout, vocab_embedding
from .regather import regathering

__all__ = [
    "Axis", "CollectiveCounter", "Input", "Layer", "Layout", "Mask", "Mesh", "Namespace", "Output",
    "Outputs", "Param", "Partial", "RankError", "RankPool", "ShardedModule", "attention",
    "count_collectives", "cross_entropy", "dropout", "gather_kv_attention", "merge", "moe", "ops",
    "pass_q_attention", "per_layer", "regathering", "ring_attention", "run_ranks",
    "tree_attention", "ulysses_attention", "usp_attention", "vocab_embedding", "window_attention",
]  # fmt: skip
