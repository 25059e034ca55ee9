"""Ring pass-Q: queries travel from rank to rank, keys and values stay."""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithm import Algorithm, differentiable, start
from .held import Held
from .links import Group, Link, unpack
from .options import Options
from .partial import Partial, wide
from .ring import RING
from .scores import Mask
from .task import ShardTask, Task
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
    task = ShardTask.of(options, group, q, k, v, layout, query_layout)
    return differentiable(PASS_Q, task, q, k, v, sinks)


def _forward(q: Tensor, held: Held, sinks: Tensor | None, task: Task) -> Partial:
    """Every rank's queries visit this rank's keys; the result is that of this rank's queries."""
    into, link = start(q, held.value_dim, sinks), task.link
    for part in _returned(_circulate(q, held.made(), task), q, held.value_dim, link):
        into.add_(part.out, part.lse)
    return into


PASS_Q = Algorithm("pass_q", _forward, RING.backward, travels="queries")


def _circulate(q: Tensor, held: Held, task: Task) -> list[Partial]:
    """What the queries of each rank get from the keys of this one."""
    link, parts = task.link, [Partial.empty(q, held.value_dim) for _ in range(task.link.size)]
    q = q.contiguous()
    for step in range(link.size):
        owner = (link.rank - step) % link.size
        hop = link.shift(q, "forward") if step < link.size - 1 else None
        held.attend(parts[owner], q, task.work(owner, link.rank), task.scores)
        if hop is not None:
            (q,) = hop.wait()
    return parts


def _returned(parts: list[Partial], q: Tensor, value_dim: int, link: Link) -> list[Partial]:
    """What this rank's queries got, from the own keys backwards around the ring."""
    own = link.rank
    messages = [part.lse if i == own else _encode(part, q.dtype) for i, part in enumerate(parts)]
    messages[own] = messages[own].new_empty(0, dtype=torch.uint8)
    sizes = [_message_size(q, value_dim)] * link.size
    received = link.all_to_all(messages, sizes, "forward")
    order = [(own - step) % link.size for step in range(link.size)]
    return [parts[i] if i == own else _decode(received[i], q, value_dim) for i in order]


def _encode(part: Partial, dtype: torch.dtype) -> Tensor:
    """Bytes of lse and, in `dtype`, out.  lse comes first: both are then aligned."""
    lse, out = (x.reshape(-1).view(torch.uint8) for x in (part.lse, part.out.to(dtype)))
    return torch.cat([lse, out])


def _decode(message: Tensor, q: Tensor, value_dim: int) -> Partial:
    """Inverse of `_encode`."""
    size = q.shape[0] * q.shape[1] * q.shape[2] * wide(q.dtype).itemsize
    lse, out = message[:size].view(wide(q.dtype)), message[size:].view(q.dtype)
    shape = q.shape[:3]
    (out,) = unpack(out, (*shape, value_dim))
    return Partial(out, lse.view(shape))


def _message_size(q: Tensor, value_dim: int) -> int:
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    return rows * (wide(q.dtype).itemsize + value_dim * q.dtype.itemsize)
