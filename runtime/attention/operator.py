"""Attention as an operator that compilers do not look into, whatever its algorithm.

It runs what eager calls run, and keeps for backward what they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ...compat.torch import storage_key
from ..mesh.collectives import Axis
from ..mesh.opaque import axis_known_as
from . import calls
from .algorithm import Given, Way, run_by
from .kept import EXCHANGED, Asked, like_result, made
from .options import Options

_ALONE = "positions"
"""What takes the place of an algorithm where no axis cuts the sequence."""


def over_shards(
    options: Options,
    algorithm: str,
    axis: Axis,
    zigzag: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> Tensor:
    """As `calls.over_shards`."""
    return _call(options, algorithm, axis.known_as, zigzag, 0, q, k, v)


def by_positions(
    options: Options, query_start: int, q: Tensor, k: Tensor, v: Tensor | None
) -> Tensor:
    """As `calls.by_positions`."""
    return _call(options, _ALONE, "", False, query_start, q, k, v)


def _call(
    options: Options,
    algorithm: str,
    axis: str,
    zigzag: bool,
    query_start: int,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
) -> Tensor:
    scale = 1.0 / sqrt(q.shape[3]) if options.scale is None else options.scale
    words = [zigzag, query_start, options.causal, options.window]
    return _attention(
        q, k, v, options.sinks, options.bias, options.up, algorithm, axis, words,
        [scale, options.softcap],
    )[0]  # fmt: skip


class _Kept:
    """Stands in for the context that autograd gives to both passes."""

    def __init__(self, saved: Sequence[Tensor | None] = (), wanted: Sequence[bool] = ()) -> None:
        self.saved_tensors, self.needs_input_grad = tuple(saved), tuple(wanted)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep them."""
        self.saved_tensors = tensors


def _run(given: Given, algorithm: str, axis: str, words: list[int], numbers: list[float]) -> Tensor:
    """The call as it is made eagerly."""
    q, k, v, sinks, bias, up = given
    zigzag, query_start, causal, window = words
    scale, softcap = numbers
    options = Options("attention", bool(causal), window, scale, softcap, sinks, bias, up=up)
    if algorithm == _ALONE:
        return calls.by_positions(options, query_start, q, k, v)
    return calls.over_shards(options, algorithm, axis_known_as(axis), bool(zigzag), q, k, v)


@torch.library.custom_op("shardwright::run_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    up: Tensor | None,
    algorithm: str,
    axis: str,
    words: list[int],
    numbers: list[float],
) -> list[Tensor]:
    """The result, and what is kept for backward besides it and the inputs."""
    kept = _Kept()

    def forward(way: Way, given: Given) -> Tensor:
        return way.forward(kept, given)

    with run_by(forward):
        out = _run(Given(q, k, v, sinks, bias, up), algorithm, axis, words, numbers)
    saved = kept.saved_tensors
    new = (*saved[:3], *saved[5:]) if algorithm == EXCHANGED else saved[6:]
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return _apart([out, *(x.contiguous() for x in new if x is not None)])


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    up: Tensor | None,
    algorithm: str,
    axis: str,
    words: list[int],
    numbers: list[float],
) -> list[Tensor]:
    over = axis_known_as(axis) if axis else None
    rank, ranks = (0, 1) if over is None else (over.rank, over.size)
    asked = Asked(q, k, v, up, words[3], rank, ranks)
    return [like_result(q, k, v, up), *made(algorithm, asked)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, sinks, bias, up, ctx.algorithm, ctx.axis, ctx.words, ctx.numbers = inputs
    out, *new = output
    ctx.shapes = [*q.shape, *k.shape, *(() if v is None else v.shape)]
    if ctx.algorithm == EXCHANGED:
        q, k, v, out, *new = new
    ctx.save_for_backward(bias, q, k, v, sinks, up, out, *new)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    bias, *saved = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:6])
    found = iter(
        _attention_backward(
            grads[0], saved, bias, ctx.shapes, wanted, ctx.algorithm, ctx.axis, ctx.words,
            ctx.numbers,
        )
    )  # fmt: skip
    return *(next(found) if x else None for x in wanted), None, None, None, None


@torch.library.custom_op("shardwright::run_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    saved: list[Tensor | None],  # as `algorithm.save` was given them
    bias: Tensor | None,
    shapes: list[int],  # of q, k and, unless k are latents, v
    wanted: list[bool],
    algorithm: str,
    axis: str,
    words: list[int],
    numbers: list[float],
) -> list[Tensor]:
    """The gradients that are wanted, in the order of the inputs."""
    kept, found = _Kept(saved, wanted), list[Tensor | None]()

    def backward(way: Way, given: Given) -> Tensor:
        found.extend(way.backward(kept, grad))
        return grad

    given = _like_given(grad, saved, bias, shapes)
    with run_by(backward):
        _run(given, algorithm, axis, words, numbers)
    pairs = zip(found, given, wanted, strict=True)
    return _apart(
        [g.to(x.dtype).contiguous() for g, x, w in pairs if w and g is not None and x is not None]
    )


@_attention_backward.register_fake
def _(
    grad: Tensor,
    saved: list[Tensor | None],
    bias: Tensor | None,
    shapes: list[int],
    wanted: list[bool],
    algorithm: str,
    axis: str,
    words: list[int],
    numbers: list[float],
) -> list[Tensor]:
    given = _like_given(grad, saved, bias, shapes)
    return [x.new_empty(x.shape) for x, w in zip(given, wanted, strict=True) if w and x is not None]


def _like_given(
    grad: Tensor, saved: Sequence[Tensor | None], bias: Tensor | None, shapes: Sequence[int]
) -> Given:
    """The inputs; q, k and v by their shapes, without memory."""
    nothing = grad.new_empty(())
    q, k, *v = (nothing.expand(shapes[i : i + 4]) for i in range(0, len(shapes), 4))
    return Given(q, k, v[0] if v else None, saved[3], bias, saved[4])


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """Each with memory of its own, as an operator must return them."""
    seen: set[int] = set()
    found: list[Tensor] = []
    for x in tensors:
        key = storage_key(x.untyped_storage())
        found.append(x.clone() if key in seen else x)
        seen.add(key)
    return found


_attention.register_autograd(_gradient, setup_context=_keep)


__all__ = ["by_positions", "over_shards"]
