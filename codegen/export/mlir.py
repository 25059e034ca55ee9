"""A plan as MLIR: the mesh, every operator in its generic form, and how each value lies.

Types are those of whole tensors, as both dialects have them.  A function for each kind of layer,
which `main` calls once for each layer; parameters are its arguments, by their names in state dicts.
Where a rank converts a value, the value is annotated again.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from ...facts.mesh import Mesh
from ...facts.spec import P, Spec
from ...ir.graph import Node, Param, TensorType, Value
from ...planner.errors import PlanError
from ...planner.plan.plan import PlanData
from ...planner.plan.program import BlockBody, Compute, Convert, LoopCall, Program, Sharded, Weight
from ...planner.strategies.layout import Layout
from .target import Target, Written

_TYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "ui8", torch.bool: "i1", torch.complex64: "complex<f32>",
    torch.complex128: "complex<f64>", torch.float8_e4m3fn: "f8E4M3FN", torch.float8_e5m2: "f8E5M2",
}  # fmt: skip
_IN_ORDER = "tokens lie in zigzag order on the ranks that share a sequence; here in blocks"


class Dialect(Protocol):
    """How a mesh and the sharding of a value are written.

    `told`: arguments and results carry theirs, so that only conversions are lines of their own.
    """

    told: bool

    def mesh(self, mesh: Mesh) -> str:
        """The line that declares the mesh."""
        ...

    def head(self, specs: Sequence[tuple[Spec, int]], mesh: Mesh) -> list[str]:
        """Lines at the top of a function that has values in these specs, of these ranks."""
        ...

    def annotated(
        self, name: str, source: str, typed: str, spec: Spec, rank: int, mesh: Mesh
    ) -> str:
        """The line that gives `source` a sharding, under another name."""
        ...

    def argument(self, spec: Spec, rank: int, mesh: Mesh) -> str:
        """What stands behind the type of an argument."""
        ...

    def result(self, specs: Sequence[tuple[Spec, int]], mesh: Mesh) -> str:
        """The attribute of an operator for how its results lie; "" where annotations say it."""
        ...


def _axes(spec: Spec, rank: int) -> list[list[int]]:
    """For each dim the axes that cut it, major to minor."""
    return [[axis for axis, state in enumerate(spec) if state == dim] for dim in range(rank)]


def _partial(spec: Spec) -> list[int]:
    return [axis for axis, state in enumerate(spec) if state == P]


class ShardDialect:
    """LLVM's `shard`, which was called `mesh` before LLVM 22 (#150177), with a grid for a mesh."""

    told = False

    def mesh(self, mesh: Mesh) -> str:
        """`shard.grid @mesh(shape = 2x4)`."""
        return f"shard.grid @mesh(shape = {'x'.join(map(str, mesh.sizes))})"

    def head(self, specs: Sequence[tuple[Spec, int]], mesh: Mesh) -> list[str]:
        """A sharding for each."""
        made = dict.fromkeys(self._sharding(spec, rank) for spec, rank in specs)
        return [
            f"{name} = shard.sharding @mesh split_axes = {split} : !shard.sharding"
            for name, split in made
        ]

    def _sharding(self, spec: Spec, rank: int) -> tuple[str, str]:
        axes = _axes(spec, rank)
        name = "_".join("".join(map(str, dim)) or "r" for dim in axes) or "scalar"
        return f"%sharding_{name}", str(axes or [[]])

    def annotated(
        self, name: str, source: str, typed: str, spec: Spec, rank: int, mesh: Mesh
    ) -> str:
        """`shard.shard`; summands in an attribute of ours, for the dialect has none."""
        sharding, _ = self._sharding(spec, rank)
        summed = _partial(spec)
        more = f" {{shardwright.partial = {summed}}}" if summed else ""
        return f"{name} = shard.shard {source} to {sharding}{more} : {typed}"

    def argument(self, spec: Spec, rank: int, mesh: Mesh) -> str:
        """None: arguments are annotated inside."""
        return ""

    def result(self, specs: Sequence[tuple[Spec, int]], mesh: Mesh) -> str:
        """None: results are annotated behind the operator."""
        return ""


class ShardyDialect:
    """Shardy's `sdy`, whose axes have names."""

    told = True

    def mesh(self, mesh: Mesh) -> str:
        """`sdy.mesh @mesh = <["dp"=2, "tp"=4]>`."""
        axes = ", ".join(f'"{name}"={size}' for name, size in mesh.axes)
        return f"sdy.mesh @mesh = <[{axes}]>"

    def head(self, specs: Sequence[tuple[Spec, int]], mesh: Mesh) -> list[str]:
        """Nothing."""
        return []

    def _sharding(self, spec: Spec, rank: int, mesh: Mesh) -> str:
        def names(axes: Sequence[int]) -> str:
            return "{" + ", ".join(f'"{mesh.names[axis]}"' for axis in axes) + "}"

        dims = ", ".join(map(names, _axes(spec, rank)))
        summed = f", unreduced={names(_partial(spec))}" if _partial(spec) else ""
        return f"<@mesh, [{dims}]{summed}>"

    def annotated(
        self, name: str, source: str, typed: str, spec: Spec, rank: int, mesh: Mesh
    ) -> str:
        """`sdy.sharding_constraint`."""
        sharding = self._sharding(spec, rank, mesh)
        return f"{name} = sdy.sharding_constraint {source} {sharding} : {typed}"

    def argument(self, spec: Spec, rank: int, mesh: Mesh) -> str:
        """An attribute."""
        return f" {{sdy.sharding = #sdy.sharding{self._sharding(spec, rank, mesh)}}}"

    def result(self, specs: Sequence[tuple[Spec, int]], mesh: Mesh) -> str:
        """One for all results."""
        each = ", ".join(self._sharding(spec, rank, mesh) for spec, rank in specs)
        return f"sdy.sharding = #sdy.sharding_per_value<[{each}]>"


class Mlir(Target):
    """Any plan without stages."""

    exact = trains = serves = True
    comment = "//"

    def __init__(self, name: str, title: str, dialect: Dialect, lost: tuple[str, ...] = ()) -> None:
        self.name, self.title = name, title
        self._dialect, self._lost = dialect, lost

    def write(self, plan: PlanData, layout: Layout | None) -> Written:
        """A module for each phase."""
        if plan.pipeline is not None:
            raise PlanError(
                f"a pipeline is a program for each stage, which {self.name} is not written for; "
                "plan it with a --layout that has no pp"
            )
        lost = list(self._lost) if any(map(_has_summands, plan.phases)) else []
        lost += [_IN_ORDER] if any(p.decisions.order == "zigzag" for p in plan.phases) else []
        if plan.training:
            lost.append("how gradients are reduced, and when: this is the forward pass")
        names = ("prefill", "decode") if plan.decode is not None else ("main",)
        mesh = self._dialect.mesh(plan.mesh)
        functions = [
            line
            for name, phase in zip(names, plan.phases, strict=True)
            for line in _Module(phase, name, self._dialect).lines()
        ]
        lines = [f"module @{_symbol(plan.graph.name)} {{", f"  {mesh}", *functions, "}"]
        return Written("\n".join(lines) + "\n", tuple(lost))


def _has_summands(plan: PlanData) -> bool:
    made = (item for item, _ in plan.program.flat() if isinstance(item, Compute))
    return any(P in output.spec for item in made for output in item.outputs)


class _Module:
    """The functions of one phase."""

    def __init__(self, plan: PlanData, name: str, dialect: Dialect) -> None:
        self._plan, self._name, self._dialect = plan, name, dialect
        self._calls = [item for item in plan.program.statements if isinstance(item, LoopCall)]

    def _block_name(self, call: LoopCall, kind: int) -> str:
        """`main_model_layers_0`."""
        return _symbol(f"{self._name}_{call.loop.path}_{kind}")

    def lines(self) -> Iterator[str]:
        """Of the kinds of layers, then of the model."""
        for call in self._calls:
            for kind, body in enumerate(call.bodies):
                yield from self._block(self._block_name(call, kind), call, body)
        yield from self._main(self._plan.program)

    def _block(self, name: str, call: LoopCall, body: BlockBody) -> Iterator[str]:
        write = _Function(name, self._plan.mesh, self._dialect)
        carried = len(call.carried)
        for value, item in zip(body.block.inputs, call.carried, strict=False):
            write.argument(value, item.spec)
        for value in body.block.inputs[carried:]:
            write.argument(value, None)
        write.weights(body.block.params, body.weights, "")
        for statement in body.statements:
            write.statement(statement)
        yield from write.text(body.outputs)

    def _main(self, program: Program) -> Iterator[str]:
        write = _Function(self._name, self._plan.mesh, self._dialect)
        for item in program.inputs:
            write.argument(item.value, item.spec)
        write.weights(program.graph.params, program.weights, "")
        layers: dict[tuple[str, int], list[str]] = {}
        for call in self._calls:
            for layer, kind in enumerate(call.loop.order):
                body = call.bodies[kind]
                prefix = f"{call.loop.path}.{layer}."
                layers[call.loop.name, layer] = write.stored(body, prefix)
        for statement in program.statements:
            if isinstance(statement, LoopCall):
                self._layers(write, statement, layers)
            else:
                write.statement(statement)
        yield from write.text(program.outputs)

    def _layers(
        self, write: _Function, call: LoopCall, stored: dict[tuple[str, int], list[str]]
    ) -> None:
        values = [write.read(item) for item in call.carried]
        types = [_type(item.value.type) for item in call.carried]
        others = [write.base(value) for value in call.loop.invariants]
        other_types = [_type(value.type) for value in call.loop.invariants]
        for layer, kind in enumerate(call.loop.order):
            weights = stored[call.loop.name, layer]
            weight_types = [_stored_type(param) for param in call.bodies[kind].block.params]
            values = write.call(
                self._block_name(call, kind),
                [*values, *others, *weights],
                [*types, *other_types, *weight_types],
                types,
            )
        for name, item in zip(values, call.outputs, strict=True):
            write.define(item, name)


class _Function:
    """One function as it is written."""

    def __init__(self, name: str, mesh: Mesh, dialect: Dialect) -> None:
        self._name, self._mesh, self._dialect = name, mesh, dialect
        self._arguments: list[str] = []
        self._lines: list[str] = []
        self._specs: list[tuple[Spec, int]] = []
        self._names: dict[tuple[str, Spec], str] = {}
        self._bases: dict[str, str] = {}
        self._count = 0

    def _new(self, hint: str) -> str:
        self._count += 1
        return f"%{re.sub('[^a-zA-Z0-9_]', '_', hint)}_{self._count}"

    def argument(self, value: Value, spec: Spec | None) -> None:
        """A value from outside; its spec is None where uses say it."""
        name, rank = self._new(value.name), len(value.type.shape)
        lies = "" if spec is None else self._dialect.argument(spec, rank, self._mesh)
        self._arguments.append(f"{name}: {_type(value.type)}{lies}")
        self._bases[value.name] = name
        if spec is not None:
            self._names[value.name, spec] = self._made(name, value, spec)

    def weights(self, params: Sequence[Param], weights: Sequence[Weight], prefix: str) -> None:
        """Parameters as they are stored, and the steps to how they are used."""
        uses: dict[str, list[Weight]] = {param.value.name: [] for param in params}
        for weight in weights:
            uses[weight.param.value.name].append(weight)
        for param in params:
            used = uses[param.value.name]
            spec = used[0].stored if used else None
            name = self._stored(param, spec, prefix)
            if param.stored not in (None, param.value.type.dtype):
                cast = self._new(param.name)
                types = f"({_stored_type(param)}) -> {_type(param.value.type)}"
                self._lines.append(f'{cast} = "shardwright.cast"({name}) : {types}')
                name = cast
            self._bases[param.value.name] = name
            for weight in used:
                at = self._made(name, param.value, weight.stored)
                for lies in dict.fromkeys((weight.kept.spec, weight.used)):
                    if lies != weight.stored:
                        at = self._annotated(at, param.value, lies)
                self._names[param.value.name, weight.used] = at

    def stored(self, body: BlockBody, prefix: str) -> list[str]:
        """The parameters of a layer as arguments, which it gets as they are stored."""
        specs = {weight.param.value.name: weight.stored for weight in body.weights}
        return [
            self._stored(param, specs.get(param.value.name), prefix) for param in body.block.params
        ]

    def _stored(self, param: Param, spec: Spec | None, prefix: str) -> str:
        name, rank = self._new(param.name), len(param.value.type.shape)
        lies = "" if spec is None else self._dialect.argument(spec, rank, self._mesh)
        known = f"shardwright.name = {_quoted(prefix + param.name)}"
        attributes = f"{lies[:-1]}, {known}}}" if lies else f" {{{known}}}"
        self._arguments.append(f"{name}: {_stored_type(param)}{attributes}")
        return name

    def statement(self, statement: Convert | Compute) -> None:
        """An operator, or a conversion."""
        if isinstance(statement, Convert):
            target = statement.target
            source = self.read(statement.source)
            self._names[target.value.name, target.spec] = self._annotated(
                source, target.value, target.spec
            )
            return
        self._compute(statement)

    def _compute(self, item: Compute) -> None:
        operands = [self.read(operand) for operand in item.operands]
        types = ", ".join(_type(operand.value.type) for operand in item.operands)
        results = ", ".join(_type(value.type) for value in item.node.outputs)
        name = self._new(item.node.name)
        lies = [(out.spec, len(out.value.type.shape)) for out in item.outputs]
        pairs = [*_attributes(item.node), self._dialect.result(lies, self._mesh)]
        attributes = ", ".join(filter(None, pairs))
        many = f":{len(item.outputs)}" if len(item.outputs) > 1 else ""
        self._lines.append(
            f"{name}{many} = {_quoted(item.node.op)}({', '.join(operands)})"
            f" {{{attributes}}} : ({types}) -> ({results})"
        )
        for i, out in enumerate(item.outputs):
            made = f"{name}#{i}" if many else name
            self._bases[out.value.name] = made
            self._names[out.value.name, out.spec] = self._made(made, out.value, out.spec)

    def _made(self, name: str, value: Value, spec: Spec) -> str:
        """A value where it comes from."""
        return name if self._dialect.told else self._annotated(name, value, spec)

    def _annotated(self, source: str, value: Value, spec: Spec) -> str:
        name, rank = self._new(value.name), len(value.type.shape)
        self._specs.append((spec, rank))
        line = self._dialect.annotated(name, source, _type(value.type), spec, rank, self._mesh)
        self._lines.append(line)
        return name

    def read(self, item: Sharded) -> str:
        """A value in a spec; one from outside is annotated at its first use."""
        key = item.value.name, item.spec
        if key not in self._names:
            self._names[key] = self._annotated(self._bases[key[0]], item.value, item.spec)
        return self._names[key]

    def base(self, value: Value) -> str:
        """A value, however it lies."""
        return self._bases[value.name]

    def define(self, item: Sharded, name: str) -> None:
        """A value that a call made."""
        self._bases[item.value.name] = name
        self._names[item.value.name, item.spec] = self._annotated(name, item.value, item.spec)

    def call(
        self, function: str, given: Sequence[str], types: Sequence[str], made: Sequence[str]
    ) -> list[str]:
        """A call of another function; the names of its results."""
        name = self._new(function)
        many = f":{len(made)}" if len(made) > 1 else ""
        self._lines.append(
            f"{name}{many} = func.call @{function}({', '.join(given)})"
            f" : ({', '.join(types)}) -> ({', '.join(made)})"
        )
        return [f"{name}#{i}" for i in range(len(made))] if many else [name]

    def text(self, outputs: Sequence[Sharded]) -> Iterator[str]:
        """The whole function."""
        names = [self.read(item) for item in outputs]
        types = ", ".join(_type(item.value.type) for item in outputs)
        yield f"  func.func @{self._name}({', '.join(self._arguments)}) -> ({types}) {{"
        for line in [*self._dialect.head(self._specs, self._mesh), *self._lines]:
            yield f"    {line}"
        yield f"    return {', '.join(names)} : {types}" if names else "    return"
        yield "  }"


def _type(type_: TensorType, dtype: torch.dtype | None = None) -> str:
    """`tensor<8x16xbf16>`."""
    return f"tensor<{''.join(f'{size}x' for size in type_.shape)}{_TYPES[dtype or type_.dtype]}>"


def _stored_type(param: Param) -> str:
    return _type(param.value.type, param.dtype)


def _attributes(node: Node) -> Iterator[str]:
    """Arguments that are no tensors."""
    for name, arg in node.args:
        if (text := _attribute(arg)) is not None:
            yield f"{name} = {text}"


def _attribute(arg: object) -> str | None:
    """None for what is no attribute: tensors, and None itself."""
    if isinstance(arg, bool):
        return str(arg).lower()
    if isinstance(arg, int):
        return f"{arg} : i64"
    if isinstance(arg, float):
        bits = struct.unpack(">Q", struct.pack(">d", arg))[0]
        return f"{arg:.17e} : f64" if math.isfinite(arg) else f"0x{bits:016X} : f64"
    if isinstance(arg, (str, torch.dtype)):
        return _quoted(str(arg))
    if isinstance(arg, complex):
        return f"[{_attribute(arg.real)}, {_attribute(arg.imag)}]"
    if isinstance(arg, tuple):
        inner = [_attribute(each) for each in arg]
        return f"[{', '.join(filter(None, inner))}]" if any(inner) or not inner else None
    return None


def _quoted(text: str) -> str:
    """A text as MLIR has it: letters of all languages as they are, which JSON would write as
    `\\u00e9`."""
    return json.dumps(text, ensure_ascii=False)


def _symbol(text: str) -> str:
    return re.sub("[^a-zA-Z0-9_]", "_", text) or "model"


_NO_SUMS = "partial sums have no place in the dialect; they are attributes `shardwright.partial`"
SHARD = Mlir("mlir", "MLIR, the dialect `shard` of LLVM 22", ShardDialect(), (_NO_SUMS,))
SDY = Mlir("sdy", "MLIR, the dialect `sdy` of Shardy", ShardyDialect())

__all__ = ["SDY", "SHARD", "Mlir"]
