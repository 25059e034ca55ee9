"""Statements of a program to lines of Python: one line per op, in the program's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isfinite, prod

import torch

from ..facts.mesh import Mesh
from ..facts.moves import primitive
from ..facts.spec import P, R, S, V, is_shard
from ..facts.units import format_bytes, format_seconds
from ..ir.graph import Arg, Node, Value
from ..ir.ops.labels import DimLabels
from ..ir.ops.registry import kind_of, operator_of, rule_of
from ..planner.plan.program import Compute, Convert, LoopCall, Sharded, Statement, is_gather
from ..planner.strategies.conversion import Step
from .names import Names, base_name
from .source import statement


def parameter_path(name: str) -> str:
    """`self.model.layers[0].weight` for `model.layers.0.weight`."""
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".")]
    return "self" + "".join(parts)


class BodyEmitter:
    """Writes the statements of one `forward`."""

    def __init__(
        self,
        statements: Sequence[Statement],
        outputs: Sequence[Sharded],
        mesh: Mesh,
        labels: dict[str, DimLabels],
        zigzag: Mapping[str, frozenset[int]],
        *,
        recompute: bool = False,
        foreseen: int | None = None,
    ) -> None:
        self.statements = statements
        self.outputs = outputs
        self.mesh = mesh
        self.labels = labels
        self.zigzag = zigzag  # by value, the dims whose slices are in zigzag order
        self.recompute = recompute
        self.names = Names(_axis_names(mesh))
        self.axes_used: set[tuple[str, ...]] = set()  # single axes, and axes joined
        self.inline: dict[Sharded, str] = {}  # parameters, and what is gathered for one use only
        self.baked: set[str] = set()  # labels of dims whose planned size is written as a number
        # Parameters gathered by the first `foreseen` statements, and loops that gather, in order
        self.gathers: list[Convert | LoopCall] = []
        self.foreseen = len(statements) if foreseen is None else foreseen
        self._parameters: set[Sharded] = set()
        self._unused: dict[Sharded, tuple[Convert, ...]] = {}  # gathers written inline, until then
        self._notes: dict[Sharded, list[str]] = {}  # on what is written inline, until it is used
        # Ops that name an operand more than once.
        self._wordy = {
            item.node.name
            for item in statements
            if isinstance(item, Compute) and kind_of(item.node) == "attention"
        }
        self._uses = self._count_uses()
        self._last = self._last_uses()

    def define(self, item: Sharded, name: str) -> str:
        """An argument of the function."""
        return self.names.give(item, name)

    def define_parameter(self, item: Sharded, path: str) -> None:
        """A parameter, written as an attribute where it is used."""
        self.inline[item] = path
        self._parameters.add(item)

    def lines(self, indent: int) -> list[str]:
        """The body's lines, without the return."""
        out: list[str] = []
        for at, item in enumerate(self.statements):
            dying = {s for s in _reads(item) if self._last.get(s) == at}
            if isinstance(item, LoopCall):
                out += self._loop(item, dying, indent)
            elif isinstance(item, Convert):
                out += self._convert(item, dying, indent)
            else:
                out += self._compute(item, dying, indent)
            if at < self.foreseen:
                self._note_gathers(item)
        return out

    def gather_axes(self) -> set[tuple[str, ...]]:
        """The axes that `gather_lines` names."""
        steps = [item.priced.step for item in self.gathers if isinstance(item, Convert)]
        return {tuple(self.mesh.names[axis] for axis in step.axes) for step in steps}

    def gather_lines(self, indent: int) -> list[str]:
        """A line for each of `gathers`; `lines` comes first."""
        out: list[str] = []
        for item in self.gathers:
            if isinstance(item, LoopCall):
                out.append(f"{'    ' * indent}for layer in {parameter_path(item.loop.path)}:")
                out += statement("yield from layer.gathers()", indent + 1)
                continue
            step = item.priced.step
            text = f"{self.text(item.source)}, {step.a}{_uneven_size(item, self.mesh)}"
            out += statement(f"yield Gather({self.axis_text(step)}, {text})", indent)
        return out

    def _note_gathers(self, item: Statement) -> None:
        """Add the gathers that run at this statement: its own, and those written inline in it."""
        ran = [gather for read in _reads(item) for gather in self._unused.pop(read, ())]
        if isinstance(item, Convert) and is_gather(item) and item.source in self._parameters:
            ran.append(item)
        if isinstance(item, Convert) and item.target in self.inline:
            self._unused[item.target] = tuple(ran)
        else:
            self.gathers += ran
        if isinstance(item, LoopCall):
            bodies = [statement_ for body in item.bodies for statement_ in body.statements]
            self.gathers += [item] if any(map(is_gather, bodies)) else []

    def text(self, item: Sharded) -> str:
        """How `item` is written where it is used."""
        return self.inline[item] if item in self.inline else self.names[item]

    def layout(self, item: Sharded) -> str:
        """`[b/dp, s, 4096/tp]`; ` + tp` where the ranks of tp hold summands."""
        labels = self.labels.get(item.value.name, ())
        dims: list[str] = []
        for dim, size in enumerate(item.value.type.shape):
            names = labels[dim] if dim < len(labels) else ()
            text = "".join(names) or str(size)
            cut = [n for n, s in zip(self.mesh.names, item.spec, strict=True) if s == dim]
            dims.append("/".join([text, *cut]))
        partial = [n for n, s in zip(self.mesh.names, item.spec, strict=True) if s == P]
        return f"[{', '.join(dims)}]" + "".join(f" + {name}" for name in partial)

    # -- statements ---------------------------------------------------------------------------

    def _convert(self, item: Convert, dying: set[Sharded], indent: int) -> list[str]:
        text = self._conversion_call(item)
        notes = self._inline_notes(item)
        if self._is_inline(item):
            self.inline[item.target] = text
            self._notes[item.target] = [*notes, *_inline_note(item)]
            return []
        comment = "; ".join([self._conversion_comment(item), *notes])
        if item.param:
            name = self.names.give(item.target, _parameter_base(item.source.value.name))
        else:
            name = self._name(item, item.target, dying)
        return statement(f"{name} = {text}", indent, comment)

    def _conversion_call(self, item: Convert) -> str:
        """The method of `runtime.Axis` for the step (see its table)."""
        step, source = item.priced.step, self.text(item.source)
        axis = self.axis_text(step)
        size = _uneven_size(item, self.mesh)
        gradient = item.source.value.differentiable
        tokens = self.zigzag.get(item.source.value.name, frozenset())
        order = ", zigzag=True" if tokens & {step.a, step.b} else ""
        match primitive(step.a, step.b):
            case "all_gather":
                back = ', backward="slice"' if gradient and step.b == R else ""
                method = "gather_parameter" if item.param else "all_gather"
                return f"{axis}.{method}({source}, {step.a}{size}{back}{order})"
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

    def _conversion_comment(self, item: Convert) -> str:
        forward = [t for t in item.priced.traffic if not t.backward]
        backward = [t for t in item.priced.traffic if t.backward]
        parts = [self.layout(item.target)]
        if forward:
            parts.append(format_bytes(forward[0].bytes))
        if backward:
            kinds = " and ".join(t.kind.replace("_", "-") for t in backward)
            parts.append(
                f"backward {kinds}" + ("" if forward else f" {format_bytes(backward[0].bytes)}")
            )
        if item.priced.traffic:
            parts.append(format_seconds(item.priced.seconds))
        return "; ".join(parts)

    def _inline_notes(self, item: Statement) -> list[str]:
        """What to say of the conversions that are written inline in a statement."""
        return [note for read in _reads(item) for note in self._notes.pop(read, ())]

    def axis_text(self, step: Step) -> str:
        """The local variable of the axis of a step, or of its axes joined: `dp`, `dp_tp`."""
        names = tuple(self.mesh.names[axis] for axis in step.axes)
        self.axes_used.add(names)
        return "_".join(names)

    def _compute(self, item: Compute, dying: set[Sharded], indent: int) -> list[str]:
        text = render(item, self)
        if len(item.outputs) == 1:
            name = self._name(item, item.outputs[0], dying)
        else:
            base = base_name(item, self.names, dying)
            for old in dying:
                self.names.release(old)
            known = item.node.loc.targets
            same = len(known) == len(item.outputs)
            name = ", ".join(
                self.names.give(out, known[i] if same else f"{base}_{i}")
                for i, out in enumerate(item.outputs)
            )
        where = f"  {item.node.loc}" if item.node.loc.file else ""
        comment = "; ".join([self.layout(item.outputs[0]), *self._inline_notes(item)])
        return statement(f"{name} = {text}", indent, comment + where)

    def _name(self, item: Convert | Compute, target: Sharded, dying: set[Sharded]) -> str:
        base = base_name(item, self.names, dying)
        for old in dying:
            self.names.release(old)
        return self.names.give(target, base)

    def _loop(self, item: LoopCall, dying: set[Sharded], indent: int) -> list[str]:
        pad = "    " * indent
        arguments = [self.text(argument) for argument in item.arguments]
        entering = [self.text(value) for value in item.carried]
        bases = [self.names.base(v) if v in self.names else "x" for v in item.carried]
        for old in dying:
            self.names.release(old)
        carried = [self.names.give(v, b) for v, b in zip(item.outputs, bases, strict=True)]
        lines = [f"{pad}{a} = {b}" for a, b in zip(carried, entering, strict=True) if a != b]
        lines.append(f"{pad}for layer in {parameter_path(item.loop.path)}:")
        passed = ", ".join([*carried, *arguments])
        run = f"self.recompute(layer, {passed})" if self.recompute else f"layer({passed})"
        call = f"{', '.join(carried)} = {run}"
        comment = "; ".join([self.layout(item.outputs[0]), *self._inline_notes(item)])
        return [*lines, *statement(call, indent + 1, comment)]

    # -- uses ---------------------------------------------------------------------------------

    def _is_inline(self, item: Convert) -> bool:
        """Is a parameter's conversion written where its result is used, once and by one op?"""
        once = item.param and self._uses.get(item.target) == 1
        return once and item.user not in self._wordy

    def _count_uses(self) -> dict[Sharded, int]:
        uses: dict[Sharded, int] = {}
        for item in self.statements:
            for read in _reads(item):
                uses[read] = uses.get(read, 0) + 1
        for out in self.outputs:
            uses[out] = uses.get(out, 0) + 1
        return uses

    def _last_uses(self) -> dict[Sharded, int]:
        last: dict[Sharded, int] = {}
        for at, item in enumerate(self.statements):
            for read in _reads(item):
                last[read] = at
        for out in self.outputs:
            last[out] = len(self.statements)
        # what is written inline is read again where the text stands
        for at, item in reversed(list(enumerate(self.statements))):
            if isinstance(item, Convert) and self._is_inline(item):
                last[item.source] = max(last.get(item.source, at), last.get(item.target, at))
        return last


def _parameter_base(name: str) -> str:
    """`q_proj` for `model.layers.0.self_attn.q_proj.weight`, `scale` for `scale`."""
    return (name.split(".")[-2:])[0]


def _inline_note(item: Convert) -> list[str]:
    """`all-gather 1.05 MB, backward all-gather and reduce-scatter, 200 us`; nothing if local."""
    traffic = item.priced.traffic
    if not traffic:
        return []
    forward = [t.kind.replace("_", "-") for t in traffic if not t.backward][:1]
    backward = [t.kind.replace("_", "-") for t in traffic if t.backward]
    kinds = [*forward, *([f"backward {' and '.join(backward)}"] if backward else [])]
    kinds[0] += f" {format_bytes(traffic[0].bytes)}"
    return [", ".join([*kinds, format_seconds(item.priced.seconds)])]


def _reads(item: Statement) -> tuple[Sharded, ...]:
    if isinstance(item, Convert):
        return (item.source,)
    if isinstance(item, Compute):
        return item.operands
    return (*item.carried, *item.arguments)


def _axis_names(mesh: Mesh) -> list[str]:
    """Names of all axes and of all joined axes."""
    counts = range(1, len(mesh.names) + 1)
    return ["_".join(names) for n in counts for names in combinations(mesh.names, n)]


def _uneven_size(item: Convert, mesh: Mesh) -> str:
    """`, size=50257` where a dim does not divide and its true size must be told."""
    step = item.priced.step
    if not is_shard(step.a):
        return ""
    size = item.source.value.type.shape[step.a]
    ways = prod(mesh.sizes[axis] for axis in step.axes)
    return f", size={size}" if size % ways else ""


def render(item: Compute, body: BodyEmitter) -> str:
    """Source of the call that runs a node on local tensors."""
    renderer = _Renderer(item, body)
    text = operator_of(item.node).emit(item.node, renderer)
    if not renderer.sized:
        body.baked |= _written_sizes(item.node, body.labels)
    return text


def _written_sizes(node: Node, labels: dict[str, DimLabels]) -> set[str]:
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
    return found


class _Renderer:
    """Implements `ir.ops.Render` for one statement."""

    def __init__(self, item: Compute, body: BodyEmitter) -> None:
        self.item = item
        self.body = body
        self.node: Node = item.node
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
        if isinstance(arg, float) and not isfinite(arg):
            return f'float("{arg}")'
        return f'"{arg}"' if isinstance(arg, str) else repr(arg)

    def arg(self, name: str) -> str:
        """Source text of the argument `name`."""
        return self._texts[name]

    def items(self, name: str) -> list[str]:
        """Source texts of the items of the list argument `name`."""
        return self._items[name]

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
            if factors in dims and operand not in self.body.inline:
                return f"{self.body.text(operand)}.size({dims.index(factors)})"
        return None

    def _other_dim(self, dim: int, label: tuple[str, ...]) -> str | None:
        """The size of dim `dim` of the result, from any live tensor that has such a dim."""
        if len(label) != 1:
            return None
        mine = {i for i, state in enumerate(self.item.outputs[0].spec) if state == dim}
        for other in self.body.names.live():
            labels = self.body.labels.get(other.value.name, ())
            for place, theirs in enumerate(labels):
                if theirs != label or other.value.type.shape[place] == 1:
                    continue
                cut = {i for i, state in enumerate(other.spec) if state == place}
                if mine - cut:
                    continue
                factors = [self.body.axis_text(Step((i,), R, S(0))) for i in sorted(cut - mine)]
                size = f"{self.body.text(other)}.size({place})"
                return " * ".join([size, *(f"{axis}.size" for axis in factors)])
        return None

    def _ways(self) -> dict[str, int]:
        ways = rule_of(self.node).ways(self.item.choices, self.body.mesh.sizes)
        assert ways is not None
        return ways

    def axis(self, factor: str) -> str:
        """The `Axis` expression that cuts `factor`, or an empty string."""
        cut = tuple(i for i, choice in enumerate(self.item.choices) if choice == factor)
        return self.body.axis_text(Step(cut, R, S(0))) if cut else ""

    def algorithm(self) -> tuple[str, str]:
        """The algorithm that the op runs over an axis, and that axis; empty strings if none."""
        known = rule_of(self.node).algorithms
        axes = tuple(i for i, choice in enumerate(self.item.choices) if choice in known)
        if not axes:
            return "", ""
        return self.item.choices[axes[0]], self.body.axis_text(Step(axes, R, S(0)))

    def order(self) -> str:
        """In which order ranks hold the tokens of a sequence: `contiguous` or `zigzag`."""
        return "zigzag" if self.node.operands[0].name in self.body.zigzag else "contiguous"

    def sharded_axes(self) -> tuple[str, ...]:
        """Names of the mesh axes over which the result is sharded."""
        spec = self.item.outputs[0].spec
        return tuple(n for n, s in zip(self.body.mesh.names, spec, strict=True) if is_shard(s))


def _tuple_text(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
