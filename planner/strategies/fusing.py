"""What light operators read and write in memory, where layers are compiled and where they are not.

A compiler runs a chain of light operators as one kernel, which reads what comes from outside of the
chain once, and writes only what is used outside of it.  In backward one kernel reads the gradients
of what was written, reads what the derivatives need (what is not in memory it computes again from
the chain's inputs), and writes the gradients of the inputs.  What is run eagerly is a chain of its
own each.

Shares of a chain's traffic are given to its nodes, so that the price of a node follows from its own
choices: an input to its first reader, a result to the node that makes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import networkx as nx

from ...ir.graph import Graph, Node, Value
from ...ir.ops.local import Local
from ...ir.ops.operator import Light, Operator
from ...ir.ops.registry import operator_of, saved_values
from .regions import Scope, scopes

# Of a value that several users read, gradients are summed up: two are read, one is written
_ADDED = 3


@dataclass(slots=True)
class Share:
    """How often a node moves each of its operands and results (by their numbers, the results after
    the operands), forward and backward.

    `first`: is it the one with which the kernel of its chain is counted?  `fused`: is that one that
    a compiler writes?
    """

    first: bool
    fused: bool
    forward: dict[int, int] = field(default_factory=dict[int, int])
    backward: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others."""
        sides = (tuple(sorted(side.items())) for side in (self.forward, self.backward))
        return self.first, self.fused, *sides

    def bytes(self, local: Local) -> tuple[int, int]:
        """Bytes moved forward and backward on one rank."""
        values = (*local.node.operands, *local.node.outputs)
        needs, gives = local.specs()
        sizes = [local.bytes(v, spec) for v, spec in zip(values, (*needs, *gives), strict=True)]
        forward, backward = (
            sum(times * sizes[at] for at, times in side.items())
            for side in (self.forward, self.backward)
        )
        return forward, backward if local.backward else 0


def shares(graph: Graph, *, compiled: bool, training: bool) -> Mapping[str, Share]:
    """By name, the shares of all nodes that only stream numbers through; layers are `compiled`."""
    found: dict[str, Share] = {}
    for scope in scopes(graph):
        uses = _uses(scope, graph)
        fuse = compiled and scope.loop is not None
        for chain in _chains(scope.nodes) if fuse else _alone(scope.nodes):
            found |= _of_chain(chain, uses, training, fused=fuse)
    return found


def streams(node: Node) -> bool:
    """Does a node only stream numbers through, as light operators do that declare nothing else?"""
    operator = operator_of(node)
    own = type(operator).work is not Operator.work
    return isinstance(operator, Light) and not operator.free and not own


def _alone(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    return ([node] for node in nodes if streams(node))


def _chains(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Light nodes joined along values and views, with the same number of others before them: then
    none of these stands between two of them."""
    depth: dict[str, int] = {}
    maker = {value.name: node for node in nodes for value in node.outputs}
    joined: nx.Graph[str] = nx.Graph()
    for node in nodes:
        heavy = not (streams(node) or operator_of(node).free)
        before = max((depth[v.name] for v in node.operands if v.name in depth), default=0)
        for value in node.outputs:
            depth[value.name] = before + heavy
        if heavy:
            continue
        joined.add_node(node.name)
        for value in node.operands:
            source = maker.get(value.name)
            if source is not None and source.name in joined and depth[value.name] == before:
                joined.add_edge(source.name, node.name)
    for names in nx.connected_components(joined):
        chain = [node for node in nodes if node.name in names and streams(node)]
        if chain:
            yield chain


@dataclass(frozen=True, slots=True)
class _Uses:
    """Which value each one is a view of (itself, if it is none), and who reads each of those."""

    viewed: Mapping[str, str]
    readers: Mapping[str, tuple[str, ...]]

    def root(self, value: Value) -> str:
        """The name of what is in memory."""
        return self.viewed.get(value.name, value.name)


def _uses(scope: Scope, graph: Graph) -> _Uses:
    """In one scope; what leaves it is read by "" as well."""
    viewed: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    for node in scope.nodes:
        if operator_of(node).free:
            for value in node.outputs:
                source = node.operands[0].name
                viewed[value.name] = viewed.get(source, source)
            continue
        for name in dict.fromkeys(viewed.get(v.name, v.name) for v in node.operands):
            readers.setdefault(name, []).append(node.name)
    inside = {value.name for node in scope.nodes for value in node.outputs}
    for name in _leaving(scope, graph) & inside:
        readers.setdefault(viewed.get(name, name), []).append("")
    return _Uses(viewed, {name: tuple(nodes) for name, nodes in readers.items()})


def _leaving(scope: Scope, graph: Graph) -> set[str]:
    """Names of what is used outside of a scope."""
    if scope.block is not None:
        return {value.name for value in scope.block.outputs}
    names = {out.value.name for out in graph.outputs}
    for item in graph.body:
        if not isinstance(item, Node):
            names |= {value.name for value in (*item.carried, *item.invariants)}
        elif item not in scope.nodes:
            names |= {value.name for value in item.operands}
    return names


def _of_chain(
    chain: Sequence[Node], uses: _Uses, training: bool, *, fused: bool
) -> dict[str, Share]:
    found = {node.name: Share(node is chain[0], fused) for node in chain}
    made = {uses.root(value) for node in chain for value in node.outputs}
    readers: dict[str, tuple[Share, int, Value]] = {}  # of what comes from outside
    for node in chain:
        for at, value in enumerate(node.operands):
            if uses.root(value) not in made and uses.root(value) not in readers:
                readers[uses.root(value)] = (found[node.name], at, value)
    for share, at, _ in readers.values():
        _add(share.forward, at)
    kept: dict[str, tuple[Share, int, Value]] = {}  # of what is made here and is in memory
    for node in chain:
        for at, value in enumerate(node.outputs, start=len(node.operands)):
            names = uses.readers.get(uses.root(value), ())
            if not found.keys() >= set(names) or not names:
                kept[value.name] = (found[node.name], at, value)
                _add(found[node.name].forward, at)
    if training:
        _backward(chain, found, uses, readers, kept)
    return found


def _backward(
    chain: Sequence[Node],
    found: Mapping[str, Share],
    uses: _Uses,
    readers: Mapping[str, tuple[Share, int, Value]],
    kept: Mapping[str, tuple[Share, int, Value]],
) -> None:
    """Add what backward moves."""
    needed = {uses.root(value) for node in chain for value in saved_values(node)}
    if not needed:  # sums: gradients pass through, and those of what others read too are added up
        for share, at, value in readers.values():
            others = [n for n in uses.readers.get(uses.root(value), ()) if n not in found]
            if value.differentiable and others:
                _add(share.backward, at, _ADDED)
        return
    for share, at, value in kept.values():
        if value.differentiable:
            _add(share.backward, at)
    known = {name: each for name, each in (*readers.items(), *kept.items())}
    for name in needed if needed <= known.keys() else readers:
        share, at, _ = known[name]
        _add(share.backward, at)
    alike = _alike(chain, uses)
    for name, (share, at, value) in readers.items():
        if value.differentiable and name not in alike:
            _add(share.backward, at)
    for node in chain:  # the gradient of a weight is summed up over tokens: all is read once more
        size = prod(node.output.type.shape)
        if any(v.differentiable and prod(v.type.shape) < size for v in node.operands):
            _add(found[node.name].backward, len(node.operands), 2)


def _alike(chain: Sequence[Node], uses: _Uses) -> set[str]:
    """What is added to another operand of the same shape: its gradient is that of the other."""
    found: set[str] = set()
    for node in chain:
        if saved_values(node) or operator_of(node).heavy:
            continue
        same = [v for v in node.operands if v.type.shape == node.output.type.shape]
        found |= {uses.root(value) for value in same[1:]}
    return found


def _add(side: dict[int, int], at: int, times: int = 1) -> None:
    side[at] = side.get(at, 0) + times


__all__ = ["Share", "shares", "streams"]
