"""The keys of one rank, in the form in which ranks send them to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .kernels import Queries
from .latents import Heads
from .links import pack, unpack
from .partial import Partial
from .scores import Scores
from .work import Work


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's keys: of its shard, or of what it caches.

    Values are `v`; without `v` they are the first `value_dim` numbers of the keys, or `heads` makes
    keys and values of latents `k`.
    """

    k: Tensor
    v: Tensor | None
    heads: Heads | None
    value_dim: int

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor | None, up: Tensor | None, values_in_keys: int = 0
    ) -> Held:
        """For queries q; with `up` k are latents and v is None."""
        if up is not None:
            heads = Heads.of(up, q, k)
            return Held(k, None, heads, heads.value_dim)
        return Held(k, v, None, values_in_keys if v is None else v.shape[3])

    @property
    def sent(self) -> tuple[Tensor, ...]:
        """The tensors of which a message consists."""
        return (self.k,) if self.v is None else (self.k, self.v)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the tensors in `sent`, and so of their gradients."""
        return [x.shape for x in self.sent]

    def packed(self) -> Tensor:
        """One message with all tensors of `sent`."""
        return pack(*self.sent)

    def received(self, message: Tensor) -> Held:
        """The keys of another rank, from the message that it packed."""
        k, *v = unpack(message, *self.shapes)
        return replace(self, k=k, v=v[0] if v else None)

    def of_key_heads(self, heads: slice) -> Held:
        """The same with some of the key heads; latents count as one head."""
        return replace(self, k=self.k[:, heads], v=None if self.v is None else self.v[:, heads])

    def made(self) -> Held:
        """With the heads' keys and values instead of latents, for keys that stay where they are."""
        k, v = self._keys_and_values()
        return Held(k, v, None, self.value_dim)

    def attend(self, into: Partial, q: Tensor, work: Work, scores: Scores) -> None:
        """Merge queries q over these keys into `into`."""
        if work:
            work.attend(into, q, *self._keys_and_values(), scores)

    def attend_backward(
        self,
        grads: tuple[Tensor, Sequence[Tensor], Tensor | None],
        queries: Queries,
        work: Work,
        scores: Scores,
    ) -> None:
        """Add the gradients of `work` to `grads`: of q, of `sent`, and of `up` if there is one.

        Keys and values are made again.
        """
        if not work:
            return
        dq, dsent, dup = grads
        k, v = self._keys_and_values()
        if self.heads is None:
            work.attend_backward((dq, dsent[0], dsent[1]), queries, k, v, scores)
            return
        assert dup is not None
        dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in (k, v))
        work.attend_backward((dq, dk, dv), queries, k, v, scores)
        self.heads.made_backward((dsent[0], dup), self.k, dk, dv)

    def _keys_and_values(self) -> tuple[Tensor, Tensor]:
        if self.heads is not None:
            return self.heads.made(self.k)
        return self.k, self.k[..., : self.value_dim] if self.v is None else self.v
