"""A planned graph with smaller sizes, cut in the same way: what `plan verify` can run anywhere.

Factor rules tie the dims of a node's operands and results together.  Over the whole graph they
leave a few independent sizes, the *atoms*: a dim that one op sees as a whole and a reshape
takes apart into heads and head width is the product of two.  Each atom gets the smallest size that
keeps the plan's structure, then every shape and every argument that holds a size follows.

What keeps the structure: no size becomes 1 (a size-1 dim has no factor); what the plan cuts evenly
stays a multiple of the ways it is cut, what it cuts unevenly stays uneven; ratios that an op
fixes (halves of a rotary embedding, a fused projection) stay; a loop keeps two layers of each kind.
Sizes whose role is not known (an op without a rule, a table read at computed places) stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

import torch

from ...compat.torch import fake_tensors
from ...facts.mesh import Mesh
from ...facts.spec import Spec, is_shard
from ..graph import Graph, Node, Param, Value, originals
from ..ops.registry import operator_of, rule_of
from ..ops.rule import Choice
from ..ops.sizes import Size, Sizes
from .interpret import interpret
from .resizing import labelled, params_of, rewrite, tie_graph, values_of

# Smallest sizes that are chosen: of any atom, of a sequence, of a vocabulary.
_LEAST, _LEAST_TOKENS, _LEAST_ROWS = 4, 16, 32
_LAYERS_PER_KIND = 2


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smaller graph, and the sizes that changed: (what, from, to)."""

    graph: Graph
    changes: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """A graph, the choices by node, and every spec that a value takes on its way, by its name."""

    graph: Graph
    choices: Mapping[str, tuple[Choice, ...]]
    specs: Iterable[tuple[str, Spec]]  # repeats allowed


def shrink(
    planned: Sequence[Planned], old: Mesh, new: Mesh, *, tokens_only: bool = False
) -> list[Shrunk]:
    """Graphs of one model with smaller sizes that their choices and specs fit on `new`.

    Parameters and batch stay alike in all of them.  Each axis size of `new` divides that of `old`.
    `tokens_only`: only dims labelled as batch or sequence change.  Raises ValueError if a smaller
    graph does not come out right, naming the node.
    """
    if any(a % b for a, b in zip(old.sizes, new.sizes, strict=True)):
        raise ValueError(f"mesh {new} does not divide mesh {old}")
    sums: list[tuple[Size, Size, int]] = []
    every = [Sizes(sums=sums) for _ in planned]
    for atoms, one in zip(every, planned, strict=True):
        tie_graph(atoms, one.graph)
    for atoms, one in zip(every[1:], planned[1:], strict=True):
        _tie_graphs(every[0], planned[0].graph, atoms, one.graph)
    demands = _Demands(old.sizes, new.sizes)
    floors: dict[Size, int] = {}
    for atoms, one in zip(every, planned, strict=True):
        values = {value.name: value for value in values_of(one.graph)}
        for node in one.graph.nodes:
            demands.node(atoms, node, one.choices[node.name])
        for name, spec in one.specs:
            demands.value(atoms, values[name], spec)
        for atom, floor in _floors(atoms, one.graph, tokens_only).items():
            floors[atom] = max(floor, floors.get(atom, 0))
    sizes = _choose(every[0], demands, floors)
    found: list[Shrunk] = []
    windows: dict[int, int] = {}
    for atoms, one in zip(every, planned, strict=True):
        order = _every if tokens_only else _few_of_each
        small = rewrite(one.graph, atoms, sizes, windows, order)
        _check(one.graph, small, one.choices, new)
        found.append(Shrunk(small, _changes(one.graph, small)))
    return found


# --- layers --------------------------------------------------------------------------------------


def _every(order: tuple[int, ...]) -> tuple[int, ...]:
    return order


def _few_of_each(order: tuple[int, ...]) -> tuple[int, ...]:
    """Two layers of each kind."""
    kept: list[int] = []
    for kind in order:
        if kept.count(kind) < _LAYERS_PER_KIND:
            kept.append(kind)
    return tuple(kept)


# --- several graphs of one model ----------------------------------------------------------------


def _tie_graphs(ours: Sizes, graph: Graph, theirs: Sizes, other: Graph) -> None:
    """Two graphs of one model have the same parameters, and inputs of one batch."""
    known = dict(_named_params(graph))
    for name, value in _named_params(other):
        if name in known:
            pairs = zip(ours.all_of(known[name]), theirs.all_of(value), strict=True)
            for x, y in pairs:
                ours.equate([x], [y])
    batch = [labelled(atoms, g, "b") for atoms, g in ((ours, graph), (theirs, other))]
    for x in batch[0]:
        for y in batch[1]:
            ours.equate([x], [y])


def _named_params(graph: Graph) -> Iterator[tuple[str, Value]]:
    """Every parameter by a name that all graphs of a model have for it."""
    yield from ((param.name, param.value) for param in graph.params)
    for loop in graph.loops:
        for kind, block in enumerate(loop.blocks):
            yield from ((f"{loop.path} {kind} {p.name}", p.value) for p in block.params)


# --- what the plan asks of the sizes ------------------------------------------------------------


@dataclass(slots=True)
class _Demands:
    """Per atom: the numbers that must divide it, and those that must not."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    multiple: dict[Size, set[int]] = field(default_factory=dict)
    uneven: dict[Size, set[int]] = field(default_factory=dict)

    def node(self, atoms: Sizes, node: Node, choices: Sequence[Choice]) -> None:
        """Each factor is cut by the axes that chose it."""
        rule = rule_of(node)
        tensors = [*zip(node.operands, rule.operands, strict=True)]
        tensors += [*zip(node.outputs, rule.results, strict=True)]
        for factor in {factor for choice in choices for factor in rule.cuts(choice)}:
            axes = [i for i, choice in enumerate(choices) if factor in rule.cuts(choice)]
            for value, dims in tensors:
                for dim, names in enumerate(dims):
                    if factor in names:  # a factor that may be cut is the major one of its dim
                        whole = atoms.flat([atoms.dim(value, dim)])
                        self._cut(_leading(whole, rule.sizes[factor]), axes)

    def value(self, atoms: Sizes, value: Value, spec: Spec) -> None:
        """Each dim is cut by the axes that shard it."""
        for dim in {state for state in spec if is_shard(state)}:
            axes = [i for i, state in enumerate(spec) if state == dim]
            self._cut(atoms.flat([atoms.dim(value, dim)]), axes)

    def _cut(self, items: Sequence[Size], axes: Sequence[int]) -> None:
        before = prod(self.old[axis] for axis in axes)
        ways = prod(self.new[axis] for axis in axes)
        if ways == 1:
            return
        if prod(atom.size for atom in items) % before:
            if len(items) == 1:
                self.uneven.setdefault(items[0], set()).add(ways)
            return
        for atom in items:  # the major ones first: they are what is cut
            share = gcd(atom.size, ways)
            self.multiple.setdefault(atom, set()).add(share)
            ways //= share

    def met(self, atom: Size, size: int) -> bool:
        """Would `size` do for `atom`?"""
        return all(size % n == 0 for n in self.multiple.get(atom, ())) and all(
            size % n and size >= n for n in self.uneven.get(atom, ())
        )


def _leading(items: Sequence[Size], size: int) -> list[Size]:
    """The major atoms whose product is `size`."""
    taken: list[Size] = []
    for atom in items:
        if prod(a.size for a in taken) >= size:
            break
        taken.append(atom)
    return taken


def _floors(atoms: Sizes, graph: Graph, tokens_only: bool) -> dict[Size, int]:
    """The smallest size of each atom that may change."""
    floors: dict[Size, int] = {}
    for item in graph.inputs:
        for dim, label in enumerate(item.labels):
            if label:
                for atom in atoms.flat([atoms.dim(item.value, dim)]):
                    floors[atom] = _LEAST if label == "b" else _LEAST_TOKENS
    if tokens_only:
        return floors
    for node in graph.nodes:
        for limit in operator_of(node).limits(node).values():
            for atom in atoms.flat([atoms.dim(limit.table, limit.dim)]):
                floors[atom] = max(floors.get(atom, 0), _LEAST_ROWS)
    for dim in atoms.dims.values():
        for atom in atoms.flat([dim]):
            floors.setdefault(atom, _LEAST)
    return floors


def _choose(atoms: Sizes, demands: _Demands, floors: Mapping[Size, int]) -> dict[Size, int]:
    """A new size for every atom that changes."""
    chosen: dict[Size, int] = {}
    taken: set[int] = set()
    for group in _groups(atoms, floors):
        base, _ = group[0]
        if any(atom.fixed or atom not in floors for atom, _ in group):
            continue
        floor = max(floors[atom] - offset for atom, offset in group)
        fits = [
            size
            for size in range(max(floor, 2), min(base.size, floor + 256))
            if all(size + k > 1 and demands.met(atom, size + k) for atom, k in group)
            and (base.size % 2 or size % 2 == 0)  # even stays even
        ]
        # different sizes for different things: a dim taken for another then shows
        size = next((n for n in fits if n not in taken), fits[0] if fits else base.size)
        taken.add(size)
        chosen.update({atom: size + offset for atom, offset in group})
    return chosen


def _groups(atoms: Sizes, floors: Mapping[Size, int]) -> list[list[tuple[Size, int]]]:
    """Atoms that differ by a constant from one another: (atom, its size minus the first's)."""
    near: dict[Size, list[tuple[Size, int]]] = {}
    for a, b, offset in atoms.sums:
        x, y = atoms.flat([a]), atoms.flat([b])
        if len(x) != 1 or len(y) != 1:
            atoms.fix(a, b)
            continue
        near.setdefault(y[0], []).append((x[0], offset))
        near.setdefault(x[0], []).append((y[0], -offset))
    seen: set[Size] = set()
    groups: list[list[tuple[Size, int]]] = []
    for first in [*floors, *near]:
        if first in seen:
            continue
        seen.add(first)
        group = [(first, 0)]
        for atom, offset in group:
            for other, more in near.get(atom, ()):
                if other not in seen:
                    seen.add(other)
                    group.append((other, offset + more))
        groups.append(group)
    return groups


# --- the proof that it came out right -----------------------------------------------------------


def _check(
    graph: Graph, small: Graph, choices: Mapping[str, tuple[Choice, ...]], mesh: Mesh
) -> None:
    """Every op gives the shape that the graph says, has the factors that it had, and can be cut."""
    for old, new in zip(graph.nodes, small.nodes, strict=True):
        a, b = rule_of(old), rule_of(new)
        alike = (a.operands, a.results, a.whole) == (b.operands, b.results, b.whole)
        if not alike or b.ways(choices[new.name], mesh.sizes) is None:
            raise ValueError(f"{new.loc}: `{new.op}` cannot be planned alike with sizes {b.sizes}")
    with fake_tensors():
        state = {name: _empty(value) for name, value in state_of(small).items()}
        interpret(small, state, {item.name: _empty(item.value) for item in small.inputs})


def _empty(value: Value) -> torch.Tensor:
    return torch.empty(value.type.shape, dtype=value.type.dtype)


def state_of(graph: Graph) -> dict[str, Value]:
    """Every parameter and persistent buffer by its original name, layers counted out."""
    return {name: p.value for name, p in _original_params(graph) if p.kind != "constant"}


def buffers_of(graph: Graph) -> frozenset[str]:
    """The names in `state_of` that are buffers."""
    return frozenset(name for name, param in _original_params(graph) if param.kind == "buffer")


def _original_params(graph: Graph) -> Iterator[tuple[str, Param]]:
    yield from ((param.name, param) for param in originals(graph.params))
    for loop in graph.loops:
        blocks = [originals(block.params) for block in loop.blocks]
        for index, kind in enumerate(loop.order):
            yield from ((f"{loop.path}.{index}.{param.name}", param) for param in blocks[kind])


def _changes(graph: Graph, small: Graph) -> tuple[tuple[str, int, int], ...]:
    """Batch, sequence, layers, and the sizes of parameters, each once, where they changed."""
    words = {"b": "batch", "s": "sequence"}
    found: dict[tuple[str, int, int], None] = {}
    for a, b in zip(graph.inputs, small.inputs, strict=True):
        for label, x, y in zip(a.labels, a.value.type.shape, b.value.type.shape, strict=False):
            if label:
                found[words.get(label, label), x, y] = None
    for a, b in zip(graph.loops, small.loops, strict=True):
        found[f"layers of {a.path}", len(a.order), len(b.order)] = None
    for a, b in zip(params_of(graph), params_of(small), strict=True):
        for x, y in zip(a.value.type.shape, b.value.type.shape, strict=True):
            found["parameter dims", x, y] = None
    return tuple(change for change in found if change[1] != change[2])


__all__ = ["Planned", "Shrunk", "buffers_of", "shrink", "state_of"]
