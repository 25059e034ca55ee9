"""The operator `shardwright::attention`: attention kept whole by capture.

Shapes: q (b, hq, sq, d), k (b, hkv, sk, d), v (b, hkv, sk, dv), result (b, hq, sq, dv); hq is a
multiple of hkv, and query head h reads key head h // (hq / hkv).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    sinks: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """softmax(cap(scale * q k^T) + mask) v, written out; differentiable by autograd.

    `causal`: query i sees keys j <= i.  `window` w > 0: query i sees keys j > i - w.  `mask`: bool
    (True = attend) or additive, broadcastable to (b, hq, sq, sk).  `softcap` c > 0: scores become
    c * tanh(scores / c).  `sinks` (hq,): the score of one more key of each head, whose value is
    zero.  `chunk` c > 0: query i sees keys of its own chunk, j // c = i // c.  A query that sees no
    key gives zeros.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-2, -1)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    seen = _seen(q.shape[2], k.shape[2], mask, causal, window, chunk, q.device)
    if seen is None:
        weights = _weights(scores, sinks)
    else:
        scores = scores.masked_fill(~seen, float("-inf"))
        # a row without any visible key would be 0 / 0: give it zeros, and zero gradients
        empty = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
        weights = _weights(scores, sinks).masked_fill(empty, 0.0)
    weights = weights.to(q.dtype)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return weights @ v


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys and, if there are any, the sinks, whose weights are left out."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, -1, dtype=_accumulation(scores.dtype))
    return weights if sinks is None else weights[..., :-1]


def _seen(
    sq: int,
    sk: int,
    mask: Tensor | None,
    causal: bool,
    window: int,
    chunk: int,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query may attend to, broadcastable to (b, hq, sq, sk); None means all."""
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    if not causal and window <= 0 and not chunk:
        return seen
    rows = torch.arange(sq, device=device)[:, None]
    columns = torch.arange(sk, device=device)[None, :]
    band = columns <= rows if causal else torch.ones(sq, sk, dtype=torch.bool, device=device)
    if window > 0:
        band = band & (columns > rows - window)
    if chunk:
        band = band & (columns // chunk == rows // chunk)
    return band if seen is None else seen & band


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    """Softmax runs in at least 32 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("shardwright::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    sinks: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """`attention_math` as one operator, so that tracing keeps it whole.

    Raises ValueError with `dropout_p` > 0: its backward computes the weights again, and could not
    draw the same zeros.
    """
    if dropout_p > 0:
        raise ValueError(
            f"shardwright::attention cannot be run with dropout_p={dropout_p}: it is an operator "
            "for tracing; call `attention_math`, or set the attention dropout to 0"
        )
    return attention_math(q, k, v, mask, scale, causal, window, softcap, 0.0, sinks, chunk).clone()


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout_p: float,
    sinks: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *first, sinks, chunk = inputs
    ctx.save_for_backward(*first[:4], sinks)
    ctx.options, ctx.chunk = first[4:], chunk


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, a floating-point mask and sinks, by running the formula again."""
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    # torch leaves out last arguments that have their default
    wanted: tuple[bool, ...] = (*ctx.needs_input_grad[:4], any(ctx.needs_input_grad[9:10]))
    leaves: list[Any] = [
        None if value is None else value.detach().requires_grad_(need)
        for value, need in zip(saved, wanted, strict=True)
    ]
    with torch.enable_grad():
        output = attention_math(*leaves[:4], *ctx.options, sinks=leaves[4], chunk=ctx.chunk)
    needed = [leaf for leaf, need in zip(leaves, wanted, strict=True) if leaf is not None and need]
    found = iter(torch.autograd.grad(output, needed, grad))
    *grads, of_sinks = [next(found) if need else None for need in wanted]
    return (*grads, None, None, None, None, None, of_sinks, None)


attention.register_fake(_attention_fake)
attention.register_autograd(_attention_backward, setup_context=_save_inputs)


@torch.library.custom_op("shardwright::mask_stand_in", mutates_args=())
def mask_stand_in(place: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Stands for an attention mask whose meaning is known otherwise; its values mean nothing.

    bool (batch, 1, queries, keys) on the device of `place`.
    """
    return torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=place.device)


def _stand_in_fake(place: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Shape and dtype of the stand-in."""
    return place.new_empty((batch, 1, queries, keys), dtype=torch.bool)


mask_stand_in.register_fake(_stand_in_fake)

__all__ = ["attention", "attention_math", "mask_stand_in"]
