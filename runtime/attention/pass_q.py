"""Ring pass-Q: queries travel from rank to rank, keys and values stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import attend
from .links import Group, Link, unpack
from .partial import Partial, wide
from .ring import ring_backward
from .scores import Mask
from .task import Options, Task, save, start
from .tokens import Layout


def pass_q_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    layout: Layout | None = None,
    query_layout: Layout | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    mask: Mask | None = None,
) -> Tensor:
    """Attention over a sequence that is sharded over `group`, by ring pass-Q.

    Tensors and options are those of `ring_attention`, without `bias` (its rows would have to travel
    with the queries).  Partial results go back to the queries' owner in one all-to-all, `out` in
    the dtype of q and `lse` in float32.  Differentiable: backward is that of `ring_attention`.

    Cost, over p ranks: forward receives (p-1) b hq sq d e bytes in p-1 messages, each under way
    while a block is computed, and then (p-1) b hq sq (dv e + 4) bytes in one all-to-all that
    nothing hides.  Memory: partial results for the queries of all ranks.  Wins for few new
    queries over a long cache (`query_layout`), where queries are smaller than keys and values.

    Raises ValueError for sizes that do not fit together or to the layout.
    """
    options = Options("pass_q_attention", causal, window, scale, softcap, sinks, None, slopes, mask)
    task = Task.of(options, group, q, k, v, layout, query_layout)
    return _PassQ.apply(q, k, v, sinks, task)


class _PassQ(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, task: Task
    ) -> Tensor:
        ctx.task = task
        into = start(q, v.shape[3], sinks)
        for part in return_partials(_circulate(q, k, v, task), q, v, task.link):
            into.add_(part.out, part.lse)
        return save(ctx, (q, k, v, sinks), into)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        *found, _ = ring_backward(ctx, grads[0], ctx.task)  # there is no `up`
        return (*found, None)


def _circulate(q: Tensor, k: Tensor, v: Tensor, task: Task) -> list[Partial]:
    """What the queries of each rank get from the keys of this one."""
    link, parts = task.link, [Partial.empty(q, v.shape[3]) for _ in range(task.link.size)]
    q = q.contiguous()
    for step in range(link.size):
        owner = (link.rank - step) % link.size
        hop = link.shift(q, "forward") if step < link.size - 1 else None
        pieces = task.scores.pieces(task.queries, owner, task.keys, link.rank)
        attend(parts[owner], q, k, v, pieces, task.scores)
        if hop is not None:
            (q,) = hop.wait()
    return parts


def return_partials(parts: list[Partial], q: Tensor, v: Tensor, link: Link) -> list[Partial]:
    """What this rank's queries got, from the own keys backwards around the ring."""
    own = link.rank
    messages = [part.lse if i == own else _encode(part, q.dtype) for i, part in enumerate(parts)]
    messages[own] = messages[own].new_empty(0, dtype=torch.uint8)
    sizes = [_message_size(q, v)] * link.size
    received = link.all_to_all(messages, sizes, "forward")
    order = [(own - step) % link.size for step in range(link.size)]
    return [parts[i] if i == own else _decode(received[i], q, v) for i in order]


def _encode(part: Partial, dtype: torch.dtype) -> Tensor:
    """Bytes of lse and, in `dtype`, out.  lse comes first: both are then aligned."""
    lse, out = (x.reshape(-1).view(torch.uint8) for x in (part.lse, part.out.to(dtype)))
    return torch.cat([lse, out])


def _decode(message: Tensor, q: Tensor, v: Tensor) -> Partial:
    """Inverse of `_encode`."""
    size = q.shape[0] * q.shape[1] * q.shape[2] * wide(q.dtype).itemsize
    lse, out = message[:size].view(wide(q.dtype)), message[size:].view(q.dtype)
    shape = q.shape[:3]
    (out,) = unpack(out, (*shape, v.shape[3]))
    return Partial(out, lse.view(shape))


def _message_size(q: Tensor, v: Tensor) -> int:
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    return rows * (wide(q.dtype).itemsize + v.shape[3] * q.dtype.itemsize)
