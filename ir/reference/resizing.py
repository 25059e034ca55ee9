"""Graphs with other sizes: which dims are the same number, and a graph written anew.

Factor rules tie the dims of a node's operands and results together.  Over the whole graph they
leave a few independent sizes, the *atoms* (`ops/sizes.py`); with a new size for some of them every
shape and every argument that holds a size follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from ..graph import Extent, Graph, Input, Loop, Node, Param, TensorType, Value
from ..graph.rewrite import with_args
from ..ops.registry import operator_of, rule_of
from ..ops.rule import opaque_rule
from ..ops.sizes import Resizing, Size, Sizes
from .widen import rebuilt

# --- sizes and how they hang together -----------------------------------------------------------


def params_of(graph: Graph) -> Iterator[Param]:
    yield from graph.params
    for loop in graph.loops:
        for block in loop.blocks:
            yield from block.params


def values_of(graph: Graph) -> Iterator[Value]:
    yield from (item.value for item in graph.inputs)
    yield from (param.value for param in params_of(graph))
    for node in graph.nodes:
        yield from node.outputs
    for loop in graph.loops:
        yield from loop.outputs
        for block in loop.blocks:
            yield from block.inputs


def tie_graph(atoms: Sizes, graph: Graph) -> None:
    for node in graph.nodes:
        _tie_node(atoms, node)
    for loop in graph.loops:
        _tie_loop(atoms, loop)
    _fix_tables(atoms, graph)


def labelled(atoms: Sizes, graph: Graph, label: str) -> list[Size]:
    """The sizes of the inputs' dims of that label."""
    return [
        atoms.dim(item.value, dim)
        for item in graph.inputs
        for dim, name in enumerate(item.labels)
        if name == label
    ]


def _tie_loop(atoms: Sizes, loop: Loop) -> None:
    outer = (*loop.carried, *loop.invariants)
    for block in loop.blocks:
        pairs = [*zip(block.inputs, outer, strict=True)]
        pairs += [*zip(block.outputs, loop.outputs, strict=True)]
        pairs += [*zip(block.outputs, loop.carried, strict=True)]
        for a, b in pairs:
            for x, y in zip(atoms.all_of(a), atoms.all_of(b), strict=True):
                atoms.equate([x], [y])


def _tie_node(atoms: Sizes, node: Node) -> None:
    """What the node says about the sizes of its operands and results."""
    operator, rule = operator_of(node), rule_of(node)
    told = operator.ties(atoms, node)
    shapes = [v.type.shape for v in node.operands], [v.type.shape for v in node.outputs]
    if rule == opaque_rule(*shapes):
        if not told:
            atoms.fix(*(a for v in (*node.operands, *node.outputs) for a in atoms.all_of(v)))
        return
    factors = {name: Size(size) for name, size in rule.sizes.items()}
    for value, dims in zip(
        (*node.operands, *node.outputs), (*rule.operands, *rule.results), strict=True
    ):
        for dim, names in enumerate(dims):
            atoms.equate([atoms.dim(value, dim)], [factors[name] for name in names])
    if operator.rigid:
        atoms.fix(*(factors[name] for name in rule.whole))


def _fix_tables(atoms: Sizes, graph: Graph) -> None:
    """Tables that are read at computed places (positions) keep their rows."""
    direct = _passed_on(graph)
    for node in graph.nodes:
        for name, limit in operator_of(node).limits(node).items():
            indices = node.arg(name)
            if limit.read and isinstance(indices, Value) and indices.name not in direct:
                atoms.fix(atoms.dim(limit.table, limit.dim))


def _passed_on(graph: Graph) -> set[str]:
    """Values that hold the numbers of an input, only arranged otherwise."""
    direct = {item.value.name for item in graph.inputs}
    for node in graph.nodes:
        aliases = operator_of(node).aliases
        if aliases and all(value.name in direct for value in node.operands):
            direct |= {out.name for out in node.outputs}
    return direct


# --- the graph with the new sizes ---------------------------------------------------------------


def rewrite(
    graph: Graph,
    atoms: Sizes,
    sizes: Mapping[Size, int],
    windows: dict[int, int],
    order: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda order: order,
    *,
    shortens: bool = True,
) -> Graph:
    """`graph`, tied as `atoms`, with new sizes for some of these.

    `windows` are those of attention, before and after; new ones are noted there.  `order` is
    applied to the orders of loops' blocks.  `shortens`: long contexts become short ones.
    """

    def shape(value: Value) -> tuple[int, ...]:
        return tuple(
            prod(sizes.get(atom, atom.size) for atom in atoms.flat([item]))
            for item in atoms.all_of(value)
        )

    def value(old: Value) -> Value:
        return replace(old, type=TensorType(shape(old), old.type.dtype))

    def node(old: Node) -> Node:
        same = all(shape(v) == v.type.shape for v in (*old.operands, *old.outputs))
        return old if same else with_args(old, **operator_of(old).resized(old, new))

    new, starts = Resizing(shape, windows, shortens), _part_starts(graph, shape)

    def param(old: Param) -> Param:
        if old.data is not None:
            return replace(old, data=_cut_data(old.data, shape(old.value)))
        part = old.part and replace(old.part, start=starts[old.value.name])
        return replace(old, part=part)

    return rebuilt(graph, value=value, node=node, param=param, order=order)


def _part_starts(graph: Graph, shape: Callable[[Value], tuple[int, ...]]) -> dict[str, int]:
    """Where parts of an original tensor begin: they lie one after another, in their order."""
    starts: dict[str, int] = {}
    blocks = (block.params for loop in graph.loops for block in loop.blocks)
    for params in (graph.params, *blocks):
        ends: dict[str, int] = {}
        for param in params:
            if (part := param.part) is not None:
                starts[param.value.name] = ends.get(part.name, 0)
                ends[part.name] = starts[param.value.name] + shape(param.value)[part.dim]
    return starts


def _cut_data(data: object, shape: Sequence[int]) -> tuple[object, ...] | complex | bool:
    """The first entries of nested tuples along every dim."""
    if not shape:
        assert isinstance(data, (complex, float, int))
        return data
    assert isinstance(data, tuple)
    return tuple(_cut_data(item, shape[1:]) for item in data[: shape[0]])


# --- other numbers of sequences -----------------------------------------------------------------


def with_batch(graph: Graph, size: int) -> Graph | None:
    """The graph of a batch of so many sequences, as a capture of the model would give it.

    None where that is not told without one: where what the model does may depend on their number,
    for more of them where constants of the model are made for as many as `graph` has, and where it
    has only one, whose dims are told from no others.
    """
    known = {n for item in graph.inputs for n, label in _dims(item) if label == "b"}
    free = all(_may_have(item, size) for item in graph.inputs)
    if not free or len(known) != 1:
        return None
    atoms = Sizes()
    tie_graph(atoms, graph)
    found = {a for item in labelled(atoms, graph, "b") for a in atoms.flat([item])}
    if len(found) != 1 or any(atom.fixed or atom.size not in known for atom in found):
        return None
    if size > max(known) and found & _of_constants(atoms, graph):
        return None
    made = rewrite(graph, atoms, dict.fromkeys(found, size), {}, shortens=False)
    return made if size > 1 else replace(made, inputs=tuple(map(_of_one, made.inputs)))


def _dims(item: Input) -> Iterator[tuple[int, str]]:
    return zip(item.value.type.shape, item.labels, strict=False)


def _of_constants(atoms: Sizes, graph: Graph) -> set[Size]:
    """The sizes of parameters whose values the graph has."""
    known = (param.value for param in params_of(graph) if param.data is not None)
    return {atom for value in known for dim in atoms.all_of(value) for atom in atoms.flat([dim])}


def _may_have(item: Input, size: int) -> bool:
    """Is the module the same one for inputs of so many sequences?"""
    extents: tuple[Extent | None, ...] = item.extents or (None,) * len(item.labels)
    return all(
        label != "b" or extent is not None and extent.allows(size)
        for label, extent in zip(item.labels, extents, strict=False)
    )


def _of_one(item: Input) -> Input:
    """An input of one sequence, of which there are no others: operators do not cut a dim of one."""
    labelled_extents = zip(item.labels, item.extents, strict=False)
    extents = tuple(None if label == "b" else extent for label, extent in labelled_extents)
    return replace(item, extents=extents)


__all__ = ["labelled", "params_of", "rewrite", "tie_graph", "values_of", "with_batch"]
