"""Fold runs of structurally identical blocks into loops.

`for layer in self.layers: x = layer(x, cos, sin)` is captured as the layers written out.  `fold`
finds the layers again by the module paths of the nodes (`model.layers.0`, `model.layers.1`, ...),
proves that they are equal up to the names of their parameters, and replaces them by one `Loop`.

A stack of blocks is folded if
1. its nodes stand together, in the order of their indices from 0, at least two blocks
   (nodes between them that do not depend on a block are moved to the front);
2. a block reads: its own parameters, what the block before gives (carried), and values from
   outside the stack that are the same in each block of its kind (invariants);
3. only the last block's carried values are read after the stack;
4. each kind of block gives the carried values at the same places, with the same types;
5. at least two blocks are of one kind.
Anything else stays as it was.

No graph is searched here: module paths say which nodes are a block's, and their order says which
nodes of two blocks correspond, so blocks are equal if their keys are (`_instance`).  Isomorphisms
of 126 layers by networkx would take 0.5 s; all of these keys take 0.04 s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..graph import Arg, Block, Graph, Loop, Node, Param, Value
from ..graph.rewrite import flat, with_operands

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def fold(graph: Graph, class_names: Mapping[str, str] | None = None) -> Graph:
    """`graph` with every foldable stack of blocks as a `Loop`, outermost stacks first.

    `class_names` gives the class of the module at a path, for `Block.class_name`; without it the
    class is taken from the nodes.  Raises ValueError for a graph that has loops already.
    """
    flat(graph)  # raises for a graph that is folded already
    taken: list[str] = []
    for path in _stacks(graph):
        if not any(path.startswith(f"{outer}.") for outer in taken):
            folded = _fold_stack(graph, path, class_names or {})
            if folded is not None:
                graph = folded
                taken.append(path)
    return graph


def _stacks(graph: Graph) -> list[str]:
    """Paths of module lists that nodes belong to, outermost first, in order of appearance."""
    found: dict[str, None] = {}
    for node in graph.body:
        if isinstance(node, Node):
            for match in _INDEX.finditer(f".{node.loc.module}"):
                if match.start() > 0:  # a bare number is a layer of an nn.Sequential model
                    found[node.loc.module[: match.start() - 1]] = None
    return sorted(found, key=lambda path: path.count("."))


@dataclass(frozen=True, slots=True)
class _Instance:
    """One block of a stack as it stands in the flat graph.

    `reads` are the values from outside, in order of first use; `key` is the block's structure
    with the values it reads, makes and owns replaced by numbers and relative names.
    """

    index: int
    nodes: tuple[Node, ...]
    reads: tuple[Value, ...]
    made: dict[str, tuple[int, int]]  # value name -> (node, output) position
    key: object

    def value_at(self, position: tuple[int, int]) -> Value:
        return self.nodes[position[0]].outputs[position[1]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What instances with the same key have in common.

    `carried[s]` is the position in `reads` of carried value s; `gives[s]` where it is made.
    """

    carried: tuple[int, ...]
    gives: tuple[tuple[int, int], ...]
    fixed: tuple[str, ...]  # names of the values at the other positions of `reads`


@dataclass(frozen=True, slots=True)
class _Stack:
    """A stack that can be folded: per block its instance, kind and parameters.

    `order[i]` is the number of block i's kind, `firsts[k]` the first block of kind number k.
    """

    path: str
    instances: Sequence[_Instance]
    kinds: Sequence[_Kind]
    owned: Sequence[dict[str, Param]]
    class_names: Mapping[str, str]
    order: tuple[int, ...]
    firsts: Sequence[int]

    @property
    def name(self) -> str:
        return self.path.replace(".", "_")

    def prefix(self, index: int) -> str:
        """What the names of block `index`'s parameters begin with."""
        return f"{self.path}.{index}."

    def most_differentiable(self, kind: int) -> int:
        """The block that stands for its kind: the first, unless the second has more gradients.

        Below a frozen embedding the first block's input has no gradient, but the second's has.
        """

        def gradients(index: int) -> int:
            nodes = self.instances[index].nodes
            return sum(value.differentiable for node in nodes for value in node.outputs)

        same = [i for i, number in enumerate(self.order) if number == kind]
        return max(same[:2], key=lambda i: (gradients(i), -i))

    def class_name(self, index: int) -> str:
        """Class of block `index`."""
        path = f"{self.path}.{index}"
        nodes = self.instances[index].nodes
        from_nodes = next((n.loc.module_class for n in nodes if n.loc.module == path), "Block")
        return self.class_names.get(path, from_nodes)


def _fold_stack(graph: Graph, path: str, class_names: Mapping[str, str]) -> Graph | None:
    """`graph` with the stack at `path` folded, or None where it is not a loop."""
    parts = _segment(graph, path)
    if parts is None:
        return None
    before, blocks, after = parts
    params = {p.name: p for p in graph.params}
    owned = _owned(graph.params, path, len(blocks))
    if owned is None:
        return None
    instances = [_instance(i, nodes, path, params) for i, nodes in enumerate(blocks)]
    kinds = _kinds(instances, _read_later(graph, after))
    if kinds is None:
        return None
    stack = _Stack(path, instances, kinds, owned, class_names, *_order(instances, kinds, owned))
    if len(stack.firsts) == len(instances):
        return None
    return _assemble(graph, stack, before, after)


# ---- 1. nodes ----------------------------------------------------------------------------------


def _segment(
    graph: Graph, path: str
) -> tuple[list[Node | Loop], list[list[Node]], list[Node | Loop]] | None:
    """Body before the stack, the nodes of each block, body after; None if they are interleaved."""
    prefix = f"{path}."
    indices = [_index(item, prefix) for item in graph.body]
    inside = [position for position, index in enumerate(indices) if index is not None]
    if not inside:
        return None
    first, last = inside[0], inside[-1]
    before, blocks = list(graph.body[:first]), [list[Node]()]
    depends: set[str] = set()
    for item, index in zip(graph.body[first : last + 1], indices[first : last + 1], strict=True):
        if index is None:
            if isinstance(item, Loop) or any(v.name in depends for v in item.operands):
                return None
            before.append(item)
            continue
        assert isinstance(item, Node)
        if index == len(blocks):
            blocks.append([])
        if index != len(blocks) - 1:
            return None
        blocks[index].append(item)
        depends.update(value.name for value in item.outputs)
    whole = len(blocks) >= 2 and all(blocks)
    return (before, blocks, list(graph.body[last + 1 :])) if whole else None


def _index(item: Node | Loop, prefix: str) -> int | None:
    """The block that a node belongs to, by its module path."""
    if isinstance(item, Loop) or not item.loc.module.startswith(prefix):
        return None
    number = item.loc.module[len(prefix) :].partition(".")[0]
    return int(number) if number.isdigit() else None


# ---- 2. structure ------------------------------------------------------------------------------


def _owned(params: Iterable[Param], path: str, count: int) -> list[dict[str, Param]] | None:
    """Parameters of each block by relative name; None if one is shared with another place."""
    prefix = f"{path}."
    owned: list[dict[str, Param]] = [{} for _ in range(count)]
    for param in params:
        number, _, relative = param.name.removeprefix(prefix).partition(".")
        if param.name.startswith(prefix) and number.isdigit() and int(number) < count:
            own = f"{prefix}{number}."
            if any(not alias.startswith(own) for alias in param.aliases):
                return None
            aliases = tuple(alias.removeprefix(own) for alias in param.aliases)
            owned[int(number)][relative] = replace(param, name=relative, aliases=aliases)
        elif any(alias.startswith(prefix) for alias in param.aliases):
            return None
    return owned


def _instance(index: int, nodes: Sequence[Node], path: str, params: dict[str, Param]) -> _Instance:
    """Describe one block."""
    own = f"{path}.{index}."
    made: dict[str, tuple[int, int]] = {}
    reads: dict[str, Value] = {}

    def label(arg: Arg) -> Any:
        if isinstance(arg, tuple):
            return tuple(label(item) for item in arg)
        if not isinstance(arg, Value):
            return (type(arg), arg)  # 1, 1.0 and True are equal, but not the same argument
        if arg.name in made:
            return ("made", made[arg.name])
        if arg.name in params and arg.name.startswith(own):
            return ("own", arg.name.removeprefix(own), arg.type)
        reads.setdefault(arg.name, arg)
        return ("read", list(reads).index(arg.name), arg.type)

    key: list[object] = []
    for position, node in enumerate(nodes):
        args = tuple((name, label(arg)) for name, arg in node.args)
        key.append((node.op, args, tuple(value.type for value in node.outputs)))
        made.update({value.name: (position, i) for i, value in enumerate(node.outputs)})
    return _Instance(index, tuple(nodes), tuple(reads.values()), made, tuple(key))


def _read_later(graph: Graph, after: Sequence[Node | Loop]) -> set[str]:
    """Names of the values that the graph reads after the stack."""
    names = {output.value.name for output in graph.outputs}
    for item in after:
        values = item.operands if isinstance(item, Node) else (*item.carried, *item.invariants)
        names.update(value.name for value in values)
    return names


# ---- 3. what is carried ------------------------------------------------------------------------


def _kinds(instances: Sequence[_Instance], later: set[str]) -> list[_Kind] | None:
    """The kind of each instance, or None where the stack is not a loop."""
    last = instances[-1]
    for instance in instances[:-1]:
        if any(name in later for name in instance.made):
            return None
    gives = _gives(instances, later)
    if gives is None:
        return None
    types = [instances[0].value_at(position).type for position in gives[0]]
    kinds: list[_Kind] = []
    earlier: set[str] = set()
    for i, instance in enumerate(instances):
        if [instance.value_at(position).type for position in gives[i]] != types:
            return None
        if i == 0:
            carried = _first_carried(instances, gives, types)
        else:
            names = [value.name for value in instance.reads]
            handed = [instances[i - 1].value_at(position).name for position in gives[i - 1]]
            if any(name in earlier for name in names):
                return None  # reads a block further back
            carried = (
                tuple(names.index(name) for name in handed) if set(handed) <= set(names) else None
            )
            earlier.update(instances[i - 1].made)
        if carried is None:
            return None
        fixed = tuple(v.name for j, v in enumerate(instance.reads) if j not in carried)
        kinds.append(_Kind(carried, gives[i], fixed))
    return kinds if all(name not in later or name in last.made for name in last.made) else None


def _gives(
    instances: Sequence[_Instance], later: set[str]
) -> list[tuple[tuple[int, int], ...]] | None:
    """For each instance, the positions of the values that the next one (or the rest) reads."""
    gives: list[tuple[tuple[int, int], ...]] = []
    for current, following in zip(instances, instances[1:], strict=False):
        read = {value.name for value in following.reads}
        gives.append(tuple(sorted(p for name, p in current.made.items() if name in read)))
    last = instances[-1]
    outside = tuple(sorted(p for name, p in last.made.items() if name in later))
    same = next((g for g, i in zip(gives, instances, strict=False) if i.key == last.key), outside)
    if not set(outside) <= set(same) or not gives[0]:
        return None
    return [*gives, same]


def _first_carried(
    instances: Sequence[_Instance],
    gives: Sequence[tuple[tuple[int, int], ...]],
    types: Sequence[object],
) -> tuple[int, ...] | None:
    """Which of the first block's reads are the carried values' beginnings.

    Known from another block of the same structure; else the reads of the right types that no
    other block reads, if there is exactly one choice.
    """
    first = instances[0]
    for i in range(1, len(instances)):
        if instances[i].key == first.key:
            names = [value.name for value in instances[i].reads]
            handed = [instances[i - 1].value_at(position).name for position in gives[i - 1]]
            return (
                tuple(names.index(name) for name in handed) if set(handed) <= set(names) else None
            )
    shared = {value.name for instance in instances[1:] for value in instance.reads}
    free = [j for j, value in enumerate(first.reads) if value.name not in shared]
    return tuple(free) if [first.reads[j].type for j in free] == list(types) else None


# ---- 4. the loop -------------------------------------------------------------------------------


def _order(
    instances: Sequence[_Instance], kinds: Sequence[_Kind], owned: Sequence[dict[str, Param]]
) -> tuple[tuple[int, ...], list[int]]:
    """The kind number of each instance, and the first instance of each kind.

    Instances are of one kind if their structure, carried places, invariants and parameters agree.
    """
    table: dict[object, int] = {}
    firsts: list[int] = []
    order: list[int] = []
    for instance, kind, params in zip(instances, kinds, owned, strict=True):
        described = tuple(
            (p.name, p.value.type, p.value.differentiable, p.kind, p.aliases, p.data)
            for p in params.values()
        )
        key = (instance.key, kind, described)
        if key not in table:
            table[key] = len(firsts)
            firsts.append(instance.index)
        order.append(table[key])
    return tuple(order), firsts


def _assemble(
    graph: Graph, stack: _Stack, before: Sequence[Node | Loop], after: Sequence[Node | Loop]
) -> Graph:
    """The graph with a loop in place of the stack."""
    outside = {value.name: value for i in stack.instances for value in i.reads}
    fixed = dict.fromkeys(name for i in stack.firsts for name in stack.kinds[i].fixed)
    invariants = tuple(outside[name] for name in fixed)
    start = tuple(stack.instances[0].reads[j] for j in stack.kinds[0].carried)
    blocks = tuple(_block(stack, kind, invariants) for kind in range(len(stack.firsts)))
    ends = [stack.instances[-1].value_at(position) for position in stack.kinds[-1].gives]
    outputs = tuple(
        replace(value, name=f"{stack.name}_out{i}" if len(ends) > 1 else f"{stack.name}_out")
        for i, value in enumerate(ends)
    )
    by = {old.name: new for old, new in zip(ends, outputs, strict=True)}
    loop = Loop(stack.name, stack.path, blocks, stack.order, start, invariants, outputs)
    gone = {stack.prefix(i) + name for i, params in enumerate(stack.owned) for name in params}
    return replace(
        graph,
        params=tuple(p for p in graph.params if p.name not in gone),
        body=(*before, loop, *(_reading(item, by) for item in after)),
        outputs=tuple(replace(o, value=by.get(o.value.name, o.value)) for o in graph.outputs),
    )


def _block(stack: _Stack, number: int, invariants: Sequence[Value]) -> Block:
    """One kind of block as a function of carried values and invariants."""
    several = len(stack.firsts) > 1
    label = f"{stack.path}.*{number}" if several else f"{stack.path}.*"
    inside = f"{stack.name}_{number}" if several else stack.name
    chosen = stack.most_differentiable(number)
    instance, kind = stack.instances[chosen], stack.kinds[chosen]
    by: dict[str, Value] = {}
    params: list[Param] = []
    for relative, param in stack.owned[chosen].items():
        value = replace(param.value, name=f"{label}.{relative}")
        by[stack.prefix(chosen) + relative] = value
        params.append(replace(param, value=value))
    inputs: list[Value] = []
    for slot, position in enumerate(kind.carried):
        value, given = instance.reads[position], instance.value_at(kind.gives[slot])
        name = f"{inside}_in{slot}" if len(kind.carried) > 1 else f"{inside}_in"
        inputs.append(Value(name, value.type, value.differentiable or given.differentiable))
        by[value.name] = inputs[-1]
    for value in invariants:
        inputs.append(replace(value, name=f"{inside}_{value.name}"))
        if value.name in kind.fixed:  # the first block's carried value may be another's invariant
            by[value.name] = inputs[-1]
    nodes = tuple(with_operands(node, by) for node in instance.nodes)
    outputs = tuple(instance.value_at(position) for position in kind.gives)
    return Block(stack.class_name(chosen), tuple(params), tuple(inputs), nodes, outputs)


def _reading(item: Node | Loop, by: dict[str, Value]) -> Node | Loop:
    """`item` with the values it reads replaced."""
    if isinstance(item, Node):
        return with_operands(item, by)
    carried, invariants = (
        tuple(by.get(value.name, value) for value in values)
        for values in (item.carried, item.invariants)
    )
    return replace(item, carried=carried, invariants=invariants)


__all__ = ["fold"]
