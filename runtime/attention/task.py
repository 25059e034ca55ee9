"""What all algorithms share: checked inputs, and what autograd carries from forward to backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from .agreement import Call, agree
from .kernels import Queries, attend, sinks_gradient
from .latents import Held
from .links import Group, Link, link_of
from .partial import Partial, wide
from .pieces import Piece
from .scores import Mask, Scores
from .tokens import Layout


@dataclass(frozen=True, slots=True)
class Options:
    """The keyword options of an attention function, as the user gave them."""

    name: str
    causal: bool
    window: int
    scale: float | None
    softcap: float
    sinks: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    mask: Mask | None

    def scores(self, q: Tensor) -> Scores:
        """Checked, for queries (b, hq, sq, d)."""
        if self.window < 0 or self.softcap < 0:
            self.refuse(f"window and softcap are 0 or more, got {self.window}, {self.softcap}")
        scale = 1.0 / sqrt(q.shape[3]) if self.scale is None else self.scale
        if not isfinite(scale):
            self.refuse(f"scale must be finite, got {scale}")
        for title, x in (("sinks", self.sinks), ("slopes", self.slopes)):
            if x is not None and tuple(x.shape) != (q.shape[1],):
                self.refuse(f"{title} must have one number for each of {q.shape[1]} query heads")
        if self.slopes is not None and self.slopes.requires_grad:
            raise NotImplementedError(
                f"{self.name}: no gradient is computed for slopes; detach them, or give what they"
                " add to the scores as `bias`, where the algorithm takes one"
            )
        if self.bias is not None:
            self._check_bias(self.bias, q)
        mask = Mask() if self.mask is None else self._checked_mask(self.mask, q)
        return Scores(scale, self.causal, self.window, self.softcap, self.bias, self.slopes, mask)

    def _check_bias(self, bias: Tensor, q: Tensor) -> None:
        fits = bias.ndim == 4 and bias.shape[2] == q.shape[2] and bias.is_floating_point()
        if not fits or bias.shape[0] not in (1, q.shape[0]) or bias.shape[1] not in (1, q.shape[1]):
            self.refuse(
                f"bias must be a float tensor ({q.shape[0]} or 1, {q.shape[1]} or 1, {q.shape[2]},"
                f" positions of keys), got {bias.dtype} {tuple(bias.shape)}"
            )

    def _checked_mask(self, mask: object, q: Tensor) -> Mask:
        if not isinstance(mask, Mask):
            raise TypeError(
                f"{self.name}: mask is a `Mask` (key padding, documents, prefix), got"
                f" {type(mask).__name__}; a score matrix is given as `bias`"
            )
        if mask.prefix and self.window:
            raise NotImplementedError(f"{self.name}: a prefix together with a window")
        for title, x in (("keys", mask.keys), ("documents", mask.documents)):
            if x is not None and (x.ndim != 2 or x.shape[0] != q.shape[0]):
                self.refuse(f"mask.{title} must be ({q.shape[0]}, positions), got {tuple(x.shape)}")
        if mask.keys is not None and mask.keys.dtype != torch.bool:
            self.refuse(f"mask.keys must be bool (False is padding), got {mask.keys.dtype}")
        return mask

    def check_covers(self, scores: Scores, queries: Layout, keys: Layout) -> None:
        """Refuse masks that end before the last position."""
        mask, stop = scores.mask, keys.start + keys.length
        reach = {"bias": scores.bias, "mask.keys": mask.keys, "mask.documents": mask.documents}
        for title, x in reach.items():
            if title == "mask.documents":
                stop = max(stop, queries.start + queries.length)
            if x is not None and x.shape[-1] < stop:
                self.refuse(f"{title} has {x.shape[-1]} columns for {stop} positions")

    def refuse(self, why: str) -> None:
        """Raise ValueError."""
        raise ValueError(f"{self.name}: {why}")


def check_heads(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors that no attention fits, whatever their layout."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{name}: expected (batch, heads, sequence, head_dim), got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{name}: sizes do not fit together: {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{name}: {q.shape[1]} query heads over {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{name}: one float dtype expected, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{name}: one device expected, got {q.device}, {k.device}, {v.device}")


def check_latents(options: Options, q: Tensor, k: Tensor, up: Tensor) -> None:
    """Refuse latents k (b, 1, s, r + rope) of which `up` makes no keys for q (b, h, s, d)."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, up {tuple(up.shape)}"
    if not q.ndim == k.ndim == 4 or up.ndim != 3:
        options.refuse(
            "expected q (batch, heads, sequence, head_dim), k (batch, 1, sequence, r + rope)"
            f" and up (heads, d_nope + dv, r), got {shapes}"
        )
    nope = q.shape[3] - (k.shape[3] - up.shape[2])
    fits = k.shape[1] == 1 and q.shape[1] == up.shape[0] and q.shape[0] == k.shape[0]
    if not fits or not 0 < nope <= q.shape[3] or nope >= up.shape[1]:
        options.refuse(f"sizes do not fit together: {shapes}")
    if not q.dtype == k.dtype == up.dtype or not q.is_floating_point():
        options.refuse(f"one float dtype expected, got {q.dtype}, {k.dtype}, {up.dtype}")
    if not q.device == k.device == up.device:
        options.refuse(f"one device expected, got {q.device}, {k.device}, {up.device}")


def check_keys(options: Options, q: Tensor, k: Tensor, v: Tensor | None, up: Tensor | None) -> None:
    """Refuse keys and values, or latents and what makes both of them, that do not fit."""
    if (v is None) != (up is not None):
        options.refuse("v is None with `up`, which makes keys and values of latents k, and only so")
    if up is not None:
        check_latents(options, q, k, up)
    elif v is not None:
        check_heads(options.name, q, k, v)


def layouts_of(
    ranks: int, q: Tensor, k: Tensor, layout: Layout | None, query_layout: Layout | None
) -> tuple[Layout, Layout]:
    """The layouts of queries and keys.

    `layout` is that of the keys and, if `query_layout` is None, of the queries.  Without one
    the ranks hold equal shards one after the other.
    """
    keys = layout or Layout.contiguous(k.shape[2] * ranks, ranks)
    return query_layout or layout or Layout.contiguous(q.shape[2] * ranks, ranks), keys


def check_rows(
    options: Options, rank: int, ranks: int, q: Tensor, k: Tensor, layouts: tuple[Layout, Layout]
) -> None:
    """Refuse layouts of queries and keys that do not fit the shards of this rank.

    After `agree`: the other ranks must hear of a shard that is wrong on one of them alone.
    """
    for title, x, layout in zip("qk", (q, k), layouts, strict=True):
        if layout.ranks != ranks:
            options.refuse(f"the layout has {layout.ranks} shards where there are {ranks} ranks")
        if x.shape[2] != layout.rows:
            options.refuse(
                f"{title} {tuple(x.shape)} on rank {rank} has {x.shape[2]} rows, its layout has"
                f" {layout.rows}; cut it with layout.shard(x, 2, rank)"
            )


@dataclass(frozen=True, slots=True)
class Task:
    """One call: who takes part, which tokens they hold, how scores are made."""

    link: Link
    scores: Scores
    queries: Layout
    keys: Layout

    @staticmethod
    def of(
        options: Options,
        group: Group,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        layout: Layout | None,
        query_layout: Layout | None,
        up: Tensor | None = None,
    ) -> Task:
        """Checked, also against the other ranks; layouts as in `layouts_of`."""
        check_keys(options, q, k, v, up)
        link = link_of(options.name, group)
        scores = options.scores(q)
        layouts = layouts_of(link.size, q, k, layout, query_layout)
        call = Call.of(options.name, scores, (q, k, v, options.sinks), layouts, up=up)
        agree(call, [link], q.device, every_time=layout is None)
        check_rows(options, link.rank, link.size, q, k, layouts)
        options.check_covers(scores, *layouts)
        return Task(link, scores, *layouts)

    def pieces(self, source: int) -> tuple[Piece, ...]:
        """What this rank's queries attend of the keys of rank `source`."""
        return self.scores.pieces(self.queries, self.link.rank, self.keys, source)

    def with_bias_gradient(self, wanted: bool) -> tuple[Task, Tensor | None]:
        """(this task for a backward pass, what then has the gradient of the bias, if wanted).

        The gradient is float32 or float64; autograd rounds it to the dtype of the bias.
        """
        bias = self.scores.bias
        if bias is None or not wanted:
            return self, None
        dbias = torch.zeros_like(bias, dtype=wide(bias.dtype))
        return replace(self, scores=replace(self.scores, dbias=dbias)), dbias

    def attend(self, into: Partial, q: Tensor, k: Tensor, v: Tensor, source: int) -> None:
        """Merge this rank's queries over the keys of rank `source` into `into`."""
        attend(into, q, k, v, self.pieces(source), self.scores)


def start(q: Tensor, value_dim: int, sinks: Tensor | None) -> Partial:
    """What the queries have before the first key: nothing, or the sinks."""
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
    """Keep inputs, final result and `more` tensors for backward; the result in q's dtype."""
    q, k, v, sinks = inputs
    out = into.out.to(q.dtype)
    ctx.save_for_backward(q, k, v, sinks, up, out, into.lse, *more)
    return out


def saved_more(ctx: Any) -> tuple[Tensor, ...]:
    """The `more` tensors that `save` kept, once, after `saved`."""
    more, ctx.more = ctx.more, ()
    return tuple(more)


def saved(ctx: Any, grad: Tensor) -> tuple[Queries, Tensor, Tensor, Tensor | None]:
    """(queries, k, v, gradient of the sinks) from what `save` kept."""
    queries, held, dsinks = saved_held(ctx, grad)
    assert held.v is not None, "latents, of an algorithm that knows none"
    return queries, held.k, held.v, dsinks


def saved_held(ctx: Any, grad: Tensor) -> tuple[Queries, Held, Tensor | None]:
    """As `saved`; k and v may be latents, and what makes both of them."""
    # Asked for once: each time gathers the parameters among them again.
    q, k, v, sinks, up, out, lse, *ctx.more = ctx.saved_tensors
    queries = Queries.of(q, out, lse, grad.to(q.dtype))
    dsinks = None if sinks is None else sinks_gradient(sinks, queries)
    return queries, Held.of(q, k, v, up), dsinks
