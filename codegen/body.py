"""The statements of one function to lines of Python, named and nested as the user would write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import prod

import torch

from ..facts.blocks import local_shape
from ..facts.collectives import find_collective
from ..facts.mesh import Mesh
from ..facts.moves import primitive
from ..facts.spec import P, R, S, V, is_shard
from ..facts.units import format_bytes, format_seconds
from ..facts.users import Import
from ..ir.graph import Arg, Loop, Node, Value
from ..ir.graph.names import is_path
from ..ir.graph.rewrite import with_args
from ..ir.ops.labels import DimLabels
from ..ir.ops.registry import is_view, local_of, operator_of, rule_of
from ..ir.ops.views import Dim, reshaped
from ..planner.plan.program import Compute, Convert, LoopCall, PricedStep, Sharded
from ..planner.strategies.regions import Recomputed
from ..planner.strategies.steps import Step
from .classes import TorchModule
from .expressions import nested
from .names import Base, Names, base_of
from .nesting import Function, ModuleCall, UserCall, makes_of, reads_of
from .nesting import Step as Item
from .source import WIDTH, number_text, statement


def attribute(path: str) -> str:
    """`self.model.layers[0].weight` for `model.layers.0.weight`.

    Modules whose names cannot stand in Python, as `heads.a-b`, are asked for by name.

    >>> attribute("heads.a-b.weight")
    'self.get_submodule("heads.a-b").weight'
    """
    parts = path.split(".")
    odd = [i for i, part in enumerate(parts) if not is_path(part) or (part.isdigit() and not i)]
    named = parts[: odd[-1] + 1] if odd else []
    if named and len(named) == len(parts):
        raise ValueError(
            f"the model has a parameter `{path}`, a name that cannot stand in Python; rename it"
        )
    start = f'self.get_submodule("{".".join(named)}")' if named else "self"
    rest = parts[len(named) :]
    return start + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)


def _module(path: str) -> str:
    """The module at `path`, as `attribute` has what lies in it."""
    return attribute(f"{path}.weight").removesuffix(".weight")


# A layer's call, by what is done with it (`Modes`)
_RUN = {
    "full": "self.recompute(layer, {})",
    "part": 'self.recompute(layer, {}, keep="products, attention")',
    "kept": "layer({})",
}


@dataclass(frozen=True, slots=True)
class Context:
    """What all functions of a program share."""

    mesh: Mesh
    labels: Mapping[str, DimLabels]
    zigzag: Mapping[str, frozenset[int]]  # by value, the dims whose slices are in zigzag order
    parameters: Mapping[str, str]  # by the name of its value, its path in the block or model
    words: Mapping[str, str]  # by the name of a value, what the user calls it
    weights: Mapping[Sharded, str]  # the paths that parameters are used under
    layers: Recomputed  # which run again in backward
    training: bool = False
    order: str = "contiguous"  # in which ranks hold tokens
    # what the module calls the user's functions
    users: Mapping[Import, str] = field(default_factory=dict[Import, str])
    functions: frozenset[str] = frozenset()  # names of the user's functions that no variable hides


@dataclass(slots=True)
class _Pending:
    """An expression that waits for the statement that it is written in.

    One that is a view of another has that as its `core`, and in `around` what is written around it.
    """

    item: Item
    text: str
    notes: list[str]
    reads: set[Sharded]
    numbers: set[int]  # of the statements that it is made of
    moves: bool  # does it communicate?
    base: Base
    core: _Pending | None = None
    around: str = ""

    def over(self, core: str, value: Sharded) -> _Pending:
        """The same with a variable in place of its core."""
        assert self.core is not None
        text = nested(self.around, {_CORE: core})
        assert text is not None
        numbers = self.numbers - self.core.numbers
        return _Pending(self.item, text, [], {value}, numbers, False, self.base)


_CORE = "nested_0"  # stands for the one part of an expression


class FunctionWriter:
    """Writes one function.

    What is used once and has no name of the user's is written where it is used, as far as a line
    goes; of values that are moved between ranks no more than one in a statement.
    """

    def __init__(self, function: Function, context: Context, *, comments: bool = True) -> None:
        self.function = function
        self._comments = comments
        self.context = context
        self.mesh, self.labels, self.zigzag = context.mesh, context.labels, context.zigzag
        taken = [*axis_names(context.mesh), *context.users.values(), *context.functions]
        self.names = Names(taken)
        self.axes_used: set[tuple[str, ...]] = set()  # single axes, and axes joined
        self.baked: set[str] = set()  # labels of dims whose planned size is written as a number
        self.calls: dict[ModuleCall, list[str]] = {}  # with what the caller calls the arguments
        self.leaves: dict[str, TorchModule] = {}  # modules of torch's own that it calls, by path
        self.held: dict[str, None] = {}  # paths of all modules that it calls, in their order
        self.borrows = False  # was a size read off something that is no operand?
        self._pending: dict[Sharded, _Pending] = {}
        self._tokens: dict[str, _Pending] = {}
        self._out: list[str] = []

    def define(self, item: Sharded, name: str) -> str:
        """An argument of the function."""
        return self.names.give(item, Base(name, True), -1)

    def lines(self, indent: int, returns: str = "{}") -> list[str]:
        """The body's lines; `returns` is what it returns, with the results for `{}`."""
        self._indent = indent
        self._plan_nesting()
        for at, item in enumerate(self.function.statements):
            if isinstance(item, LoopCall):
                self._loop(at, item)
            else:
                self._statement(at, item)
        self._return(returns)
        return self._out

    def text(self, item: Sharded) -> str:
        """How `item` is written where it is used; a token if its expression may stand there."""
        if item in self._pending:
            token = f"nested_{len(self._tokens)}"
            self._tokens[token] = self._pending[item]
            return token
        if item in self.context.weights and item not in self.names:
            path = self.function.own(self.context.weights[item])
            assert path is not None
            return attribute(path)
        return self.names[item]

    def has_name(self, item: Sharded) -> bool:
        """Is there a variable for it?"""
        return item in self.names

    def layout(self, item: Sharded) -> str:
        """`[b/dp, s, 4096/tp]`; ` + tp` where the ranks of tp hold summands."""
        labels = self.labels.get(item.value.name, ())
        dims: list[str] = []
        for dim, size in enumerate(item.value.type.shape):
            names = labels[dim] if dim < len(labels) else ()
            text = ("".join(names) if size > 1 else "") or str(size)
            cut = [n for n, s in zip(self.mesh.names, item.spec, strict=True) if s == dim]
            dims.append("/".join([text, *cut]))
        partial = [n for n, s in zip(self.mesh.names, item.spec, strict=True) if s == P]
        return f"[{', '.join(dims)}]" + "".join(f" + {name}" for name in partial)

    def axis_text(self, step: Step) -> str:
        """The local variable of the axis of a step, or of its axes joined: `dp`, `dp_tp`."""
        names = tuple(self.mesh.names[axis] for axis in step.axes)
        self.axes_used.add(names)
        return "_".join(names)

    # -- what nests in what -------------------------------------------------------------------

    def _plan_nesting(self) -> None:
        """For each value that may be nested the statement that uses it, and all last uses."""
        steps, end = self.function.statements, len(self.function.statements)
        users: dict[Sharded, list[int]] = {}
        for at, item in enumerate(steps):
            for read in reads_of(item):
                users.setdefault(read, []).append(at)
        for out in self.function.outputs:
            users.setdefault(out, []).append(end)
        self._nests: set[int] = set()
        self._users = users
        self._runs = [*range(end), end]  # where each statement is written
        # weights come and go with loops: nothing is written behind one that is before it
        loops = [at for at, item in enumerate(steps) if _has_loop(item)]
        for at in reversed(range(end)):
            made = makes_of(steps[at])
            if len(made) == 1 and len(users.get(made[0], ())) == 1:
                user = users[made[0]][0]
                if any(at < loop < self._runs[user] for loop in loops):
                    continue
                if self._may_nest(at, None if user == end else steps[user]):
                    self._nests.add(at)
                    self._runs[at] = self._runs[user]
        for item in users:
            self._find_last(item)
        self._entering: dict[Sharded, Base] = {}
        for step in steps:
            for value, name in zip(*_flowing(step), strict=True):
                if len(users[value]) == 1:
                    self._entering[value] = Base(name, True)

    def _find_last(self, item: Sharded) -> None:
        """Note the statement that uses `item` last, by where uses are written."""
        self.names.last[item] = max(self._runs[at] for at in self._users[item])

    def _may_nest(self, at: int, user: Item | None) -> bool:
        """May statement `at` be written in its only user, or where that is None in the return?"""
        item = self.function.statements[at]
        if isinstance(item, LoopCall) or isinstance(user, LoopCall):
            return False
        if isinstance(item, Convert):
            return True
        base = base_of(item, self.names, self.function.call)
        if not base.users or self._is_taken(base.name, at):
            return True
        return isinstance(user, Convert) or (user is None and self.function.call is not None)

    def _is_taken(self, name: str, at: int) -> bool:
        """Does the user's name stand for something else that is used after statement `at`?"""
        named = [i for i in self.function.inputs if i in self.names and self.names[i] == name]
        for step in self.function.statements[:at]:
            if isinstance(step, Compute | ModuleCall | UserCall) and len(makes_of(step)) == 1:
                base = base_of(step, self.names, self.function.call)
                named += makes_of(step) if base.users and base.name == name else ()
        return any(max(self._users.get(item, [-1])) > at for item in named)

    # -- statements ---------------------------------------------------------------------------

    def _statement(self, at: int, item: Compute | Convert | ModuleCall | UserCall) -> None:
        base, made = self._base(at, item), makes_of(item)
        self.names.note(made[0], base)
        text, pending = self._expression(at, item, base)
        if at in self._nests and not self.borrows:
            self._pending[made[0]] = pending
            return
        self._write(at, pending, text)

    def _expression(
        self, at: int, item: Compute | Convert | ModuleCall | UserCall, base: Base
    ) -> tuple[str, _Pending]:
        """The statement's expression, with all that can be nested in it; the rest gets names."""
        while True:
            self._tokens, self.borrows, baked = {}, False, set(self.baked)
            text = self._render(item)
            parts = list(self._tokens.values())
            moves = _moves(item)
            inner = {token: part.text for token, part in self._tokens.items()}
            full = nested(text, inner) if inner else text
            begin = "return " if self._is_returned(item) else f"{self._target(at, item, base)} = "
            fits = full is not None and len(f"{begin}{full}") + 4 * self._indent <= WIDTH
            moving = [part for part in parts if part.moves]
            if not parts or (fits and len(moving) + moves <= 1):
                notes = [note for part in parts for note in part.notes]
                reads = {r for r in reads_of(item) if r not in self._pending}
                reads |= {read for part in parts for read in part.reads}
                numbers = {at, *(number for part in parts for number in part.numbers)}
                for part in parts:
                    self._pending.pop(makes_of(part.item)[0], None)
                if isinstance(item, Convert):
                    notes += [note] if (note := ", ".join(traffic_parts([item.priced]))) else []
                elif isinstance(item, Compute):
                    notes += [note] if (note := self._inside(item)) else []
                assert full is not None
                done = _Pending(item, full, notes, reads, numbers, bool(moving) or moves, base)
                done.core, done.around = _core(item, parts, text)
                return full, done
            self.baked = baked
            out = next(iter(moving), None) if len(moving) + moves > 1 else None
            self._name_now(at, out or max(parts, key=lambda part: len(part.text)))

    def _inside(self, item: Compute) -> str:
        """`inside all-to-all 67 MB, backward all-to-all 67 MB`: what an operator sends itself."""
        training = self.context.training and any(v.differentiable for v in item.node.outputs)
        local = local_of(
            item.node, item.choices, self.mesh.sizes, training=training, order=self.context.order
        )
        sent: dict[str, float] = {}
        for traffic in operator_of(item.node).traffic(local):
            kind = traffic.kind.replace("_", "-")
            name = f"backward {kind}" if traffic.backward else f"inside {kind}"
            sent[name] = sent.get(name, 0.0) + traffic.times * traffic.bytes
        return ", ".join(f"{name} {format_bytes(total)}" for name, total in sent.items())

    def _is_returned(self, item: Item) -> bool:
        """Is the statement's result what the function returns?"""
        uses = [self._users.get(value, []) for value in makes_of(item)]
        return self.function.call is not None and uses == [[len(self.function.statements)]]

    def _name_now(self, at: int, pending: _Pending) -> None:
        """Write what was to be nested as a statement of its own, before the one at `at`."""
        made = makes_of(pending.item)[0]
        core = pending.core or pending
        for number in core.numbers:
            self._runs[number] = at - 1
        for read in core.reads:
            self._find_last(read)
        self._write(at - 1, core, core.text)
        if core is pending:
            del self._pending[made]
        else:  # of a view what it shows gets the name
            value = makes_of(core.item)[0]
            self._pending[made] = pending.over(self.names[value], value)

    def _write(self, at: int, pending: _Pending, text: str) -> None:
        made = makes_of(pending.item)
        bases = self._bases(pending.item, pending.base)
        names = [
            self.names.give(value, base, at) if self._users.get(value) else "_"
            for value, base in zip(made, bases, strict=True)
        ]
        layouts = {self.layout(read) for read in pending.reads if not self._is_parameter(read)}
        used = [value for value in made if self._users.get(value)] or [made[0]]
        results = dict.fromkeys(map(self.layout, used))
        shown = [] if set(results) <= layouts else [", ".join(results)]
        comment = "; ".join([*shown, *pending.notes]) if self._comments else ""
        self._out += statement(f"{', '.join(names)} = {text}", self._indent, comment)

    def _bases(self, item: Item, base: Base) -> list[Base]:
        """What each result of a statement would best be called."""
        made = makes_of(item)
        if len(made) == 1:
            return [base]
        words: Sequence[str | None]
        words = [self.context.words.get(value.value.name) for value in made]
        call = item.function.call if isinstance(item, UserCall) else None
        if call is not None and len(call.targets) == len(made):
            words = [name if name != "_" else None for name in call.targets]
        return [Base(w, True) if w else base.numbered(n) for n, w in enumerate(words)]

    def _target(self, at: int, item: Item, base: Base) -> str:
        """What would be assigned now."""
        pairs = zip(makes_of(item), self._bases(item, base), strict=True)
        return ", ".join(
            self.names.choose(value, wanted, at) if self._users.get(value) else "_"
            for value, wanted in pairs
        )

    def _is_parameter(self, item: Sharded) -> bool:
        return item.value.name in self.context.parameters

    def _base(self, at: int, item: Compute | Convert | ModuleCall | UserCall) -> Base:
        """What the result of a statement would best be called."""
        base = base_of(item, self.names, self.function.call)
        if not isinstance(item, Convert):
            return self._entering.get(makes_of(item)[0], base)
        if item.target in self._entering:
            return self._entering[item.target]
        stays = self.names.last.get(item.source, -1) > at and item.source not in self._pending
        return base.converted(item) if stays else base

    def _render(self, item: Compute | Convert | ModuleCall | UserCall) -> str:
        if isinstance(item, Convert):
            return self._conversion_call(item)
        if isinstance(item, Compute):
            return self._leaf(item) or render(item, self)
        if isinstance(item, UserCall):
            return f"{item.name}({', '.join(map(self.text, item.inputs))})"
        self.calls[item] = [self._natural(read) for read in item.inputs]
        self.held[item.path] = None
        return f"{_module(item.path)}({', '.join(map(self.text, item.inputs))})"

    def _leaf(self, item: Compute) -> str:
        """`self.q_proj(x)` where a layer of torch's is all that runs; else nothing.

        That is also where a module of the user's holds just its parameters, and does the same.
        """
        call = item.node.loc.calls[-1] if item.node.loc.calls else None
        leaf = operator_of(item.node).leaf(item.node, item.choices)
        if call is None or leaf is None:
            return ""
        names = [name for name, arg in item.node.args if isinstance(arg, Value)]
        operands = dict(zip(names, item.operands, strict=True))
        value = operands.pop(leaf.input)
        used = {n: self.context.weights.get(weight, "") for n, weight in operands.items()}
        full = next(iter(used.values()), "").rpartition(".")[0]
        path = self.function.own(full) if full else None
        ran_there = call.path == full or call.path.endswith(f".{full}")
        if path is None or not ran_there or used != {name: f"{full}.{name}" for name in used}:
            return ""
        options = tuple((name, repr(option)) for name, option in leaf.options)
        made = TorchModule(f"nn.{leaf.kind}", options)
        holds = {p for p in self.context.parameters.values() if p.startswith(f"{full}.")}
        if holds != set(used.values()) or self.leaves.setdefault(path, made) != made:
            return ""
        self.held[path] = None
        return f"{_module(path)}({self.text(value)})"

    def _natural(self, item: Sharded) -> str:
        """What the caller calls an argument."""
        if item in self._pending:
            return self._pending[item].base.name
        return self.names.base(item).name if item in self.names else "x"

    def _return(self, returns: str) -> None:
        """`return`, with the results' expressions in it as far as they fit."""
        end = len(self.function.statements)
        while True:
            self._tokens = {}
            text = ", ".join(map(self.text, self.function.outputs))
            parts = list(self._tokens.values())
            full = nested(text, {token: part.text for token, part in self._tokens.items()})
            width = 4 * self._indent + len("return ") + len(returns.format(full))
            moving = [part for part in parts if part.moves]
            alone = returns == "{}" and [text] == [*self._tokens]  # then it may take several lines
            if not parts or (full is not None and (width <= WIDTH or alone) and len(moving) <= 1):
                break
            self._name_now(end, max(parts, key=lambda part: len(part.text)))
        notes = [note for part in parts for note in part.notes]
        out = self.function.outputs[0] if self.function.outputs else None
        if parts and out is not None and len(self.function.outputs) == 1:
            reads = {self.layout(r) for r in parts[0].reads if not self._is_parameter(r)}
            notes = ([] if self.layout(out) in reads else [self.layout(out)]) + notes
        self._out += statement(
            f"return {returns.format(full or text)}",
            self._indent,
            "; ".join(notes) if self._comments else "",
        )

    def _loop(self, at: int, item: LoopCall) -> None:
        pad = "    " * self._indent
        arguments = [self.text(argument) for argument in item.arguments]
        entering = [self.text(value) for value in item.carried]
        carried: list[str] = []
        names = dict(zip(*_flowing(item), strict=True))
        for value, source in zip(item.outputs, item.carried, strict=True):
            base = self.names.base(source) if source in self.names else Base("x")
            base = Base(names[source], True) if source in names else base
            carried.append(self.names.give(value, Base(base.name, base.users, source), at))
        self._out += [f"{pad}{a} = {b}" for a, b in zip(carried, entering, strict=True) if a != b]
        path = self.function.own(item.loop.path)
        assert path is not None
        passed = ", ".join([*carried, *arguments])
        for layers, mode in self._runs_of(item.loop, _module(path)):
            self._out.append(f"{pad}for layer in {layers}:")
            run = _RUN[mode].format(passed)
            call = f"{', '.join(carried)} = {run}"
            self._out += statement(call, self._indent + 1, self.layout(item.outputs[0]))

    def _runs_of(self, loop: Loop, module: str) -> Iterator[tuple[str, str]]:
        """The layers of a loop, in parts; how are they recomputed (`Modes`)?"""
        modes, start, count = self.context.layers.of(loop), 0, len(loop.order)
        for mode, layers in modes._asdict().items():
            first = start or ""
            start += layers
            end = start if start < count else ""
            if layers:
                yield (module if layers == count else f"{module}[{first}:{end}]"), mode

    def _conversion_call(self, item: Convert) -> str:
        """The method of `runtime.Axis` for the step (see its table)."""
        step, source = item.priced.step, self.text(item.source)
        axis = self.axis_text(step) + (f'.by("{step.by}")' if step.by else "")
        size = uneven_size(item, self.mesh)
        gradient = item.source.value.differentiable and self.context.training
        tokens = self.zigzag.get(item.source.value.name, frozenset())
        order = ", zigzag=True" if tokens & {step.a, step.b} else ""
        match primitive(step.a, step.b):
            case "all_gather":
                back = ', backward="slice"' if gradient and step.b == R else ""
                return f"{axis}.all_gather({source}, {step.a}{size}{back}{order})"
            case "all_reduce":
                back = ', backward="all_reduce"' if gradient and step.b == V else ""
                return f"{axis}.all_reduce({source}{back})"
            case "reduce_scatter":
                return f"{axis}.reduce_scatter({source}, {step.b}{order})"
            case "slice":
                back = ', backward="pad"' if gradient and step.a == V else ""
                return f"{axis}.shard({source}, {step.b}{back}{order})"
            case "all_to_all":
                dims = f"gather_dim={step.a}, shard_dim={step.b}"
                if order:
                    order = f", zigzag={_tuple_text([str(dim) for dim in sorted(tokens)])}"
                return f"{axis}.all_to_all({source}, {dims}{size}{order})"
            case "mask":
                back = ', backward="mask"' if gradient and step.a == V else ""
                return f"{axis}.partial({source}{back})"
            case "pad":
                return f"{axis}.pad({source}, {step.a}{size}{order})"
            case _:
                return f"{axis}.copy({source})" if step.b == V else f"{axis}.own_gradient({source})"


def _has_loop(item: Item) -> bool:
    """Does a loop over layers run in it?"""
    inside = item.function.statements if isinstance(item, ModuleCall) else ()
    return isinstance(item, LoopCall) or any(map(_has_loop, inside))


def _flowing(item: Item) -> tuple[tuple[Sharded, ...], tuple[str, ...]]:
    """What enters a loop and flows through it, with the names that the user's loop has for that."""
    if not isinstance(item, LoopCall):
        return (), ()
    pattern = re.compile(rf"{re.escape(item.loop.path)}\.\d+")
    nodes = (node for body in item.bodies for node in body.block.nodes)
    calls = (call for node in nodes for call in node.loc.calls)
    call = next((call for call in calls if pattern.fullmatch(call.path)), None)
    targets = () if call is None else tuple(name for name in call.targets if name != "_")
    return (item.carried, targets) if len(targets) == len(item.carried) else ((), ())


def _core(item: Item, parts: Sequence[_Pending], text: str) -> tuple[_Pending | None, str]:
    """What `item` is a view of, if that is written in it, and what stands around it."""
    if not isinstance(item, Compute) or not is_view(item.node) or len(parts) != 1:
        return None, ""
    part = parts[0]
    if part.core is None:
        return part, text
    return part.core, nested(text, {_CORE: part.around}) or ""


def _moves(item: Item) -> bool:
    """Does a statement move activations?"""
    return isinstance(item, Convert) and bool(item.priced.traffic)


def traffic_parts(steps: Sequence[PricedStep]) -> list[str]:
    """`all-gather 1.05 MB`, `backward all-gather, reduce-scatter`, `200 us`; none if local.

    Backward goes through the steps from the last to the first.
    """
    traffic = [t for step in steps for t in step.traffic]
    if not traffic:
        return []
    forward = dict.fromkeys(find_collective(t.kind).words for t in traffic if not t.backward)
    back = [t for step in reversed(steps) for t in reversed(step.traffic) if t.backward]
    backward = dict.fromkeys(find_collective(t.kind).words for t in back)
    kinds = [", ".join(forward)] if forward else []
    kinds += [f"backward {', '.join(backward)}"] if backward else []
    kinds[0] += f" {format_bytes(max(t.bytes for t in traffic))}"
    return [*kinds, format_seconds(sum(step.seconds for step in steps))]


def axis_names(mesh: Mesh) -> list[str]:
    """Names of all axes and of all joined axes."""
    counts = range(1, len(mesh.names) + 1)
    return ["_".join(names) for n in counts for names in combinations(mesh.names, n)]


def uneven_size(item: Convert, mesh: Mesh) -> str:
    """`, size=50257` where a dim does not divide and its true size must be told."""
    step = item.priced.step
    if not is_shard(step.a):
        return ""
    size = item.source.value.type.shape[step.a]
    ways = prod(mesh.sizes[axis] for axis in step.axes)
    return f", size={size}" if size % ways else ""


def render(item: Compute, body: FunctionWriter) -> str:
    """Source of the call that runs a node on local tensors."""
    node = item.node
    if remembers := operator_of(node).remembers:
        name = node.arg(remembers)
        own = body.function.own(name) if isinstance(name, str) else None
        assert own is not None
        node = with_args(node, **{remembers: attribute(own).removeprefix("self.")})
    renderer = _Renderer(item, node, body)
    text = operator_of(node).emit(node, renderer)
    if not renderer.sized:
        body.baked |= _written_sizes(node, body.labels)
    return text


def _written_sizes(node: Node, labels: Mapping[str, DimLabels]) -> set[str]:
    """Labels of dims whose full size is among the numbers that the node is called with."""
    values = (*node.operands, *node.outputs)
    sizes = {
        size: label
        for value in values
        for size, label in zip(value.type.shape, labels.get(value.name, ()), strict=False)
        if label
    }
    counts = ("end", "start", "size", "shape", "split_size", "split_sizes", "length", "pad")
    found: set[str] = set()
    for name, arg in node.args:
        if name in counts:
            numbers = [n for n in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(n, int)]
            found |= {label for n in numbers for label in sizes.get(n, ())}
    return found | _written_rows(node, labels)


def _written_rows(node: Node, labels: Mapping[str, DimLabels]) -> set[str]:
    """Labels of a dim of which the node is called with the number of one row."""
    args = dict(node.args)
    if not isinstance(args.get("index"), int) or not node.operands:
        return set()
    value, dim = args.get("positions", node.operands[0]), args.get("dim", 1)
    assert isinstance(value, Value) and isinstance(dim, int)
    named = labels.get(value.name, ())
    dim %= max(len(value.type.shape), 1)
    return set(named[dim]) if dim < len(named) else set()


class _Renderer:
    """Implements `ir.ops.Render` for one statement."""

    def __init__(self, item: Compute, node: Node, body: FunctionWriter) -> None:
        self.item = item
        self.body = body
        self.node = node
        self._operands = iter(item.operands)
        self.sized = False  # did the op ask for its sizes, so that none is written as a number?
        self._texts: dict[str, str] = {}
        self._items: dict[str, list[str]] = {}
        for name, arg in self.node.args:
            if isinstance(arg, tuple):
                self._items[name] = [self._text(item) for item in arg]
                self._texts[name] = _tuple_text(self._items[name])
            else:
                self._texts[name] = self._text(arg)

    def _text(self, arg: Arg) -> str:
        if isinstance(arg, Value):
            return self.body.text(next(self._operands))
        if isinstance(arg, tuple):
            return _tuple_text([self._text(item) for item in arg])
        if isinstance(arg, torch.dtype):
            return str(arg)
        return f'"{arg}"' if isinstance(arg, str) else number_text(arg)

    def arg(self, name: str) -> str:
        """Source text of the argument `name`."""
        return self._texts[name]

    def items(self, name: str) -> list[str]:
        """Source texts of the items of the list argument `name`."""
        return self._items[name]

    def view(self) -> str:
        """The first operand in the shape of the first result."""
        operand, result = self.item.operands[0], self.item.outputs[0]
        labels = self.body.labels.get(result.value.name, ())
        numbers: list[int | None] = []
        shape = result.value.type.shape
        for dim, size in enumerate(local_shape(shape, result.spec, self.body.mesh.sizes)):
            free = dim < len(labels) and labels[dim] and shape[dim] != 1
            numbers.append(None if free else size)
        method = reshaped(_dims(operand), _dims(result), numbers)
        if method is None:
            return f"{self.arg('self')}.reshape({', '.join(self.sizes())})"
        self.sized = True
        return f"{self.arg('self')}{method}"

    def sizes(self) -> list[str]:
        """Local size of each dim of the first result, written so that it holds for any batch.

        A dim of the batch or sequence is read off an operand, left to torch (`-1`), or read off
        another live tensor; only if none of these can be, the planned size is written.
        """
        self.sized = True
        rule, ways = rule_of(self.node), self._ways()
        shape = self.node.output.type.shape
        labels = self.body.labels.get(self.node.output.name, ((),) * len(shape))
        infer = operator_of(self.node).infers_size
        out: list[str] = []
        for dim, (factors, label) in enumerate(zip(rule.results[0], labels, strict=True)):
            planned = prod(-(-rule.sizes[f] // ways.get(f, 1)) for f in factors)
            text = str(planned if factors else shape[dim])
            if label and shape[dim] != 1:
                found = self._same_dim(factors) or self._other_dim(dim, label)
                if found is None and infer and "-1" not in out:
                    found = "-1"
                if found is None:
                    self.body.baked |= set(label)
                text = found or text
            out.append(text)
        return out

    def _same_dim(self, factors: tuple[str, ...]) -> str | None:
        """`x.size(0)` of an operand dim with just these factors."""
        for operand, dims in zip(self.item.operands, rule_of(self.node).operands, strict=True):
            if factors in dims and self.body.has_name(operand):
                return f"{self.body.text(operand)}.size({dims.index(factors)})"
        return None

    def _other_dim(self, dim: int, label: tuple[str, ...]) -> str | None:
        """The size of dim `dim` of the result, from any live tensor that has such a dim."""
        if len(label) != 1:
            return None
        size = self.node.output.type.shape[dim]
        mine = {i for i, state in enumerate(self.item.outputs[0].spec) if state == dim}
        for other in self.body.names.known():
            labels = self.body.labels.get(other.value.name, ())
            for place, theirs in enumerate(labels):
                if theirs != label or other.value.type.shape[place] != size:
                    continue  # sequences of an encoder and of a decoder are both `s`
                cut = {i for i, state in enumerate(other.spec) if state == place}
                if mine - cut:
                    continue
                factors = [self.body.axis_text(Step((i,), R, S(0))) for i in sorted(cut - mine)]
                local = f"{self.body.text(other)}.size({place})"
                self.body.borrows = True
                return " * ".join([local, *(f"{axis}.size" for axis in factors)])
        return None

    def _ways(self) -> dict[str, int]:
        ways = rule_of(self.node).ways(self.item.choices, self.body.mesh.sizes)
        assert ways is not None
        return ways

    def axis(self, factor: str) -> str:
        """The `Axis` expression that cuts `factor`, or an empty string."""
        cut = tuple(i for i, choice in enumerate(self.item.choices) if choice == factor)
        return self.body.axis_text(Step(cut, R, S(0))) if cut else ""

    def ways(self, factor: str) -> int:
        """Over how many ranks `factor` is cut."""
        return self._ways().get(factor, 1)

    def algorithm(self) -> tuple[str, str]:
        """The algorithm that the op runs over an axis, and that axis; empty strings if none."""
        known = rule_of(self.node).algorithms
        axes = tuple(i for i, choice in enumerate(self.item.choices) if choice in known)
        if not axes:
            return "", ""
        return self.item.choices[axes[0]], self.body.axis_text(Step(axes, R, S(0)))

    def imported(self, item: Import) -> str:
        """The name that the module gives to something of the user's."""
        return self.body.context.users[item]

    def order(self) -> str:
        """In which order ranks hold the tokens of a sequence: `contiguous` or `zigzag`."""
        return "zigzag" if self.node.operands[0].name in self.body.zigzag else "contiguous"

    def sharded_axes(self) -> tuple[str, ...]:
        """Names of the mesh axes over which the result is sharded."""
        spec = self.item.outputs[0].spec
        return tuple(n for n, s in zip(self.body.mesh.names, spec, strict=True) if is_shard(s))


def _dims(item: Sharded) -> list[Dim]:
    cuts = [
        tuple(i for i, s in enumerate(item.spec) if s == d)
        for d in range(len(item.value.type.shape))
    ]
    return list(zip(item.value.type.shape, cuts, strict=True))


def _tuple_text(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
