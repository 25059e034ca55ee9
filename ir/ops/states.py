"""States of fixed size that serving keeps for each sequence, beside keys and values.

New tokens of a sequence stand in order, padding (position -1) behind them, so that what is made of
padding is never read by a token and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...facts.blocks import local_shape
from ...facts.spec import R, S, Spec
from ..graph import Node
from .local import Local
from .operator import Operator
from .rule import Choice


def state_spec(operator: Operator, node: Node, choices: Sequence[Choice]) -> Spec:
    """How a state lies on the mesh by the choices of the operator that keeps it."""
    cut = operator.cut_state(node)
    return tuple(S(cut[choice]) if choice in cut else R for choice in choices)


def kept_bytes(operator: Operator, local: Local) -> float:
    """Bytes of a state that one rank keeps."""
    kind = operator.state(local.node)
    spec = state_spec(operator, local.node, local.choices)
    numel = 1
    for size in local_shape(kind.shape, spec, local.sizes):
        numel *= size
    return float(numel * kind.dtype.itemsize)


def in_order(positions: Tensor) -> None:
    """Raise ValueError unless tokens (b, t) stand in order, and padding behind them."""
    if positions.is_meta:  # without values
        return
    new = positions >= 0
    counts = new.sum(1, keepdim=True)
    places = torch.arange(positions.shape[1], device=positions.device)
    follows = positions[:, :1] + places
    if bool((new != (places < counts)).any()) or bool((new & (positions != follows)).any()):
        raise ValueError(
            f"a state takes tokens in order, with padding behind them, got {positions}"
        )


def last_of(x: Tensor, positions: Tensor, count: int) -> Tensor:
    """The last `count` of the inputs (b, c, count + t) that belong to a token: (b, c, count)."""
    new = (positions >= 0).sum(1)
    index = new[:, None] + torch.arange(count, device=x.device)
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


__all__ = ["in_order", "kept_bytes", "last_of", "state_spec"]
