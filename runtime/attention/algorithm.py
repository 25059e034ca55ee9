"""What an algorithm of distributed attention is, and how autograd, or an operator, runs one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor
from torch.autograd import Function

from ..mesh.derivatives import first_order
from .held import Held
from .kernels import Queries, sinks_gradient
from .partial import Partial
from .task import Task

# Of q, of the tensors in `Held.sent`, and of `up` if there is one; float32 or float64.
Gradients: TypeAlias = tuple[Tensor, Sequence[Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How ranks that share sequences attend together, over shards and over a cache.

    forward   (q, this rank's keys, sinks, task) -> what the queries get of the keys of all ranks
    backward  (queries, this rank's keys, task) -> gradients

    For calls over a cache: `travels` says whose positions all ranks must know, and `whole` that
    every rank has all new tokens, of which it caches those that it owns; else it has some of them,
    and caches its own.
    """

    name: str
    forward: Callable[[Tensor, Held, Tensor | None, Task], Partial]
    backward: Callable[[Queries, Held, Task], Gradients]
    travels: Literal["keys", "queries", "nothing"]
    whole: bool = False


class Given(NamedTuple):
    """The tensors of a call that gradients are for."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None
    up: Tensor | None


class Way(Protocol):
    """How a call that is checked runs.

    `ctx` is autograd's: forward keeps tensors in it, in the order of `save`, and nothing else.
    """

    def forward(self, ctx: Any, given: Given) -> Tensor:
        """The result (b, hq, sq, dv)."""
        ...

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of what was given, in its order."""
        ...


Runner: TypeAlias = Callable[[Way, Given], Tensor]
_runner: ContextVar[Runner | None] = ContextVar("runner", default=None)


def run(way: Way, given: Given) -> Tensor:
    """The attention of checked inputs, by autograd or as `run_by` says."""
    runner = _runner.get()
    result: Tensor = _Differentiable.apply(*given, way) if runner is None else runner(way, given)
    return result


@contextmanager
def run_by(runner: Runner) -> Generator[None]:
    """Inside, `runner` runs attention, without autograd."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


class _Differentiable(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *given, ctx.way = args
        return ctx.way.forward(ctx, Given(*given))

    @staticmethod
    @first_order("attention over shards")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *ctx.way.backward(ctx, grads[0]), None


def differentiable(
    algorithm: Algorithm,
    task: Task,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sinks: Tensor | None,
    up: Tensor | None = None,
) -> Tensor:
    """The attention of checked inputs (b, hq, sq, dv)."""
    return run(_ByAlgorithm(algorithm, task), Given(q, k, v, sinks, task.scores.bias, up))


@dataclass(frozen=True, slots=True)
class _ByAlgorithm:
    algorithm: Algorithm
    task: Task

    def forward(self, ctx: Any, given: Given) -> Tensor:
        q, k, v, sinks, _, up = given
        into = self.algorithm.forward(q, Held.of(q, k, v, up), sinks, self.task)
        return save(ctx, (q, k, v, sinks), into, up=up)

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        task, dbias = self.task.with_bias_gradient(ctx.needs_input_grad[4])
        queries, held, dsinks = _saved_held(ctx, grad)
        dq, dsent, dup = self.algorithm.backward(queries, held, task)
        dq, dk, *dv = (x.to(held.k.dtype) for x in (dq, *dsent))
        return dq, dk, dv[0] if dv else None, dsinks, dbias, dup


def start(q: Tensor, value_dim: int, sinks: Tensor | None) -> Partial:
    """The partial result before the first key: that of no keys, or of the sinks alone."""
    if sinks is None:
        return Partial.empty(q, value_dim)
    return Partial.of_sinks(sinks, q, value_dim)


def save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    into: Partial,
    *more: Tensor,
    up: Tensor | None = None,
) -> Tensor:
    """Keep inputs, final result and `more` tensors for backward; the result in q's dtype.

    `Kept` (`kept.py`) tells compilers of them.
    """
    q, k, v, sinks = inputs
    out = into.out.to(q.dtype)
    ctx.save_for_backward(q, k, v, sinks, up, out, into.lse, *more)
    return out


def saved(ctx: Any, grad: Tensor) -> tuple[Queries, Tensor, Tensor, Tensor | None]:
    """(queries, k, v, gradient of the sinks) from what `save` kept."""
    queries, held, dsinks = _saved_held(ctx, grad)
    assert held.v is not None, "latents, of an algorithm that knows none"
    return queries, held.k, held.v, dsinks


def saved_more(ctx: Any) -> tuple[Tensor, ...]:
    """The `more` tensors that `save` kept, once, after `saved`."""
    more, ctx.more = ctx.more, ()
    return tuple(more)


def _saved_held(ctx: Any, grad: Tensor) -> tuple[Queries, Held, Tensor | None]:
    """As `saved`; k and v may be latents, and what makes both of them."""
    # Asked for once: each time gathers the parameters among them again.
    q, k, v, sinks, up, out, lse, *ctx.more = ctx.saved_tensors
    queries = Queries.of(q, out, lse, grad.to(q.dtype))
    dsinks = None if sinks is None else sinks_gradient(sinks, queries)
    return queries, Held.of(q, k, v, up), dsinks
