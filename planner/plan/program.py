"""The program of one rank: local ops and conversions, in order.

Lowering walks the graph with the decisions.  A node needs its operands in certain specs; a value
that is not there yet in that spec is converted just before its first use, and kept for later
users.  Values that a loop takes from outside are converted before the loop.

Parameters and buffers are converted by no statement: each block says in which specs it uses them
(`Weight`), and they are brought before it runs, many in one collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch

from ...facts.collectives import collective_for
from ...facts.moves import backward_primitive, primitive
from ...facts.spec import R, Spec, V, format_spec
from ...facts.traffic import Traffic
from ...ir.graph import Block, Graph, Loop, Node, Param, Value
from ...ir.ops.local import node_specs
from ...ir.ops.order import token_dims
from ...ir.ops.registry import rule_of
from ...ir.ops.rule import Choice
from ..strategies.build import Decisions
from ..strategies.conversion import Conversions
from ..strategies.regions import Recomputed
from ..strategies.steps import Step
from ..strategies.storage import Storage

Paths: TypeAlias = Callable[[Value, Spec, Spec], "tuple[PricedStep, ...]"]


@dataclass(frozen=True, slots=True)
class PricedStep:
    """One step of a conversion with its forward and backward price and traffic."""

    step: Step
    seconds: float
    traffic: tuple[Traffic, ...]

    @property
    def forward(self) -> Traffic | None:
        """The collective that moves the value, if one does."""
        return next((t for t in self.traffic if not t.backward), None)

    @property
    def backward(self) -> Traffic | None:
        """The collective that moves the gradient, if one does."""
        kind = collective_for(backward_primitive(self.step.a, self.step.b), self.step.by)
        return next((t for t in self.traffic if t.backward and t.kind == kind), None)


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
class Leg:
    """A collective on the way of a weight, for the step of this number on it."""

    step: int
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of a block: how it is kept, how the block uses it, and the steps between.

    One that is used in several specs has a `Weight` for each.  `name` is what statements call it:
    the parameter's own name, or another for each further spec.  The traffic of steps says what
    forward and backward do; seconds are those of a step of training.
    """

    param: Param
    name: str
    kept: Storage
    used: Spec
    homecoming: tuple[PricedStep, ...]  # stored -> home
    steps: tuple[PricedStep, ...]  # home -> used

    @property
    def stored(self) -> Spec:
        """The spec of the parameter."""
        return self.kept.stored

    @property
    def plain(self) -> bool:
        """Is it used as it is stored?"""
        cast = self.param.stored not in (None, self.param.value.type.dtype)
        return self.kept.home is None and self.used == self.stored and not cast

    @property
    def item(self) -> Sharded:
        """What operands of statements say."""
        return Sharded(self.param.value, self.used)

    @property
    def is_astray(self) -> bool:
        """Is it used otherwise than it is at home, where it has one?  No plan may have that."""
        return any(self.used[axis] != V for axis in self.kept.homebound)

    @property
    def way(self) -> tuple[PricedStep, ...]:
        """The steps from where it is stored to where it is used."""
        return (*self.homecoming, *self.steps)

    @property
    def forward(self) -> tuple[Leg, ...]:
        """The collectives that bring it to a use; if there are any, it is not kept for backward."""
        return tuple(leg for leg in self._ahead() if leg.step >= len(self.homecoming))

    @property
    def refresh(self) -> tuple[Leg, ...]:
        """The collectives that bring it home, once a step."""
        return tuple(leg for leg in self._ahead() if leg.step < len(self.homecoming))

    def _ahead(self) -> Iterator[Leg]:
        for i, step in enumerate(self.way):
            if (traffic := step.forward) is not None:
                yield Leg(i, traffic)

    def backward(self, *, home: bool) -> tuple[Leg, ...]:
        """The collectives that its gradient takes back: home, or on to where it is stored."""
        ends = len(self.homecoming) if home else 0
        found = [(i, step.backward) for i, step in enumerate(self.way) if i >= ends]
        return tuple(Leg(i, traffic) for i, traffic in reversed(found) if traffic is not None)


@dataclass(frozen=True, slots=True)
class BlockBody:
    """One kind of block: its weights, statements, results."""

    block: Block
    weights: tuple[Weight, ...]
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


@dataclass(frozen=True)
class Program:
    """The whole model on one rank."""

    graph: Graph
    inputs: tuple[Sharded, ...]
    weights: tuple[Weight, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[Sharded, ...]
    layers: Recomputed = field(default_factory=Recomputed)  # which run forward again in backward
    order: str = "contiguous"  # how ranks that share a sequence hold its tokens; or `zigzag`
    training: bool = True  # does a backward pass follow?
    micro_batches: int = 1  # that run it in one step
    reduced: torch.dtype | None = None  # of gradients between ranks; None: as they come

    def recomputed(self, loop: Loop) -> int:
        """How many first layers of a loop run forward again in backward, whole or in part."""
        modes = self.layers.of(loop)
        return modes.full + modes.part

    @cached_property
    def zigzag(self) -> dict[str, frozenset[int]]:
        """By value, the dims whose slices are in zigzag order."""
        return token_dims(self.graph) if self.order == "zigzag" else {}

    def flat(self) -> list[tuple[Convert | Compute, int]]:
        """Every statement with how often it runs in a micro-batch, loops opened."""
        out: list[tuple[Convert | Compute, int]] = []
        for statement in self.statements:
            if isinstance(statement, LoopCall):
                for kind, body in enumerate(statement.bodies):
                    times = statement.loop.order.count(kind)
                    out += [(inner, times) for inner in body.statements]
            else:
                out.append((statement, 1))
        return out

    def moves(self) -> list[tuple[PricedStep, int]]:
        """Every step of values and weights, with how often its seconds are those of a step."""
        steps = [
            (item.priced, self.micro_batches * times)
            for item, times in self.flat()
            if isinstance(item, Convert)
        ]
        return steps + [(step, times) for weight, times in self.brought() for step in weight.way]

    def brought(self) -> list[tuple[Weight, int]]:
        """Every weight with how many layers have it."""
        found = [(weight, 1) for weight in self.weights]
        for call in self.statements:
            if isinstance(call, LoopCall):
                for kind, body in enumerate(call.bodies):
                    times = call.loop.order.count(kind)
                    found += [(weight, times) for weight in body.weights]
        return found

    def stages(self) -> dict[Sharded, tuple[int, int]]:
        """When each of `weights` is used: in the first of two stages, to the last.

        Stage n is what runs after n loops; what the layers of a loop take is used to its end.
        """
        ours = {weight.item for weight in self.weights}
        found: dict[Sharded, tuple[int, int]] = {}
        stage = 0

        def use(items: Iterable[Sharded], until: int) -> None:
            for item in ours.intersection(items):
                found[item] = (found.get(item, (stage, stage))[0], until)

        for item in self.statements:
            if isinstance(item, LoopCall):
                use(item.carried, stage)
                use(item.arguments, stage + 1)
                stage += 1
            else:
                use(_reads(item), stage)
        use(self.outputs, stage)
        return found


def _reads(item: Convert | Compute) -> tuple[Sharded, ...]:
    return item.operands if isinstance(item, Compute) else (item.source,)


def lower(
    graph: Graph,
    decisions: Decisions,
    paths: Paths,
    *,
    training: bool,
    micro_batches: int = 1,
    reduced: torch.dtype | None = None,
) -> Program:
    """The program of `graph` under `decisions`; `paths` gives the steps between two specs."""
    program = _Lowering(graph, decisions, paths, training).run()
    return replace(program, micro_batches=micro_batches, reduced=reduced)


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        decisions: Decisions,
        paths: Paths,
        training: bool,
    ) -> None:
        self.graph = graph
        self.decisions = decisions
        self.paths = paths
        self.training = training

    def run(self) -> Program:
        graph, specs = self.graph, self.decisions.specs
        top = _Scope(self, graph.params)
        inputs = tuple(Sharded(i.value, specs[i.value.name]) for i in graph.inputs)
        for item in inputs:
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
            top.fetch(out.value, self.decisions.outputs[out.value.name]) for out in graph.outputs
        )
        return Program(
            graph,
            inputs,
            top.weights(),
            tuple(statements),
            outputs,
            self.decisions.recomputed,
            self.decisions.order,
            self.training,
        )

    def _loop(self, loop: Loop, top: _Scope) -> LoopCall:
        carried_specs = [self.decisions.specs[value.name] for value in loop.outputs]
        carried = tuple(
            top.fetch(value, spec) for value, spec in zip(loop.carried, carried_specs, strict=True)
        )
        n = len(carried)
        needed: dict[tuple[int, Spec], None] = {}
        bodies: list[BlockBody] = []
        for block in loop.blocks:
            invariants = {v.name: i for i, v in enumerate(block.inputs[n:])}
            scope = _Scope(self, block.params, invariants)
            for inner, spec in zip(block.inputs[:n], carried_specs, strict=True):
                scope.define(Sharded(inner, spec))
            for node in block.nodes:
                scope.run(node)
            outputs = tuple(
                scope.fetch(value, spec)
                for value, spec in zip(block.outputs, carried_specs, strict=True)
            )
            needed |= scope.taken
            bodies.append(BlockBody(block, scope.weights(), tuple(scope.plain()), outputs))
        arguments: list[Sharded] = []
        for position, spec in sorted(needed):
            arguments.append(top.fetch(loop.invariants[position], spec))
        results = tuple(Sharded(v, s) for v, s in zip(loop.outputs, carried_specs, strict=True))
        return LoopCall(loop, tuple(bodies), carried, tuple(arguments), results)


class _Scope:
    """The statements of one function body, and which values exist in which specs."""

    def __init__(
        self,
        lowering: _Lowering,
        params: tuple[Param, ...],
        invariants: dict[str, int] | None = None,
    ) -> None:
        self.lowering = lowering
        self.params = params
        self.wanted: dict[str, dict[Spec, None]] = {p.value.name: {} for p in params}
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

    def fetch(self, value: Value, spec: Spec) -> Sharded:
        """`value` in `spec`, converted now if it is not there yet."""
        spec = self._canonical(value, spec)
        if value.name in self.wanted:
            self.wanted[value.name][spec] = None
            return Sharded(value, spec)
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
                self.statements.append(Convert(at, target, priced))
                self._have[value.name, following] = target
            at = target
        return at

    def run(self, node: Node) -> None:
        """Fetch the operands of `node`, then compute it."""
        choices = self.lowering.decisions.choices[node.name]
        needs, gives = node_specs(node, rule_of(node), choices, self.lowering.training)
        pairs = zip(node.operands, needs, strict=True)
        operands = tuple(self.fetch(value, spec) for value, spec in pairs)
        outputs = tuple(Sharded(v, s) for v, s in zip(node.outputs, gives, strict=True))
        self.statements.append(Compute(node, choices, operands, outputs))
        for item in outputs:
            self.define(item)

    def weights(self) -> tuple[Weight, ...]:
        """The parameters as the statements use them; those that none uses as they are kept."""
        found: list[Weight] = []
        for param in self.params:
            value = param.value
            decisions, paths = self.lowering.decisions, self.lowering.paths
            stored = self._canonical(value, decisions.specs[value.name])
            kept = Storage(stored, decisions.homes.get(value.name))
            wanted = list(self.wanted[value.name]) or [kept.spec]
            plain = kept.spec if kept.spec in wanted else wanted[0]
            homecoming = paths(value, stored, kept.spec) if stored != kept.spec else ()
            for spec in wanted:
                name = param.name
                if spec != plain:
                    name += "_as_" + format_spec(spec).replace(",", "_")
                steps = paths(value, kept.spec, spec) if spec != kept.spec else ()
                found.append(Weight(param, name, kept, spec, homecoming, steps))
        return tuple(found)

    def _canonical(self, value: Value, spec: Spec) -> Spec:
        if self.lowering.training and value.differentiable:
            return spec
        return tuple(R if state == V else state for state in spec)
