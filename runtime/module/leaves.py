"""Modules of torch's own in generated modules, with the sizes that are used on this rank.

A generated class declares them as `q_proj: nn.Linear`; what it gets is one of these, whose
parameters the model registers.  Hooks, profilers and quantisation find them under their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Linear(nn.Linear):
    """An `nn.Linear` of which this rank holds a part: sizes are those of its weight."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rows of the weight."""
        return self.weight.shape[0]


class Embedding(nn.Embedding):
    """An `nn.Embedding` of which this rank holds all rows, or some of their columns."""

    def __init__(self, padding_idx: int | None = None) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", None)
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False

    @property
    def num_embeddings(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rows of the table."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Columns of the table that are here."""
        return self.weight.shape[1]

    def extra_repr(self) -> str:
        """Torch's looks for its sizes in `__dict__`."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class RMSNorm(nn.RMSNorm):
    """An `nn.RMSNorm` of the width of its weight."""

    def __init__(self, eps: float | None = None) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", None)
        self.eps = eps
        self.elementwise_affine = True

    @property
    def normalized_shape(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[int, ...]:
        """The last dims of what is normed."""
        return tuple(self.weight.shape)

    def extra_repr(self) -> str:
        """As torch's, which looks for them in `__dict__`."""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine=True"


class LayerNorm(nn.LayerNorm):
    """An `nn.LayerNorm` of the width of its weight."""

    def __init__(self, eps: float = 1e-5) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.eps = eps
        self.elementwise_affine = True

    @property
    def normalized_shape(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> tuple[int, ...]:
        """The last dims of what is normed."""
        return tuple(self.weight.shape)

    def extra_repr(self) -> str:
        """As torch's, which looks for them in `__dict__`."""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine=True"


# By the class that generated modules name; what makes one takes its options
LEAVES: Mapping[type[nn.Module], Any] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.RMSNorm: RMSNorm,
    nn.LayerNorm: LayerNorm,
}
