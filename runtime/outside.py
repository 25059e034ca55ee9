"""A loss outside of a sharded module, of its logits as the ranks hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..facts.spec import R, parse_spec, zigzag_dims
from .loss import Reduction, cross_entropy
from .mesh.batches import Output, look_up
from .mesh.mesh import Mesh
from .mesh.parts import own_part


class Returning(Protocol):
    """A sharded module: its mesh, and what it returns."""

    mesh: Mesh
    OUTPUTS: Sequence[Output]


def cross_entropy_of(
    model: Returning,
    out: Any,
    labels: Tensor,
    *,
    output: str = "logits",
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy` of what `model` has returned as `out`, the same on all ranks, with
    gradients.

    `output` names the logits (..., v) in `out`; nothing of them is gathered.  `labels` (...) are
    those of all tokens, on every rank.  Raises ValueError for an output that is not there, and
    labels of another shape.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    told = _find(model.OUTPUTS, output)
    logits, mesh, spec = look_up(out, told.path), model.mesh, parse_spec(told.spec)
    last = logits.ndim - 1
    tokens = tuple(R if state == last else state for state in spec)
    zigzag = tuple(dim for dim in zigzag_dims(told.spec) if dim != last)
    own = own_part(labels, tokens, mesh, zigzag).to(logits.device)
    names = tuple(name for name, state in zip(mesh.names, spec, strict=True) if state == last)
    vocab = mesh[names[0] if len(names) == 1 else names] if names else None
    token_axes = [axis for axis, state in zip(mesh.axes, tokens, strict=True) if state != R]
    loss = cross_entropy(
        logits,
        own,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        vocab_axis=vocab,
        vocab_size=told.shape[last] if names else None,
        token_axes=token_axes,
    )
    for axis in token_axes:
        loss = axis.all_reduce(loss)
    return loss


def _find(outputs: Sequence[Output], name: str) -> Output:
    named = {".".join(map(str, output.path)): output for output in outputs}
    if len(named) == 1 and "" in named:  # a bare tensor
        return named[""]
    if name not in named:
        raise ValueError(f"the module returns no `{name}`; it returns {', '.join(named)}")
    return named[name]


__all__ = ["Returning", "cross_entropy_of"]
