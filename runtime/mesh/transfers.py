"""What ranks do in each collective that `facts/collectives.py` declares, from buffer to buffer.

Buffers are contiguous and hold no layout: of one or several tensors the rows that go to each rank
lie in the first dim.  A function takes the buffer, the ranks, and perhaps where the result may be
written, and returns what is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor
from torch.distributed import ProcessGroup

from . import transport
from .transport import Transfer


class Ranks(Protocol):
    """The ranks of an axis; `parts` are the axes that it flattens, outermost first."""

    @property
    def size(self) -> int:
        """How many."""
        ...

    @property
    def group(self) -> ProcessGroup:
        """Their process group."""
        ...

    @property
    def parts(self) -> Sequence[Ranks]:
        """The axes of a flattened one, none of a single one."""
        ...


Start: TypeAlias = Callable[[Tensor, Ranks, "Tensor | None"], Transfer]


def _all_gather(x: Tensor, ranks: Ranks, out: Tensor | None) -> Transfer:
    """All ranks' `x`, which may be this rank's row of `out`, along a new first dim."""
    if out is None:
        return transport.start_all_gather(x, ranks.group)
    return transport.start_gather_rows(out, x, ranks.group)


def _reduce_scatter(x: Tensor, ranks: Ranks, out: Tensor | None) -> Transfer:
    """The sum of this rank's row of `x`."""
    return transport.start_reduce_scatter(x, ranks.group)


def _all_reduce(x: Tensor, ranks: Ranks, out: Tensor | None) -> Transfer:
    """The sum of `x`, in `x` itself where `out` is `x`."""
    return transport.start_all_reduce(x, ranks.group, reuse=out is x)


def _all_to_all(x: Tensor, ranks: Ranks, out: Tensor | None) -> Transfer:
    """Row i is what rank i held as the row of this rank."""
    return transport.start_all_to_all(x, ranks.group)


TRANSFERS: dict[str, Start] = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
}

__all__ = ["TRANSFERS", "Ranks", "Start", "Transfer"]
