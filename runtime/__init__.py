"""What generated modules import: collectives with gradients, sharded ops, checkpoints."""

from . import ops
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
    "Axis", "CollectiveCounter", "Input", "Layer", "Mesh", "Namespace", "Output", "Outputs",
    "Param", "RankError", "RankPool", "ShardedModule", "attention", "count_collectives",
    "cross_entropy", "dropout", "moe", "ops", "per_layer", "regathering", "run_ranks",
    "vocab_embedding",
]  # fmt: skip
