"""Recurrences over tokens whose state a model hands from one step to the next.

Between the state before and the new one stand the model's own lines (those of a recurrence that is
written out token by token become so in `steps.py`).  Where they take several
tokens at once they know how to leave some out: they put zeros behind the tokens, up to whole
chunks, and the new state is what it is without those.  So padding of ours becomes zeros in the same
places.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..graph import Arg, Graph, Loc, Loop, Node, TensorType, Value
from ..graph.rewrite import with_operands
from ..ops.registry import operator_of
from .steps import Stepped


@dataclass(frozen=True, slots=True)
class Recurrences:
    """Of all nodes of a graph, by name: those `inner` to a recurrence, which may mix tokens; those
    of them that put zeros at the `ends` of tokens, that pick rows of a dim of tokens, and that give
    all tokens along a dim; and the values that are `leaving` it."""

    inner: frozenset[str]
    ends: frozenset[str]
    leaving: frozenset[str]
    picks: Mapping[str, int]
    gives: Mapping[str, int]


def recurrences(stepped: Stepped) -> Recurrences:
    """Those whose states the graph keeps."""
    inner, ends, leaving = set(stepped.inner), set(stepped.ends), set[str]()
    for nodes in _bodies(stepped.graph):
        own, closed = _in_body(nodes, stepped.inner)
        inner |= own
        ends |= closed
        read = {value.name for node in nodes if node.name not in inner for value in node.operands}
        made = {v.name for node in nodes if node.name in inner for v in node.outputs}
        leaving |= made & read
    return Recurrences(
        frozenset(inner), frozenset(ends), frozenset(leaving), stepped.picks, stepped.gives
    )


def _bodies(graph: Graph) -> Iterator[Sequence[Node]]:
    yield [item for item in graph.body if isinstance(item, Node)]
    for item in graph.body:
        if isinstance(item, Loop):
            yield from (block.nodes for block in item.blocks)


def _in_body(nodes: Sequence[Node], known: Container[str]) -> tuple[set[str], set[str]]:
    """Names of (nodes that are inner besides those that are known, those at the ends of tokens)."""
    kept = [node for node in nodes if operator_of(node).acts and node.name not in known]
    homes = {home_of(node) for node in kept}
    here = [node for node in nodes if home_of(node) in homes]
    ends = {node.name for node in here if _puts_zeros_behind(node)}
    reads = {node.operands[0].name for node in kept}
    starts = {node.name for node in here if node.output.name in reads}
    behind = {node.name for node in _behind(nodes, starts | ends)}
    return {node.name for node in here if node.name in behind}, ends


def home_of(node: Node) -> str:
    """The innermost module of the user's that a node ran in."""
    return next((call.path for call in reversed(node.loc.calls) if call.file), "")


def _behind(nodes: Sequence[Node], starts: set[str]) -> Iterator[Node]:
    """The nodes of those names, and all that read what they make."""
    values: set[str] = set()
    for node in nodes:
        if node.name in starts or any(value.name in values for value in node.operands):
            values |= {value.name for value in node.outputs}
            yield node


def _puts_zeros_behind(node: Node) -> bool:
    """Does it put zeros, or nothing, behind the rows of a dim?"""
    if node.op not in ("aten.pad.default", "aten.constant_pad_nd.default"):
        return False
    args = dict(node.args)
    amounts = args["pad"]
    assert isinstance(amounts, tuple)
    constant = args.get("mode", "constant") == "constant" and args.get("value") in (None, 0)
    return constant and not any(amounts[::2]) and sum(map(bool, amounts)) <= 1


@dataclass(slots=True)
class Zeros:
    """Puts zeros in place of padding, as `positions` (b, t) of a body tell."""

    positions: Value
    made: dict[tuple[int, ...], Value] = field(default_factory=dict[tuple[int, ...], Value])

    def before(self, node: Node, dim: int) -> list[Node]:
        """`node`, which puts zeros behind the tokens in `dim` of its operand (b, ...), and what it
        then takes."""
        x = node.operands[0]
        batch, count = self.positions.type.shape
        shape = tuple({0: batch, dim: count}.get(i, 1) for i in range(len(x.type.shape)))
        nodes = [] if shape in self.made else self._mask(node, shape)
        filled = replace(x, name=f"{node.name}_tokens_only")
        args: tuple[tuple[str, Arg], ...] = (("self", x), ("mask", self.made[shape]), ("value", 0))
        nodes.append(Node(filled.name, "aten.masked_fill.Scalar", args, (filled,), _at(node)))
        return [*nodes, with_operands(node, {x.name: filled})]

    def _mask(self, node: Node, shape: tuple[int, ...]) -> list[Node]:
        """Which tokens are padding, of a shape that broadcasts."""
        flat = Value(f"{node.name}_padding", TensorType(self.positions.type.shape, torch.bool))
        mask = Value(f"{node.name}_mask", TensorType(shape, torch.bool))
        self.made[shape] = mask
        below: tuple[tuple[str, Arg], ...] = (("self", self.positions), ("other", 0))
        view: tuple[tuple[str, Arg], ...] = (("self", flat), ("shape", shape))
        return [
            Node(flat.name, "aten.lt.Scalar", below, (flat,), _at(node)),
            Node(mask.name, "aten.reshape.default", view, (mask,), _at(node)),
        ]


def _at(node: Node) -> Loc:
    return replace(node.loc, targets=("padding",))


__all__ = ["Recurrences", "Zeros", "home_of", "recurrences"]
