"""The program of one rank: local ops and conversions, in order.

Lowering walks the graph with the decisions.  A node needs its operands in certain specs; a value
that is not there yet in that spec is converted just before its first use, and kept for later
users.  Values that a loop takes from outside are converted before the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from ...facts.moves import primitive
from ...facts.spec import R, Spec, V
from ...facts.traffic import Traffic
from ...ir.graph import Block, Graph, Loop, Node, Param, Value
from ...ir.ops.local import node_specs
from ...ir.ops.order import token_dims
from ...ir.ops.registry import rule_of
from ...ir.ops.rule import Choice
from ..strategies.build import Decisions
from ..strategies.conversion import Conversions, Step

Paths: TypeAlias = Callable[[Value, Spec, Spec], "tuple[PricedStep, ...]"]


@dataclass(frozen=True, slots=True)
class PricedStep:
    """One step of a conversion with its forward and backward price and traffic."""

    step: Step
    seconds: float
    traffic: tuple[Traffic, ...]


def priced_path(conversions: Conversions, a: Spec, b: Spec) -> tuple[PricedStep, ...]:
    """The steps of the cheapest conversion from `a` to `b`."""
    steps: list[PricedStep] = []
    at = a
    for step in conversions.path(a, b):
        seconds, traffic = conversions.step_seconds(step, at), conversions.step_traffic(step, at)
        steps.append(PricedStep(step, seconds, traffic))
        at = tuple(step.b if i in step.axes else s for i, s in enumerate(at))
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class Sharded:
    """A value in a spec: what a local variable of the program holds."""

    value: Value
    spec: Spec


@dataclass(frozen=True, slots=True)
class Convert:
    """`target = step(source)`."""

    source: Sharded
    target: Sharded
    priced: PricedStep
    param: bool
    user: str  # name of the node that asked first

    @property
    def primitive(self) -> str:
        """What it runs in forward: `all_gather`, `slice`, `nothing`, ..."""
        return primitive(self.priced.step.a, self.priced.step.b)


@dataclass(frozen=True, slots=True)
class Compute:
    """A node run on local tensors."""

    node: Node
    choices: tuple[Choice, ...]
    operands: tuple[Sharded, ...]
    outputs: tuple[Sharded, ...]


@dataclass(frozen=True, slots=True)
class BlockBody:
    """One kind of block: parameters in storage, arguments, statements, results."""

    block: Block
    params: tuple[tuple[Param, Spec], ...]
    statements: tuple[Convert | Compute, ...]
    outputs: tuple[Sharded, ...]


@dataclass(frozen=True, slots=True)
class LoopCall:
    """`for layer in path: carried = layer(carried, arguments)`.

    `carried` are the loop's initial values in the carried specs; `arguments` the outer values that
    the blocks take, each in the spec they need.
    """

    loop: Loop
    bodies: tuple[BlockBody, ...]
    carried: tuple[Sharded, ...]
    arguments: tuple[Sharded, ...]
    outputs: tuple[Sharded, ...]


Statement: TypeAlias = Convert | Compute | LoopCall


def is_gather(item: Statement) -> bool:
    """Does the statement gather a parameter?"""
    return isinstance(item, Convert) and item.param and item.primitive == "all_gather"


@dataclass(frozen=True)
class Program:
    """The whole model on one rank."""

    graph: Graph
    inputs: tuple[Sharded, ...]
    params: tuple[tuple[Param, Spec], ...]
    statements: tuple[Statement, ...]
    outputs: tuple[Sharded, ...]
    recompute: bool = False  # layers run forward again in backward, and keep only their inputs
    order: str = "contiguous"  # how ranks that share a sequence hold its tokens; or `zigzag`
    training: bool = True  # does a backward pass follow?

    @cached_property
    def zigzag(self) -> dict[str, frozenset[int]]:
        """By value, the dims whose slices are in zigzag order."""
        return token_dims(self.graph) if self.order == "zigzag" else {}

    def flat(self) -> list[tuple[Convert | Compute, int]]:
        """Every statement with how often it runs, loops opened."""
        out: list[tuple[Convert | Compute, int]] = []
        for statement in self.statements:
            if isinstance(statement, LoopCall):
                for kind, body in enumerate(statement.bodies):
                    times = statement.loop.order.count(kind)
                    out += [(inner, times) for inner in body.statements]
            else:
                out.append((statement, 1))
        return out


def lower(graph: Graph, decisions: Decisions, paths: Paths, *, training: bool) -> Program:
    """The program of `graph` under `decisions`; `paths` gives the steps between two specs."""
    return _Lowering(graph, decisions, paths, training).run()


class _Lowering:
    def __init__(self, graph: Graph, decisions: Decisions, paths: Paths, training: bool) -> None:
        self.graph = graph
        self.decisions = decisions
        self.paths = paths
        self.training = training
        self.params = {p.value.name for p in graph.params} | {
            p.value.name for loop in graph.loops for block in loop.blocks for p in block.params
        }

    def run(self) -> Program:
        graph, specs = self.graph, self.decisions.specs
        top = _Scope(self)
        inputs = tuple(Sharded(i.value, specs[i.value.name]) for i in graph.inputs)
        params = tuple((p, specs[p.value.name]) for p in graph.params)
        for item in (*inputs, *(Sharded(p.value, spec) for p, spec in params)):
            top.define(item)
        statements = top.statements
        for item in graph.body:
            if isinstance(item, Node):
                top.run(item)
            else:
                statements.append(self._loop(item, top))
                for value in item.outputs:
                    top.define(Sharded(value, specs[value.name]))
        outputs = tuple(
            top.fetch(out.value, self.decisions.outputs[out.value.name], "output")
            for out in graph.outputs
        )
        return Program(
            graph,
            inputs,
            params,
            tuple(statements),
            outputs,
            self.decisions.recompute,
            self.decisions.order,
            self.training,
        )

    def _loop(self, loop: Loop, top: _Scope) -> LoopCall:
        carried_specs = [self.decisions.specs[value.name] for value in loop.outputs]
        carried = tuple(
            top.fetch(value, spec, loop.path)
            for value, spec in zip(loop.carried, carried_specs, strict=True)
        )
        n = len(carried)
        needed: dict[tuple[int, Spec], None] = {}
        bodies: list[BlockBody] = []
        for block in loop.blocks:
            scope = _Scope(self, invariants={v.name: i for i, v in enumerate(block.inputs[n:])})
            for inner, spec in zip(block.inputs[:n], carried_specs, strict=True):
                scope.define(Sharded(inner, spec))
            params = tuple((p, self.decisions.specs[p.value.name]) for p in block.params)
            for param, spec in params:
                scope.define(Sharded(param.value, spec))
            for node in block.nodes:
                scope.run(node)
            outputs = tuple(
                scope.fetch(value, spec, "next iteration")
                for value, spec in zip(block.outputs, carried_specs, strict=True)
            )
            needed |= scope.taken
            bodies.append(BlockBody(block, params, tuple(scope.plain()), outputs))
        arguments: list[Sharded] = []
        for position, spec in sorted(needed):
            arguments.append(top.fetch(loop.invariants[position], spec, loop.path))
        results = tuple(Sharded(v, s) for v, s in zip(loop.outputs, carried_specs, strict=True))
        return LoopCall(loop, tuple(bodies), carried, tuple(arguments), results)


class _Scope:
    """The statements of one function body, and which values exist in which specs."""

    def __init__(self, lowering: _Lowering, invariants: dict[str, int] | None = None) -> None:
        self.lowering = lowering
        self.invariants = invariants or {}
        self.taken: dict[tuple[int, Spec], None] = {}  # invariants by position, in needed specs
        self.statements: list[Statement] = []
        self._home: dict[str, Spec] = {}
        self._have: dict[tuple[str, Spec], Sharded] = {}

    def plain(self) -> list[Convert | Compute]:
        """The statements of a block, which has no loops of its own."""
        return [s for s in self.statements if not isinstance(s, LoopCall)]

    def define(self, item: Sharded) -> None:
        """`item` now exists."""
        spec = self._canonical(item.value, item.spec)
        self._home[item.value.name] = spec
        self._have[item.value.name, spec] = Sharded(item.value, spec)

    def fetch(self, value: Value, spec: Spec, user: str) -> Sharded:
        """`value` in `spec`, converted now if it is not there yet."""
        spec = self._canonical(value, spec)
        if value.name in self.invariants:
            self.taken[self.invariants[value.name], spec] = None
            return Sharded(value, spec)
        if (value.name, spec) in self._have:
            return self._have[value.name, spec]
        at = self._have[value.name, self._home[value.name]]
        for priced in self.lowering.paths(value, at.spec, spec):
            following = tuple(
                priced.step.b if axis in priced.step.axes else state
                for axis, state in enumerate(at.spec)
            )
            target = Sharded(value, following)
            if (value.name, following) not in self._have:
                param = value.name in self.lowering.params
                self.statements.append(Convert(at, target, priced, param, user))
                self._have[value.name, following] = target
            at = target
        return at

    def run(self, node: Node) -> None:
        """Fetch the operands of `node`, then compute it."""
        choices = self.lowering.decisions.choices[node.name]
        needs, gives = node_specs(node, rule_of(node), choices, self.lowering.training)
        pairs = zip(node.operands, needs, strict=True)
        operands = tuple(self.fetch(value, spec, node.name) for value, spec in pairs)
        outputs = tuple(Sharded(v, s) for v, s in zip(node.outputs, gives, strict=True))
        self.statements.append(Compute(node, choices, operands, outputs))
        for item in outputs:
            self.define(item)

    def _canonical(self, value: Value, spec: Spec) -> Spec:
        if self.lowering.training and value.differentiable:
            return spec
        return tuple(R if state == V else state for state in spec)
