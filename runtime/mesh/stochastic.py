"""Operations that draw random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .opaque import not_compiled


@not_compiled("random draws that ranks agree on")
def dropout(
    x: Tensor, p: float, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Zero each element with probability `p` and scale the others by 1 / (1 - p).

    `generator` comes from `mesh.generator(axes that shard x)`: ranks that hold the same values
    then drop the same ones, ranks that hold different values draw independently.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    if not training or p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    kept.bernoulli_(1.0 - p, generator=generator)
    return (x * kept) * (1.0 / (1.0 - p))  # backward keeps one byte per element, the mask
