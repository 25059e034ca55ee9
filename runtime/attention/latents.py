"""Keys and values that are made from latents: latents are stored and sent, heads are made of them.

A latent is r + rope numbers of a token: c (r numbers), and behind it the part of the keys that all
heads share.  With `up` (heads, d_nope + dv, r) head h has the key (up[h, :d_nope] c, shared part)
and the value up[h, d_nope:] c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import Queries, attend, attend_backward
from .links import pack, unpack
from .partial import Partial
from .pieces import Piece
from .scores import Scores


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
        """Add to `grads`, of latents k and of `up`, what gradients of keys and values make.

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


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's keys, as ranks send them: k and v, or latents k of which `heads` makes both."""

    k: Tensor
    v: Tensor | None
    heads: Heads | None

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor | None, up: Tensor | None) -> Held:
        """For queries q; with `up` k are latents and v is None."""
        return Held(k, v, None if up is None else Heads.of(up, q, k))

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        if self.heads is not None:
            return self.heads.value_dim
        assert self.v is not None
        return self.v.shape[3]

    @property
    def sent(self) -> tuple[Tensor, ...]:
        """The tensors of which a message consists."""
        return (self.k,) if self.v is None else (self.k, self.v)

    @property
    def shapes(self) -> list[torch.Size]:
        """Of `sent`, and of its gradients."""
        return [x.shape for x in self.sent]

    def packed(self) -> Tensor:
        """The message that tells another rank."""
        return pack(*self.sent)

    def received(self, message: Tensor) -> Held:
        """Those of another rank, from what it packed."""
        k, *v = unpack(message, *self.shapes)
        return replace(self, k=k, v=v[0] if v else None)

    def of_key_heads(self, heads: slice) -> Held:
        """Some of the key heads; latents are one."""
        return replace(self, k=self.k[:, heads], v=None if self.v is None else self.v[:, heads])

    def attend(self, into: Partial, q: Tensor, pieces: Sequence[Piece], scores: Scores) -> None:
        """Merge queries q over these keys into `into`."""
        if pieces:
            attend(into, q, *self._keys_and_values(), pieces, scores)

    def attend_backward(
        self,
        grads: tuple[Tensor, Sequence[Tensor], Tensor | None],
        queries: Queries,
        pieces: Sequence[Piece],
        scores: Scores,
    ) -> None:
        """Add the gradients of the pieces to `grads`: of q, of `sent`, and of `up` if there is one.

        Keys and values are made again.
        """
        if not pieces:
            return
        dq, dsent, dup = grads
        k, v = self._keys_and_values()
        if self.heads is None:
            attend_backward((dq, dsent[0], dsent[1]), queries, k, v, pieces, scores)
            return
        assert dup is not None
        dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in (k, v))
        attend_backward((dq, dk, dv), queries, k, v, pieces, scores)
        self.heads.made_backward((dsent[0], dup), self.k, dk, dv)

    def _keys_and_values(self) -> tuple[Tensor, Tensor]:
        if self.heads is not None:
            return self.heads.made(self.k)
        assert self.v is not None
        return self.k, self.v
