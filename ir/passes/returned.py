"""What a model returns: all that it does, or what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...facts.nested import Path, dotted
from ...facts.updated import updated_buffer
from ..graph import Graph
from ..ops.live import live_items
from .raising import raised


def returning(graph: Graph, names: Sequence[str]) -> Graph:
    """`graph`, folded or flat, with the outputs of these names alone, and what they need.

    A name is that of an output or of what it lies in: `loss`, `hidden_states`,
    `hidden_states.3`.  Values that nothing reads any more, such as logits, may become part of
    one operator.  Raises ValueError for a name that no output has.
    """
    known = [output.path for output in graph.outputs if not updated_buffer(output.path)]
    for name in names:
        if not any(_is_called(path, name) for path in known):
            has = ", ".join(f"`{dotted(path)}`" if path else "one tensor" for path in known)
            raise ValueError(f"the model returns no `{name}`; it returns {has}")
    outputs = tuple(
        output
        for output in graph.outputs
        if updated_buffer(output.path) or any(_is_called(output.path, name) for name in names)
    )
    body = live_items(graph.body, [output.value.name for output in outputs])
    return raised(replace(graph, outputs=outputs, body=body))


def _is_called(path: Path, name: str) -> bool:
    return dotted(path) == name or dotted(path).startswith(f"{name}.")


__all__ = ["returning"]
