"""What is computed twice is computed once: in a body, and in the layers of a loop.

Two nodes with the same operator and operands make the same values; the first one serves both.  A
node of a layer that depends on nothing of the layer, only on what the loop takes from outside,
is moved in front of the loop (cosines and sines of positions, masks).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from ..graph import Arg, Block, Graph, Loop, Node, Value
from ..graph.rewrite import with_operands
from ..ops.live import live_items

_Key: TypeAlias = tuple[object, ...]


def computed_once(graph: Graph) -> Graph:
    """`graph`, folded, without repeated nodes and with its loops' invariants computed outside."""
    known = _Known()
    body: list[Node | Loop] = []
    for item in graph.body:
        if isinstance(item, Loop):
            ahead, loop = _hoisted(known.renamed(item), known)
            body += [*ahead, loop]
        elif (node := known.first(with_operands(item, known.by))) is not None:
            body.append(node)
    outputs = tuple(replace(out, value=known.now(out.value)) for out in graph.outputs)
    read = [out.value.name for out in outputs]
    return replace(graph, body=live_items(body, read), outputs=outputs)


@dataclass(slots=True)
class _Known:
    """What a body has computed so far; `by` has what stands for the results of repeated nodes."""

    made: dict[_Key, Node] = field(default_factory=dict[_Key, Node])
    by: dict[str, Value] = field(default_factory=dict[str, Value])

    def first(self, node: Node) -> Node | None:
        """`node`, if nothing before it computes the same; else None, and that stands for it."""
        if not repeatable(node):
            return node
        earlier = self.made.setdefault(_key(node), node)
        if earlier is node:
            return node
        self.by |= {
            value.name: same for value, same in zip(node.outputs, earlier.outputs, strict=True)
        }
        return None

    def now(self, value: Value) -> Value:
        """What stands for `value`."""
        return self.by.get(value.name, value)

    def renamed(self, loop: Loop) -> Loop:
        """`loop` with what it takes from outside replaced."""
        return replace(
            loop,
            carried=tuple(map(self.now, loop.carried)),
            invariants=tuple(map(self.now, loop.invariants)),
        )


def repeatable(node: Node) -> bool:
    """Does the node give the same result whenever it runs, and change nothing?"""
    namespace, _, rest = node.op.partition(".")
    if namespace != "aten":
        return False
    packet, _, overload = rest.partition(".")
    tags = getattr(getattr(torch.ops.aten, packet), overload).tags
    return torch.Tag.nondeterministic_seeded not in tags


def _key(node: Node) -> _Key:
    args = tuple((name, _plain(arg)) for name, arg in node.args)
    return node.op, args, tuple(value.type for value in node.outputs)


def _plain(arg: Arg) -> object:
    """An argument as part of a key; 1, 1.0 and True are not the same."""
    if isinstance(arg, tuple):
        return tuple(map(_plain, arg))
    return arg.name if isinstance(arg, Value) else (type(arg), arg)


# --- loops -----------------------------------------------------------------------------------


def _hoisted(loop: Loop, known: _Known) -> tuple[list[Node], Loop]:
    """Nodes to run before `loop`, and the loop without them."""
    n = len(loop.carried)
    ahead: list[Node] = []
    bodies: list[tuple[Block, tuple[Node, ...], dict[str, Value]]] = []
    for block in loop.blocks:
        outside = dict(zip((v.name for v in block.inputs[n:]), loop.invariants, strict=True))
        nodes, moved = _moved(loop, block, outside, known)
        ahead += moved
        bodies.append((block, nodes, outside))
    wanted = list(dict.fromkeys(v for _, nodes, outside in bodies for v in _taken(nodes, outside)))
    blocks = tuple(
        _over(block, nodes, outside, wanted, f"{loop.name}_{kind}")
        for kind, (block, nodes, outside) in enumerate(bodies)
    )
    return ahead, replace(loop, invariants=tuple(wanted), blocks=blocks)


def _moved(
    loop: Loop, block: Block, outside: dict[str, Value], known: _Known
) -> tuple[tuple[Node, ...], list[Node]]:
    """(the nodes that stay in the block, those to run before the loop).

    `outside` maps what a block knows of the outside to the values there, and grows by what moves.
    """
    own = _Known()
    stay: list[Node] = []
    moved: list[Node] = []
    results = {value.name for value in block.outputs}
    for node in block.nodes:
        if results.intersection(value.name for value in node.outputs):
            stay.append(with_operands(node, own.by))
            continue
        if not (repeatable(node) and all(value.name in outside for value in node.operands)):
            if (first := own.first(with_operands(node, own.by))) is not None:
                stay.append(first)
            continue
        outside_calls = tuple(c for c in node.loc.calls if not c.path.startswith(f"{loop.path}."))
        loc = replace(node.loc, calls=outside_calls)
        outer = replace(with_operands(node, outside), loc=loc)
        if known.first(outer) is not None:
            moved.append(outer)
        outside |= {value.name: known.now(value) for value in node.outputs}
    return tuple(stay), moved


def _taken(nodes: Sequence[Node], outside: Mapping[str, Value]) -> Iterable[Value]:
    """The outer values that the nodes of a block read, in order."""
    for node in nodes:
        for value in node.operands:
            if value.name in outside:
                yield outside[value.name]


def _over(
    block: Block,
    nodes: tuple[Node, ...],
    outside: Mapping[str, Value],
    wanted: Sequence[Value],
    prefix: str,
) -> Block:
    """`block` that takes the outer values `wanted`."""
    carried = [value for value in block.inputs if value.name not in outside]
    inner = {outer.name: replace(outer, name=f"{prefix}_{outer.name}") for outer in wanted}
    by = {name: inner[outer.name] for name, outer in outside.items() if outer.name in inner}
    return replace(
        block,
        inputs=(*carried, *(inner[outer.name] for outer in wanted)),
        nodes=tuple(with_operands(node, by) for node in nodes),
    )


__all__ = ["computed_once", "repeatable"]
