"""Attention in one process, pair by pair: what every algorithm is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwright.runtime import Layout, Mask

ROPE = 3  # numbers of a latent that are part of the keys of all heads


@dataclass(frozen=True)
class Case:
    """One attention over a whole sequence, and how it is sharded."""

    ranks: int = 2
    length: int = 24
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (8, 8)
    batch: int = 2
    layout: str = "contiguous"
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    scale: float | None = None
    sinks: bool = False
    slopes: bool = False
    bias: tuple[int, int] | None = None  # batch and heads, each 1 where they share it
    padded: bool = False
    documents: tuple[int, ...] = ()
    prefix: int = 0
    rank: int = 0  # of latents, of which keys and values of all heads are made
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def but(self, **changes: object) -> Case:
        """The same case with other values."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def make_layout(self, ranks: int | None = None) -> Layout:
        """The layout by its name; `packed` takes the documents."""
        ranks = ranks or self.ranks
        if self.layout == "packed":
            return Layout.packed(self.documents, ranks)
        return getattr(Layout, self.layout)(self.length, ranks)


@dataclass(frozen=True)
class Inputs:
    """Whole tensors of a case: the same on all ranks."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    sinks: Tensor | None
    slopes: Tensor | None
    bias: Tensor | None
    mask: Mask | None
    up: Tensor | None = None  # with it k are latents (b, 1, s, rank + ROPE), and v is empty


def make(case: Case) -> Inputs:
    """Random inputs; the same for the same case."""
    generator = torch.Generator().manual_seed(case.seed)
    b, s, (hq, hkv), (d, dv) = case.batch, case.length, case.heads, case.head_dims

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    q, k, v, grad = draw(b, hq, s, d), draw(b, hkv, s, d), draw(b, hkv, s, dv), draw(b, hq, s, dv)
    sinks = draw(hq) if case.sinks else None
    slopes = draw(hq).abs() if case.slopes else None
    bias = draw(*case.bias, s, s) if case.bias else None
    keys = documents = None
    if case.padded:  # a different number of keys for each sequence
        keys = torch.arange(s) < torch.tensor([s - 3 * i for i in range(b)])[:, None]
    if case.documents and case.layout != "packed":
        ids = torch.repeat_interleave(
            torch.arange(len(case.documents)), torch.tensor(case.documents)
        )
        documents = torch.stack([ids, ids.flip(0)])[:b]
    mask, up = Mask(keys, documents, case.prefix), None
    if case.rank:
        k, v = draw(b, 1, s, case.rank + ROPE), draw(b, 1, s, 0)
        up = draw(hq, d - ROPE + dv, case.rank)
    return Inputs(q, k, v, grad, sinks, slopes, bias, mask, up)


def heads_of(case: Case, latents: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (b, h, s, d) of latents, head by head."""
    c, shared = latents[:, 0].split([case.rank, ROPE], 2)
    nope = case.head_dims[0] - ROPE
    keys = [torch.cat([c @ weight[:nope].T, shared], 2) for weight in up]
    return torch.stack(keys, 1), torch.stack([c @ weight[nope:].T for weight in up], 1)


def allowed(case: Case, inputs: Inputs) -> Tensor:
    """Who may attend whom (b, s, s), from the definitions."""
    s = case.length
    key, query = torch.arange(s), torch.arange(s)[:, None]
    pairs = torch.ones(s, s, dtype=torch.bool)
    if case.causal:
        pairs &= key <= query
    if case.window:
        pairs &= key > query - case.window
    pairs |= key < case.prefix
    if case.layout == "packed":
        ids = torch.repeat_interleave(
            torch.arange(len(case.documents)), torch.tensor(case.documents)
        )
        pairs &= ids == ids[:, None]
    pairs = pairs.expand(case.batch, s, s)
    assert inputs.mask is not None
    if inputs.mask.keys is not None:
        pairs = pairs & inputs.mask.keys[:, None]
    if inputs.mask.documents is not None:
        ids = inputs.mask.documents
        pairs = pairs & (ids[:, None] == ids[:, :, None])
    return pairs


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """(out, dq, dk, dv and gradients of sinks, up and bias, if any), every score written out.

    With latents dk is that of these, and there is no dv.
    """
    given = (inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.up, inputs.bias)
    q, k, v, sinks, up, bias = (
        None if x is None else x.detach().to(dtype).requires_grad_() for x in given
    )
    assert q is not None and k is not None and v is not None
    leaves = [x for x in (q, k, None if case.rank else v, sinks, up, bias) if x is not None]
    if up is not None:
        k, v = heads_of(case, k, up)
    k, v = (x.repeat_interleave(case.heads[0] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (case.scale or q.shape[-1] ** -0.5)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if bias is not None:
        scores = scores + bias
    if inputs.slopes is not None:
        position = torch.arange(case.length)
        distance = (position - position[:, None]).to(dtype)
        scores = scores + inputs.slopes.to(dtype)[:, None, None] * (
            distance if case.causal else -distance.abs()
        )
    pairs = allowed(case, inputs)[:, None]
    scores = scores.masked_fill(~pairs, -torch.inf)
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    else:
        nothing = ~pairs.any(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    out = weights @ v
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.to(dtype))]
