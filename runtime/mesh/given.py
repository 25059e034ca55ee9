"""What a user hands to a module is a tensor, or said by name."""

from __future__ import annotations

from torch import Tensor

from ...facts.given import shown


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError naming what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {shown(value)}")


__all__ = ["check_tensor"]
