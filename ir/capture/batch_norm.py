"""Batch norms in training mode as what they compute, so that ranks that cut the batch share sums.

Statistics are those of the whole batch (as `nn.SyncBatchNorm` has them): means over a cut dim are
all-reduced, as any mean is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..graph import Arg, Value

BATCH_NORM = "aten.batch_norm.default"


def counts(args: Mapping[str, Arg]) -> bool:
    """Does the norm take the statistics of its batch, and change the running ones?"""
    return args["training"] is True and isinstance(args["running_mean"], Value)


def written_out(node: fx.Node, args: Mapping[str, Arg]) -> tuple[fx.GraphModule, list[Value]]:
    """What the norm of `node` computes, and the operands: result and new running statistics."""
    names = ("input", "weight", "bias", "running_mean", "running_var")
    operands = [value for name in names if isinstance(value := args[name], Value)]
    momentum, eps = args["momentum"], args["eps"]
    assert isinstance(momentum, float) and isinstance(eps, float)
    affine = args["weight"] is not None

    def norm(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = rest[:2] if affine else None
        return _norm(x, scale, rest[-2], rest[-1], momentum, eps)

    values: list[Tensor] = [
        torch.empty(value.type.shape, dtype=value.type.dtype, device="meta") for value in operands
    ]
    traced = make_fx(norm, tracing_mode="fake", pre_dispatch=True)(*values)
    for inner in traced.graph.nodes:
        kept = {
            key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta
        }
        inner.meta.update(kept)
    return traced, operands


def _norm(
    x: Tensor,
    affine: tuple[Tensor, ...] | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`F.batch_norm(x, ..., training=True)` of x (b, c, ...), and the new running statistics."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    along = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
    wide = x.float() if x.dtype.itemsize < 4 else x
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    var = centred.square().mean(dims, keepdim=True)
    y = centred * torch.rsqrt(var + eps)
    if affine is not None:
        weight, bias = affine
        y = y * weight.reshape(along) + bias.reshape(along)
    # counted, since batches of other sizes than the planned one may come
    count = torch.ones_like(wide).sum(dims)
    unbiased = var.detach().reshape(-1) * (count / (count - 1).clamp(min=1))
    new_mean = running_mean * (1 - momentum) + mean.detach().reshape(-1) * momentum
    new_var = running_var * (1 - momentum) + unbiased * momentum
    return y.to(x.dtype), new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)


__all__ = ["BATCH_NORM", "counts", "written_out"]
