"""Every op: cut in every way its rule allows, it gives what one process gives, gradients too."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from operator import mod
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shardwright.codegen.module import write_source
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.facts.spec import P, R, S, Spec, V, is_shard
from shardwright.ir.graph import Arg, Graph, Input, Node, Output, Param, TensorType, Value
from shardwright.ir.ops.experts import Form
from shardwright.ir.ops.local import node_specs
from shardwright.ir.ops.product import product_dims
from shardwright.ir.ops.registry import (
    OPS,
    find_op,
    register,
    rule_of,
    saved_values,
)
from shardwright.ir.ops.rule import Choice
from shardwright.ir.reference.interpret import interpret
from shardwright.planner.plan.program import PricedStep, Program, lower, priced_path
from shardwright.planner.plan.traffic import predicted_bytes
from shardwright.planner.strategies.build import Decisions
from shardwright.planner.strategies.conversion import Conversions as TypeConversions
from shardwright.planner.strategies.lattice import spec_fits
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.steps import Moving, Repeats
from shardwright.runtime import RankPool, count_collectives
from tests.sharded import assert_close, flatten, mesh_of, total, weights_like, whole_outputs


class Draw:
    """Random shapes and values from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def n(self) -> int:
        """A size that 2 and 4 divide, or only 2, or none."""
        return self.rng.choice((4, 4, 8, 6, 5))

    def even(self) -> int:
        """A size that 4 divides."""
        return self.rng.choice((4, 8))

    def shape(self) -> tuple[int, int, int]:
        """Three sizes."""
        return (self.n(), self.n(), self.n())

    def x(self, *shape: int) -> Tensor:
        """Floats around 0; they become a trainable parameter."""
        shape = shape or self.shape()
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def z(self, *shape: int) -> Tensor:
        """Complex numbers around 0; they become a trainable parameter."""
        shape = shape or self.shape()
        return torch.randn(shape, generator=self.generator, dtype=torch.complex128)

    def scalar(self) -> Tensor:
        """A float without dims."""
        return torch.randn((), generator=self.generator, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        """Floats in (0.5, 1.5)."""
        shape = shape or self.shape()
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5

    def ints(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high); they become an input."""
        return torch.randint(0, high, shape, generator=self.generator)

    def bools(self, *shape: int) -> Tensor:
        """Coin flips; they become an input."""
        return torch.rand(shape, generator=self.generator) < 0.5


Args: TypeAlias = dict[str, Any]
Example: TypeAlias = Callable[[Draw], Args]
EXAMPLES: dict[str, list[Example]] = {}
ROUTED = "dispatch"  # moves what a router decides: see tests/planner/test_experts.py
# Generated modules ask for the type of an operand alone, which is not made for that.
UNREAD = {
    "aten.type_as.default",
    *(f"aten.new_{what}.default" for what in ("zeros", "ones", "full")),
}
# Autograd keeps some operands as something made of them: copies of other strides, experts' rows
ANOTHER_FORM = {
    "aten.einsum.default", "aten.matmul.default", "aten.div.Scalar_mode",
    "shardwright.attention", "shardwright.moe",
}  # fmt: skip
SERVING = {  # have a cache: see tests/endtoend/test_serving.py, test_states.py
    "shardwright.cached_attention", "shardwright.cached_convolution",
    *(f"shardwright.{name}" for name in ("state", "step", "new_state")),
    *(f"shardwright.state_{name}" for name in ("before", "step", "after")),
}  # fmt: skip
DRAWS = {name for name, op in OPS.items() if op.draws}  # see tests/endtoend/test_draws.py
EMPTY = {"aten.empty_like.default", "aten.empty.memory_format", "aten.new_empty.default"}


def example(names: str, *makers: Example) -> None:
    """Examples of one or more ops: functions from random numbers to arguments by schema name.

    What is not given takes the schema's default.
    """
    for name in names.split():
        EXAMPLES[name] = list(makers)


def aten(names: str) -> str:
    """`relu exp` -> `aten.relu.default aten.exp.default`."""
    return " ".join(f"aten.{name}.default" for name in names.split())


# --- elementwise ---------------------------------------------------------------------------------

example(
    aten(
        "relu tanh sigmoid exp exp2 expm1 silu cos sin abs erf log_sigmoid elu hardswish"
        " hardsigmoid leaky_relu square mish neg clone contiguous alias detach"
        " lift_fresh_copy floor ceil round trunc sign zeros_like ones_like softplus"
    ),
    lambda d: {"self": d.x()},
)
example(aten("real imag _conj conj_physical resolve_conj sgn angle"), lambda d: {"self": d.z()})
example("aten.view_as_real.default", lambda d: {"self": d.z()})
example("aten.view_as_complex.default", lambda d: {"self": d.x(4, d.n(), 2)})
example(
    "aten.complex.default",
    lambda d: dict(zip(("real", "imag"), (d.x(4, 6), d.x(4, 6)), strict=True)),
    lambda d: {"real": d.x(4, 6), "imag": d.x(6)},
)
example("aten.polar.default", lambda d: {"abs": d.positive(4, 6), "angle": d.x(4, 6)})
example(
    aten("rsqrt sqrt reciprocal log log2 log10 log1p"),
    lambda d: {"self": d.positive()},
    lambda d: {"self": d.positive(4, 5, 8)},
)
example(
    "aten.gelu.default", lambda d: {"self": d.x()}, lambda d: {"self": d.x(), "approximate": "tanh"}
)
example("aten.fill.Tensor", lambda d: {"self": d.x(), "value": d.scalar()})
example("aten.hardtanh.default", lambda d: {"self": d.x(), "min_val": -0.5, "max_val": 0.25})
example("aten.clamp_min.default", lambda d: {"self": d.x(), "min": -0.25})
example("aten.clamp_max.default", lambda d: {"self": d.x(), "max": 0.25})
example(
    "aten.clamp.default",
    lambda d: {"self": d.x(), "min": -0.5, "max": 0.5},
    lambda d: {"self": d.x(), "max": 0.5},
)
example(
    "aten.clamp.Tensor",
    lambda d: {"self": d.x(4, 5, 8), "min": -d.positive(8), "max": d.positive(4, 1, 8)},
    lambda d: {"self": d.x(), "max": d.scalar()},
)
example("aten.clamp_min.Tensor", lambda d: {"self": d.x(), "min": d.scalar()})
example("aten.clamp_max.Tensor", lambda d: {"self": d.x(), "max": d.scalar()})
example("aten.full_like.default", lambda d: {"self": d.x(), "fill_value": 1.5})
example(
    "aten.isnan.default aten.isinf.default aten.isfinite.default",
    lambda d: {"self": d.x() / d.bools(4, 1, 1)} if False else {"self": d.x()},
)
example("aten.logical_not.default aten.bitwise_not.default", lambda d: {"self": d.bools(4, 8)})
_comparisons = "eq ne lt le gt ge".split()
example(
    " ".join(f"aten.{name}.Scalar" for name in _comparisons),
    lambda d: {"self": d.ints(4, 4, 6), "other": 2},
    lambda d: {"self": d.x(), "other": 0.25},
)
example(
    " ".join(f"aten.{name}.Tensor" for name in _comparisons),
    lambda d: {"self": d.ints(3, 4, 6), "other": d.ints(3, 6)},
)
example(
    "aten.floor_divide.Scalar aten.remainder.Scalar aten.floor_divide.default"
    " aten.bitwise_and.Scalar aten.bitwise_or.Scalar aten.bitwise_xor.Scalar",
    lambda d: {"self": d.ints(50, 4, 6), "other": 3},
)
example("aten.remainder.Tensor", lambda d: {"self": d.ints(50, 4, 6), "other": d.ints(5, 6) + 1})
example(
    "aten.bitwise_and.Tensor aten.bitwise_or.Tensor aten.bitwise_xor.Tensor aten.__and__.Tensor"
    " aten.__or__.Tensor",
    lambda d: {"self": d.ints(50, 4, 6), "other": d.ints(50, 4, 1)},
    lambda d: {"self": d.bools(4, 6), "other": d.bools(6)},
)
example(
    aten("logical_and logical_or logical_xor"),
    lambda d: {"self": d.bools(4, 6), "other": d.bools(4, 1)},
)
_pairs: tuple[Example, ...] = (
    lambda d: {"self": d.x(4, 6, 8), "other": d.x(4, 6, 8)},
    lambda d: {"self": d.x(4, 5), "other": d.x(8, 4, 5)},
    lambda d: {"self": d.x(4, 1, 5), "other": d.x(8, 1)},
    lambda d: {"self": d.x(), "other": d.scalar()},
)
example("aten.mul.Tensor aten.maximum.default aten.minimum.default", *_pairs)
_number: Example = lambda d: {"self": d.x(), "other": -2.5}  # noqa: E731
example("aten.mul.Scalar aten.div.Scalar aten.add.Scalar aten.sub.Scalar aten.rsub.Scalar", _number)
EXAMPLES["aten.mul.Tensor"] += [_number]
_scaled: tuple[Example, ...] = (
    *_pairs,
    _number,
    lambda d: {"self": d.x(4, 5), "other": d.x(8, 4, 5), "alpha": -2},
)
example("aten.add.Tensor aten.sub.Tensor", *_scaled)
example("aten.rsub.Tensor", *_pairs, _scaled[-1])
example(
    "aten.div.Tensor",
    _number,
    lambda d: {"self": d.x(4, 5), "other": d.positive(8, 4, 5)},
    lambda d: {"self": d.x(5, 1), "other": d.positive(4, 5, 5)},
)
example(
    "aten.div.Tensor_mode",
    lambda d: {"self": d.x(4, 5), "other": d.positive(8, 4, 5), "rounding_mode": None},
    lambda d: {"self": d.ints(50, 4, 5), "other": d.ints(5, 4, 1) + 1, "rounding_mode": "floor"},
)
example("aten.div.Scalar_mode", lambda d: {"self": d.x(), "other": 0.5, "rounding_mode": "trunc"})
example(
    "aten.pow.Tensor_Scalar",
    lambda d: {"self": d.positive(4, 5), "exponent": -0.5},
    lambda d: {"self": d.x(4, 5), "exponent": 3},
)
example("aten.pow.Tensor_Tensor", lambda d: {"self": d.positive(4, 6, 1), "exponent": d.x(6, 5)})
example(
    "aten.pow.Scalar",
    lambda d: {"self": 10000.0, "exponent": d.x(4, 5)},
    lambda d: {"self": -2, "exponent": d.ints(5, 4, 6)},
)
example(
    "aten.where.self",
    lambda d: {"condition": d.bools(4, 6), "self": d.x(4, 6), "other": d.x(8, 1, 6)},
    lambda d: {"condition": d.bools(4, 1), "self": d.x(4, 5), "other": d.scalar()},
)
example(
    "aten.where.ScalarOther",
    lambda d: {"condition": d.bools(4, 1), "self": d.x(4, 5), "other": -1.0},
)
example(
    "aten.where.ScalarSelf",
    lambda d: {"condition": d.bools(4, 1), "self": -1.0, "other": d.x(4, 5)},
)
example("aten.where.Scalar", lambda d: {"condition": d.bools(4, 6), "self": 1, "other": -3})
example(
    "aten.masked_fill.Scalar",
    lambda d: {"self": d.x(4, 6), "mask": d.bools(6), "value": 0},
    lambda d: {"self": d.x(4, 6), "mask": d.bools(4, 1), "value": float("-inf")},
)
example(
    "aten.masked_fill.Tensor",
    lambda d: {"self": d.x(4, 6), "mask": d.bools(6), "value": d.scalar()},
)
example(
    "aten.masked_scatter.default",
    lambda d: {"self": d.x(2, 5, 8), "mask": d.bools(2, 5, 1), "source": d.x(10, 8)},
    lambda d: {"self": d.x(2, 5, 4), "mask": d.bools(2, 5, 4), "source": d.x(40)},
    lambda d: {"self": d.x(4, 6), "mask": d.bools(6), "source": d.x(4, 6)},
)
example("aten.to.dtype", lambda d: {"self": d.ints(9, 4, 6), "dtype": torch.float64})
example("aten._to_copy.default", lambda d: {"self": d.ints(9, 4, 6), "dtype": torch.float64})
example("aten.to.device", lambda d: {"self": d.x(), "device": "cpu", "dtype": torch.float64})
example("aten.to.dtype_layout", lambda d: {"self": d.ints(9, 4, 6), "dtype": torch.float64})
example("aten.type_as.default", lambda d: {"self": d.ints(9, 4, 6), "other": d.x(2)})
example("aten.dropout.default", lambda d: {"input": d.x(), "p": 0.0, "train": True})

# --- along one dim, reductions -------------------------------------------------------------------

_inner: tuple[Example, ...] = (
    lambda d: {"self": d.x(), "dim": -1},
    lambda d: {"self": d.x(), "dim": 1},
)
example("aten.softmax.int aten.log_softmax.int aten.cumsum.default aten.cumprod.default", *_inner)
example("aten.glu.default", lambda d: {"self": d.x(4, 8, 5), "dim": 1})
example("aten.sort.default", lambda d: {"self": d.x(), "dim": 1, "descending": True})
example("aten.topk.default", lambda d: {"self": d.x(), "k": 2, "dim": 1})
example(
    "aten.diff.default",
    lambda d: {"self": d.x(), "dim": 1},
    lambda d: {"self": d.x(4, 6), "prepend": d.x(4, 1)},
)
example(
    "aten.layer_norm.default",
    lambda d: {"input": d.x(4, 5, 8), "normalized_shape": (8,), "weight": d.x(8), "bias": d.x(8)},
    lambda d: {"input": d.x(4, 6, 8), "normalized_shape": (6, 8), "weight": d.x(6, 8)},
    lambda d: {"input": d.x(4, 6, 8), "normalized_shape": (8,), "bias": d.x(8)},
)
example(
    "aten.rms_norm.default",
    lambda d: {"input": d.x(4, 6, 8), "normalized_shape": (8,), "weight": d.x(8), "eps": 1e-6},
    lambda d: {"input": d.x(4, 6, 8), "normalized_shape": (8,)},
)
example(
    "shardwright.rotary",
    lambda d: {
        "x": d.x(2, 4, 6, 8),
        "cos": d.x(1, 1, 6, 4),
        "sin": d.x(1, 1, 6, 4),
        "pairing": "halves",
    },
    lambda d: {"x": d.x(4, 6, 8), "cos": d.x(6, 8), "sin": d.x(6, 8), "pairing": "pairs"},
    lambda d: {"x": d.x(4, 6, 8), "cos": d.x(6, 4), "sin": d.x(6, 4), "pairing": "pairs_to_halves"},
)
example(
    "aten.baddbmm.default",
    lambda d: {"self": d.x(4, 1, 8), "batch1": d.x(4, 6, 2), "batch2": d.x(4, 2, 8)},
    lambda d: {"self": d.x(4, 6, 4), "batch1": d.x(4, 6, 8), "batch2": d.x(4, 8, 4)},
)
example(
    "aten.select_scatter.default",
    lambda d: {"self": d.x(4, 6, 8), "src": d.x(4, 8), "dim": 1, "index": 2},
    lambda d: {"self": d.x(4, 6), "src": d.x(4), "dim": -1, "index": 0},
)
example(
    "aten.slice_scatter.default",
    lambda d: {"self": d.x(4, 6, 8), "src": d.x(4, 3, 8), "dim": 1, "start": 2, "end": 5},
    lambda d: {"self": d.x(4, 6), "src": d.x(4, 2), "dim": -1, "end": 2},
)
example(
    "shardwright.causal_convolution",
    lambda d: {"x": d.x(4, 8, 6), "weight": d.x(8, 1, 3), "bias": d.x(8), "dilation": 1},
    lambda d: {"x": d.x(4, 4, 6), "weight": d.x(4, 1, 2), "bias": None, "dilation": 2},
    lambda d: {"x": d.x(4, 6, 5), "weight": d.x(8, 6, 3), "bias": d.x(8), "dilation": 1},
    lambda d: {"x": d.x(4, 8, 5), "weight": d.x(4, 2, 2), "bias": d.x(4), "dilation": 1},
)
_reduced: tuple[Example, ...] = (
    lambda d: {"self": d.x(), "dim": (-1,)},
    lambda d: {"self": d.x(), "dim": (0, 2), "keepdim": True},
)
example("aten.sum.dim_IntList aten.mean.dim aten.amax.default aten.amin.default", *_reduced)
EXAMPLES["aten.sum.dim_IntList"] += [lambda d: {"self": d.ints(9, 4, 6), "dim": (0,)}]
example(
    "aten.sum.default aten.mean.default aten.max.default aten.min.default",
    lambda d: {"self": d.x()},
)
example("aten.logsumexp.default", *_reduced)
example(
    "aten.linalg_vector_norm.default",
    lambda d: {"self": d.x(), "ord": 2.0, "dim": (-1,), "keepdim": True},
    lambda d: {"self": d.x(), "ord": 2.0},
)
example(
    "aten.var.correction aten.std.correction",
    lambda d: {"self": d.x(), "dim": (-1,), "correction": 0, "keepdim": True},
    lambda d: {"self": d.x(), "dim": (0, 2)},
)
example("aten.var.dim aten.std.dim", lambda d: {"self": d.x(), "dim": (-1,), "unbiased": False})
example("aten.any.dim aten.all.dim", lambda d: {"self": d.bools(4, 6), "dim": -1})
example("aten.any.default aten.all.default", lambda d: {"self": d.bools(4, 6)})
example(
    "aten.argmax.default aten.argmin.default",
    lambda d: {"self": d.x(), "dim": 1},
    lambda d: {"self": d.x()},
)
example("aten.max.dim aten.min.dim", lambda d: {"self": d.x(), "dim": 1, "keepdim": True})
example(
    "aten.mse_loss.default",
    lambda d: {"self": d.x(4, 6), "target": d.x(4, 6)},
    lambda d: {"self": d.x(4, 6), "target": d.x(4, 6), "reduction": 2},
    lambda d: {"self": d.x(4, 6), "target": d.x(4, 6), "reduction": 0},
)

# --- views ---------------------------------------------------------------------------------------

example(
    "aten.view.default aten._unsafe_view.default",
    lambda d: {"self": d.x(4, 5, 8), "size": (4, 5, 2, 4)},
    lambda d: {"self": d.x(4, 6, 8), "size": (24, 8)},
)
example(
    "aten.reshape.default",
    lambda d: {"self": d.x(4, 5, 8), "shape": (4, 5, 2, 4)},
    lambda d: {"self": d.x(2, 4, 6, 1), "shape": (8, 1, 6)},
    lambda d: {"self": d.x(6, 4), "shape": (4, 6)},
    lambda d: {"self": d.x(4, 4, 8), "shape": (8, 2, 8)},
)
example(
    "aten.unsqueeze.default",
    lambda d: {"self": d.x(), "dim": -1},
    lambda d: {"self": d.bools(4, 8), "dim": 1},
)
example("aten.squeeze.dim", lambda d: {"self": d.x(4, 1, 5), "dim": 1})
example("aten.squeeze.dims", lambda d: {"self": d.x(1, 4, 1, 5), "dim": (0, 2)})
example("aten.squeeze.default", lambda d: {"self": d.x(1, 4, 1, 5)})
example("aten.flatten.using_ints", lambda d: {"self": d.x(4, 2, 6), "start_dim": 0, "end_dim": 1})
example("aten.unflatten.int", lambda d: {"self": d.x(5, 8), "dim": 1, "sizes": (4, 2)})
example("aten.transpose.int", lambda d: {"self": d.x(), "dim0": 0, "dim1": -1})
example("aten.permute.default", lambda d: {"self": d.x(), "dims": (2, 0, 1)})
example("aten.t.default aten.numpy_T.default", lambda d: {"self": d.x(4, 5)})
example(
    "aten.expand.default",
    lambda d: {"self": d.x(4, 1, 5), "size": (6, 4, 8, -1)},
    lambda d: {"self": d.x(1, 5), "size": (5, 5)},
    lambda d: {"self": d.x(4, 5), "size": (4, 5)},
)
example(
    "aten.slice.Tensor",
    lambda d: {"self": d.x(4, 8, 5), "dim": 1, "start": 2, "end": 6},
    lambda d: {"self": d.x(4, 8, 5), "dim": -1, "start": -2},
    lambda d: {"self": d.x(4, 8, 5), "dim": 0, "start": 1, "end": -1, "step": 2},
)
example("aten.select.int", lambda d: {"self": d.x(), "dim": 1, "index": -1})
example(
    "aten.chunk.default",
    lambda d: {"self": d.x(4, 6, 5), "chunks": 2, "dim": 1},
    lambda d: {"self": d.x(4, 6, 5), "chunks": 1, "dim": -1},
)
example("aten.split.Tensor", lambda d: {"self": d.x(4, 6, 5), "split_size": 4, "dim": 1})
example(
    "aten.split_with_sizes.default", lambda d: {"self": d.x(4, 6), "split_sizes": (1, 5), "dim": 1}
)
example("aten.split.sizes", lambda d: {"self": d.x(4, 6), "split_size": (1, 5), "dim": 1})
example("aten.unbind.int", lambda d: {"self": d.x(3, 4, 5), "dim": 0})
example("aten.cat.default", lambda d: {"tensors": (d.x(4, 6), d.x(4, 2)), "dim": -1})
example("aten.stack.default", lambda d: {"tensors": (d.x(4, 5), d.x(4, 5)), "dim": 1})
example(
    "aten.pad.default",
    lambda d: {"self": d.x(4, 6), "pad": (0, 1), "mode": "constant", "value": -100.0},
    lambda d: {"self": d.x(4, 6, 5), "pad": (1, 1), "mode": "reflect"},
    lambda d: {"self": d.x(4, 6, 5), "pad": (0, 0, 2, 0)},
)
example("aten.constant_pad_nd.default", lambda d: {"self": d.x(4, 6), "pad": (1, 0), "value": 0})
example(
    "aten.roll.default",
    lambda d: {"self": d.x(), "shifts": (1,), "dims": (-1,)},
    lambda d: {"self": d.x(4, 6), "shifts": (5,)},
)
example("aten.flip.default", lambda d: {"self": d.x(), "dims": (1,)})
example(
    "aten.tril.default aten.triu.default",
    lambda d: {"self": d.x(), "diagonal": -1},
    lambda d: {"self": d.x()},
)
example(
    "aten.repeat_interleave.self_int",
    lambda d: {"self": d.x(4, 6, 5), "repeats": 3, "dim": 1},
    lambda d: {"self": d.x(4, 6), "repeats": 2},
)
example("aten.repeat.default", lambda d: {"self": d.x(4, 1, 5), "repeats": (2, 1, 3, 1)})

# --- picking by index ----------------------------------------------------------------------------

example(
    "aten.index_select.default",
    lambda d: {"self": d.x(4, 6, 5), "dim": 1, "index": d.ints(6, 8)},
)
example(
    "aten.gather.default",
    lambda d: {"self": d.x(4, 6, 5), "dim": 1, "index": d.ints(6, 4, 8, 5)},
    lambda d: {"self": d.x(4, 6, 5), "dim": -1, "index": d.ints(5, 2, 6, 1)},
)
example(
    "aten.index.Tensor",
    lambda d: {"self": d.x(6, 4, 8), "indices": (d.ints(6, 4, 2),)},
    lambda d: {"self": d.x(4, 6, 5, 8), "indices": (None, d.ints(6, 4, 1), d.ints(5, 2))},
    lambda d: {"self": d.x(4, 6, 5), "indices": (d.ints(4, 4), None, d.ints(5, 4))},
)
example("aten.one_hot.default", lambda d: {"self": d.ints(5, 4, 6), "num_classes": 5})
example(
    "aten.embedding.default",
    lambda d: {"weight": d.x(9, 4), "indices": d.ints(9, 4, 6)},
    lambda d: {"weight": d.x(8, 6), "indices": d.ints(8, 4, 2), "padding_idx": 3},
    lambda d: {"weight": d.x(8, 6), "indices": d.ints(8, 4), "scale_grad_by_freq": True},
)

# --- creation ------------------------------------------------------------------------------------

example("aten.arange.default", lambda d: {"end": d.n()})
example("aten.arange.start", lambda d: {"start": 2, "end": 10})
example("aten.arange.start_step", lambda d: {"start": -3, "end": 12, "step": 2})
_places = {"dtype": torch.float64}
example("aten.full.default", lambda d: {"size": (4, d.n()), "fill_value": -1.5} | _places)
example("aten.zeros.default aten.ones.default", lambda d: {"size": (4, d.n())} | _places)
example("aten.new_zeros.default aten.new_ones.default", lambda d: {"self": d.x(), "size": (4, 6)})
example("aten.new_full.default", lambda d: {"self": d.x(), "size": (4, 6), "fill_value": -2})
example("aten.scalar_tensor.default", lambda d: {"s": 2.5} | _places)

# --- matrix products, attention, loss ------------------------------------------------------------

example(
    "aten.linear.default",
    lambda d: {"input": d.x(4, 6, 8), "weight": d.x(5, 8), "bias": d.x(5)},
    lambda d: {"input": d.x(4, 8), "weight": d.x(d.even(), 8)},
)
example(
    "shardwright.affine",
    lambda d: {"input": d.x(4, 6, 8), "weight": d.x(8, 5), "bias": d.x(5)},
)
example(
    "aten.conv1d.default",
    lambda d: {"input": d.x(4, 8, 9), "weight": d.x(4, 8, 3), "bias": d.x(4), "stride": (2,)},
    lambda d: {"input": d.x(8, 9), "weight": d.x(6, 8, 3), "padding": (1,)},
)
example(
    "aten.conv2d.default",
    lambda d: {"input": d.x(4, 4, 6, 8), "weight": d.x(8, 4, 2, 4), "stride": (2, 4)},
    lambda d: {"input": d.x(4, 4, 6, 6), "weight": d.x(8, 2, 3, 3), "bias": d.x(8), "groups": 2},
)
example(
    "aten.addmm.default",
    lambda d: {"self": d.x(5), "mat1": d.x(4, 8), "mat2": d.x(8, 5)},
    lambda d: {"self": d.x(4, 6), "mat1": d.x(4, 8), "mat2": d.x(8, 6), "beta": 2, "alpha": -1},
    lambda d: {"self": d.x(4, 1), "mat1": d.x(4, 8), "mat2": d.x(8, 5), "beta": 0.5},
    lambda d: {"self": d.x(1, 5), "mat1": d.x(4, 8), "mat2": d.x(8, 5), "alpha": 3},
    lambda d: {"self": d.scalar(), "mat1": d.x(4, 8), "mat2": d.x(8, 6)},
)
example("aten.mm.default", lambda d: {"self": d.x(4, 6), "mat2": d.x(6, 8)})
example("aten.bmm.default", lambda d: {"self": d.x(2, 4, 6), "mat2": d.x(2, 6, 8)})
example(
    "aten.matmul.default",
    lambda d: {"self": d.x(2, 1, 4, 6), "other": d.x(4, 6, 8)},
    lambda d: {"self": d.x(4, 6, 8), "other": d.x(8, 4)},
    lambda d: {"self": d.x(4, 6), "other": d.x(6)},
    lambda d: {"self": d.x(6), "other": d.x(2, 6, 8)},
    lambda d: {"self": d.x(6), "other": d.x(6)},
)
example(
    "aten.einsum.default",
    lambda d: {"equation": "bsd,hd->bsh", "tensors": (d.x(4, 2, 6), d.x(8, 6))},
    lambda d: {"equation": "bij,bjk->bik", "tensors": (d.x(2, 4, 6), d.x(2, 6, 5))},
    lambda d: {"equation": "...d,hd->...h", "tensors": (d.x(4, 2, 6), d.x(8, 6))},
    lambda d: {"equation": "...ij, ...jk", "tensors": (d.x(2, 1, 4, 6), d.x(4, 6, 2))},
    lambda d: {"equation": "ib,bj", "tensors": (d.x(4, 6), d.x(6, 2))},
    lambda d: {"equation": "...i,...i->i", "tensors": (d.x(2, 4, 6), d.x(2, 4, 6))},
    lambda d: {"equation": "ii,i->i", "tensors": (d.x(4, 4), d.x(4))},
    lambda d: {"equation": "ij->ji", "tensors": (d.x(4, 6),)},
    lambda d: {"equation": "bi,io,o->bo", "tensors": (d.x(4, 6), d.x(6, 8), d.x(8))},
)


def attention_args(
    d: Draw, *, mask: Tensor | None = None, heads: int = 4, kv_heads: int = 2, **options: Any
) -> Args:
    """Arguments of an attention over 8 queries and keys."""
    defaults = {"scale": 0.5, "causal": True, "window": 0, "softcap": 0.0, "dropout_p": 0.0}
    return {
        "q": d.x(2, heads, 8, 6),
        "k": d.x(2, kv_heads, 8, 6),
        "v": d.x(2, kv_heads, 8, 4),
        "mask": mask,
        **(defaults | options),
    }


example(
    "shardwright.attention",
    lambda d: attention_args(d),
    lambda d: attention_args(d, heads=8, kv_heads=1),
    lambda d: attention_args(d, window=3, kv_heads=4),
    lambda d: attention_args(d, causal=False, window=3),
    lambda d: attention_args(d, softcap=2.0, mask=d.bools(2, 1, 8, 8) | torch.eye(8).bool()),
    lambda d: attention_args(d, causal=False, mask=d.x(1, 4, 8, 8)),
    lambda d: attention_args(d, causal=False, mask=d.x(8, 8)),
    lambda d: attention_args(d, window=3, sinks=d.x(4)),
)
example(
    "shardwright.last_token",
    lambda d: {"x": d.x(4, 6, 8), "positions": picks(d, 9, 4, 6)},
)
example(
    "shardwright.cross_entropy",
    lambda d: _loss(d, 9),
    lambda d: _loss(d, 8, label_smoothing=0.1),
    lambda d: _loss(d, 8, reduction=2, ignore_index=3),
)


def _loss(d: Draw, classes: int, **options: Any) -> Args:
    tensors = {"logits": d.x(4, 6, classes), "labels": d.ints(classes, 4, 6)}
    return tensors | LOSS_OPTIONS | options


LOSS_OPTIONS: Args = {
    "dtype": None, "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0,
}  # fmt: skip
example(
    "shardwright.linear_cross_entropy",
    lambda d: _linear_loss(d, 9),
    lambda d: _linear_loss(d, 8, softcap=1.5, scale=0.5, reduction=2, ignore_index=3),
    lambda d: _linear_loss(d, 8, bias=d.x(8), label_smoothing=0.1),
)
example("shardwright.softcap", lambda d: {"x": d.x(4, 6, 8), "cap": 1.5})
example("shardwright.replaced", lambda d: {"old": d.x(4, 6, 8), "new": d.x(4, 6, 8)})


def _linear_loss(d: Draw, classes: int, **options: Any) -> Args:
    tensors = {"x": d.x(4, 6, 8), "weight": d.x(classes, 8), "labels": d.ints(classes, 4, 6)}
    head: Args = {"bias": None, "scale": 1.0, "softcap": 0.0}
    return tensors | head | LOSS_OPTIONS | options


# --- routing -------------------------------------------------------------------------------------


def picks(d: Draw, high: int, *shape: int) -> Tensor:
    """Integers in [0, high), all different along the last dim."""
    scores = torch.rand(*shape[:-1], high, generator=d.generator)
    return scores.argsort(-1)[..., : shape[-1]]


example(
    "aten.scatter.src",
    lambda d: {"self": d.x(4, 6, 8), "dim": -1, "index": picks(d, 8, 4, 6, 3), "src": d.x(4, 6, 3)},
    lambda d: {"self": d.x(4, 8), "dim": 1, "index": picks(d, 8, 4, 2), "src": d.x(4, 2)},
    lambda d: {"self": d.x(6, 8), "dim": 1, "index": picks(d, 8, 4, 2), "src": d.x(4, 2)},
)
example(
    "aten.scatter.value",
    lambda d: {"self": d.x(4, 6, 8), "dim": -1, "index": picks(d, 8, 4, 6, 3), "value": 1.5},
)
example(
    "aten.scatter_add.default",
    lambda d: {"self": d.x(4, 6), "dim": 1, "index": d.ints(6, 4, 3), "src": d.x(4, 3)},
)


def moe_args(d: Draw, *, biased: bool = False, **options: Any) -> Args:
    """Arguments of 4 experts with 6 hidden units each on 2 x 4 tokens, each with 2 choices."""
    form = Form(**options)
    rows = 12 if form.gating in ("halves", "pairs") else 6
    shapes = {"up": (rows, 8), "down": (4, 6)}
    if form.gating == "separate":
        shapes["gate"] = (rows, 8)
    tensors: dict[str, Tensor | None] = dict.fromkeys(
        ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    )
    for name, (out, into) in shapes.items():
        tensors[name] = d.x(4, *((into, out) if form.transposed else (out, into)))
        tensors[f"{name}_bias"] = d.x(4, out) if biased else None
    chosen = {"x": d.x(2, 4, 8), "indices": picks(d, 4, 2, 4, 2), "weights": d.x(2, 4, 2)}
    return {**chosen, **tensors, **dict(form.arguments())}


example(
    "shardwright.moe",
    lambda d: moe_args(d),
    lambda d: moe_args(
        d, biased=True, gating="pairs", alpha=1.7, limit=1.0, offset=1.0, transposed=True
    ),
    lambda d: moe_args(d, biased=True, gating="separate", activation="gelu"),
    lambda d: moe_args(d, gating="none", activation="relu2"),
    lambda d: moe_args(d, transposed=True, weigh_input=True),
)

for _name in ("mul.Tensor", "add.Tensor", "sub.Tensor"):
    EXAMPLES[f"aten.{_name}"] += [lambda d: {"self": d.z(4, 5), "other": d.z(5)}]
EXAMPLES["aten.mul.Tensor"] += [lambda d: {"self": d.z(4, 6), "other": d.x(4, 6)}]
EXAMPLES["aten.mul.Tensor"] += [lambda d: {"self": d.z(4, 6), "other": 1.5 - 2j}]
EXAMPLES["aten.div.Tensor"] += [lambda d: {"self": d.z(4, 6), "other": d.z(4, 6) + 3}]
for _name in ("abs.default", "exp.default", "neg.default", "sin.default"):
    EXAMPLES[f"aten.{_name}"] += [lambda d: {"self": d.z()}]
EXAMPLES["aten.sum.dim_IntList"] += [lambda d: {"self": d.z(4, 6), "dim": (0,)}]
EXAMPLES["aten.matmul.default"] += [lambda d: {"self": d.z(4, 6, 5), "other": d.z(5, 8)}]
EXAMPLES["aten.linear.default"] += [
    lambda d: {"input": d.z(4, 6, 8), "weight": d.z(5, 8), "bias": d.z(5)}
]
EXAMPLES["aten.to.dtype"] += [lambda d: {"self": d.x(4, 6), "dtype": torch.complex128}]


# --- one op to a graph ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Single:
    """A graph of one node with values for everything it takes."""

    graph: Graph
    node: Node
    params: dict[str, Tensor]
    inputs: dict[str, Tensor]


def single(op: str, given: Args) -> Single:
    """The graph that runs `op` once: floats are parameters, other tensors inputs."""
    params: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {"unused": torch.zeros(4, dtype=torch.int64)}
    values: dict[str, Value] = {}

    def declare(item: Any) -> Arg:
        if isinstance(item, tuple | list):
            return tuple(declare(part) for part in item)
        if not isinstance(item, Tensor):
            return item
        name = f"t{len(values)}"
        kind = TensorType(tuple(item.shape), item.dtype)
        (params if kind.continuous else inputs)[name] = item
        values[name] = Value(name, kind, kind.continuous)
        return values[name]

    arguments = _with_defaults(op, given)
    args = tuple((name, declare(item)) for name, item in arguments.items())
    leaves = {n: t.clone().requires_grad_() for n, t in params.items()} | inputs
    made = OPS[op].evaluate(op, {name: _real(arg, leaves) for name, arg in args})
    made = list(made) if isinstance(made, tuple | list) else [made]
    outputs = tuple(
        Value(f"y{i}", TensorType(tuple(t.shape), t.dtype), t.requires_grad)
        for i, t in enumerate(made)
    )
    node = Node("node", op, args, outputs)
    unused = Value("unused", TensorType((4,), torch.int64))
    graph = Graph(
        name="Single",
        inputs=tuple(Input(n, values.get(n, unused)) for n in inputs),
        params=tuple(Param(n, values[n]) for n in params),
        body=(node,),
        outputs=tuple(Output((i,), value) for i, value in enumerate(outputs)),
    )
    return Single(graph, node, params, inputs)


def _with_defaults(op: str, given: Args) -> Args:
    """All arguments in the order of the schema; names that the schema does not have are errors."""
    if op.startswith("shardwright."):
        return given
    packet, overload = op.removeprefix("aten.").rsplit(".", 1)
    schema = getattr(getattr(torch.ops.aten, packet), overload)._schema.arguments
    assert set(given) <= {a.name for a in schema}, f"{op} takes {[a.name for a in schema]}"
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _real(arg: Arg, tensors: dict[str, Tensor]) -> Any:
    if isinstance(arg, Value):
        return tensors[arg.name]
    return [_real(item, tensors) for item in arg] if isinstance(arg, tuple) else arg


def expected(case: Single) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs by path and gradients by name of one process."""
    leaves = {name: t.clone().requires_grad_() for name, t in case.params.items()}
    outputs = {str(p): t for p, t in interpret(case.graph, leaves, case.inputs).items()}
    parts = [total(t * weights_like(t)) for t in outputs.values() if t.requires_grad]
    if parts:
        torch.stack(parts).sum().backward()
    return {p: t.detach() for p, t in outputs.items()}, {n: t.grad for n, t in leaves.items()}


# --- sharded runs --------------------------------------------------------------------------------

Task: TypeAlias = tuple[str, str, dict[str, Tensor], dict[str, Tensor]]  # name, source, tensors
Moved: TypeAlias = dict[tuple[str, str, str], float]  # bytes by operation, axis and phase
Result: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor | None], Moved]


def run_tasks(tasks: list[Task]) -> list[Result]:
    """In one rank: run many generated modules; whole outputs and gradients of each."""
    return [run_task(*task) for task in tasks]


def run_task(
    name: str, source: str, params: dict[str, Tensor], inputs: dict[str, Tensor]
) -> Result:
    """In one rank: run one generated module forward and backward."""
    try:
        module = ModuleType("generated")
        exec(compile(source, "generated", "exec"), module.__dict__)
        model = module.ShardedModel.from_state_dict(params)
        with count_collectives() as counter:
            out = model(**model.shard_inputs(**inputs))
            _backward(model, out)
        counted = {(k.op, k.axis, str(k.phase)): c.bytes for k, c in counter.counts.items()}
        whole = {str(path): t for path, t in flatten(whole_outputs(model, out))}
        return whole, model.full_gradients(), counted
    except Exception as error:
        raise AssertionError(f"{name}\n{source}") from error


def _backward(model: Any, out: Any) -> None:
    """From a fixed combination of the floating outputs, without their padding."""
    specs = {str(o.path): o for o in model.OUTPUTS}
    parts: list[Tensor] = []
    for path, t in ((str(path), t) for path, t in flatten(out)):
        if t.requires_grad:
            weights = weights_like(torch.empty(specs[path].shape, dtype=t.dtype))
            own = model.local_part(weights, specs[path].spec)
            parts.append(total(t[tuple(slice(size) for size in own.shape)] * own))
    if parts:
        torch.stack(parts).sum().backward()


def decisions(
    case: Single, choices: tuple[Choice, ...], sizes: tuple[int, ...], rng: random.Random
) -> Decisions:
    """These choices for the node, and any layout for what it takes and gives."""
    needs, gives = node_specs(case.node, rule_of(case.node), choices, training=True)
    needed = {value.name: spec for value, spec in zip(case.node.operands, needs, strict=True)}
    specs: dict[str, Spec] = {}
    for item in case.graph.inputs:
        specs[item.value.name] = any_layout(item.value, sizes, rng, uneven=False)
    for param in case.graph.params:
        need = needed[param.value.name]
        own = not {P, V} & set(need) and rng.random() < 0.5
        specs[param.value.name] = need if own else any_layout(param.value, sizes, rng)
    outputs = {v.name: any_layout(v, sizes, rng) for v in case.node.outputs}
    for value, spec in zip(case.node.outputs, gives, strict=True):
        if all(s == R or is_shard(s) for s in spec) and rng.random() < 0.5:
            outputs[value.name] = spec
    return Decisions({case.node.name: choices}, specs, outputs)


def any_layout(
    value: Value, sizes: tuple[int, ...], rng: random.Random, *, uneven: bool = True
) -> Spec:
    """Whole or sharded on each axis, as the sizes allow."""
    shape = value.type.shape
    every = product([R, *map(S, range(len(shape)))], repeat=len(sizes))
    legal = [spec for spec in every if spec_fits(shape, spec, sizes)]
    if uneven:
        return rng.choice(legal)
    return rng.choice([spec for spec in legal if _even(shape, spec, sizes)])


def _even(shape: tuple[int, ...], spec: Spec, sizes: tuple[int, ...]) -> bool:
    ways = [prod(n for s, n in zip(spec, sizes, strict=True) if s == d) for d in range(len(shape))]
    return not any(map(mod, shape, ways))


def legal_choices(node: Node, mesh: Mesh) -> list[tuple[Choice, ...]]:
    """Every combination of choices that the node's rule and sizes allow."""
    rule = rule_of(node)
    every = product(rule.choices(), repeat=len(mesh.sizes))
    return [choices for choices in every if rule.ways(choices, mesh.sizes) is not None]


class Conversions:
    """The cheapest conversions on one mesh, shared by all cases."""

    def __init__(self, mesh: Mesh) -> None:
        self.network = Network(mesh, load_cluster("cpu"))
        self.known: dict[tuple[TensorType, bool, bool], TypeConversions] = {}

    def program(self, case: Single, taken: Decisions) -> Program:
        """The program of one rank."""
        params = {param.value.name for param in case.graph.params}

        def paths(value: Value, a: Spec, b: Spec) -> tuple[PricedStep, ...]:
            key = (value.type, value.differentiable, value.name in params)
            if key not in self.known:
                self.known[key] = TypeConversions(
                    Moving(*key), self.network, Repeats(regather=float(key[1] and key[2]))
                )
            return priced_path(self.known[key], a, b)

        return lower(case.graph, taken, paths, training=True)


def tasks_of(
    op: str, conversions: Conversions, examples: int | None = None, limit: int | None = None
) -> Iterator[tuple[Task, Result]]:
    """Generated modules of all (or `limit` random) legal choices for the op's (first) examples."""
    mesh = conversions.network.mesh
    for number, make in enumerate(EXAMPLES[op][:examples]):
        seed = sum(map(ord, op)) + 1000 * number
        rng = random.Random(seed)
        case = single(op, make(Draw(seed)))
        want = expected(case)
        legal = legal_choices(case.node, mesh)
        for choices in rng.sample(legal, min(limit or len(legal), len(legal))):
            program = conversions.program(case, decisions(case, choices, mesh.sizes, rng))
            source = write_source(program, mesh, summary=op, phase="train", optimizer="none")
            name = f"{op} example {number} cut {choices}"
            yield (name, source, case.params, case.inputs), (*want, moved_by(program, mesh))


def moved_by(program: Program, mesh: Mesh) -> Moved:
    """What the program is said to move, all its outputs having a gradient."""
    return {(k.op, k.axis, k.phase): n for k, n in predicted_bytes(program, mesh).items()}


def test_every_op_has_an_example() -> None:
    assert {*EXAMPLES, *SERVING, *DRAWS, *EMPTY} == set(OPS)


@pytest.mark.long
def test_every_choice_on_one_axis() -> None:
    check_all(mesh_of(2))


@pytest.mark.long
def test_some_choices_on_two_axes() -> None:
    check_all(mesh_of(2, 2), examples=1, limit=1)


@pytest.mark.slow
def test_many_choices_on_two_axes() -> None:
    check_all(mesh_of(2, 2), limit=4)


def check_all(mesh: Mesh, examples: int | None = None, limit: int | None = None) -> None:
    """Run all cases in one pool of ranks, and compare outputs and gradients."""
    conversions = Conversions(mesh)
    pairs = [pair for op in EXAMPLES for pair in tasks_of(op, conversions, examples, limit)]
    with RankPool(mesh.ranks) as pool:
        results = pool.run(run_tasks, [task for task, _ in pairs], timeout_s=280)
    for rank, of_rank in enumerate(results):
        for (task, want), got in zip(pairs, of_rank, strict=True):
            compare(f"rank {rank}: {task[0]}", got, want)
    for number, (task, want) in enumerate(pairs):
        compare_bytes(task[0], [of_rank[number][2] for of_rank in results], want[2])


def compare(name: str, got: Result, want: Result) -> None:
    """All outputs and all gradients to 1e-9."""
    for path, tensor in want[0].items():
        finite = torch.nan_to_num(tensor.detach())
        mine = torch.nan_to_num(got[0][path].detach())
        assert_close(mine, finite, 1e-9, f"{name}: output {path}")
    for param, tensor in want[1].items():
        mine = got[1][param]
        if tensor is None:
            assert mine is None or not mine.any(), f"{name}: gradient of {param}"
            continue
        assert mine is not None, f"{name}: no gradient of {param}"
        assert_close(mine, tensor, 1e-9, f"{name}: gradient of {param}")


def compare_bytes(name: str, counted: list[Moved], want: Moved) -> None:
    """What the busiest rank received is what the program is said to move.

    But of `ANOTHER_FORM` operators parameters need not all be brought again in backward.
    """
    op = name.split()[0]
    if op in UNREAD or ROUTED in name:
        return
    got: Moved = {}
    for of_rank in counted:
        for key, n_bytes in of_rank.items():
            got[key] = max(got.get(key, 0.0), n_bytes)
    if op in ANOTHER_FORM:
        bringing = ("all_gather", "all_to_all", "reduce_scatter")
        again = [key for key in want if key[0] in bringing and key[2] == "backward"]
        for key in again:
            assert got.pop(key, 0.0) <= want[key] * (1 + 1e-12), f"{name}: brings more again"
        want = {key: n_bytes for key, n_bytes in want.items() if key not in again}
    assert got == pytest.approx(want, rel=1e-12), f"{name}: bytes"


# --- prices --------------------------------------------------------------------------------------

PRODUCTS = [op for op in EXAMPLES if OPS[op].spent_on == "matrix products"]


@pytest.mark.parametrize("op", PRODUCTS)
def test_product_dims_are_what_torch_counts(op: str) -> None:
    for make in EXAMPLES[op]:
        case = single(op, make(Draw(1)))
        rule = rule_of(case.node)
        if rule.whole:  # without a rule the dims say nothing
            continue
        batch, m, n, k = product_dims(rule, {})
        with FlopCounterMode(display=False) as counter:
            interpret(case.graph, case.params, case.inputs)
        # torch does not count products with a vector, nor einsums of one operand
        uncounted = 2 * prod(rule.sizes.values())
        assert 2 * batch * m * n * k == (counter.get_total_flops() or uncounted)
        for choice in rule.sizes:
            ways = rule.ways((choice,), (2,))
            if ways is not None and rule.sizes[choice] % 2 == 0:
                assert 2 * prod(product_dims(rule, ways)) == batch * m * n * k


@pytest.mark.parametrize("op", EXAMPLES)
def test_what_autograd_keeps(op: str) -> None:
    """Tensors that autograd holds after the forward pass are among those that the op declares.

    Declared may be more (an op keeps what its backward needs in the worst case), and what is as
    small as a row (statistics of a norm, a scalar) does not count.
    """
    case = single(op, EXAMPLES[op][0](Draw(2)))
    if not any(value.differentiable for value in case.node.outputs):
        assert saved_values(case.node) == ()
        return
    leaves = {n: t.clone().requires_grad_() for n, t in case.params.items()}
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        outputs = list(interpret(case.graph, leaves, case.inputs).values())
    named = {t.untyped_storage().data_ptr(): n for n, t in (leaves | case.inputs).items()}
    results = {t.untyped_storage().data_ptr() for t in outputs}
    declared = {value.name for value in saved_values(case.node)}
    made = {value.name for value in case.node.outputs}
    for pointer in held:
        if pointer in named:
            assert named[pointer] in declared, f"keeps operand {named[pointer]}"
        elif pointer in results:
            assert declared & made, "keeps its result"


# --- the registry --------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
ROOMS = (
    "codegen", "costmodel", "facts", "ir/graph", "ir/ops", "ir/reference", "planner", "shardwright"
)  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_no_operator_is_known_by_name(room: str) -> None:
    """Outside of the declarations, `runtime`, and what makes or matches graphs."""
    here = ROOT / room
    files = [path for path in here.rglob("*.py") if path.resolve().is_relative_to(here)]
    files = [path for path in files if "FAMILY.add(" not in path.read_text(encoding="utf-8")]
    assert files
    named = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in OPS
    }
    assert not named


def test_a_second_registration_is_an_error() -> None:
    with pytest.raises(ValueError, match="duplicate registration of op `aten.relu.default`"):
        register("aten.relu.default", OPS["aten.relu.default"])


def test_an_op_without_a_rule_is_whole_and_keeps_everything() -> None:
    value = Value("x", TensorType((4, 6), torch.float32), differentiable=True)
    made = Value("y", TensorType((4, 6), torch.float32), differentiable=True)
    node = Node("n", "aten.unheard_of.default", (("self", value),), (made,))
    assert find_op(node.op) is None
    assert set(rule_of(node).choices()) == {"R"}
    assert saved_values(node) == (value, made)
