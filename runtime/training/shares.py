"""What a micro-batch's mean losses weigh in the loss of its step, by the labels that count there.

A step's cross entropy is the mean over all its labels that count.  Micro-batch k of m has `count`
of the `total`; the mean of the m results is right where each is multiplied by count * m / total.
`step.py` says so around each micro-batch, and `loss.py` asks.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

# A plain global and not a context variable: layers that are recomputed on CUDA run in threads of
# autograd's own, which do not inherit the context of the thread that called `backward`.
_share: Tensor | None = None


@contextmanager
def share_of_step(share: Tensor | None) -> Generator[None]:
    """Within, mean cross entropies are multiplied by `share` (), or by nothing."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def mean_loss(total: Tensor, count: Tensor) -> Tensor:
    """The mean of `count` losses that add up to `total`, with its share of the step."""
    if _share is None:
        return total / count
    return total / count.clamp(min=1) * _share.to(total.dtype)  # a share may be 0


__all__ = ["mean_loss", "share_of_step"]
