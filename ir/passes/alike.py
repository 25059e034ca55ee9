"""Does one module run a model for inputs of another size?

A model is captured twice, with inputs of two sizes.  The module that is written for the first graph
holds for the second one where both run the same operators, and where each of these would be written
as the same text: a size that the module reads off its tensors is no difference, a number is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from ...facts.users import Import
from ..graph import Arg, Block, Graph, Loc, Loop, Node, Param, Value, values_in
from ..graph.rewrite import with_args
from ..ops.labels import DimLabels, label_dims
from ..ops.registry import operator_of
from ..ops.sizes import Resizing
from ..ops.views import Dim, reshaped


@dataclass(frozen=True, slots=True)
class Difference:
    """What another size changes in a module, and where the model says so.

    `counts`: it is only a number of rows that follows from the shapes, as the end of a slice.
    """

    loc: Loc
    what: str
    counts: bool = False


def differences(planned: Graph, other: Graph) -> Iterator[Difference]:
    """What must not be in a module for both graphs; none after one in the operators themselves."""
    return _Comparison(label_dims(planned)).graphs(planned, other)


def kinds(graph: Graph) -> dict[str, Loc]:
    """Each operator with what it is given besides tensors and numbers of rows, and where it is
    first: the same for graphs that differ in how often they take a step."""
    found: dict[str, Loc] = {}
    for node in graph.nodes:
        given = [f"{n}={_names(arg)}" for n, arg in node.args if not _is_counted(n, arg)]
        found.setdefault(f"`{node.op}` gets {', '.join(given) or 'nothing'}", node.loc)
    return found


_COUNTED = frozenset(
    {"index", "start", "end", "split_size", "split_sizes", "size", "shape", "pad", "dim"}
)


def _is_counted(name: str, arg: Arg) -> bool:
    return name in _COUNTED or isinstance(arg, Value) or any(values_in(arg))


class _Otherwise(Exception):
    """The graphs run other operators from here on."""


@dataclass(slots=True)
class _Comparison:
    """`ours`: the planned value for each of the other graph; `shapes` those of the other graph, by
    the planned name; `tables`: constants with other numbers."""

    labels: Mapping[str, DimLabels]
    ours: dict[str, Value] = field(default_factory=dict[str, Value])
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    tables: dict[str, bool] = field(default_factory=dict[str, bool])

    def graphs(self, a: Graph, b: Graph) -> Iterator[Difference]:
        """Differences of two whole graphs."""
        try:
            self.same(Loc(), [i.name for i in a.inputs], [i.name for i in b.inputs])
            self.bind([i.value for i in a.inputs], [i.value for i in b.inputs], Loc())
            self.params(a.params, b.params)
            yield from self.bodies(a.body, b.body)
            self.same(Loc(), [out.path for out in a.outputs], [out.path for out in b.outputs])
            self.read(Loc(), [out.value for out in a.outputs], [out.value for out in b.outputs])
        except _Otherwise as error:
            yield Difference(error.args[0], "other operators run then")

    def same(self, loc: Loc, a: object, b: object) -> None:
        """Raises _Otherwise for what must be equal."""
        if a != b:
            raise _Otherwise(loc)

    def bind(self, a: Sequence[Value], b: Sequence[Value], loc: Loc) -> None:
        """Values that stand for one another."""
        self.same(loc, [_kind(value) for value in a], [_kind(value) for value in b])
        for x, y in zip(a, b, strict=True):
            self.ours[y.name] = x
            self.shapes[x.name] = y.type.shape

    def read(self, loc: Loc, a: Sequence[Value], b: Sequence[Value]) -> None:
        """Values that are read must be those that stand for one another."""
        self.same(loc, [v.name for v in a], [self.ours[v.name].name for v in b])

    def params(self, a: Sequence[Param], b: Sequence[Param]) -> None:
        """Parameters are the same; constants may hold other numbers until they are read."""
        self.same(Loc(), [(p.name, p.kind) for p in a], [(p.name, p.kind) for p in b])
        self.bind([p.value for p in a], [p.value for p in b], Loc())
        for x, y in zip(a, b, strict=True):
            if x.data is None:
                self.same(Loc(), x.value.type, y.value.type)
            elif x.data != y.data or x.value.type != y.value.type:
                self.tables[x.value.name] = _is_part(x.data, y.data) or _is_part(y.data, x.data)

    def bodies(self, a: Sequence[Node | Loop], b: Sequence[Node | Loop]) -> Iterator[Difference]:
        """Differences of two bodies, item by item."""
        for x, y in zip(a, b, strict=False):
            if isinstance(x, Node) and isinstance(y, Node):
                yield from self.nodes(x, y)
            elif isinstance(x, Loop) and isinstance(y, Loop):
                yield from self.loops(x, y)
            else:
                raise _Otherwise(_place(x))
        if len(a) != len(b):
            longer = a if len(a) > len(b) else b
            raise _Otherwise(_place(longer[min(len(a), len(b))]))

    def loops(self, a: Loop, b: Loop) -> Iterator[Difference]:
        """Differences of the kinds of layers."""
        loc = _place(a)
        self.same(loc, (a.path, a.order, len(a.blocks)), (b.path, b.order, len(b.blocks)))
        self.read(loc, [*a.carried, *a.invariants], [*b.carried, *b.invariants])
        for x, y in zip(a.blocks, b.blocks, strict=True):
            yield from self.blocks(x, y)
        self.bind(a.outputs, b.outputs, loc)

    def blocks(self, a: Block, b: Block) -> Iterator[Difference]:
        """Differences of one kind of layer."""
        self.bind(a.inputs, b.inputs, Loc())
        self.params(a.params, b.params)
        yield from self.bodies(a.nodes, b.nodes)
        self.read(_place(a.nodes[-1]), a.outputs, b.outputs)

    def nodes(self, a: Node, b: Node) -> Iterator[Difference]:
        """What another size changes in the text of one operator."""
        self.same(a.loc, (a.op, [n for n, _ in a.args]), (b.op, [n for n, _ in b.args]))
        self.read(a.loc, a.operands, b.operands)
        self.bind(a.outputs, b.outputs, a.loc)
        for value in a.operands:
            if value.name in self.tables:
                what = f"`{value.name}` is a table that `forward` makes for the size"
                yield Difference(a.loc, what, self.tables[value.name])
        other = with_args(b, **{name: self.planned(arg) for name, arg in b.args})
        if self.text(a, a) != self.text(other, a):
            yield Difference(a.loc, self.changed(a, other), self.follows(a, other))

    def planned(self, arg: Arg) -> Arg:
        """An argument of the other graph, of planned values."""
        if isinstance(arg, Value):
            return Value(self.ours[arg.name].name, arg.type, arg.differentiable)
        return tuple(map(self.planned, arg)) if isinstance(arg, tuple) else arg

    def text(self, node: Node, planned: Node) -> str:
        """The node as a module has it, without the sizes that are read off tensors in `planned`."""
        labels = self.labels.get(planned.output.name, ())
        shape = planned.output.type.shape
        read = [bool(label) and n != 1 for n, label in zip_longest(shape, labels, fillvalue=())]
        return operator_of(node).emit(node, _Text(node, planned, read))

    def follows(self, a: Node, b: Node) -> bool:
        """Are the other arguments what the shapes alone make of the planned ones?"""
        shapes = Resizing(lambda value: self.shapes[value.name], {})
        expected = with_args(a, **operator_of(a).resized(a, shapes))
        return _plain(expected) == _plain(b)

    def changed(self, a: Node, b: Node) -> str:
        """The first argument that is another one."""
        for (name, x), (_, y) in zip(a.args, b.args, strict=True):
            if _names(x) != _names(y):
                return f"`{a.op}` gets {name}={_names(x)}, and then {_names(y)}"
        return f"`{a.op}` is written otherwise"


def _kind(value: Value) -> tuple[object, ...]:
    return value.type.dtype, len(value.type.shape), value.differentiable


def _place(item: Node | Loop) -> Loc:
    """Where an item stands; of a loop the first line of its layers."""
    return item.loc if isinstance(item, Node) else item.blocks[0].nodes[0].loc


def _names(arg: Arg) -> object:
    """An argument with names for its values."""
    if isinstance(arg, tuple):
        return tuple(map(_names, arg))
    return arg.name if isinstance(arg, Value) else arg


def _plain(node: Node) -> list[tuple[str, object]]:
    return [(name, _names(arg)) for name, arg in node.args]


def _is_part(part: object, whole: object) -> bool:
    """Are nested numbers the first ones of others along every dim?"""
    if isinstance(part, tuple) and isinstance(whole, tuple):
        return len(part) <= len(whole) and all(map(_is_part, part, whole))
    return part == whole


def _dims(value: Value) -> list[Dim]:
    return [(size, ()) for size in value.type.shape]


class _Text:
    """Implements `ir.ops.Render` for a node of the model on one rank, with the words that are
    chosen for the node as it was planned.

    `read` says which sizes of its first result are read off tensors, and not written.
    """

    def __init__(self, node: Node, planned: Node, read: Sequence[bool]) -> None:
        self._node, self._planned, shape = node, planned, node.output.type.shape
        self._numbers = [None if off else n for off, n in zip(read, shape, strict=True)]

    def arg(self, name: str) -> str:
        return repr(_names(self._node.arg(name)))

    def items(self, name: str) -> list[str]:
        items = self._node.arg(name)
        return [repr(_names(item)) for item in items] if isinstance(items, tuple) else []

    def sizes(self) -> list[str]:
        return ["-" if number is None else str(number) for number in self._numbers]

    def view(self) -> str:
        before, after = _dims(self._planned.operands[0]), _dims(self._planned.output)
        method = reshaped(before, after, self._numbers)
        return self.arg("self") + (method or f".reshape({', '.join(self.sizes())})")

    def axis(self, factor: str) -> str:
        return ""

    def algorithm(self) -> tuple[str, str]:
        return "", ""

    def imported(self, item: Import) -> str:
        return str(item)

    def order(self) -> str:
        return "contiguous"

    def ways(self, factor: str) -> int:
        return 1

    def sharded_axes(self) -> tuple[str, ...]:
        return ()


__all__ = ["Difference", "differences", "kinds"]
