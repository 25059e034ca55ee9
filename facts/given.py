"""Checks of single values that a user gives; each failure is a sentence with the value in it."""

from __future__ import annotations

import math
import operator
from typing import Any

ENDLESS = 2**63 - 1


def shown(value: object) -> str:
    """A value in few words.

    >>> shown("8"), shown([1] * 100)
    ("'8' (str)", '[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ... (list)')
    """
    shape: Any = getattr(value, "shape", None)
    if shape is not None:
        return f"a tensor of shape {tuple(shape)}"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def whole(name: str, value: object, least: int, most: int = ENDLESS) -> int:
    """A whole number in that range, numpy's too.  Raises TypeError or ValueError."""
    given: Any = value
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number, got {shown(value)}") from None
    if number < least:
        raise ValueError(f"{name}={number}: expected {least} or more")
    if number > most:
        raise ValueError(f"{name}={number}: expected at most {most}")
    return number


def finite(name: str, value: object) -> float:
    """A finite number.  Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {shown(value)}")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")
    return float(value)


def text(name: str, value: object, such_as: str = "") -> str:
    """A text.  Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be text{such_as}, got {shown(value)}")
    return value


__all__ = ["ENDLESS", "finite", "shown", "text", "whole"]
