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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, prod

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...facts.mesh import Mesh
from ...facts.spec import Spec, is_shard
from ..graph import Arg, Graph, Loop, Node, Param, TensorType, Value, originals
from ..graph.rewrite import with_args
from ..ops.attention import decompressing, values_in_keys
from ..ops.registry import find_op, rule_of
from ..ops.rule import Choice, opaque_rule
from .interpret import interpret
from .widen import rebuilt

# Smallest sizes that are chosen: of any atom, of a sequence, of a vocabulary.
_LEAST, _LEAST_TOKENS, _LEAST_ROWS = 4, 16, 32
_MOST_CONTEXT = 32  # tokens that are cached before
# Ratios between a dim and its parts above this are taken for differences.
_RATIO = 8
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
    sums: list[tuple[_Atom, _Atom, int]] = []
    every = [_Atoms(sums=sums) for _ in planned]
    for atoms, one in zip(every, planned, strict=True):
        _tie_graph(atoms, one.graph)
    for atoms, one in zip(every[1:], planned[1:], strict=True):
        _tie_graphs(every[0], planned[0].graph, atoms, one.graph)
    demands = _Demands(old.sizes, new.sizes)
    floors: dict[_Atom, int] = {}
    for atoms, one in zip(every, planned, strict=True):
        values = {value.name: value for value in _values(one.graph)}
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
        small = _rewrite(one.graph, atoms, sizes, windows, shorten=not tokens_only)
        _check(one.graph, small, one.choices, new)
        found.append(Shrunk(small, _changes(one.graph, small)))
    return found


# --- sizes and how they hang together -----------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Atom:
    """A size; it may turn out to equal another's (`same`), or to be a product (`parts`)."""

    size: int
    fixed: bool = False
    same: _Atom | None = None
    parts: tuple[_Atom, ...] = ()


@dataclass(slots=True)
class _Atoms:
    """The atoms of every dim of every value; `sums` holds (a, b, c) for a = b + c."""

    dims: dict[tuple[str, int], _Atom] = field(default_factory=dict)
    sums: list[tuple[_Atom, _Atom, int]] = field(default_factory=list)

    def dim(self, value: Value, dim: int) -> _Atom:
        """The size of one dim."""
        dim %= len(value.type.shape)
        return self.dims.setdefault((value.name, dim), _Atom(value.type.shape[dim]))

    def all_of(self, value: Value) -> list[_Atom]:
        """The sizes of all dims."""
        return [self.dim(value, i) for i in range(len(value.type.shape))]

    def flat(self, items: Sequence[_Atom]) -> list[_Atom]:
        """What the product of `items` is made of, major to minor; sizes of 1 are left out."""
        out: list[_Atom] = []
        for item in items:
            while item.same is not None:
                item = item.same
            if item.parts:
                out += self.flat(item.parts)
            elif item.size != 1:
                out.append(item)
        return out

    def fix(self, *items: _Atom) -> None:
        """These sizes stay."""
        for atom in self.flat(items):
            atom.fixed = True

    def equate(self, left: Sequence[_Atom], right: Sequence[_Atom]) -> None:
        """Two products are the same number, made up in the same order; else both stay."""
        a, b = self.flat(left), self.flat(right)
        while a and b:
            x, y = a.pop(), b.pop()
            if x.same is not None or x.parts or y.same is not None or y.parts:
                a += self.flat([x])  # changed by an earlier round
                b += self.flat([y])
            elif x.size == y.size:
                if x is not y:
                    y.same, x.fixed = x, x.fixed or y.fixed
            elif not x.size or not y.size:
                self.fix(x, y, *a, *b)  # empty: a product that says nothing of its other sizes
                return
            elif x.size % y.size == 0:
                a.append(_split(x, y))
            elif y.size % x.size == 0:
                b.append(_split(y, x))
            else:
                self.fix(x, y, *a, *b)
                return
        self.fix(*a, *b)

    def ratio(self, atom: _Atom, times: int, unit: _Atom) -> None:
        """`atom` is `times` units, for good."""
        self.equate([atom], [_Atom(times, fixed=True), unit])


def _split(atom: _Atom, minor: _Atom) -> _Atom:
    """Make `atom` a product whose minor part is `minor`; gives the major part."""
    major = _Atom(atom.size // minor.size, atom.fixed)
    minor.fixed = minor.fixed or atom.fixed
    atom.parts = (major, minor)
    return major


def _params(graph: Graph) -> Iterator[Param]:
    yield from graph.params
    for loop in graph.loops:
        for block in loop.blocks:
            yield from block.params


def _values(graph: Graph) -> Iterator[Value]:
    yield from (item.value for item in graph.inputs)
    yield from (param.value for param in _params(graph))
    for node in graph.nodes:
        yield from node.outputs
    for loop in graph.loops:
        yield from loop.outputs
        for block in loop.blocks:
            yield from block.inputs


def _tie_graph(atoms: _Atoms, graph: Graph) -> None:
    for node in graph.nodes:
        _tie_node(atoms, node)
    for loop in graph.loops:
        _tie_loop(atoms, loop)
    _fix_tables(atoms, graph)


def _tie_graphs(ours: _Atoms, graph: Graph, theirs: _Atoms, other: Graph) -> None:
    """Two graphs of one model have the same parameters, and inputs of one batch."""
    known = dict(_named_params(graph))
    for name, value in _named_params(other):
        if name in known:
            pairs = zip(ours.all_of(known[name]), theirs.all_of(value), strict=True)
            for x, y in pairs:
                ours.equate([x], [y])
    batch = [_labelled(atoms, g, "b") for atoms, g in ((ours, graph), (theirs, other))]
    for x in batch[0]:
        for y in batch[1]:
            ours.equate([x], [y])


def _named_params(graph: Graph) -> Iterator[tuple[str, Value]]:
    """Every parameter by a name that all graphs of a model have for it."""
    yield from ((param.name, param.value) for param in graph.params)
    for loop in graph.loops:
        for kind, block in enumerate(loop.blocks):
            yield from ((f"{loop.path} {kind} {p.name}", p.value) for p in block.params)


def _labelled(atoms: _Atoms, graph: Graph, label: str) -> list[_Atom]:
    """The sizes of the inputs' dims of that label."""
    return [
        atoms.dim(item.value, dim)
        for item in graph.inputs
        for dim, name in enumerate(item.labels)
        if name == label
    ]


def _tie_loop(atoms: _Atoms, loop: Loop) -> None:
    outer = (*loop.carried, *loop.invariants)
    for block in loop.blocks:
        pairs = [*zip(block.inputs, outer, strict=True)]
        pairs += [*zip(block.outputs, loop.outputs, strict=True)]
        pairs += [*zip(block.outputs, loop.carried, strict=True)]
        for a, b in pairs:
            for x, y in zip(atoms.all_of(a), atoms.all_of(b), strict=True):
                atoms.equate([x], [y])


def _tie_node(atoms: _Atoms, node: Node) -> None:
    """What the node says about the sizes of its operands and results."""
    if node.op in _TIES:
        _TIES[node.op](atoms, node)
    rule = rule_of(node)
    shapes = [v.type.shape for v in node.operands], [v.type.shape for v in node.outputs]
    if rule == opaque_rule(*shapes):
        if node.op not in _TIES:
            atoms.fix(*(a for v in (*node.operands, *node.outputs) for a in atoms.all_of(v)))
        return
    factors = {name: _Atom(size) for name, size in rule.sizes.items()}
    for value, dims in zip(
        (*node.operands, *node.outputs), (*rule.operands, *rule.results), strict=True
    ):
        for dim, names in enumerate(dims):
            atoms.equate([atoms.dim(value, dim)], [factors[name] for name in names])
    if "view" in node.op or "reshape" in node.op or "flatten" in node.op:
        atoms.fix(*(factors[name] for name in rule.whole))


def _tie_same(atoms: _Atoms, node: Node) -> None:
    """The result has the shape of the operand."""
    pairs = zip(atoms.all_of(node.operands[0]), atoms.all_of(node.output), strict=True)
    for x, y in pairs:
        atoms.equate([x], [y])


def _tie_free(atoms: _Atoms, node: Node) -> None:
    """Any size will do; an argument follows it."""


def _tie_slice(atoms: _Atoms, node: Node) -> None:
    operand = node.operands[0]
    dim = node.int_arg("dim") % len(operand.type.shape)
    x, y = atoms.dim(operand, dim), atoms.dim(node.output, dim)
    start = _start(node, x.size)
    unit = gcd(start, x.size, y.size)
    if x.size == y.size:
        atoms.equate([x], [y])
    elif node.int_arg("step") != 1:
        atoms.fix(x, y)
    elif x.size // unit <= _RATIO:
        shared = _Atom(unit)
        atoms.ratio(x, x.size // unit, shared)
        atoms.ratio(y, y.size // unit, shared)
    elif x.size - y.size <= _RATIO:
        atoms.sums.append((x, y, x.size - y.size))
    elif start == 0:
        atoms.fix(x)  # the beginning of a table, as long as needed
    else:
        atoms.fix(x, y)


def _tie_parts(atoms: _Atoms, node: Node) -> None:
    """Split and chunk: parts of one dim."""
    operand = node.operands[0]
    dim = node.int_arg("dim") % len(operand.type.shape)
    _tie_sum(atoms, atoms.dim(operand, dim), [atoms.dim(out, dim) for out in node.outputs])


def _tie_cat(atoms: _Atoms, node: Node) -> None:
    dim = node.int_arg("dim") % len(node.output.type.shape)
    _tie_sum(atoms, atoms.dim(node.output, dim), [atoms.dim(v, dim) for v in node.operands])


def _tie_sum(atoms: _Atoms, whole: _Atom, parts: list[_Atom]) -> None:
    """`whole` is the sum of `parts`: multiples of a common unit, or one part and a few rows."""
    unit = gcd(*(part.size for part in parts))
    largest = max(parts, key=lambda part: part.size)
    if whole.size // unit <= 2 * _RATIO:
        shared = _Atom(unit)
        for item in (whole, *parts):
            atoms.ratio(item, item.size // unit, shared)
    elif whole.size - largest.size <= _RATIO:
        atoms.fix(*(part for part in parts if part is not largest))
        atoms.sums.append((whole, largest, whole.size - largest.size))
    else:
        atoms.fix(whole, *parts)


def _tie_pad(atoms: _Atoms, node: Node) -> None:
    operand, pads = node.operands[0], node.arg("pad")
    assert isinstance(pads, tuple)
    for dim in range(len(operand.type.shape)):
        x, y = atoms.dim(operand, dim), atoms.dim(node.output, dim)
        if x.size == y.size:
            atoms.equate([x], [y])
        else:
            atoms.sums.append((y, x, y.size - x.size))


def _tie_select(atoms: _Atoms, node: Node) -> None:
    operand = node.operands[0]
    dim = node.int_arg("dim")
    size = operand.type.shape[dim]
    if node.int_arg("index") not in (0, -1, size - 1):
        atoms.fix(atoms.dim(operand, dim))


def _tie_stack(atoms: _Atoms, node: Node) -> None:
    atoms.fix(atoms.dim(node.output, node.int_arg("dim")))


def _tie_unbind(atoms: _Atoms, node: Node) -> None:
    atoms.fix(atoms.dim(node.operands[0], node.int_arg("dim")))


def _tie_repeat(atoms: _Atoms, node: Node) -> None:
    """`repeats` stays."""
    dim = node.int_arg("dim") % len(node.output.type.shape)
    x, y = atoms.dim(node.operands[0], dim), atoms.dim(node.output, dim)
    atoms.equate([y], [x, _Atom(y.size // x.size, fixed=True)])


def _tie_gather(atoms: _Atoms, node: Node) -> None:
    """The result is shaped like the indices; the dim that is read keeps its rows."""
    source, index = node.operands
    dim = node.int_arg("dim") % len(source.type.shape)
    for i in range(len(source.type.shape)):
        atoms.equate([atoms.dim(index, i)], [atoms.dim(node.output, i)])
        x, y = atoms.dim(source, i), atoms.dim(index, i)
        if i == dim or x.size != y.size:
            atoms.fix(x)
        else:
            atoms.equate([x], [y])


def _tie_topk(atoms: _Atoms, node: Node) -> None:
    """What is chosen from, and how much of it, stays: a router's experts and choices."""
    dim = node.int_arg("dim")
    atoms.fix(atoms.dim(node.operands[0], dim), atoms.dim(node.output, dim))


def _tie_scatter(atoms: _Atoms, node: Node) -> None:
    """The dim that is written along stays, and that of the indices."""
    dim = node.int_arg("dim")
    atoms.fix(*(atoms.dim(value, dim) for value in node.operands))


def _tie_experts(atoms: _Atoms, node: Node) -> None:
    """Experts and choices stay, since indices name experts; gate and up are as large."""
    up = node.arg("up")
    assert isinstance(up, Value)
    atoms.fix(atoms.dim(up, 0), atoms.dim(node.operands[1], -1))
    rows, two = atoms.dim(up, 2 if node.arg("transposed") else 1), _Atom(2, fixed=True)
    unit = _Atom(rows.size // 2)
    if node.arg("gating") == "halves":
        atoms.equate([rows], [two, unit])
    elif node.arg("gating") == "pairs":
        atoms.equate([rows], [unit, two])


def _tie_heads(atoms: _Atoms, node: Node) -> None:
    """Keys and values that are made from latents: their parts fit the queries and the result."""
    up = decompressing(node)
    if up is None:
        return
    query, latent = (atoms.dim(value, 3) for value in node.operands[:2])
    made, rank, value = atoms.dim(up, 1), atoms.dim(up, 2), atoms.dim(node.output, 3)
    nope, rope = _Atom(made.size - value.size), _Atom(latent.size - rank.size)
    _tie_sum(atoms, made, [nope, value])
    _tie_sum(atoms, latent, [rank, rope])
    _tie_sum(atoms, query, [nope, rope])


_TIES: dict[str, Callable[[_Atoms, Node], None]] = {
    **dict.fromkeys(
        (
            "aten.softmax.int", "aten.log_softmax.int", "aten.cumsum.default", "aten.roll.default",
            "aten.flip.default", "aten.tril.default", "aten.triu.default",
        ),
        _tie_same,
    ),
    **dict.fromkeys(
        (
            "aten.arange.default", "aten.arange.start", "aten.arange.start_step",
            "aten.scalar_tensor.default",
        ),
        _tie_free,
    ),
    "aten.slice.Tensor": _tie_slice,
    **dict.fromkeys(
        ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"), _tie_parts
    ),
    "aten.cat.default": _tie_cat,
    **dict.fromkeys(("aten.pad.default", "aten.constant_pad_nd.default"), _tie_pad),
    "aten.select.int": _tie_select,
    "aten.unbind.int": _tie_unbind,
    "aten.stack.default": _tie_stack,
    "aten.repeat_interleave.self_int": _tie_repeat,
    "aten.gather.default": _tie_gather,
    "aten.topk.default": _tie_topk,
    **dict.fromkeys(("aten.scatter.src", "aten.scatter.value"), _tie_scatter),
    "shardwright.moe": _tie_experts,
    **dict.fromkeys(("shardwright.attention", "shardwright.cached_attention"), _tie_heads),
}  # fmt: skip


def _fix_tables(atoms: _Atoms, graph: Graph) -> None:
    """Tables that are read at computed places (positions) keep their rows."""
    direct = _passed_on(graph)
    for node in graph.nodes:
        if node.op == "aten.embedding.default":
            table, indices = node.operands
            if indices.name not in direct:
                atoms.fix(atoms.dim(table, 0))


def _passed_on(graph: Graph) -> set[str]:
    """Values that hold the numbers of an input, only arranged otherwise."""
    direct = {item.value.name for item in graph.inputs}
    for node in graph.nodes:
        op = find_op(node.op)
        moves = (op is not None and op.kind == "view") or node.op.startswith("aten.to.")
        if moves and all(value.name in direct for value in node.operands):
            direct |= {out.name for out in node.outputs}
    return direct


# --- what the plan asks of the sizes ------------------------------------------------------------


@dataclass(slots=True)
class _Demands:
    """Per atom: the numbers that must divide it, and those that must not."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    multiple: dict[_Atom, set[int]] = field(default_factory=dict)
    uneven: dict[_Atom, set[int]] = field(default_factory=dict)

    def node(self, atoms: _Atoms, node: Node, choices: Sequence[Choice]) -> None:
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

    def value(self, atoms: _Atoms, value: Value, spec: Spec) -> None:
        """Each dim is cut by the axes that shard it."""
        for dim in {state for state in spec if is_shard(state)}:
            axes = [i for i, state in enumerate(spec) if state == dim]
            self._cut(atoms.flat([atoms.dim(value, dim)]), axes)

    def _cut(self, items: Sequence[_Atom], axes: Sequence[int]) -> None:
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

    def met(self, atom: _Atom, size: int) -> bool:
        """Would `size` do for `atom`?"""
        return all(size % n == 0 for n in self.multiple.get(atom, ())) and all(
            size % n and size >= n for n in self.uneven.get(atom, ())
        )


def _leading(items: Sequence[_Atom], size: int) -> list[_Atom]:
    """The major atoms whose product is `size`."""
    taken: list[_Atom] = []
    for atom in items:
        if prod(a.size for a in taken) >= size:
            break
        taken.append(atom)
    return taken


def _floors(atoms: _Atoms, graph: Graph, tokens_only: bool) -> dict[_Atom, int]:
    """The smallest size of each atom that may change."""
    floors: dict[_Atom, int] = {}
    for item in graph.inputs:
        for dim, label in enumerate(item.labels):
            if label:
                for atom in atoms.flat([atoms.dim(item.value, dim)]):
                    floors[atom] = _LEAST if label == "b" else _LEAST_TOKENS
    if tokens_only:
        return floors
    for node in graph.nodes:
        if node.op in ("aten.embedding.default", "shardwright.cross_entropy"):
            table = node.operands[0]
            rows = 0 if node.op == "aten.embedding.default" else len(table.type.shape) - 1
            for atom in atoms.flat([atoms.dim(table, rows)]):
                floors[atom] = max(floors.get(atom, 0), _LEAST_ROWS)
    for dim in atoms.dims.values():
        for atom in atoms.flat([dim]):
            floors.setdefault(atom, _LEAST)
    return floors


def _choose(atoms: _Atoms, demands: _Demands, floors: Mapping[_Atom, int]) -> dict[_Atom, int]:
    """A new size for every atom that changes."""
    chosen: dict[_Atom, int] = {}
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


def _groups(atoms: _Atoms, floors: Mapping[_Atom, int]) -> list[list[tuple[_Atom, int]]]:
    """Atoms that differ by a constant from one another: (atom, its size minus the first's)."""
    near: dict[_Atom, list[tuple[_Atom, int]]] = {}
    for a, b, offset in atoms.sums:
        x, y = atoms.flat([a]), atoms.flat([b])
        if len(x) != 1 or len(y) != 1:
            atoms.fix(a, b)
            continue
        near.setdefault(y[0], []).append((x[0], offset))
        near.setdefault(x[0], []).append((y[0], -offset))
    seen: set[_Atom] = set()
    groups: list[list[tuple[_Atom, int]]] = []
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


# --- the graph with the new sizes ---------------------------------------------------------------


def _rewrite(
    graph: Graph,
    atoms: _Atoms,
    sizes: Mapping[_Atom, int],
    windows: dict[int, int],
    *,
    shorten: bool,
) -> Graph:
    """`windows` are those of attention, before and after; new ones are noted there."""

    def shape(value: Value) -> tuple[int, ...]:
        return tuple(
            prod(sizes.get(atom, atom.size) for atom in atoms.flat([item]))
            for item in atoms.all_of(value)
        )

    def value(old: Value) -> Value:
        return replace(old, type=TensorType(shape(old), old.type.dtype))

    def node(old: Node) -> Node:
        same = all(shape(v) == v.type.shape for v in (*old.operands, *old.outputs))
        return old if same else with_args(old, **_new_args(old, shape, windows))

    starts = _part_starts(graph, shape)

    def param(old: Param) -> Param:
        if old.data is not None:
            return replace(old, data=_cut_data(old.data, shape(old.value)))
        part = old.part and replace(old.part, start=starts[old.value.name])
        return replace(old, part=part)

    def order(old: tuple[int, ...]) -> tuple[int, ...]:
        kept: list[int] = []
        for kind in old:
            if kept.count(kind) < _LAYERS_PER_KIND:
                kept.append(kind)
        return tuple(kept)

    return rebuilt(
        graph, value=value, node=node, param=param, order=order if shorten else lambda old: old
    )


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


def _cut_data(data: object, shape: Sequence[int]) -> tuple[object, ...] | float | int | bool:
    """The first entries of nested tuples along every dim."""
    if not shape:
        assert isinstance(data, (float, int))
        return data
    assert isinstance(data, tuple)
    return tuple(_cut_data(item, shape[1:]) for item in data[: shape[0]])


def _new_args(
    node: Node, shape: Callable[[Value], tuple[int, ...]], windows: dict[int, int]
) -> dict[str, Arg]:
    """The arguments of `node` that hold a size, for the new shapes."""
    names = {name for name, _ in node.args}
    result = shape(node.output)
    given = tuple(size for value in node.operands[:1] for size in shape(value))
    changes: dict[str, Arg] = {}
    for name in ("size", "shape"):
        if name in names and isinstance(node.arg(name), tuple):
            changes[name] = result
    match node.op:
        case "aten.unflatten.int":
            first = node.int_arg("dim") % len(given)
            changes["sizes"] = result[first : first + len(result) - len(given) + 1]
        case "aten.layer_norm.default" | "aten.rms_norm.default":
            inner = node.arg("normalized_shape")
            assert isinstance(inner, tuple)
            changes["normalized_shape"] = result[len(result) - len(inner) :]
        case "aten.arange.default" | "aten.arange.start" | "aten.arange.start_step":
            start = node.int_arg("start") if "start" in names else 0
            step = node.int_arg("step") if "step" in names else 1
            changes["end"] = start + step * result[0]
        case "aten.slice.Tensor" if node.int_arg("step") == 1:  # with steps the dim stays
            changes |= _new_slice(node, given, result)
        case "aten.split.Tensor":
            changes["split_size"] = result[node.int_arg("dim")]
        case "aten.split_with_sizes.default":
            dim = node.int_arg("dim")
            changes["split_sizes"] = tuple(shape(out)[dim] for out in node.outputs)
        case "aten.select.int":
            dim, index = node.int_arg("dim"), node.int_arg("index")
            if index > 0 and index == node.operands[0].type.shape[dim] - 1:
                changes["index"] = given[dim] - 1
        case "aten.embedding.default":
            padding = node.arg("padding_idx")
            if isinstance(padding, int):
                changes["padding_idx"] = min(padding, given[0] - 1)
        case "shardwright.attention" | "shardwright.cached_attention":
            changes |= _new_reach(node, shape, windows)
            if values_in_keys(node):
                up = decompressing(node)
                changes["value_dim"] = result[3] if up is None else shape(up)[2]
        case _:
            pass
    return changes


def _new_slice(node: Node, given: Sequence[int], result: Sequence[int]) -> dict[str, Arg]:
    """Bounds of the slice: from the start, to the end, or the same parts of the whole."""
    old = node.operands[0].type.shape
    dim = node.int_arg("dim") % len(old)
    before, after = node.output.type.shape[dim], result[dim]
    start = _start(node, old[dim])
    if start == 0:
        first = 0
    elif start + before == old[dim]:
        first = given[dim] - after
    else:
        first = start * after // before
    return {"start": first, "end": first + after if first + after < given[dim] else 2**63 - 1}


def _new_reach(
    node: Node, shape: Callable[[Value], tuple[int, ...]], windows: dict[int, int]
) -> dict[str, Arg]:
    """Fewer cached tokens; a window that hides something still does, the same in all graphs."""
    window, key = node.int_arg("window"), node.operands[1]
    before, after = key.type.shape[2], shape(key)[2]
    changes: dict[str, Arg] = {}
    if node.op == "shardwright.cached_attention":
        context = node.int_arg("context")
        changes["context"] = min(context, _MOST_CONTEXT)
        before, after = before + context, after + min(context, _MOST_CONTEXT)
    if window > 0:
        kept = after if window >= before else max(1, min(window, after // 2))
        kept = windows.setdefault(window, kept if before != after else window)
        changes["window"] = kept
        if dict(node.args).get("chunk"):  # its window is as long
            changes["chunk"] = kept
    return changes


def _start(node: Node, size: int) -> int:
    start = node.arg("start")
    return (start + size if start < 0 else min(start, size)) if isinstance(start, int) else 0


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
    with FakeTensorMode():
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
    for a, b in zip(_params(graph), _params(small), strict=True):
        for x, y in zip(a.value.type.shape, b.value.type.shape, strict=True):
            found["parameter dims", x, y] = None
    return tuple(change for change in found if change[1] != change[2])


__all__ = ["Planned", "Shrunk", "buffers_of", "shrink", "state_of"]
