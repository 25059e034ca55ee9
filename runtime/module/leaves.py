"""Modules of torch's own in generated modules, with the sizes that are used on this rank.

A generated class declares them as `q_proj: nn.Linear`; what it gets is one of these, whose
parameters the model registers.  Hooks, profilers and quantisation find them under their names.
"""

from __future__ import annotations

from collections.abc import Mapping

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


# By the class that generated modules name
LEAVES: Mapping[type[nn.Module], type[Linear]] = {nn.Linear: Linear}
