"""Local parts of the operations that know they are sharded: embedding, loss, attention, dropout."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..facts.users import import_user as import_user
from .attention.cached_operator import cached_attention as cached_attention
from .attention.local import attention as attention
from .changed import replaced as replaced
from .convolution import cached_convolution as cached_convolution
from .convolution import causal_convolution as causal_convolution
from .loss import cross_entropy as cross_entropy
from .loss import linear_cross_entropy as linear_cross_entropy
from .loss import softcap as softcap
from .mesh.collectives import Axis
from .mesh.stochastic import dropout as dropout
from .moe import moe as moe  # generated modules call it `ops.moe`
from .recurrence import state_after as state_after
from .recurrence import state_before as state_before
from .recurrence import state_step as state_step


def vocab_embedding(
    ids: Tensor, weight: Tensor, axis: Axis, size: int, padding_idx: int | None = None
) -> Tensor:
    """Rows of an embedding table of `size` rows that is sharded along dim 0 over `axis`.

    `weight` is this rank's block (rows, h); the result (*ids.shape, h) is partial (`P`) over
    `axis`: rows that other ranks hold are zero.  Row `padding_idx` gets no gradient.
    """
    own = axis.block(size)
    count = own.stop - own.start
    local = ids - own.start
    here = (local >= 0) & (local < count)
    known = (ids >= 0) & (ids < size)
    # -1 for ids outside the table, so that the look-up refuses them as it does unsharded.
    index = torch.where(here, local, known.to(local.dtype) - 1)
    fixed = None
    if padding_idx is not None and own.start <= padding_idx % size < own.stop:
        fixed = padding_idx % size - own.start
    return F.embedding(index, weight, fixed).masked_fill(~here.unsqueeze(-1), 0)


def last_token(x: Tensor, positions: Tensor, axis: Axis | None = None) -> Tensor:
    """The row of `x` (b, t, ...) with the highest of `positions` (b, t) per sequence: (b, 1, ...).

    With `axis` the tokens of a sequence are sharded over it and the result is partial (`P`) over
    it: all ranks but the one that holds the token give zeros.  A sequence of padding alone (all
    positions -1) gives a meaningless row.
    """
    highest, index = positions.max(1)
    index = index.view(-1, *[1] * (x.ndim - 1)).expand(-1, 1, *x.shape[2:])
    own = x.gather(1, index)
    if axis is None or axis.size == 1:
        return own
    elsewhere = axis.reduce(highest, "max") != highest
    return own.masked_fill(elsewhere.view(-1, *[1] * (x.ndim - 1)), 0)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairing: Literal["halves", "pairs", "pairs_to_halves"] = "halves",
) -> Tensor:
    """Rotary position embedding of x (..., d): (a, b) -> (a cos - b sin, b cos + a sin).

    The planes (a, b) are numbers in the same place of both `halves` of the last dim, or `pairs` of
    neighbours; `pairs_to_halves` takes pairs and puts all first coordinates before the second
    ones.  `cos` and `sin` broadcast against `x`; their last dim is d/2, a number for each plane,
    or d.
    """
    first, second = _coordinates(x, pairing)
    whole = cos.size(-1) == x.size(-1)
    if whole and pairing == "halves":  # the same numbers, by fewer operators
        return x * cos + torch.cat((-second, first), -1) * sin
    if whole:
        (cos, cos_2), (sin, sin_2) = _coordinates(cos, pairing), _coordinates(sin, pairing)
    else:
        cos_2, sin_2 = cos, sin
    turned = first * cos - second * sin, second * cos_2 + first * sin_2
    return torch.stack(turned, -1).flatten(-2) if pairing == "pairs" else torch.cat(turned, -1)


def _coordinates(x: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """The first and the second coordinates of the planes in the last dim."""
    if pairing != "halves":
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second
