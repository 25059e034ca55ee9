"""Which rank gets which of the new tokens, and which of them it stores."""

from __future__ import annotations

import torch
from torch import Tensor

from ...facts.spec import R, Spec
from ..cache.cache import PAGE, owners
from ..cache.declared import BATCH, TOKENS
from ..cache.pools import owner_of
from ..mesh.mesh import Mesh
from ..mesh.parts import own_part


def arrange(
    starts: Tensor, counts: Tensor, ways: int, *, balanced: bool, width: int = 0, step: int = 1
) -> Tensor:
    """Which new token stands in each column (b, ways * w): 0 .. counts[i] - 1, or -1 for padding.

    The columns are `ways` blocks, one for each rank that shares the sequence; w is the most that
    one of them holds, in multiples of `step`, or `width`.  `balanced` deals 2 ways chunks of each
    sequence out as zigzag does, so that all ranks cache and compute the same, whatever the
    sequence's length; the rank that begins depends on `starts`, so that single tokens go to the
    ranks page by page in turn, as `owners` says.  Otherwise tokens stay in order.

    >>> arrange(torch.tensor([0, 0]), torch.tensor([8, 3]), 2, balanced=True)
    tensor([[ 0,  1,  6,  7,  2,  3,  4,  5],
            [ 2, -1, -1, -1,  0,  1, -1, -1]])
    """
    rows: list[list[Tensor]] = []
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        if not balanced:
            block = max(-(-int(counts.max()) // ways), 1)
            rows.append([torch.arange(r * block, (r + 1) * block) for r in range(ways)])
            rows[-1] = [part[part < count] for part in rows[-1]]
            continue
        bounds = [count * i // (2 * ways) for i in range(2 * ways + 1)]
        chunks = [torch.arange(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        parts = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(ways)]
        first = start // PAGE
        rows.append([parts[(r - first) % ways] for r in range(ways)])
    longest = max(1, *(len(part) for row in rows for part in row))
    width = width or -(-longest // step) * step
    order = torch.full((len(rows), ways, width), -1, dtype=torch.int64)
    for i, row in enumerate(rows):
        for r, part in enumerate(row):
            order[i, r, : len(part)] = part
    return order.flatten(1)


def arrange_in_order(counts: Tensor, ways: int, *, width: int = 0, step: int = 1) -> Tensor:
    """As `arrange`, with the tokens of a sequence one after another and all padding behind them.

    >>> arrange_in_order(torch.tensor([5, 2]), 2)
    tensor([[ 0,  1,  2,  3,  4, -1],
            [ 0,  1, -1, -1, -1, -1]])
    """
    longest = max(-(-int(counts.max()) // ways), 1)
    order = torch.arange(ways * (width or -(-longest // step) * step))
    return torch.where(order < counts[:, None], order, -1)


def kept(positions: Tensor, spec: Spec, table_spec: Spec, mesh: Mesh) -> Tensor:
    """Full `positions` (b, t) as this rank stores them in a page table; -1 where it stores nothing.

    New tokens are cut as `spec` says over (b, t), the table's as `table_spec`: a rank stores its
    own columns, or, where all ranks have all columns, the pages that it owns.
    """
    own = own_part(positions, table_spec, mesh)
    axes = [axis for axis, state in zip(mesh.axes, table_spec, strict=True) if state == TOKENS]
    if not axes:
        return own
    if all(new == 1 for new, stored in zip(spec, table_spec, strict=True) if stored == TOKENS):
        columns = tuple({BATCH: 0, TOKENS: 1}.get(state, R) for state in table_spec)
        return own_part(positions, columns, mesh)
    sharing, rank = owner_of(axes)
    return own.where(owners(own, sharing) == rank, -1)


def own_pages(positions: Tensor, table_spec: Spec, mesh: Mesh) -> Tensor:
    """Of positions that all rows share, those that `owners` gives a rank, for its own rows."""
    own = own_part(positions, table_spec, mesh)
    cut = [axis for axis, state in zip(mesh.axes, table_spec, strict=True) if state == TOKENS]
    sharing, rank = owner_of(cut)
    return own[:, owners(positions[0], sharing) == rank]
