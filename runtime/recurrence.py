"""States that a model's lines carry from token to token, in a module that serves.

New tokens of a sequence stand in order, padding (position -1) behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache.state import StateCache
from .mesh.opaque import not_compiled


@not_compiled("states of earlier tokens")
def state_before(initial: Tensor, state: StateCache, positions: Tensor) -> Tensor:
    """The states (b, ...) before new tokens at `positions` (b, t); `initial` for new sequences."""
    turn = state.turn(positions)
    return torch.where(_rows(turn.fresh, initial), initial, state.before(turn))


def state_step(before: Tensor, after: Tensor, positions: Tensor, index: int) -> Tensor:
    """`after` where the token in column `index` is none of padding, else `before`."""
    return torch.where(_rows(positions[:, index] >= 0, after), after, before)


@not_compiled("states of earlier tokens")
def state_after(before: Tensor, after: Tensor, state: StateCache, positions: Tensor) -> Tensor:
    """Keep `after`, the states behind the new tokens, for sequences that have any."""
    kept = torch.where(_rows((positions >= 0).any(1), after), after, before)
    state.keep(kept)
    return kept


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.ndim - 1))


__all__ = ["state_after", "state_before", "state_step"]
