"""Recurrences that a model writes out token by token become steps over a state.

    h = zeros                                    before = state(zeros)
    for t in range(tokens):                      h = before
        h = f(h, x[:, t])                        h' = f(h, x[:, t]); h = step(h, h', t)
        y[t] = g(h)                  ->          y[t] = g(h')
    stack(y)                                     new_state(before, h); stack(y)

Capture has all steps one after another.  They are found from their ends: of what is put together
of all tokens, what the last token gave is compared with what the one before gave, and so on down
to the first, which begins from the initial state.  Then the steps are written anew, all like the
second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..graph import Arg, Block, Graph, Loop, Node, TensorType, Value
from ..graph.rewrite import producers, substitute
from ..ops.live import live_items
from ..ops.registry import operator_of

FEWEST = 4
"""Tokens that a model must be captured with, so that a step in the middle shows all that is
carried: what the last steps carry on is read by nothing, and not captured."""

_Source: TypeAlias = tuple[str, str, int]  # how rows are picked, of which value, along which dim


@dataclass(frozen=True, slots=True)
class Stepped:
    """A graph whose recurrences go by steps; the names of nodes that belong to these, of those of
    them that pick rows of tokens or add them up, with the dim of those, of those at the `ends` of
    tokens, for which padding must be zeros, and of those that give tokens, with their dim."""

    graph: Graph
    inner: frozenset[str]
    picks: Mapping[str, int]
    ends: frozenset[str] = frozenset()
    gives: Mapping[str, int] = field(default_factory=dict[str, int])


def by_steps(graph: Graph, tokens: int) -> Stepped:
    """`graph`, of so many tokens, with recurrences that are written out as steps over states."""
    inner: set[str] = set()
    picks: dict[str, int] = {}
    gives: dict[str, int] = {}
    if tokens < FEWEST:
        return Stepped(graph, frozenset(), picks)

    def rewritten(items: Sequence[Node | Loop], read: Sequence[Value]) -> tuple[Node | Loop, ...]:
        made = _rewritten(items, read, tokens)
        inner.update(made.inner)
        picks.update(made.picks)
        gives.update(made.gives)
        return made.items

    def block(old: Block) -> Block:
        nodes = rewritten(old.nodes, old.outputs)
        return replace(old, nodes=tuple(node for node in nodes if isinstance(node, Node)))

    body = tuple(
        replace(item, blocks=tuple(map(block, item.blocks))) if isinstance(item, Loop) else item
        for item in graph.body
    )
    body = rewritten(body, [output.value for output in graph.outputs])
    return Stepped(replace(graph, body=body), frozenset(inner), picks, gives=gives)


def fewest_tokens(graph: Graph) -> int:
    """How many tokens a served graph of this model must take; those not needed are padding."""
    return FEWEST if any(operator_of(node).keeps_out_padding for node in graph.nodes) else 1


@dataclass(frozen=True, slots=True)
class _Body:
    """The items of a body, and what `Stepped` has of them."""

    items: tuple[Node | Loop, ...]
    inner: frozenset[str] = frozenset()
    picks: Mapping[str, int] = field(default_factory=dict[str, int])
    gives: Mapping[str, int] = field(default_factory=dict[str, int])


def _rewritten(items: Sequence[Node | Loop], read: Sequence[Value], tokens: int) -> _Body:
    """The items of a body with steps over states, where they have any."""
    given = tuple(items)
    made = producers([item for item in items if isinstance(item, Node)])
    items = [_plain(item, made) if isinstance(item, Node) else item for item in items]
    for dims in (_Dims(tokens, 1), _Dims(tokens, 0)):  # dim 0 mostly counts sequences
        rows = _Rows.of([item for item in items if isinstance(item, Node)], dims)
        gathered = [each for each in _gathered(items, dims) if rows.are_steps(each.parts)]
        found = _Matching(rows).steps([each.parts for each in gathered]) if gathered else None
        if found is not None:
            return _with_steps(given, items, read, rows, gathered, found)
    return _Body(given)


def _with_steps(
    given: Sequence[Node | Loop],
    items: Sequence[Node | Loop],
    read: Sequence[Value],
    rows: _Rows,
    gathered: Sequence[_Gathered],
    found: _Steps,
) -> _Body:
    writer = _Writer(rows, found, len(gathered[0].parts))
    parts = writer.write([each.parts[1] for each in gathered])
    replaced = {
        each.last.name: each.of(values) for each, values in zip(gathered, parts, strict=True)
    }
    first = min(i for i, item in enumerate(items) if item.name in replaced)
    body = [replaced.get(item.name, item) for item in items]
    body[first:first] = writer.nodes
    picks = dict(writer.picked.values())
    inner = {*replaced, *picks, *(node.name for node in writer.nodes)}
    live = live_items(_in_order(body), [value.name for value in read])
    gives = {
        each.last.name: each.last.int_arg("dim") % len(each.last.output.type.shape)
        for each in gathered
    }
    return _Body(live, frozenset(inner), picks, gives)


def _plain(node: Node, made: Mapping[str, Node]) -> Node:
    """The node in the form that is looked for."""
    return (
        _of_nothing(node)
        if node.op.startswith("aten.new_") or "_like" in node.op
        else (_writing_a_row(node, made) or node)
    )


def _writing_a_row(node: Node, made: Mapping[str, Node]) -> Node | None:
    """`slice_scatter(x, row)` for `cat(x[:i], row, x[i + 1:])`."""
    if node.op != "aten.cat.default" or not 2 <= len(node.operands) <= 3:
        return None
    dim, shape = node.int_arg("dim") % len(node.output.type.shape), node.output.type.shape
    for i, row in enumerate(node.operands):
        if row.type.shape[dim] != 1:
            continue
        start = sum(part.type.shape[dim] for part in node.operands[:i])
        wanted = {(0, start), (start + 1, shape[dim])}
        others = [made.get(part.name) for part in node.operands if part is not row]
        bases = {_sliced(other, dim, wanted) for other in others}
        base = bases.pop() if len(bases) == 1 else None
        if base is not None and base.type == node.output.type:
            args: tuple[tuple[str, Arg], ...] = (("self", base), ("src", row), ("dim", dim))
            rows = (("start", start), ("end", start + 1), ("step", 1))
            return replace(node, op="aten.slice_scatter.default", args=(*args, *rows))
    return None


def _sliced(node: Node | None, dim: int, wanted: set[tuple[int, int]]) -> Value | None:
    """What the node takes one of the wanted ranges of rows of."""
    if node is None or node.op != "aten.slice.Tensor":
        return None
    x, args = node.operands[0], dict(node.args)
    start, end, size = args["start"] or 0, args["end"], x.type.shape[dim]
    assert isinstance(start, int)
    last = min(end, size) if isinstance(end, int) else size
    same = node.int_arg("dim") % len(x.type.shape) == dim and args["step"] in (None, 1)
    return x if same and (start, last) in wanted else None


def _of_nothing(node: Node) -> Node:
    """`zeros(shape)` for `zeros_like(x)` or `x.new_zeros(shape)`, which read nothing of x."""
    packet = node.op.removeprefix("aten.").removesuffix(".default")
    kind = packet.removeprefix("new_").removesuffix("_like")
    if packet == kind or kind not in ("zeros", "ones", "full"):
        return node
    size: tuple[tuple[str, Arg], ...] = (("size", node.output.type.shape),)
    fill = tuple((name, arg) for name, arg in node.args if name == "fill_value")
    kinds: tuple[tuple[str, Arg], ...] = (("dtype", node.output.type.dtype), ("layout", None))
    args = (*size, *fill, *kinds, ("device", None), ("pin_memory", None))
    return replace(node, op=f"aten.{kind}.default", args=args)


def _in_order(items: Sequence[Node | Loop]) -> list[Node | Loop]:
    """The same, each item after those that it reads, else as they stand."""
    makers = {value.name: i for i, item in enumerate(items) for value in item.outputs}
    done: set[int] = set()
    found: list[Node | Loop] = []
    for start in range(len(items)):
        waiting = [start]
        while waiting:
            at = waiting[-1]
            item = items[at]
            reads = item.operands if isinstance(item, Node) else (*item.carried, *item.invariants)
            missing = [i for v in reads if (i := makers.get(v.name, at)) not in done and i != at]
            if missing and at not in done:
                waiting += missing
                continue
            waiting.pop()
            if at not in done:
                done.add(at)
                found.append(item)
    return found


# ---- rows of tokens, and what is put together of them -------------------------------------------


@dataclass(frozen=True, slots=True)
class _Dims:
    """Which dims may be those of tokens: as long as there are `tokens`, from `first` on."""

    tokens: int
    first: int

    def has(self, shape: Sequence[int], dim: Arg) -> bool:
        """May `dim` of a shape be one?"""
        if not isinstance(dim, int) or not shape:
            return False
        return dim % len(shape) >= self.first and shape[dim % len(shape)] == self.tokens

    def together(self, node: Node) -> bool:
        """Does the node put one value for each token together, along such a dim?"""
        if node.op not in _TOGETHER or len(node.operands) != self.tokens:
            return False
        rank = len(node.output.type.shape)
        return node.int_arg("dim") % rank >= self.first

    def written(self, node: Node) -> bool:
        """Does it write the row of one token among those of others?"""
        if node.op not in _WRITTEN or _row(node) is None:
            return False
        return self.has(node.operands[0].type.shape, node.arg("dim"))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which values are rows of a token, and which are made of such of a token and those before it.

    `picked`: value -> (source, token).  `level`: value -> the last token that it is made of.
    """

    made: dict[str, Node]
    picked: dict[str, tuple[_Source, int]]
    level: dict[str, int]
    picks: dict[tuple[_Source, int], Value]

    @staticmethod
    def of(nodes: Sequence[Node], dims: _Dims) -> _Rows:
        """Of a body."""
        found: dict[str, tuple[_Source, int]] = {}
        picks: dict[tuple[_Source, int], Value] = {}
        for node in nodes:
            for source, token, value in _picks(node, dims):
                found[value.name] = source, token
                picks[source, token] = value
        # what is read of the last one may be what nothing reads
        whole = {s for s, _ in picks if all((s, t) in picks for t in range(dims.tokens - 1))}
        found = {name: pick for name, pick in found.items() if pick[0] in whole}
        level = {name: token for name, (_, token) in found.items()}
        for node in nodes:
            if any(value.name in found for value in node.outputs):
                continue
            levels = [level[value.name] for value in node.operands if value.name in level]
            if levels and not (dims.together(node) or dims.written(node)):
                level.update({value.name: max(levels) for value in node.outputs})
        return _Rows(producers(nodes), found, level, picks)

    def are_steps(self, parts: Sequence[Value]) -> bool:
        """Is each of the values made of one more token than the one before?"""
        return [self.level.get(value.name) for value in parts] == list(range(len(parts)))


def _picks(node: Node, dims: _Dims) -> Iterator[tuple[_Source, int, Value]]:
    """(source, token, value) of each row that the node picks of a dim of all tokens."""
    if not node.operands:
        return
    shape, args, tokens = node.operands[0].type.shape, dict(node.args), dims.tokens
    dim = args.get("dim")
    if not isinstance(dim, int) or not dims.has(shape, dim):
        return
    dim %= len(shape)
    source = (node.op, node.operands[0].name, dim)
    if node.op == "aten.select.int":
        yield source, node.int_arg("index") % tokens, node.output
    elif node.op == "aten.slice.Tensor" and node.output.type.shape[dim] == 1:
        start = args["start"] or 0
        assert isinstance(start, int)
        yield source, start % tokens, node.output
    elif node.op in _IN_ROWS and len(node.outputs) == tokens:
        yield from ((source, token, value) for token, value in enumerate(node.outputs))


_IN_ROWS = (
    "aten.unbind.int", "aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default",
)  # fmt: skip
_TOGETHER = ("aten.stack.default", "aten.cat.default")
_WRITTEN = ("aten.select_scatter.default", "aten.slice_scatter.default")


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The nodes that put values of all tokens together, and these, in order."""

    nodes: tuple[Node, ...]
    parts: tuple[Value, ...]

    @property
    def last(self) -> Node:
        """The node whose result has all."""
        return self.nodes[-1]

    def of(self, parts: Sequence[Value]) -> Node:
        """The same of other values: one node puts them together."""
        if self.last.op in _TOGETHER:
            return _with(self.last, tensors=tuple(parts))
        pieces = len(parts[0].type.shape) == len(self.last.output.type.shape)
        args = (("tensors", tuple(parts)), ("dim", self.last.int_arg("dim")))
        return replace(self.last, op=_TOGETHER[pieces], args=args)


def _with(node: Node, **changes: Arg) -> Node:
    return replace(node, args=tuple((name, changes.get(name, arg)) for name, arg in node.args))


def _gathered(items: Sequence[Node | Loop], dims: _Dims) -> Iterator[_Gathered]:
    """What is put together of as many values as there are tokens."""
    nodes = [item for item in items if isinstance(item, Node)]
    made = producers(nodes)
    followed = {node.operands[0].name for node in nodes if node.op in _WRITTEN}
    for node in nodes:
        if dims.together(node):
            yield _Gathered((node,), node.operands)
        elif dims.written(node) and node.output.name not in followed:
            chain = [node]
            while (before := made.get(chain[0].operands[0].name)) and before.op == node.op:
                chain.insert(0, before)
            if [_row(each) for each in chain] == list(range(dims.tokens)):
                yield _Gathered(tuple(chain), tuple(each.operands[1] for each in chain))


def _row(node: Node) -> int | None:
    """The row that a value is written to, if it is one."""
    index = dict(node.args).get("index", dict(node.args).get("start"))
    single = node.op == _WRITTEN[0] or node.operands[1].type.shape[node.int_arg("dim")] == 1
    return (index or 0) if single and (index is None or isinstance(index, int)) else None


# ---- that all steps are alike -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Steps:
    """The states that are carried: (what the second step begins from, what it leaves), and the
    initial ones."""

    states: tuple[tuple[Value, Value], ...]
    initial: tuple[Value, ...]


@dataclass(slots=True)
class _Matching:
    """Compares what a token gave with what the token before gave."""

    rows: _Rows
    _known: set[tuple[str, str, int]] = field(default_factory=set[tuple[str, str, int]])

    def steps(self, gathered: Sequence[tuple[Value, ...]]) -> _Steps | None:
        """What the steps that give these values carry; None if they are not alike, or nothing is
        carried."""
        carried: list[tuple[Value, Value]] = []
        by_token: dict[int, list[tuple[Value, Value]]] = {}
        for token in range(len(gathered[0]) - 1, 0, -1):
            pairs = [*((parts[token], parts[token - 1]) for parts in gathered), *carried]
            by_token[token] = carried = []
            while pairs:
                if not self._alike(*pairs.pop(), token, pairs, carried):
                    return None
        first, second = dict_of(by_token[1]), dict_of(by_token[2])
        if first is None or second is None or not first:
            return None
        # of the second step: a state that it begins from is what the first one left
        leaves = {before.name: after for after, before in by_token[2]}
        if leaves.keys() != first.keys():
            return None
        begins = {before.name: before for _, before in by_token[2]}
        names = sorted(first)
        return _Steps(
            tuple((begins[name], leaves[name]) for name in names),
            tuple(first[name] for name in names),
        )

    def _alike(
        self,
        value: Value,
        earlier: Value,
        token: int,
        pairs: list[tuple[Value, Value]],
        carried: list[tuple[Value, Value]],
    ) -> bool:
        """Is `earlier` one token before what `value` is at `token`?  What follows of that is put
        into `pairs`, and what the step began from into `carried`."""
        if (key := (value.name, earlier.name, token)) in self._known:
            return True
        self._known.add(key)
        rows, level = self.rows, self.rows.level.get(value.name)
        if level is None and value == earlier:
            return True
        if level == token - 1:
            carried.append((value, earlier))
            return value.type.dtype == earlier.type.dtype
        if value.name in rows.picked:
            source, at = rows.picked[value.name]
            return at == token and rows.picked.get(earlier.name) == (source, token - 1)
        made, before = rows.made.get(value.name), rows.made.get(earlier.name)
        if level not in (None, token) or made is None or before is None or made.op != before.op:
            return False
        if made.outputs.index(value) != before.outputs.index(earlier):
            return False
        return all(
            _same(a, b, pairs) for (_, a), (_, b) in zip(made.args, before.args, strict=True)
        )


def dict_of(pairs: Sequence[tuple[Value, Value]]) -> dict[str, Value] | None:
    """The pairs by the names of the first; None if one has two."""
    found: dict[str, Value] = {}
    for a, b in pairs:
        if found.setdefault(a.name, b) != b:
            return None
    return found


def _same(a: Arg, b: Arg, pairs: list[tuple[Value, Value]]) -> bool:
    """Are two arguments alike, if the values in them are?"""
    if isinstance(a, Value) and isinstance(b, Value):
        pairs.append((a, b))
        return True
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(_same(x, y, pairs) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


# ---- the steps anew -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Writer:
    """Writes all steps like the second."""

    rows: _Rows
    steps: _Steps
    tokens: int
    nodes: list[Node] = field(default_factory=list[Node])
    picked: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])

    def write(self, second: Sequence[Value]) -> list[list[Value]]:
        """For each value that the second step gives, those of all tokens."""
        roots = [*second, *(after for _, after in self.steps.states)]
        pattern = self._pattern(roots)
        now = {
            begin.name: self._begin(begin, initial, pattern[0])
            for (begin, _), initial in zip(self.steps.states, self.steps.initial, strict=True)
        }
        first = dict(now)
        given: list[list[Value]] = [[] for _ in second]
        for token in range(self.tokens):
            by = self._step(pattern, now, token)
            for own, value in zip(given, second, strict=True):
                own.append(by.get(value.name, value))
            for begin, after in self.steps.states:
                now[begin.name] = self._passed(now[begin.name], by[after.name], token, pattern[0])
        for begin, _ in self.steps.states:
            self._end(first[begin.name], now[begin.name], pattern[0])
        return given

    def _pattern(self, roots: Sequence[Value]) -> list[Node]:
        """The nodes of the second step, in order."""
        rows, begins = self.rows, {begin.name for begin, _ in self.steps.states}
        found: dict[str, Node] = {}

        def visit(value: Value) -> None:
            if value.name in begins or value.name in rows.picked or value.name not in rows.level:
                return
            node = rows.made[value.name]
            if node.name not in found:
                for operand in node.operands:
                    visit(operand)
                found[node.name] = node

        for root in roots:
            visit(root)
        return list(found.values())

    def _step(
        self, pattern: Sequence[Node], now: Mapping[str, Value], token: int
    ) -> dict[str, Value]:
        """Values of the second step -> those of the step of `token`."""
        by = dict(now)
        for node in pattern:
            for value in node.operands:
                if value.name in self.rows.picked and value.name not in by:
                    by[value.name] = self._pick(value, token)
            outputs = tuple(replace(v, name=f"{v.name}_at{token}") for v in node.outputs)
            args = tuple((name, substitute(arg, by)) for name, arg in node.args)
            name = f"{node.name}_at{token}"
            self.nodes.append(replace(node, name=name, args=args, outputs=outputs))
            by |= {old.name: new for old, new in zip(node.outputs, outputs, strict=True)}
        for _, after in self.steps.states:  # a state that is a row of a token, or as it was
            if after.name in self.rows.picked:
                by[after.name] = self._pick(after, token)
            by.setdefault(after.name, now.get(after.name, after))
        return by

    def _pick(self, second: Value, token: int) -> Value:
        """The row of `token` where the second step has its own."""
        source, _ = self.rows.picked[second.name]
        value = self.rows.picks.get((source, token)) or self._pick_anew(second, source, token)
        if value.name not in self.picked:
            made = self.rows.made.get(value.name)
            self.picked[value.name] = made.name if made else value.name, source[2]
        return value

    def _pick_anew(self, second: Value, source: _Source, token: int) -> Value:
        like = self.rows.made[second.name]
        value = replace(second, name=f"{second.name}_row{token}")
        rows = {"index": token, "start": token, "end": token + 1}
        made = _with(like, **{name: rows[name] for name, _ in like.args if name in rows})
        self.nodes.append(replace(made, name=value.name, outputs=(value,)))
        self.rows.picks[source, token] = value
        return value

    def _begin(self, begin: Value, initial: Value, at: Node) -> Value:
        if initial.type.shape != begin.type.shape:
            shape = begin.type.shape
            whole = Value(f"{begin.name}_initial", TensorType(shape, initial.type.dtype))
            args: tuple[tuple[str, Arg], ...]
            args = (("self", initial), ("size", shape), ("implicit", False))
            self._add("aten.expand.default", args, whole, at)
            initial = whole
        before = replace(begin, name=f"{begin.name}_before")
        return self._add("shardwright.state", (("initial", initial),), before, at)

    def _passed(self, before: Value, after: Value, token: int, at: Node) -> Value:
        kept = replace(after, name=f"{after.name}_passed{token}")
        args = (("before", before), ("after", after), ("index", token))
        return self._add("shardwright.step", args, kept, at)

    def _end(self, before: Value, after: Value, at: Node) -> None:
        kept = replace(after, name=f"{before.name}_kept")
        self._add("shardwright.new_state", (("before", before), ("after", after)), kept, at)

    def _add(self, op: str, args: tuple[tuple[str, Arg], ...], output: Value, at: Node) -> Value:
        loc = replace(at.loc, targets=())
        self.nodes.append(Node(output.name, op, args, (output,), loc))
        return output


__all__ = ["FEWEST", "Stepped", "by_steps", "fewest_tokens"]
