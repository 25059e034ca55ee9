"""States that a captured forward pass takes and gives become nodes in the layers that keep them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from ..graph import Arg, Input, Node, Output, Value


class StartsAnew(ValueError):
    """A layer makes its new state of its tokens alone, and not of the state before."""


def kept_states(
    nodes: Sequence[Node],
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    known: Container[str],
) -> tuple[tuple[Node, ...], tuple[Input, ...], tuple[Output, ...]]:
    """Body, inputs and outputs of a graph whose layers read and keep their states themselves.

    Inputs that are not `known` are states; there are outputs (0, ...), what the model gives, and
    (1, name), its new states.  States are zeros at first.  Raises StartsAnew for one that the new
    one does not follow from.
    """
    given = {item.name: item.value for item in inputs if item.name not in known}
    if not given:
        return tuple(nodes), tuple(inputs), tuple(outputs)
    after = {out.path[1]: out.value for out in outputs if out.path[0] == 1}
    body = list(nodes)
    for name, before in given.items():
        if not _follows(after[name], before, nodes):
            raise StartsAnew(name)
        _keep(body, before, after[name])
    return (
        tuple(body),
        tuple(item for item in inputs if item.name in known),
        tuple(Output(out.path[1:], out.value) for out in outputs if out.path[0] == 0),
    )


def _follows(after: Value, before: Value, nodes: Sequence[Node]) -> bool:
    """Is `after` made of `before`, among other things?"""
    made = {before.name}
    for node in nodes:
        if any(value.name in made for value in node.operands):
            made |= {value.name for value in node.outputs}
    return after.name in made


def _keep(body: list[Node], before: Value, after: Value) -> None:
    """Put nodes before the first that reads `before`, and behind that which makes `after`."""
    first = next(i for i, node in enumerate(body) if before in node.operands)
    last = next(i for i, node in enumerate(body) if after in node.outputs)
    kept = Value(f"{before.name}_kept", after.type)
    args: tuple[tuple[str, Arg], ...] = (("before", before), ("after", after))
    loc = replace(body[last].loc, targets=())
    body.insert(last + 1, Node(kept.name, "shardwright.new_state", args, (kept,), loc))
    initial = Value(f"{before.name}_initial", before.type)
    loc = replace(body[first].loc, targets=())
    zeros = (("size", before.type.shape), ("dtype", before.type.dtype))
    empty = (("layout", None), ("device", None), ("pin_memory", None))
    body[first:first] = [
        Node(initial.name, "aten.zeros.default", (*zeros, *empty), (initial,), loc),
        Node(before.name, "shardwright.state", (("initial", initial),), (before,), loc),
    ]


__all__ = ["StartsAnew", "kept_states"]
