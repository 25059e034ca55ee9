"""Causal convolutions, in training and over the states of sequences that are served."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache.state import StateCache
from .mesh.opaque import not_compiled


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1
) -> Tensor:
    """x (b, c, t) by a kernel (o, c or 1, k): each token sees itself and what is before it."""
    reach = (weight.shape[2] - 1) * dilation
    groups = x.shape[1] // weight.shape[1]
    out = F.conv1d(x, weight, bias, padding=reach, dilation=dilation, groups=groups)
    return out[..., : x.shape[2]]


@not_compiled("states of earlier tokens")
def cached_convolution(
    x: Tensor,
    weight: Tensor,
    state: StateCache,
    positions: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
) -> Tensor:
    """`causal_convolution` of new tokens at `positions` (b, t), behind the inputs in `state`.

    The state (b, c, (k - 1) * dilation) then holds the last inputs.  No gradient.
    """
    turn = state.turn(positions)
    whole = torch.cat([state.before(turn), x], 2)
    state.keep(turn.last(whole, state.values.shape[2]))
    groups = x.shape[1] // weight.shape[1]
    return F.conv1d(whole, weight, bias, dilation=dilation, groups=groups)


__all__ = ["cached_convolution", "causal_convolution"]
