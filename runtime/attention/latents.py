"""Keys and values that are made from latents: latents are stored and sent, heads are made of them.

A latent is r + rope numbers of a token: c (r numbers), and behind it the part of the keys that all
heads share.  With `up` (heads, d_nope + dv, r) head h has the key (up[h, :d_nope] c, shared part)
and the value up[h, d_nope:] c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Heads:
    """Makes the keys and values of heads from latents."""

    up: Tensor  # (heads, nope + value_dim, rank)
    nope: int  # numbers of a key that are made from the latent

    @staticmethod
    def of(up: Tensor, q: Tensor, k: Tensor) -> Heads:
        """For queries (b, heads, s, d) over latents k (b, 1, s, rank + rope)."""
        return Heads(up, q.shape[3] - (k.shape[3] - up.shape[2]))

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self.up.shape[1] - self.nope

    def made(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (b, h, s, d) and values (b, h, s, dv) of latents (b, 1, s, rank + rope)."""
        heads, _, rank = self.up.shape
        rows = F.linear(k[:, 0, :, :rank], self.up.flatten(0, 1))  # one product for all heads
        by_heads = rows.unflatten(2, (heads, -1)).transpose(1, 2)
        nope, v = by_heads.split([self.nope, self.value_dim], 3)
        return torch.cat([nope, k[..., rank:].expand(-1, heads, -1, -1)], 3), v

    def made_backward(
        self, grads: tuple[Tensor, Tensor], k: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Add to `grads`, those of latents k and of `up`, what follows from dk and dv.

        dk (b, h, s, d) and dv (b, h, s, dv); all four gradients float32 or float64.  Two products
        in the dtype of k, 4 b s r h (nope + dv) FLOP, whose results are added up in that of
        `grads`.
        """
        dlatents, dup = grads
        rank = self.up.shape[2]
        made = torch.cat([dk[..., : self.nope], dv], 3).to(k.dtype)
        rows = made.transpose(1, 2).flatten(2)  # (b, s, h * (nope + dv))
        dlatents[:, 0, :, :rank] += rows @ self.up.flatten(0, 1)
        dlatents[:, 0, :, rank:] += dk[..., self.nope :].sum(1)
        c = k[:, 0, :, :rank].flatten(0, 1)
        dup += (rows.flatten(0, 1).T @ c).view_as(dup)
