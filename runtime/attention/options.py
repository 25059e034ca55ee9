"""The options of attention: as the user gives them, and checked against the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import NoReturn

import torch
from torch import Tensor

from .scores import Mask, Scores
from .tokens import Layout


@dataclass(frozen=True, slots=True)
class Options:
    """The keyword options of the attention function `name`, as the user gave them.

    `ring_attention` says what they mean, `cached_attention` what `chunk` does.
    """

    name: str
    causal: bool = False
    window: int = 0
    scale: float | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    mask: Mask | None = None
    up: Tensor | None = None
    chunk: int = 0

    def scores(self, q: Tensor) -> Scores:
        """Checked, for queries (b, hq, sq, d)."""
        if self.window < 0 or self.softcap < 0:
            self.refuse(f"window and softcap are 0 or more, got {self.window}, {self.softcap}")
        if self.chunk < 0:
            self.refuse(f"chunk is 0 or a number of tokens, got {self.chunk}")
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
        return Scores(
            scale, self.causal, self.window, self.softcap, self.bias, self.slopes, mask,
            chunk=self.chunk, bands=q.is_cuda,
        )  # fmt: skip

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

    def check_keys(self, q: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Refuse keys and values, or latents and what makes both of them, that do not fit."""
        if (v is None) != (self.up is not None):
            self.refuse(
                "v is None with `up`, which makes keys and values of latents k, and only so"
            )
        if self.up is not None:
            self.check_latents(q, k, self.up)
        elif v is not None:
            self.check_heads(q, k, v)

    def check_heads(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Refuse tensors that no attention fits, whatever their layout."""
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if not q.ndim == k.ndim == v.ndim == 4:
            self.refuse(f"expected (batch, heads, sequence, head_dim), got {shapes}")
        if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            self.refuse(f"sizes do not fit together: {shapes}")
        if not k.shape[1] or q.shape[1] % k.shape[1]:
            self.refuse(f"{q.shape[1]} query heads over {k.shape[1]} key heads")
        self._check_alike(q, k, v)

    def check_latents(self, q: Tensor, k: Tensor, up: Tensor) -> None:
        """Refuse latents k (b, 1, s, r + rope) of which `up` makes no keys for q (b, h, s, d)."""
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, up {tuple(up.shape)}"
        if not q.ndim == k.ndim == 4 or up.ndim != 3:
            self.refuse(
                "expected q (batch, heads, sequence, head_dim), k (batch, 1, sequence, r + rope)"
                f" and up (heads, d_nope + dv, r), got {shapes}"
            )
        nope = q.shape[3] - (k.shape[3] - up.shape[2])
        fits = k.shape[1] == 1 and q.shape[1] == up.shape[0] and q.shape[0] == k.shape[0]
        if not fits or not 0 < nope <= q.shape[3] or nope >= up.shape[1]:
            self.refuse(f"sizes do not fit together: {shapes}")
        self._check_alike(q, k, up)

    def _check_alike(self, *tensors: Tensor) -> None:
        q, *others = tensors
        if any(x.dtype != q.dtype for x in others) or not q.is_floating_point():
            self.refuse(f"one float dtype expected, got {', '.join(str(x.dtype) for x in tensors)}")
        if any(x.device != q.device for x in others):
            self.refuse(f"one device expected, got {', '.join(str(x.device) for x in tensors)}")

    def refuse(self, why: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{self.name}: {why}")
