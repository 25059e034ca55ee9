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
    shared_prefix_attention,
    tree_attention,
    ulysses_attention,
    usp_attention,
    window_attention,
)
from .cache.cache import CacheFullError, KVCache, PageTable
from .cache.declared import Cache, SequenceState
from .cache.state import StateCache, StateTable
from .gathering.weights import Home, Weight
from .launch import RankError, RankPool, run_ranks
from .mesh.batches import Input, Output, Outputs
from .mesh.collectives import Axis
from .mesh.counter import CollectiveCounter, count_collectives
from .mesh.mesh import Mesh
from .module.layers import Layer, per_layer
from .module.module import ShardedModule
from .module.nested import Sharded
from .module.parameters import Param, Part
from .module.tree import Namespace
from .moe import moe
from .ops import (
    attention,
    cached_attention,
    cross_entropy,
    dropout,
    last_token,
    linear_cross_entropy,
    softcap,
    vocab_embedding,
)
from .outside import cross_entropy_of
from .pipeline.module import PipelinedModule
from .pipeline.stages import Stage
from .training.step import Labels

__all__ = [
    "Axis", "Cache", "CacheFullError", "CollectiveCounter", "Home", "Input", "KVCache", "Labels",
    "Layer", "Layout", "Mask", "Mesh", "Namespace", "Output", "Outputs", "PageTable", "Param",
    "Part", "Partial", "PipelinedModule", "RankError", "RankPool", "SequenceState", "Sharded",
    "ShardedModule", "Stage", "StateCache", "StateTable", "Weight", "attention",
    "cached_attention", "count_collectives",
    "cross_entropy", "cross_entropy_of", "dropout", "gather_kv_attention", "last_token",
    "linear_cross_entropy", "merge", "moe", "ops", "pass_q_attention", "per_layer",
    "ring_attention", "run_ranks", "shared_prefix_attention", "softcap", "tree_attention",
    "ulysses_attention", "usp_attention", "vocab_embedding", "window_attention",
]  # fmt: skip
