"""How operators are told of caches: by tensors, of which a graph takes any.

A name would be a constant of the graph, and every layer would be compiled for itself.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor

_numbers = count()
_caches: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle_of(cache: object) -> Tensor:
    """The handle of a new cache: a number, () int64 on the CPU."""
    number = next(_numbers)
    _caches[number] = cache
    return torch.tensor(number)


def cache_behind(handle: Tensor) -> Any:
    """The cache that has this handle."""
    return _caches[int(handle)]


__all__ = ["cache_behind", "handle_of"]
