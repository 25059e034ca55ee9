"""Modules and tensors by their dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class Namespace(nn.Module):
    """A bare container, so that parameters keep their dotted names; `layers[0]` is `layers.0`."""

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(index))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())


def find(root: nn.Module, name: str) -> Any:
    """What `root` has under a dotted name; AttributeError if there is nothing."""
    found: Any = root
    for part in name.split("."):
        found = getattr(found, part)
    return found


def owner_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds `name`, containers made as needed, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        child = dict(root.named_children()).get(part)
        if child is None:
            child = Namespace()
            root.add_module(part, child)
        root = child
    return root, leaf
