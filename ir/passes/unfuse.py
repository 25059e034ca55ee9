"""Fused projections taken apart: one weight for q, k and v becomes a weight for each.

Many models compute several projections of one value by one product, and cut the result after:

    qkv = linear(x, W)                              q = linear(x, W_q)
    q, k, v = split(qkv, (d, e, e), dim=-1)    ->   k = linear(x, W_k)
                                                    v = linear(x, W_v)

The parts lie one after another in one dim of W, so that a mesh axis, which cuts a dim into equal
blocks, does not cut each part by its heads.  With a parameter of its own each part can be.
`Param.part` says which slice of the original it is: state dicts keep the original.

Taken apart is a product of which
1. the weight, and the bias if there is one, are parameters that nothing else reads;
2. the result goes through reshapes, transposes and permutes that keep the parts apart, or none;
3. then splits, slices or selects along that dim take parts that cover it, none overlapping;
4. each part has more than one column, so that there is something to cut.
Parts that are interleaved (heads first, as in GPT-NeoX) do not come one after another: they stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from operator import is_

from ..graph import Arg, Block, Graph, Loop, Node, Param, Part, TensorType, Value
from ..graph.rewrite import with_args, with_operands
from .unfuse_experts import unfuse_experts

# Products with a weight: names of the arguments weight and bias, and the weight's dim of columns.
_PRODUCTS = {
    "aten.linear.default": ("weight", "bias", 0),
    "shardwright.affine": ("weight", "bias", 1),
    "aten.addmm.default": ("mat2", "self", 1),
    "aten.mm.default": ("mat2", "", 1),
    "aten.matmul.default": ("other", "", 1),
}
_RESHAPE, _TRANSPOSE, _PERMUTE = (
    "aten.reshape.default",
    "aten.transpose.int",
    "aten.permute.default",
)
_SPLITS = ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")
_DROPS_DIM = ("aten.unbind.int", "aten.select.int")


def unfuse(graph: Graph) -> Graph:
    """`graph`, folded or flat, with every fused projection taken apart, parts of parts too.

    Gates of experts are parts as well, see `unfuse_experts`.  Gives `graph` itself where there is
    none.
    """
    graph = unfuse_experts(graph)
    taken = set(_names(graph))
    scope = _Scope(graph.params, graph.body, tuple(output.value for output in graph.outputs))
    apart = scope.apart(taken)
    body = tuple(item if isinstance(item, Node) else _loop(item, taken) for item in apart.body)
    if apart is scope and all(map(is_, body, graph.body)):
        return graph
    outputs = tuple(
        replace(output, value=value)
        for output, value in zip(graph.outputs, apart.results, strict=True)
    )
    return replace(graph, params=apart.params, body=body, outputs=outputs)


def _loop(loop: Loop, taken: set[str]) -> Loop:
    """The loop with the fused projections of its blocks taken apart."""
    blocks: list[Block] = []
    for block in loop.blocks:
        scope = _Scope(block.params, block.nodes, block.outputs)
        apart = scope.apart(taken)
        nodes = tuple(node for node in apart.body if isinstance(node, Node))
        new = replace(block, params=apart.params, nodes=nodes, outputs=apart.results)
        blocks.append(block if apart is scope else new)
    same = all(map(is_, blocks, loop.blocks))
    return loop if same else replace(loop, blocks=tuple(blocks))


def _names(graph: Graph) -> Iterator[str]:
    """The names of all values and nodes."""
    yield from (item.value.name for item in graph.inputs)
    scopes = [(graph.params, graph.body)]
    for loop in graph.loops:
        yield from (value.name for value in loop.outputs)
        yield from (value.name for block in loop.blocks for value in block.inputs)
        scopes += [(block.params, block.nodes) for block in loop.blocks]
    for params, items in scopes:
        yield from (param.value.name for param in params)
        for item in items:
            if isinstance(item, Node):
                yield item.name
                yield from (value.name for value in item.outputs)


@dataclass(frozen=True, slots=True)
class _Scope:
    """The graph outside its loops, or one block: its parameters, what runs, what it returns."""

    params: tuple[Param, ...]
    body: tuple[Node | Loop, ...]
    results: tuple[Value, ...]

    def apart(self, taken: set[str]) -> _Scope:
        """The scope with its fused products taken apart; names in `taken` are not given again."""
        nodes = [item for item in self.body if isinstance(item, Node)]
        users: dict[str, list[Node | None]] = {}  # None: what is not a node of this scope
        for node in nodes:
            for value in node.operands:
                users.setdefault(value.name, []).append(node)
        for value in (*self.results, *(v for item in self.body for v in _loop_reads(item))):
            users.setdefault(value.name, []).append(None)
        private = {
            p.value.name: p
            for p in self.params
            if p.kind == "parameter" and len(users.get(p.value.name, ())) == 1
        }
        found = [f for node in nodes if (f := _fused(node, private, users)) is not None]
        if not found:
            return self
        made = {fused.product.name: _Apart(fused, private, taken) for fused in found}
        return self._with(made).apart(taken)

    def _with(self, made: Mapping[str, _Apart]) -> _Scope:
        """The scope with the products of these names replaced."""
        gone = {name for apart in made.values() for name in apart.fused.gone}
        by = {old: new for apart in made.values() for old, new in apart.by.items()}
        parts = {name: new for apart in made.values() for name, new in apart.params.items()}
        body: list[Node | Loop] = []
        for item in self.body:
            if isinstance(item, Loop):
                body.append(_reading(item, by))
            elif item.name in made:
                body += (with_operands(new, by) for new in made[item.name].nodes)
            elif item.name not in gone:
                body.append(with_operands(item, by))
        params = (new for p in self.params for new in parts.get(p.value.name, (p,)))
        results = (by.get(value.name, value) for value in self.results)
        return _Scope(tuple(params), tuple(body), tuple(results))


def _loop_reads(item: Node | Loop) -> tuple[Value, ...]:
    return (*item.carried, *item.invariants) if isinstance(item, Loop) else ()


def _reading(loop: Loop, by: Mapping[str, Value]) -> Loop:
    """The loop with what it reads replaced."""
    if not any(value.name in by for value in _loop_reads(loop)):
        return loop
    carried = tuple(by.get(value.name, value) for value in loop.carried)
    invariants = tuple(by.get(value.name, value) for value in loop.invariants)
    return replace(loop, carried=carried, invariants=invariants)


@dataclass(frozen=True, slots=True)
class _Read:
    """A value that is part of the fused result: from `start`, `size` of the dim's entries."""

    value: Value
    start: int
    size: int
    reader: Node
    name: str  # of the variable that the user assigns it to, if known


@dataclass(frozen=True, slots=True)
class _Fused:
    """A product to take apart: the views of its result, and what reads which part.

    `dims[i]` is the dim that holds the parts before `views[i]`; the last one, after all views.
    """

    product: Node
    views: tuple[Node, ...]
    dims: tuple[int, ...]
    reads: tuple[_Read, ...]
    parameters: tuple[str, ...]  # names of the weight's value and of the bias's

    @property
    def arranged(self) -> Value:
        """The result behind all views."""
        return self.views[-1].output if self.views else self.product.output

    @property
    def gone(self) -> set[str]:
        """Names of the nodes that are replaced."""
        readers = {read.reader.name for read in self.reads}
        return {self.product.name, *(view.name for view in self.views), *readers}


# ---- finding -----------------------------------------------------------------------------------


def _fused(
    node: Node, private: Mapping[str, Param], users: Mapping[str, Sequence[Node | None]]
) -> _Fused | None:
    """What there is to take apart in `node`, if it is a fused product."""
    parameters = _parameters(node, private)
    if parameters is None:
        return None
    value, dim = node.output, len(node.output.type.shape) - 1
    views, dims = list[Node](), [dim]
    while len(users.get(value.name, ())) == 1:
        view = users[value.name][0]
        moved = None if view is None else _moved(view, dim)
        if view is None or moved is None:
            break
        views.append(view)
        dims.append(moved)
        value, dim = view.output, moved
    reads: list[_Read] = []
    for reader in users.get(value.name, ()):
        taken = [] if reader is None else list(_reads(reader, dim))
        if not taken:
            return None
        reads += taken
    per_entry = node.output.type.shape[-1] // value.type.shape[dim]
    if not _covered(reads, value.type.shape[dim]) or any(r.size * per_entry < 2 for r in reads):
        return None
    return _Fused(node, tuple(views), tuple(dims), tuple(reads), parameters)


def _parameters(node: Node, private: Mapping[str, Param]) -> tuple[str, ...] | None:
    """Names of the weight and bias of a product, if it is one and owns them."""
    if node.op not in _PRODUCTS:
        return None
    weight, bias, column_dim = _PRODUCTS[node.op]
    operands = [node.arg(name) for name in (weight, bias) if name]
    values = [arg for arg in operands if isinstance(arg, Value)]
    columns = node.output.type.shape[-1:]
    if any(value.name not in private for value in values) or len({*values}) != len(values):
        return None
    shape = values[0].type.shape
    if len(shape) != 2 or shape[column_dim : column_dim + 1] != columns:
        return None
    if any(value.type.shape != columns for value in values[1:]):
        return None
    return tuple(value.name for value in values)


def _moved(node: Node, dim: int) -> int | None:
    """Where a view puts the parts that are in dim `dim` of its operand; None if nowhere whole.

    A reshape may take the dim apart: the parts are then in the major one of its pieces.
    """
    before, after = node.operands[0].type.shape, node.output.type.shape
    if node.op in (_TRANSPOSE, _PERMUTE):
        return _order(node).index(dim)
    if node.op != _RESHAPE:
        return None
    lead = prod(before[:dim])
    for at, size in enumerate(after):
        if prod(after[:at]) == lead and size != 1:
            whole = any(prod(after[at:end]) == before[dim] for end in range(at, len(after) + 1))
            return at if whole else None
    return None


def _order(node: Node) -> list[int]:
    """Which dim of its operand each dim of a transpose or permute is."""
    rank = len(node.output.type.shape)
    order = list(range(rank))
    if node.op == _TRANSPOSE:
        a, b = (node.int_arg(name) % rank for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    else:
        dims = node.arg("dims")
        assert isinstance(dims, tuple)
        order = [_int(dim) % rank for dim in dims]
    return order


def _reads(node: Node, dim: int) -> Iterator[_Read]:
    """The parts that `node` takes along `dim`; none if it does anything else."""
    shape = node.operands[0].type.shape
    if node.op not in (*_SPLITS, *_DROPS_DIM, "aten.slice.Tensor"):
        return
    if node.int_arg("dim") % len(shape) != dim:
        return
    targets = node.loc.targets if len(node.loc.targets) == len(node.outputs) else ()
    names = targets or [""] * len(node.outputs)
    start = 0
    if node.op == "aten.select.int":
        start = node.int_arg("index") % shape[dim]
    elif node.op == "aten.slice.Tensor":
        if node.arg("step") != 1:
            return
        first = node.arg("start")
        start = 0 if first is None else min(_int(first), shape[dim])
        start = start + shape[dim] if start < 0 else start
    for value, name in zip(node.outputs, names, strict=True):
        size = 1 if node.op in _DROPS_DIM else value.type.shape[dim]
        yield _Read(value, start, size, node, name)
        start += size


def _covered(reads: Sequence[_Read], size: int) -> bool:
    """Do at least two parts cover 0 to `size` without overlapping?"""
    bounds = sorted({(read.start, read.start + read.size) for read in reads})
    if len(bounds) < 2 or any(a == b for a, b in bounds):
        return False
    joined = all(left[1] == right[0] for left, right in pairwise(bounds))
    return joined and (bounds[0][0], bounds[-1][1]) == (0, size)


def _int(arg: Arg) -> int:
    assert isinstance(arg, int)
    return arg


# ---- taking apart ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Apart:
    """The nodes and parameters in place of a fused product.

    `params` lists the parts of each fused parameter, by the name of its value; `by` maps the
    names of the values that were read to what they are now.
    """

    fused: _Fused
    private: Mapping[str, Param]
    taken: set[str]  # names of values and nodes
    nodes: list[Node] = field(default_factory=list)
    params: dict[str, list[Param]] = field(default_factory=dict)
    by: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds = sorted({(read.start, read.size) for read in self.fused.reads})
        for number, (start, size) in enumerate(bounds):
            reads = [read for read in self.fused.reads if read.start == start]
            user_name = next((read.name for read in reads if read.name), "")
            self._part(reads, start, size, user_name, user_name or str(number))

    def _part(
        self, reads: Sequence[_Read], start: int, size: int, target: str, suffix: str
    ) -> None:
        """The product of one part, and the views of its result that readers take."""
        fused = self.fused
        columns = fused.product.output.type.shape[-1]
        per_entry = columns // fused.arranged.type.shape[fused.dims[-1]]
        targets = (target,) if target else ()
        result = self._product(start * per_entry, size * per_entry, targets, suffix)
        for drops in (True, False):
            same = [read for read in reads if (read.reader.op in _DROPS_DIM) == drops]
            if same:
                viewed = self._viewed(result, drops, targets, suffix)
                self.by.update({read.value.name: viewed for read in same})

    def _product(self, start: int, size: int, targets: tuple[str, ...], suffix: str) -> Value:
        """The product with columns `start` to `start + size` only."""
        product = self.fused.product
        weight, bias, dim = _PRODUCTS[product.op]
        changes: dict[str, Arg] = {}
        for argument, cut_dim in ((weight, dim), (bias, 0)):
            value = product.arg(argument) if argument else None
            if isinstance(value, Value):
                changes[argument] = self._param(value, cut_dim, start, size, suffix)
        name = self._unique(f"{product.name}_{suffix}")
        output = _resized(product.output, name, (*product.output.type.shape[:-1], size))
        loc = replace(product.loc, targets=targets)
        node = replace(with_args(product, **changes), name=name, outputs=(output,), loc=loc)
        self.nodes.append(node)
        return output

    def _param(self, value: Value, dim: int, start: int, size: int, suffix: str) -> Value:
        """The parameter that is a slice of `value`; a slice of a slice is one of the original."""
        old = self.private[value.name]
        origin = old.part or Part(old.name, dim, 0)
        shape = list(value.type.shape)
        shape[dim] = size
        new = _resized(value, self._unique(f"{value.name}_{suffix}"), shape)
        name = old.name + new.name.removeprefix(value.name)
        part = replace(origin, start=origin.start + start)
        self.params.setdefault(value.name, []).append(replace(old, name=name, value=new, part=part))
        return new

    def _viewed(self, value: Value, drops: bool, targets: tuple[str, ...], suffix: str) -> Value:
        """A part's result as the views show it; `drops`: without the dim that counts the parts."""
        columns, size = self.fused.product.output.type.shape[-1], value.type.shape[-1]
        dropped = False
        for view, dim, moved in zip(
            self.fused.views, self.fused.dims, self.fused.dims[1:], strict=False
        ):
            shape = list(view.output.type.shape)
            entries = size * shape[moved] // columns
            drop = drops and entries == 1
            shape[moved : moved + 1] = [] if drop else [entries]
            if view.op == _RESHAPE:
                op, args = _RESHAPE, (("shape", tuple(shape)),)
            else:
                order = _order(view)
                order = [at - (at > dim) for at in order if at != dim] if dropped else order
                op, args = _permutation(order)
            dropped = drop
            name, loc = self._unique(f"{view.name}_{suffix}"), replace(view.loc, targets=targets)
            output = _resized(view.output, name, shape)
            args = (("self", value), *args)
            self.nodes.append(Node(name, op, args, (output,), loc))
            value = output
        return value

    def _unique(self, name: str) -> str:
        """`name`, or `name_1`, `name_2`, ... where it is taken."""
        candidate, count = name, 0
        while candidate in self.taken:
            count += 1
            candidate = f"{name}_{count}"
        self.taken.add(candidate)
        return candidate


def _resized(value: Value, name: str, shape: Sequence[int]) -> Value:
    """A value like `value` with another name and shape."""
    return replace(value, name=name, type=TensorType(tuple(shape), value.type.dtype))


def _permutation(order: list[int]) -> tuple[str, tuple[tuple[str, Arg], ...]]:
    """Op and arguments that put dim `order[i]` at i: a transpose where two dims change places."""
    changed = [at for at, dim in enumerate(order) if at != dim]
    if len(changed) == 2:
        return _TRANSPOSE, (("dim0", changed[0]), ("dim1", changed[1]))
    return _PERMUTE, (("dims", tuple(order)),)


__all__ = ["unfuse"]
