"""A program to one Python file: a class per distinct block, the model, its tables."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from math import lcm, prod
from types import MappingProxyType
from typing import TypeAlias

from ..facts.blocks import local_shape
from ..facts.mesh import Mesh
from ..facts.spec import Spec, format_spec
from ..facts.users import Import
from ..ir.graph import Call, Extent, FunctionCall, Param
from ..ir.graph import Input as GraphInput
from ..ir.ops.attention import values_in_keys
from ..ir.ops.caches import cache_name, cache_spec, keeps_tokens, owning_axis
from ..ir.ops.counted import Counted, counted_labels
from ..ir.ops.indices import highest
from ..ir.ops.labels import LABELS, DimLabels, label_dims, size_labels
from ..ir.ops.registry import operator_of
from ..ir.ops.users import imports_in
from ..planner.plan.program import (
    BlockBody,
    Compute,
    Convert,
    LoopCall,
    PricedStep,
    Program,
    Sharded,
    Statement,
    Weight,
)
from ..planner.plan.returned import spec_text
from .body import Context, FunctionWriter, axis_names, traffic_parts
from .classes import RUNTIME, Classes, Modules, argument_names, names_of, parameter_names
from .constants import Constants
from .functions import Functions
from .inputs import fixed_table, path_text, taken_in
from .names import words_of
from .nesting import Function, nest
from .source import WIDTH, check, comment_lines, signature, statement

DECODING = "Decoding"  # the class of the second program, where a module has two; its name ends so

# From the text of a module's classes to the lines that say how to read its signs
Legend: TypeAlias = Callable[[str], Iterable[str]]


def no_legend(text: str) -> Iterable[str]:
    """Where the reader is no stranger."""
    return ()


def write_source(
    program: Program,
    mesh: Mesh,
    *,
    summary: str,
    phase: str,
    optimizer: str,
    decode: Program | None = None,
    recached: Mapping[str, Sequence[Spec]] = MappingProxyType({}),
    legend: Legend = no_legend,
) -> str:
    """The generated module as text; `summary` becomes its docstring, with the `legend` below.

    `decode` is the program for single tokens of a module that serves, with the same parameters.
    `recached` has, by the name of an attention's node in `program`, the specs that its cache takes
    one by one to the layout of `decode`; other caches lie alike in both.  The same programs give
    the same bytes.
    """
    second: list[Writer] = []
    graphs = [each.graph for each in (program, decode) if each is not None]
    imports = list(dict.fromkeys(item for graph in graphs for item in imports_in(graph)))
    users = names_of(imports, mesh.names)
    functions = Functions(graphs, [*users.values(), *axis_names(mesh)])
    classes = Classes([*users.values(), *functions.names])
    if decode is not None:
        second = [Writer(decode, mesh, "decode", optimizer, classes, functions, users, DECODING)]
    first = Writer(
        program, mesh, phase, optimizer, classes, functions, users, second=second,
        recached=recached,
    )  # fmt: skip
    models = [writer.model_class() for writer in sharing_tables((*second, first))]
    return file_of(summary, [*classes.parts(), *models], functions, legend, imports, users)


def file_of(
    summary: str,
    parts: Sequence[Sequence[str]],
    functions: Functions,
    legend: Legend,
    imports: Sequence[Import],
    users: Mapping[Import, str],
) -> str:
    """The text of a module: what it is, its imports (`imports` are of the user's files, called as
    in `users`), the user's functions, its classes in `parts`, and its demonstration."""
    parts = [*functions.parts(line for part in parts for line in part), *parts]
    lines = [line for part in parts for line in part]
    signs = list(legend("\n".join(lines)))
    summary = "\n".join([summary, "", *signs]) if signs else summary
    head = _head_lines(summary, lines, [_import_line(item, users) for item in imports])
    foot = ['if __name__ == "__main__":', "    ShardedModel.demo()"]
    text = "\n\n\n".join("\n".join(part) for part in (head, *parts, foot)) + "\n"
    return check(text, imports)


def sharing_tables(writers: Sequence[Writer]) -> Sequence[Writer]:
    """The writers of a module's programs, told which caches share a page table."""
    tables = _page_tables([writer.caches() for writer in reversed(writers)])
    for writer in writers:
        writer.tables = tables
    return writers


def _page_tables(programs: Sequence[Mapping[str, Compute]]) -> dict[str, int]:
    """By its name, which caches may share a page table with which.

    Where a program gives all ranks of an axis all new tokens, they store the pages that they own,
    otherwise their own tokens: caches differ that do so over other axes in one of the programs.
    """

    def owners(name: str) -> tuple[int, ...]:
        items = [program[name] for program in programs]
        return tuple(owning_axis(item.node, item.choices) for item in items)

    names = [name for name, item in programs[0].items() if keeps_tokens(item.node)]
    kinds = list(dict.fromkeys(map(owners, names)))
    return {name: kinds.index(owners(name)) for name in names}


def _import_line(item: Import, users: Mapping[Import, str]) -> str:
    """`Rounding = ops.import_user("rounding.py", "Rounding")`; without a name for operators."""
    if not item.function:
        return f'ops.import_user("{item.place}")'
    return f'{users[item]} = ops.import_user("{item.place}", "{item.function}")'


def _head_lines(summary: str, lines: Sequence[str], imports: Sequence[str]) -> list[str]:
    """The docstring, imports of what the lines use, and `imports` of what is the user's."""
    text = "\n".join(lines)
    names = [name for name in RUNTIME if re.search(rf"\b{name}\b[(.)]", text)]
    if imports and "ops" not in names:
        names.append("ops")
    body = "\n".join(summary.splitlines())
    return [
        f'"""{body}\n"""' if "\n" in body else f'"""{body}"""',
        "",
        "import torch",
        "import torch.nn.functional as F",
        "from torch import Tensor, nn"
        if re.search(r"\bnn\.[A-Z]", text)
        else "from torch import Tensor",
        "",
        *_import_lines(sorted(names, key=_import_order)),
        *(["", *imports] if imports else []),
    ]


class Writer:
    """Writes the classes of one program: one for each kind of block, and the model."""

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        phase: str,
        optimizer: str,
        classes: Classes,
        functions: Functions,
        users: Mapping[Import, str],
        name: str = "ShardedModel",
        second: Sequence[Writer] = (),
        recached: Mapping[str, Sequence[Spec]] = MappingProxyType({}),
        title: str = "",
    ) -> None:
        self.program = program
        self.title = title or program.graph.name
        self.mesh = mesh
        self.phase = phase
        self.optimizer = optimizer
        self.classes = classes
        self.functions = functions
        self.users = users  # what the module calls the user's functions
        self.name = name
        self.prefix = DECODING if name.endswith(DECODING) else ""  # of the classes' names
        self.second = second  # the program for decoding beside this one, if there is one
        self.recached = recached  # ways of caches to its layout, by node
        self.labels: Mapping[str, DimLabels] = label_dims(program.graph)
        self.loops = [s for s in program.statements if isinstance(s, LoopCall)]
        self.tables: Mapping[str, int] = {}  # of page tables that caches share, by their names
        self.words = words_of(program.statements)
        self.constants = Constants()
        self.baked: set[str] = set()  # labels of dims whose planned size the text holds
        self.class_of = {
            (call.loop.name, kind): self._block_class(call, kind)
            for call in self.loops
            for kind in range(len(call.bodies))
        }

    # -- functions ----------------------------------------------------------------------------

    def _nest(
        self,
        statements: Sequence[Statement],
        inputs: Sequence[Sharded],
        outputs: Sequence[Sharded],
        weights: Sequence[Weight],
        loop: str = "",
    ) -> tuple[Function, Context]:
        """The tree of functions of a block of `loop`, or of the model, and what they share."""
        names = {weight.param.value.name: weight.param.name for weight in weights}
        context = Context(
            self.mesh,
            self.labels,
            self.program.zigzag,
            names,
            self.words,
            {weight.item: weight.name for weight in weights},
            self.program.layers,
            self.program.training,
            self.program.order,
            self.users,
            self.functions.names,
        )

        def define(function: Function) -> Function | None:
            return self._define(function, context)

        return nest(statements, inputs, outputs, names, loop, define), context

    def _define(self, function: Function, context: Context) -> Function | None:
        """Write a function of the user's, if it takes tensors alone."""
        call = function.call
        assert isinstance(call, FunctionCall)
        words = [self.words.get(item.value.name) or item.value.name for item in function.inputs]
        ops = [step.node.op for step in function.statements if isinstance(step, Compute)]
        raised = any(not op.startswith("aten.") for op in ops)
        names = parameter_names(call, words, raised=raised)
        place = {name: at for at, name in enumerate(call.arguments)}
        pairs = sorted(
            zip(names, function.inputs, strict=True),
            key=lambda pair: place.get(pair[0], len(place)),
        )
        function = replace(function, inputs=tuple(item for _, item in pairs))
        writer = FunctionWriter(function, context, comments=False)
        arguments = [writer.define(item, name) for name, item in pairs]
        body = writer.lines(1)
        alone = not (writer.axes_used or writer.held)
        made = alone and self.functions.add(
            call, arguments, len(function.outputs), body, writer.baked
        )
        return function if made else None

    def _modules(self, writer: FunctionWriter, context: Context) -> Modules:
        """Classes of the modules that a function calls, written first."""
        made = Modules.of(writer.leaves)
        for call, names in writer.calls.items():
            function = call.function
            inner = FunctionWriter(function, context)
            assert isinstance(function.call, Call)
            arguments = [
                inner.define(item, name)
                for item, name in zip(
                    function.inputs, argument_names(function.call.arguments, names), strict=True
                )
            ]
            lines = inner.lines(2)
            self.baked |= inner.baked
            modules = self._modules(inner, context)
            body = [
                *modules.lines,
                *self._signature(inner, arguments, function.inputs, function.outputs),
                *self._axes_line(inner.axes_used),
                *lines,
            ]
            base = f"{self.prefix}{function.call.class_name}"
            origin = f"{function.call.class_name} of {function.call}"
            made.classes[call.path] = self.classes.add(base, "Sharded", body, origin)
        made.classes = {path: made.classes[path] for path in writer.held}
        return made

    def _signature(
        self,
        writer: FunctionWriter,
        names: Sequence[str],
        inputs: Sequence[Sharded],
        outputs: Sequence[Sharded],
    ) -> list[str]:
        """`def forward(...)`, with what its arguments are."""
        count = len(outputs)
        returned = "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"
        typed = [f"{name}: Tensor" for name in names]
        layouts = [f"{n} {writer.layout(i)}" for n, i in zip(names, inputs, strict=True)]
        lines = signature("forward", ["self", *typed], returned, 1)
        comment = "  # " + "; ".join(layouts)
        if len(lines) == 1 and len(lines[0] + comment) <= WIDTH:
            return [lines[0] + comment]
        return [*lines, *comment_lines("; ".join(layouts), 2)]

    # -- blocks -------------------------------------------------------------------------------

    def _block_class(self, call: LoopCall, kind: int) -> str:
        """The class of a kind of block, written; its name."""
        body = call.bodies[kind]
        n = len(call.carried)
        carried = [
            Sharded(value, item.spec)
            for value, item in zip(body.block.inputs[:n], call.carried, strict=True)
        ]
        inputs = [*carried, *self._inner_arguments(call, body)]
        function, context = self._nest(
            body.statements, inputs, body.outputs, body.weights, call.loop.path
        )
        writer = FunctionWriter(function, context)
        known = function.call.arguments if function.call else ()
        outer = [self._outer_name(call, i) for i in range(len(call.arguments))]
        wanted = argument_names(known, [*["hidden_states"] * n, *outer])
        names = [writer.define(i, name) for i, name in zip(inputs, wanted, strict=True)]
        lines = writer.lines(2)
        self.baked |= writer.baked
        modules = self._modules(writer, context)
        table = self._weights_table(body.weights)
        text = [
            *modules.lines,
            *table,
            *([""] if table else []),
            *self._signature(writer, names, inputs, body.outputs),
            *self._axes_line(writer.axes_used),
            *lines,
        ]
        layers = [i for i, k in enumerate(call.loop.order) if k == kind]
        many = f", {len(layers)} times: {_ranges(layers)}"
        times = f"`{call.loop.path}`{many}" if layers[1:] else f"`{call.loop.path}.{layers[0]}`"
        origin = f"; {function.call}" if function.call and function.call.file else ""
        base = f"{self.prefix}{body.block.class_name or 'Block'}"
        return self.classes.add(base, "Layer", text, times + origin)

    def _inner_arguments(self, call: LoopCall, body: BlockBody) -> list[Sharded]:
        """The loop's arguments by the names of this block's own inputs."""
        n = len(call.carried)
        position = {value.name: i for i, value in enumerate(call.loop.invariants)}
        inner = body.block.inputs[n:]
        return [Sharded(inner[position[a.value.name]], a.spec) for a in call.arguments]

    def _outer_name(self, call: LoopCall, index: int) -> str:
        item = call.arguments[index]
        return self.words.get(item.value.name) or item.value.name.split(".")[-1]

    def _axes_line(self, axes: set[tuple[str, ...]]) -> list[str]:
        """`tp = self.mesh["tp"]` for every axis that a body names, single ones first."""
        order = self.mesh.names.index
        used = sorted(axes, key=lambda names: (len(names), [order(n) for n in names]))
        return [
            f"        {'_'.join(names)} = self.mesh[{', '.join(map(_quoted, names))}]"
            for names in used
        ]

    # -- the model ----------------------------------------------------------------------------

    def model_class(self) -> list[str]:
        """The lines of the model's class."""
        program = self.program
        function, context = self._nest(
            program.statements, program.inputs, program.outputs, program.weights
        )
        writer = FunctionWriter(function, context)
        names = [
            writer.define(item, source.name)
            for item, source in zip(program.inputs, program.graph.inputs, strict=True)
        ]
        lines = writer.lines(2, "self.pack({})")
        self.baked |= writer.baked
        self.baked |= self.functions.baked
        modules = self._modules(writer, context)
        arguments, unpacked = taken_in(program.graph, names)
        sizes = ", ".join(f'"{name}": {size}' for name, size in self.mesh.axes)
        what = " for one token of each sequence" if self.prefix else ""
        return [
            f"class {self.name}(ShardedModule):",
            f'    """{self.title} as one rank of {self.mesh} runs it{what}."""',
            "",
            *modules.lines,
            f"    MESH = {{{sizes}}}",
            f'    PHASE = "{self.phase}"',
            f'    OPTIMIZER = "{self.optimizer}"',
            *self._context_line(),
            *self._step_lines(),
            *self._layers_table(),
            *self._parameters_table(),
            *self._matrices_line(),
            *self._weights_table(program.weights, program.stages()),
            *self._inputs_table(),
            *fixed_table(program.graph),
            *self._labels_line(),
            *self._outputs_table(),
            *self._caches_table(),
            *[f"    DECODE = {second.name}" for second in self.second],
            "",
            *arguments,
            *unpacked,
            *self._axes_line(writer.axes_used),
            *lines,
        ]

    def _step_lines(self) -> list[str]:
        """What a step of training does besides."""
        program, lines = self.program, list[str]()
        if program.micro_batches > 1:
            lines.append(f"    MICRO_BATCHES = {program.micro_batches}")
        if program.reduced is not None:
            told = "  # of gradients on their way between ranks"
            lines.append(f"    REDUCE = {program.reduced}{told}")
        return lines

    def _context_line(self) -> list[str]:
        nodes = [n for n in self.program.graph.nodes if keeps_tokens(n)]
        context = nodes[0].arg("context") if nodes else 0
        told = "  # tokens of a sequence that are cached before, as planned"
        return [f"    CONTEXT = {context}{told}"] if context else []

    def _layers_table(self) -> list[str]:
        if not self.loops:
            return []
        lines = ["    LAYERS = {"]
        for call in self.loops:
            runs = groupby(self.class_of[call.loop.name, kind] for kind in call.loop.order)
            counted = [(name, len(list(same))) for name, same in runs]
            text = " + ".join(f"[{name}] * {count}" for name, count in counted)
            if len(f'        "{call.loop.path}": {text},') > WIDTH:
                text = f"[{', '.join(self.class_of[call.loop.name, k] for k in call.loop.order)}]"
            lines += statement(f'"{call.loop.path}": {text}', 2)
            lines[-1] += ","
        return [*lines, "    }"]

    def _parameters_table(self) -> list[str]:
        if self.second:  # the same parameters, stored alike
            return [f"    PARAMETERS = {self.second[0].name}.PARAMETERS"]
        lines = ["    PARAMETERS = {"]
        for prefix, param, spec in self._all_stored():
            lines += self._param_line(prefix, param, spec)
        return [*self.constants.lines(), *lines, "    }"]

    def _all_stored(self) -> Iterator[tuple[str, Param, Spec]]:
        """What stands before the name of each parameter, and how it is stored."""
        yield from (("", *row) for row in _stored(self.program.weights))
        for call in self.loops:
            for kind, body in enumerate(call.bodies):
                layers = [i for i, k in enumerate(call.loop.order) if k == kind]
                prefix = f"{call.loop.path}.{{{_range_text(layers)}}}."
                yield from ((prefix, *row) for row in _stored(body.weights))

    def _matrices_line(self) -> list[str]:
        """What optimizers of whole matrices leave to others."""
        if not self.program.training:
            return []
        names = dict.fromkeys(
            prefix + (param.part.name if param.part else param.name)
            for prefix, param, _ in self._all_stored()
            if _trained(param) and len(param.value.type.shape) in (2, 3) and not param.matrix
        )
        if not names:
            return []
        told = "Muon leaves them to AdamW"
        return statement(f"NOT_MATRICES = {_strings(list(names))}", 1, told)

    def _param_line(self, prefix: str, param: Param, spec: Spec) -> list[str]:
        name = prefix + param.name
        args = [_tuple(param.value.type.shape), str(param.dtype), f'"{format_spec(spec)}"']
        if param.kind != "parameter":
            args.append(f'kind="{param.kind}"')
        elif not param.value.differentiable:
            args.append("trainable=False")
        if param.aliases:
            args.append(f"aliases={_strings([prefix + alias for alias in param.aliases])}")
        if param.data is not None:
            args.append(f"data={self.constants.text(param)}")
        if (part := param.part) is not None:
            args.append(f'part=Part("{prefix}{part.name}", {part.dim}, {part.start})')
        local = local_shape(param.value.type.shape, spec, self.mesh.sizes)
        comment = f"{list(local)} per rank" if local != param.value.type.shape else ""
        lines = statement(f'"{name}": Param({", ".join(args)}),', 2, comment)
        if all(len(line) <= WIDTH for line in lines):
            return lines
        return _one_per_line(f'"{name}": Param(', args, comment)

    def _weights_table(
        self,
        weights: Sequence[Weight],
        stages: Mapping[Sharded, tuple[int, int]] = MappingProxyType({}),
    ) -> list[str]:
        """The weights that a class uses in another layout or dtype than they are stored in."""
        lines: list[str] = []
        if any(stages.get(w.item, (0, 0)) != (0, 0) for w in weights if not w.plain):
            told = "loops over layers that run before its first use and its last"
            lines.append(f"        # `stages`: {told}")
        for weight in weights:
            if weight.plain:
                continue
            args = [f'"{format_spec(weight.stored)}"', f'"{format_spec(weight.used)}"']
            args += _through(weight.kept.spec, weight.steps)
            if weight.name != weight.param.name:
                args.append(f'of="{weight.param.name}"')
            if stages.get(weight.item, (0, 0)) != (0, 0):
                args.append(f"stages={_tuple(stages[weight.item])}")
            if weight.param.dtype != weight.param.value.type.dtype:
                args.append(f"dtype={weight.param.value.type.dtype}")
            args += _home(weight)
            comment = "; ".join(traffic_parts(weight.way))
            lines += statement(f'"{weight.name}": Weight({", ".join(args)}),', 2, comment)
        return ["    WEIGHTS = {", *lines, "    }"] if lines else []

    def _inputs_table(self) -> list[str]:
        lines: list[str] = []
        for source, item in zip(self.program.graph.inputs, self.program.inputs, strict=True):
            kind = item.value.type
            args = [f'"{self._spec_text(item)}"', _tuple(kind.shape), str(kind.dtype)]
            args += self._free(source)
            if high := highest(self.program.graph, item.value.name):
                args.append(f"high={high}")
            if source.path:
                args.append(f"path={path_text(source.path)}")
            if item.value.differentiable:
                args.append("gradient=True")
            lines += statement(f'"{source.name}": Input({", ".join(args)}),', 2)
        text = "\n".join(lines)
        told = [
            *(["`free`: dims that may have other sizes"] if "free=" in text else []),
            *(["`step`: what those are multiples of"] if "step=" in text else []),
            *(["`least`: the smallest that they may be"] if "least=" in text else []),
            *(["`most`: the largest, 0 for any"] if "most=" in text else []),
            *(["`high`: numbers are below it"] if "high=" in text else []),
            *(["`gradient`: each rank gets that of its part"] if "gradient=" in text else []),
        ]
        bounds = [
            f"        # {line}"
            for bound in (*self.program.graph.bounds, *self._stays())
            for line in textwrap.wrap(bound, WIDTH - 10)
        ]
        return ["    INPUTS = {", *bounds, *comment_lines("; ".join(told), 2), *lines, "    }"]

    def _stays(self) -> list[str]:
        """Why a dim stays that the model itself lets be of other sizes."""
        inputs = self.program.graph.inputs
        pairs = [pair for i in inputs for pair in zip(i.labels, i.extents, strict=False)]
        free = {label for label, extent in pairs if label in LABELS and extent}
        numbers, uneven = self.baked & free, (self._cuts[1] - self.baked) & free
        return [
            *(f"the {LABELS[x]} stays: numbers below follow from it" for x in sorted(numbers)),
            *(f"the {LABELS[x]} stays: ranks share it, or what follows from it, unevenly"
              for x in sorted(uneven)),
        ]  # fmt: skip

    def _labels_line(self) -> list[str]:
        """Which labels count in the mean that is the loss, for steps of several micro-batches."""
        found = counted_labels(self.program.graph) if self.program.training else None
        if isinstance(found, Counted):
            args = [f'"{found.input}"']
            args += [f"first={found.first}"] if found.first else []
            args += [f"ignore={found.ignored}"] if found.ignored != -100 else []
            return statement(f"LABELS = Labels({', '.join(args)})", 1, "those that count in a mean")
        if found is None:
            return []
        told = [f"        {json.dumps(line)}" for line in _words(found, WIDTH - 12)]
        return ["    LABELS = (", *told, "    )"]

    def _free(self, source: GraphInput) -> list[str]:
        """Arguments of the table that say which other sizes the dims of an input may have."""
        extents = [
            # one size of 1 looks like every other
            None if label in self.baked or label in self._cuts[1] or size == 1 else extent
            for label, size, extent in zip(
                source.labels, source.value.type.shape, source.extents, strict=False
            )
        ]
        free = [dim for dim, extent in enumerate(extents) if extent]
        known = [extent or Extent() for extent in extents]
        steps = [
            lcm(self._cuts[0].get(label, 1), extent.step)
            for label, extent in zip(source.labels, known, strict=False)
        ]
        args = [f"free={_tuple(free)}"] if free else []
        args += [f"step={_tuple(steps)}"] if any(steps[dim] > 1 for dim in free) else []
        least, most = [e.least for e in known], [e.most for e in known]
        args += [f"least={_tuple(least)}"] if any(n > 1 for n in least) else []
        return [*args, f"most={_tuple(most)}"] if any(most) else args

    @cached_property
    def _cuts(self) -> tuple[Mapping[str, int], frozenset[str]]:
        """By label (`b`, `s`) the least number of rows that every cut of such a dim divides, and
        the labels of dims that stay: those that ranks share unevenly, or that something depends on
        whose size is not told by them."""
        items = [*self.program.inputs, *self.program.outputs]
        for statement_, _ in self.program.flat():
            if isinstance(statement_, Convert):
                items += [statement_.source, statement_.target]
            else:
                items += [*statement_.operands, *statement_.outputs]
        steps: dict[str, int] = {}
        stay = frozenset[str]()
        sources = size_labels(self.program.graph, self.labels)
        for item in set(items):
            zigzag = self.program.zigzag.get(item.value.name, frozenset())
            shape = item.value.type.shape
            labels = self.labels.get(item.value.name, ((),) * len(shape))
            for dim, (size, names) in enumerate(zip(shape, labels, strict=True)):
                cut = zip(self.mesh.sizes, item.spec, strict=True)
                ways = prod(n for n, state in cut if state == dim)
                if ways == 1 or size == 1:
                    continue
                ways *= 2 if dim in zigzag else 1
                if names and size % ways == 0:
                    steps[names[0]] = lcm(steps.get(names[0], 1), ways)
                elif item.value.name in sources:
                    stay |= sources[item.value.name][dim]
        return steps, stay

    def _outputs_table(self) -> list[str]:
        lines = ["    OUTPUTS = ("]
        for out, item in zip(self.program.graph.outputs, self.program.outputs, strict=True):
            shape = _tuple(item.value.type.shape)
            args = [path_text(out.path), f'"{self._spec_text(item)}"', shape]
            lines += statement(f"Output({', '.join(args)}),", 2)
        single = f"    OUTPUTS = ({lines[-1].strip()})"
        return [single] if len(lines) == 2 and len(single) <= WIDTH else [*lines, "    )"]

    def _caches_table(self) -> list[str]:
        """KV caches by their path, `model.layers.{0..31}.kv`."""
        if self.second and not self.recached:
            return [f"    CACHES = {self.second[0].name}.CACHES"]
        rows = [
            line for name, item in self.caches().items() for line in self._cache_row(name, item)
        ]
        if self.recached:
            way = f"from `spec` along `path` to the layout of `{self.second[0].name}`"
            rows.insert(0, f"        # After prefill a cache is converted {way}.")
        return ["    CACHES = {", *rows, "    }"] if rows else []

    def caches(self) -> dict[str, Compute]:
        """What has a cache or a state, by its name, the same in both programs of a model."""
        found: dict[str, Compute] = {}

        def add(statements: Sequence[object], prefix: str) -> None:
            for item in statements:
                if isinstance(item, Compute) and operator_of(item.node).remembers:
                    found[f"{prefix}{cache_name(item.node)}"] = item

        add(self.program.statements, "")
        for call in self.loops:
            for kind, body in enumerate(call.bodies):
                layers = [i for i, k in enumerate(call.loop.order) if k == kind]
                add(body.statements, f"{call.loop.path}.{{{_range_text(layers)}}}.")
        return found

    def _cache_row(self, name: str, item: Compute) -> list[str]:
        node = item.node
        if not keeps_tokens(node):
            return self._state_row(name, item)
        key = node.operands[1]
        args = [
            f"heads={key.type.shape[1]}",
            f"key_dim={key.type.shape[3]}",
            f"value_dim={dict(node.args).get('value_dim') or node.output.type.shape[3]}",
            f"dtype={key.type.dtype}",
            f'spec="{format_spec(cache_spec(node, item.choices))}"',
        ]
        if node.arg("window"):
            args.append(f"window={node.arg('window')}")
        if values_in_keys(node):
            args.append("values_in_keys=True")
        if node.name in self.recached:
            path = [format_spec(spec) for spec in self.recached[node.name][1:]]
            args.append(f"path={_strings(path)}")
        if self.tables[name]:
            args.append(f"table={self.tables[name]}")
        return statement(f'"{name}": Cache({", ".join(args)}),', 2)

    def _state_row(self, name: str, item: Compute) -> list[str]:
        kind = operator_of(item.node).state(item.node)
        spec = format_spec(cache_spec(item.node, item.choices))
        args = f'shape={_tuple(kind.shape[1:])}, dtype={kind.dtype}, spec="{spec}"'
        return statement(f'"{name}": SequenceState({args}),', 2)

    def _spec_text(self, item: Sharded) -> str:
        """`S0,Z1` for a value in spec `S0,S1` whose dim 1 is cut in zigzag order."""
        return spec_text(self.program, item.value.name, format_spec(item.spec))


def _stored(weights: Sequence[Weight]) -> list[tuple[Param, Spec]]:
    """Each parameter once, as it is stored."""
    found = {weight.param.name: (weight.param, weight.stored) for weight in weights}
    return list(found.values())


def _trained(param: Param) -> bool:
    return param.kind == "parameter" and param.value.differentiable


def _through(start: Spec, steps: Sequence[PricedStep]) -> list[str]:
    """The arguments that say how a weight goes from one spec to another, where it is not told by
    these two."""
    specs = [start]
    for priced in steps[:-1]:
        step = priced.step
        specs.append(tuple(step.b if i in step.axes else s for i, s in enumerate(specs[-1])))
    by = [priced.step.by for priced in steps]
    via = [f"via={_strings([*map(format_spec, specs[1:])])}"] if specs[1:] else []
    return via + ([f"by={_strings(by)}"] if any(by) else [])


def _home(weight: Weight) -> list[str]:
    """The argument that says where a weight is between its uses, if it has a home."""
    home = weight.kept.home
    if home is None:
        return []
    args = [f'"{format_spec(home.spec)}"', *_through(weight.stored, weight.homecoming)]
    args += ["kept=False"] * (not weight.kept.kept) + ["late=True"] * home.late
    return [f"home=Home({', '.join(args)})"]


def _import_order(name: str) -> tuple[bool, str]:
    """Classes before modules, as ruff sorts them."""
    return name.islower(), name


def _import_lines(names: Sequence[str]) -> list[str]:
    line = f"from shardwright.runtime import {', '.join(names)}"
    if len(line) <= WIDTH:
        return [line]
    return ["from shardwright.runtime import (", *(f"    {name}," for name in names), ")"]


def _quoted(name: str) -> str:
    return f'"{name}"'


def _one_per_line(head: str, args: list[str], comment: str) -> list[str]:
    above = [f"        # {comment}"] if comment else []
    return [*above, f"        {head}", *(f"            {arg}," for arg in args), "        ),"]


def _tuple(items: Sequence[int]) -> str:
    return f"({', '.join(map(str, items))}{',' if len(items) == 1 else ''})"


def _words(text: str, width: int) -> list[str]:
    """Pieces of a sentence, of which each but the last ends with a space."""
    *lines, last = textwrap.wrap(text, width, break_long_words=False)
    return [*(f"{line} " for line in lines), last]


def _strings(items: Sequence[str]) -> str:
    joined = ", ".join(f'"{item}"' for item in items)
    return f"({joined}{',' if len(items) == 1 else ''})"


def _range_text(layers: list[int]) -> str:
    """`0..31`, or `0,2,4`: the runtime's `Param` table expands it."""
    if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
        return f"{layers[0]}..{layers[-1]}"
    return ",".join(map(str, layers))


def _ranges(layers: list[int]) -> str:
    text = _range_text(layers).replace("..", " to ").replace(",", ", ")
    return f"layer {text}" if len(layers) == 1 else f"layers {text}"
