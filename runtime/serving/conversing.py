"""What a module that serves has for its user: prompts in, tokens out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .generate import generate
from .serving import Serving


class Conversing:
    """Caches, and sequences in them.  All tensors here are full ones, the same on every rank."""

    _serving: Serving | None = None

    @abstractmethod
    def _serve(
        self, batch: int, tokens: int, total_tokens: int | None, capture: bool | None
    ) -> Serving:
        """A conversation with empty caches; arguments as those of `new_cache`."""

    def new_cache(
        self,
        batch: int,
        tokens: int,
        *,
        total_tokens: int | None = None,
        capture: bool | None = None,
    ) -> None:
        """Empty KV caches for `batch` sequences of up to `tokens` tokens each.

        `total_tokens` is what all sequences hold together (default: batch * tokens): with fewer,
        long sequences use the memory that short ones leave.  Where the batch is sharded, each rank
        has its share of the total for its own sequences.  Replaces the caches that are there.

        On CUDA a decode step is captured as a CUDA graph and replayed, one for each size of batch
        (1, 2, 4, 8, ...).  `capture=False` runs steps as they are; where a step can't be captured,
        a warning says which part of the model forbids it, and with `capture=True` RuntimeError.
        """
        self._serving = self._serve(batch, tokens, total_tokens, capture)

    @property
    def serving(self) -> Serving:
        """The caches and the sequences in them; RuntimeError before `new_cache`."""
        if self._serving is None:
            raise RuntimeError("there is no KV cache yet; call new_cache(batch, tokens) first")
        return self._serving

    @property
    def cached_lengths(self) -> Tensor:
        """Cached tokens of each sequence (b,), int64 on the CPU."""
        return self.serving.lengths.clone()

    def prefill(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Start new sequences with prompts (b, t); logits (b, v) of the token that follows each.

        Of row i the first `lengths[i]` tokens count (default: all).  Whatever was cached is
        dropped.  Raises CacheFullError if the prompts do not fit.
        """
        return self.serving.prefill(input_ids, lengths)

    def decode(self, tokens: Tensor) -> Tensor:
        """Continue every sequence with one token (b,); logits (b, v) of the next.

        Raises CacheFullError if a sequence is at its end.
        """
        return self.serving.decode(tokens)

    def append(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Continue the sequences with several tokens (b, t); logits (b, v) of what follows.

        Of row i the first `lengths[i]` tokens count (default: all); rows with 0 stay as they are,
        and their logits mean nothing.  Raises CacheFullError if the tokens do not fit.
        """
        return self.serving.append(input_ids, lengths)

    def admit(
        self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[list[int], Tensor]:
        """Begin sequences with prompts (n, t) beside those that are there.

        Returns the numbers of the n sequences, which were free, and logits (n, v) of the token that
        follows each.  `lengths` as in `prefill`.  After `new_cache` all are free.  Raises
        ValueError if too few are, CacheFullError if the prompts do not fit.
        """
        return self.serving.admit(input_ids, lengths)

    def free(self, sequence: int) -> None:
        """Forget a sequence, so that another may be admitted in its place.

        `decode` then skips it: its token is not read, and its logits mean nothing.
        """
        self.serving.free(sequence)

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Go back: keep only the first `lengths[i]` cached tokens of sequence i (b,).

        Raises ValueError where a window, or the state of a layer, cannot go back so far.
        """
        self.serving.truncate(lengths)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        capture: bool | None = None,
    ) -> Tensor:
        """Prompts (b, t) with up to `max_new_tokens` tokens behind them, (b, t + new).

        Prompts of different lengths are padded: on the right with `lengths` (b,) given, or
        anywhere with an `attention_mask` (b, t) of ones and zeros.  New tokens stand in columns
        t, t + 1, ... in any case.  A sequence ends with a token of `eos_token_id` and goes on with
        `pad_token_id`; generation stops when all have ended.

        The likeliest token is taken, or, with `do_sample`, one is drawn: logits / temperature, of
        those the `top_k` highest (0: all), of those the fewest with a probability of `top_p` or
        more together, of those the ones at least `min_p` times as likely as the likeliest.  Draws
        depend on `seed`, or on the mesh's shared generator, and every
        rank returns the same.

        Uses the cache that is there if it is large enough, and made with that `capture` (see
        `new_cache`; None: any), else makes a new one.
        """
        room = partial(self.room, capture=capture)
        return generate(
            room, input_ids, max_new_tokens, lengths=lengths, attention_mask=attention_mask,
            eos_token_id=eos_token_id, pad_token_id=pad_token_id, do_sample=do_sample,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        )  # fmt: skip

    def room(self, batch: int, tokens: int, capture: bool | None = None) -> Serving:
        """The serving state, with new caches unless those that are there are large enough."""
        serving = self._serving
        if serving is None or not serving.suits(batch, tokens, capture):
            self.new_cache(batch, tokens, capture=capture)
        return self.serving


__all__ = ["Conversing"]
