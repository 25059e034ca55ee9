"""Which token comes next: the likeliest, or one that is drawn; by tensor operators alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn, as transformers does it: logits / temperature, of those the `top_k`
    highest (0: all), of those the fewest with a probability of `top_p` or more together, of those
    whose probability is at least `min_p` times the highest one.

    Raises ValueError for numbers that say nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        bounded = 0 < self.top_p <= 1 and 0 <= self.min_p <= 1
        if self.temperature <= 0 or not bounded or self.top_k < 0:
            raise ValueError(
                "sampling needs temperature > 0, 0 < top_p <= 1, 0 <= min_p <= 1 and top_k >= 0"
                f" (0: no limit), got {self.temperature}, {self.top_p}, {self.min_p}, {self.top_k}"
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each token (b, v), after logits (b, v); float32 or float64."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            lowest = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True)
            share = ordered.softmax(-1)
            before = share.cumsum(-1) - share  # of the likelier tokens; 0 for the first
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            scores = torch.empty_like(scores).scatter_(-1, order, ordered)
        share = scores.softmax(-1)
        if self.min_p:
            least = self.min_p * share.amax(-1, keepdim=True)
            share = share.masked_fill(share < least, 0)
        return share


@dataclass(frozen=True, slots=True)
class Choice:
    """How sequences go on: drawn by `sampling`, None for the likeliest token, until one of `stops`;
    `pad` stands behind a sequence that has ended."""

    sampling: Sampling | None = None
    stops: tuple[int, ...] = ()
    pad: int = 0

    def of(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """One token (b,) for each row of `logits` (b, v).

        `numbers` (b, v) are exponentially distributed, or empty where nothing is drawn.
        """
        if self.sampling is None:
            return logits.argmax(-1)
        # The first of clocks that run as fast as a token is likely: what `multinomial` does, too.
        return (self.sampling.probabilities(logits) / numbers).argmax(-1)

    def numbers(self, logits: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
        """New ones for `rows` rows of such `logits` (.., v)."""
        if self.sampling is None:
            return logits.new_empty(rows, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        made = logits.new_empty(rows, logits.shape[-1], dtype=dtype)
        return made.exponential_(generator=generator)

    def go_on(self, alive: Tensor, tokens: Tensor, stops: Tensor) -> Tensor:
        """Which sequences (b,), of those that are `alive`, do not end with `tokens` (b,)."""
        return alive & (tokens[:, None] != stops).all(1)
