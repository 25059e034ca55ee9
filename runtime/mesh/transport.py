"""The bytes between ranks: collectives on contiguous buffers, without gradients or layouts.

CUDA tensors go through NCCL's collectives.  CPU tensors are exchanged by point-to-point messages
and added up here, in rank order; only a large all-reduce is gloo's own.  Time as a multiple of that
of gloo's own collective in torch 2.13, 16 KB to 16 MB, two cores that other work used too:

| ranks | reduce-scatter | all-gather | all-to-all |
|-------|----------------|------------|------------|
| 2     | 0.25 to 0.5    | 0.7 to 1.2 | 0.9 to 1.4 |
| 4     | 0.4 to 0.8     | 0.8 to 2.2 | 0.8 to 6   |

It also moves every dtype: gloo knows neither int16 nor, for all-to-all, bool.  Groups that play
other ranks (`peers.py`) are asked for whole collectives on the CPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .peers import Peers

Reduction: TypeAlias = Literal["sum", "max"]


class _Work(Protocol):
    """What torch hands out for an operation under way."""

    def wait(self) -> object: ...


# Up to so many bytes received, a CPU all-reduce is faster by copies of everything from all ranks
# (one round of messages) than by gloo's ring: measured as above, on 2 and 4 ranks.
_ONE_ROUND_BYTES = 512 * 1024

# What both NCCL and gloo can add up; NCCL moves everything else as bytes.
_SUMMABLE = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int8, torch.uint8,
    }
)  # fmt: skip

# torch 2.13 renamed both, and warns about the names that torch 2.11 knows.
_new_names = hasattr(dist, "all_gather_single")
_nccl_all_gather: Callable[..., _Work] = getattr(
    dist, "all_gather_single" if _new_names else "all_gather_into_tensor"
)
_nccl_reduce_scatter: Callable[..., _Work] = getattr(
    dist, "reduce_scatter_single" if _new_names else "reduce_scatter_tensor"
)
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Transfer:
    """A collective under way: `result` is filled in when `finish` returns, not before.

    Every transfer must be finished; all ranks start their transfers in the same order.
    """

    __slots__ = ("result", "_last", "_sources", "_works")

    def __init__(
        self,
        result: Tensor,
        works: Sequence[_Work],
        sources: object,
        last: Callable[[], object] | None = None,
    ) -> None:
        self.result = result
        self._works = works
        self._sources: object = sources  # must live until all is sent
        self._last = last

    def finish(self) -> Tensor:
        """Wait until the result is there (on CUDA: until the current stream may use it)."""
        for work in self._works:
            work.wait()
        if self._last is not None:
            self._last()
        self._works, self._sources, self._last = (), None, None
        return self.result


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' `x` stacked along a new first dim; `x` is contiguous."""
    return start_all_gather(x, group).finish()


def start_all_gather(x: Tensor, group: ProcessGroup) -> Transfer:
    """`all_gather` under way; `x` must not change before it is finished."""
    out = x.new_empty((group.size(), *x.shape))
    if not _as_a_whole(x, group):
        out[group.rank()] = x
    return start_gather_rows(out, x, group)


def start_gather_rows(out: Tensor, own: Tensor, group: ProcessGroup) -> Transfer:
    """Fills in all rows of `out` with the ranks' `own`; on the CPU this rank's row is there.

    `own` may be the row of `out` itself.
    """
    if _as_a_whole(out, group):
        target, source = _movable(out).view(-1), _movable(own).view(-1)
        return Transfer(out, [_nccl_all_gather(target, source, group=group, async_op=True)], own)
    return Transfer(out, _start_exchange([own] * group.size(), out, group), own)


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """Row i of the result is what rank i held as the row of this rank; `x` is contiguous."""
    return start_all_to_all(x, group).finish()


def start_all_to_all(x: Tensor, group: ProcessGroup) -> Transfer:
    """`all_to_all` under way; `x` must not change before it is finished."""
    out = torch.empty_like(x)
    if _as_a_whole(x, group):
        work = dist.all_to_all_single(_movable(out), _movable(x), group=group, async_op=True)
        return Transfer(out, _under_way(work), x)
    rank = group.rank()
    out[rank] = x[rank]
    return Transfer(out, _start_exchange(x, out, group), x)


def all_to_all_rows(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup
) -> Tensor:
    """The first `send[0]` rows of `x` go to rank 0, the next `send[1]` to rank 1, and so on.

    The result holds `receive[0]` rows of rank 0 first.  `x` is contiguous and at least 1-D; every
    rank's `receive` must say what the others send.
    """
    out = x.new_empty((sum(receive), *x.shape[1:]))
    if _as_a_whole(x, group):
        theirs, ours = (t if t.dtype in _SUMMABLE else t.view(torch.uint8) for t in (out, x))
        dist.all_to_all_single(theirs, ours, list(receive), list(send), group=group)
        return out
    rank = group.rank()
    outgoing, incoming = x.split(list(send)), out.split(list(receive))
    incoming[rank].copy_(outgoing[rank])
    return Transfer(out, _start_exchange(outgoing, incoming, group), x).finish()


def tell_rows(sent: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows (p,) come from each rank, where this one has `sent[i]` (p,) for rank i."""
    if isinstance(group, Peers):
        return group.expected_rows(sent)
    return all_to_all(sent.unsqueeze(1), group).flatten()


def exchange_experts(
    numbers: Tensor, send: Sequence[int], receive: Sequence[int], count: int, group: ProcessGroup
) -> Tensor:
    """`all_to_all_rows` of numbers (n, k) of the experts of rows; `count` are on each rank."""
    if isinstance(group, Peers):
        numbers = group.expected_experts(numbers, send, count)
    return all_to_all_rows(numbers, send, receive, group)


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks of their row for this rank; `x` is contiguous."""
    return start_reduce_scatter(x, group).finish()


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Transfer:
    """`reduce_scatter` under way; `x` must not change before it is finished."""
    rank = group.rank()
    out = torch.empty_like(x[rank])
    if _as_a_whole(x, group):
        target, source = out.view(-1), _summable(x).view(-1)
        return Transfer(out, [_nccl_reduce_scatter(target, source, group=group, async_op=True)], x)
    if group.size() == 2:  # added up where it arrives: the own row is not copied
        works = _start_exchange(x, [out, out], group)
        return Transfer(out, works, x, lambda: out.add_(x[rank]))
    rows = torch.empty_like(x)
    rows[rank] = x[rank]
    works = _start_exchange(x, rows, group)
    return Transfer(out, works, x, lambda: torch.sum(rows, 0, dtype=out.dtype, out=out))


def all_reduce(x: Tensor, group: ProcessGroup, op: Reduction = "sum") -> Tensor:
    """The sum or maximum over ranks, in a new tensor; `x` need not be contiguous."""
    return start_all_reduce(x, group, op).finish()


def start_all_reduce(
    x: Tensor, group: ProcessGroup, op: Reduction = "sum", *, reuse: bool = False
) -> Transfer:
    """`all_reduce` under way; `x` must not change before it is finished, and may become the result
    if it is contiguous and `reuse` is said."""
    received = (group.size() - 1) * x.nbytes
    by_rows = received <= _ONE_ROUND_BYTES or x.dtype not in _SUMMABLE
    if by_rows and not _as_a_whole(x, group):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = start_all_gather(x.contiguous(), group)
        return Transfer(out, [], rows, lambda: _reduce_into(out, rows.finish(), op))
    out = _summable(x)
    out = out if reuse else out.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(out, op=_OPS[op], group=group, async_op=True)
    return Transfer(out, _under_way(work), x)


def _under_way(work: _Work | None) -> list[_Work]:
    """What is to be waited for; torch gives None where this rank has no part."""
    return [] if work is None else [work]


def _start_exchange(
    send: Sequence[Tensor] | Tensor, receive: Sequence[Tensor] | Tensor, group: ProcessGroup
) -> list[_Work]:
    """`send[i]` to every other rank i, and from it into `receive[i]`; nothing for empty ones."""
    rank, ways = group.rank(), group.size()
    ahead = [(rank + step) % ways for step in range(1, ways)]
    return post(
        [(send[peer], peer) for peer in ahead if send[peer].numel()],
        [(receive[peer], peer) for peer in reversed(ahead) if receive[peer].numel()],
        group,
    )


def post(
    send: Sequence[tuple[Tensor, int]],
    receive: Sequence[tuple[Tensor, int]],
    group: ProcessGroup,
    tag: int = 0,
) -> list[Any]:
    """Start messages to and from ranks of `group`; `wait` ends them.

    Tensors are contiguous, not empty, and stay as they are until then; nobody is its own peer.
    Messages with one tag between two ranks arrive in the order in which they were posted.
    """
    if any(x.is_cuda for x, _ in (*send, *receive)):
        messages = [dist.P2POp(dist.irecv, x, group=group, group_peer=p) for x, p in receive]
        messages += [dist.P2POp(dist.isend, x, group=group, group_peer=p) for x, p in send]
        return dist.batch_isend_irecv(messages)
    works: list[Any] = [group.recv([x], peer, tag) for x, peer in receive]
    return works + [group.send([x], peer, tag) for x, peer in send]


def post_shift(x: Tensor, into: Tensor, group: ProcessGroup) -> list[Any]:
    """Start to send `x` to the next rank of `group`, and the like of the one before into `into`.

    All ranks do so in the same order, with the same sizes.  On the CPU as an all-to-all of gloo,
    whose own threads talk to the sockets: a message posted by this thread may have to wait until a
    thread that holds its lock gets a core, of which the other ranks' computing leaves none.  0.5
    MB beside 7.4 ms of computing, on 2 ranks, one a core: 8.2 ms instead of 10.1 (torch 2.13).
    """
    ways, rank = group.size(), group.rank()
    after, before = (rank + 1) % ways, (rank - 1) % ways
    if _as_a_whole(x, group):
        return post([(x, after)], [(into, before)], group)
    source, target = x.view(-1).view(torch.uint8), into.view(-1).view(torch.uint8)
    send, receive = [0] * ways, [0] * ways
    send[after] = receive[before] = source.numel()
    return [dist.all_to_all_single(target, source, receive, send, group=group, async_op=True)]


def wait(works: Sequence[Any]) -> None:
    """Until the messages that were posted have arrived."""
    for work in works:
        work.wait()


def _reduce_into(out: Tensor, rows: Tensor, op: Reduction) -> Tensor:
    """`rows` over dim 0; half precision is added up in float32 and rounded once."""
    if op == "max":
        return torch.amax(rows, 0, out=out)
    if len(rows) == 2:
        return torch.add(rows[0], rows[1], out=out)
    return torch.sum(rows, 0, dtype=rows.dtype, out=out)


def _as_a_whole(x: Tensor, group: ProcessGroup) -> bool:
    """Is the group asked for a collective, and not for messages of which we make one?"""
    return x.is_cuda or isinstance(group, Peers)


def _movable(x: Tensor) -> Tensor:
    return x if x.dtype in _SUMMABLE else x.view(-1).view(torch.uint8)


def _summable(x: Tensor) -> Tensor:
    if x.dtype not in _SUMMABLE:
        raise TypeError(
            f"NCCL cannot add up {x.dtype} over ranks; convert to int32 or a float type first"
        )
    return x
