"""Buffers that a forward pass changes: their new values are outputs, under paths that say so."""

from __future__ import annotations

from .nested import Path

_UPDATED = "updated buffer"


def updated_path(name: str) -> Path:
    """The path of the output that is the new value of the buffer `name`."""
    return (_UPDATED, name)


def updated_buffer(path: Path) -> str:
    """The buffer whose new value the output at `path` is; "" for what the model returns."""
    return str(path[1]) if len(path) == 2 and path[0] == _UPDATED else ""


__all__ = ["updated_buffer", "updated_path"]
