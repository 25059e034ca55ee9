"""A moving average of the parameters, of the parts that a rank holds."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .pieces import Piece, trained
from .states import Kept


class Ema:
    """An exponential moving average of the trained parameters, at first what they are when it is
    made.

    float32, or wider where parameters are.  As torch's `AveragedModel` with `get_ema_avg_fn(decay)`
    that sees the same parameters first; buffers are the model's own.
    """

    def __init__(self, pieces: Sequence[Piece], decay: float) -> None:
        _check(decay)
        self.decay = decay
        self._pieces = trained(pieces)
        self._averages = [_wide(piece.tensor).clone() for piece in self._pieces]

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """After an optimizer's step: decay * average + (1 - decay) * parameter.

        `decay` is this step's where it changes (a warm-up, say).
        """
        if decay is not None:
            _check(decay)
        weight = 1.0 - (self.decay if decay is None else decay)
        for piece, average in zip(self._pieces, self._averages, strict=True):
            average.lerp_(_wide(piece.tensor), weight)

    @contextmanager
    def applied(self) -> Generator[None]:
        """The model with the averages as its parameters: to evaluate, serve or save it.

        What parameters were is kept meanwhile, and put back: steps of an optimizer inside are lost,
        and what `full_state_dict` gives must be cloned to stay, as it may be the parameters.
        """
        own = [piece.tensor.detach().clone() for piece in self._pieces]
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for piece, x in zip(self._pieces, values, strict=True):
            piece.tensor.copy_(x)

    @property
    def kept(self) -> list[Kept]:
        """The averages as a checkpoint names them, `ema.<original>`; they are loaded in place."""
        pairs = zip(self._pieces, self._averages, strict=True)
        return [(f"ema.{piece.original}", piece, average) for piece, average in pairs]


def _check(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is 0 to 1, as 0.999; got {decay}")


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


__all__ = ["Ema"]
