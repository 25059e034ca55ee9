"""The norm of all gradients together, whatever ranks hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from ..mesh.mesh import Mesh
from .pieces import Piece


@torch.no_grad()
def gradient_norm(pieces: Sequence[Piece], mesh: Mesh, norm_type: float = 2.0) -> Tensor:
    """The norm of the whole model's gradients, the same on every rank; at least float32.

    Every number counts once, however many ranks hold it.  An all-reduce of one number over each
    axis of the mesh.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0 (inf for the largest), got {norm_type}")
    total = torch.zeros((), device=mesh.device)
    for piece in pieces:
        if (grad := piece.tensor.grad) is None:
            continue
        own = piece.rows(grad)
        dtype = torch.promote_types(own.dtype, torch.float32)
        norm = torch.linalg.vector_norm(own, norm_type, dtype=dtype)
        if norm_type == inf:
            total = torch.maximum(total, norm)
        else:
            total = total + norm**norm_type / piece.copies
    for axis in mesh.axes:
        total = axis.reduce(total, "max" if norm_type == inf else "sum")
    return total if norm_type == inf else total ** (1.0 / norm_type)


def clip_gradients(
    pieces: Sequence[Piece],
    mesh: Mesh,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """See `ShardedModule.clip_grad_norm_`."""
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be 0 or more, got {max_norm}")
    norm = gradient_norm(pieces, mesh, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of all gradients is {norm.item()}: a gradient is NaN or infinite; skip the"
            " step, or lower the learning rate"
        )
    parameters = [piece.tensor for piece in pieces]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
