"""From regions to a `ShardingProblem`, and from its solution back to decisions.

1. Every input, parameter, carried value of a loop, region and output is a node; its strategies are
   specs, or a region's strategies.
2. Where a value is used, an edge charges the conversion from the spec it is made in to the
   spec that is needed, forward and backward, times how often it runs.
3. A conversion that several users in one place (the top level, a kind of block) may share is a
   two-strategy node (used or not): it is paid once.
4. A loop is one block per kind, with costs and memory times its repeats.  What the block carries to
   its next iteration has one spec, the same at the block's start and end.
5. Memory is live bytes over the forward and backward pass: parameters and optimizer states
   always, gradients from their backward time on, what autograd keeps from its forward to its
   backward time, operands and results of a node while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ...costmodel.compute import elementwise_s
from ...costmodel.memory import optimizer_step_bytes, parameter_state_bytes
from ...facts.spec import R, S, Spec, format_spec, is_shard
from ...ir.graph import Graph, Loop, Node, Param, Value
from ...ir.ops.local import local_bytes
from ...ir.ops.registry import is_view, kind_of, local_of, operator_of, saved_values
from ...ir.ops.rule import Choice
from ..ilp.problem import Edge, ProblemNode, ShardingProblem, Usage
from .conversion import Conversions, Network, spec_fits
from .pricing import Work, price
from .regions import InLoop, Place, Region, Strategy, TopLevel, make_regions, scopes
from .times import Times

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is planned for: phase, optimizer, and bytes per GPU (None: no limit).

    `recompute`: the layers of loops keep only their inputs, and run forward again in backward.
    `order`: how ranks that share a sequence hold its tokens, `contiguous` or `zigzag`.
    `expert_imbalance`: load of the busiest rank's experts over the mean; 0 for a power-law router.
    `longest_run`: new tokens of another phase that shares the KV caches.
    """

    training: bool
    optimizer: str
    memory_bytes: float | None
    recompute: bool = False
    order: str = "contiguous"
    expert_imbalance: float = 0.0
    longest_run: int = 0


class Restriction:
    """Which strategies may be chosen; the default allows all.  Baselines and pins narrow it."""

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """May `region` run so?"""
        return True

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """May the parameter called `name` (loops as `path.*.rest`) be stored so?"""
        return True

    def allows_gather(self, axis: int) -> bool:
        """May a parameter that is sharded over `axis` be gathered over it?"""
        return True

    def none_allowed(self, param: Param, name: str, sizes: tuple[int, ...]) -> None:
        """No storage of the parameter `name` is allowed: all will be, unless this raises."""

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        """No strategy of `region` is allowed: all will be, unless this raises."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """A solved problem in the graph's own words; keys are names of nodes and values.

    `choices`: per node its choice on each axis.  `specs`: the spec of every input, parameter,
    loop-carried value (under the name of the loop's output) and output (`outputs`, by value).
    """

    choices: dict[str, tuple[Choice, ...]]
    specs: dict[str, Spec]
    outputs: dict[str, Spec]
    recompute: bool = False  # layers of loops run forward again in backward
    order: str = "contiguous"  # how ranks that share a sequence hold its tokens; or `zigzag`

    def __str__(self) -> str:
        """A line for each spec and for each node's choices."""
        layers = "recomputed" if self.recompute else "kept"
        return "\n".join(
            [
                f"tokens {self.order}, layers {layers}",
                *(f"spec {name} {format_spec(spec)}" for name, spec in self.specs.items()),
                *(f"output {name} {format_spec(spec)}" for name, spec in self.outputs.items()),
                *(f"node {name} {','.join(choices)}" for name, choices in self.choices.items()),
            ]
        )


@dataclass(slots=True)
class _User:
    """One node of the problem that needs a value: per strategy the specs that it needs."""

    node: int
    needs: list[tuple[Spec, ...]]
    weight: int
    place: Place  # users in one place share conversions


@dataclass(frozen=True, slots=True)
class Flow:
    """The node of the problem that decides a value's spec, which is one for each strategy."""

    node: int
    specs: tuple[Spec, ...]


@dataclass(slots=True)
class _Flow:
    """A value between the node that makes it and the nodes that need it."""

    value: Value
    node: int
    specs: list[Spec]
    users: list[_User] = field(default_factory=list)
    param: bool = False


@dataclass(frozen=True, slots=True)
class ParamRef:
    """A parameter with the name that reports and pins know, and how many layers have it."""

    param: Param
    name: str
    weight: int
    trainable: bool


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One run of a node on one rank: seconds, bytes of its operands and results together, bytes of
    its KV cache, bytes of rows sorted by expert that autograd keeps, what else it keeps (value,
    bytes), and the spec that each operand is needed in."""

    forward_s: float
    seconds: float
    held: float
    cache: float
    routed: float
    kept: tuple[tuple[str, int], ...]
    needs: tuple[tuple[Value, Spec], ...]


def all_params(graph: Graph) -> list[ParamRef]:
    """Every parameter, buffer and constant; those of a loop once, as `path.*.rest`."""
    refs = [ParamRef(p, p.name, 1, p.value.differentiable) for p in graph.params]
    for scope in scopes(graph):
        if scope.block is not None and scope.loop is not None:
            refs += [
                ParamRef(p, f"{scope.loop.path}.*.{p.name}", scope.weight, p.value.differentiable)
                for p in scope.block.params
            ]
    return refs


class Builder:
    """Builds the problem of one graph on one network, and reads its solution."""

    def __init__(self, graph: Graph, network: Network, setting: Setting) -> None:
        self.graph = graph
        self.network = network
        self.setting = setting
        self.sizes = network.mesh.sizes
        self.regions = make_regions(
            graph, self.sizes, training=setting.training, order=setting.order
        )
        self._conversions: dict[tuple[object, ...], Conversions] = {}
        self._work: dict[tuple[str, tuple[Choice, ...]], Work] = {}
        self._bytes: dict[tuple[str, Spec], int] = {}
        self._costs: dict[tuple[str, tuple[Choice, ...]], NodeCost] = {}
        self._alias = _aliases(graph)
        self._needed_again = _needed_again(graph, self._alias)
        self.block_values = _block_values(graph)

    # -- prices that reports and lowering also ask for ----------------------------------------

    def conversions(self, value: Value, *, param: bool, inside: bool = False) -> Conversions:
        """The conversions of a value's type; a parameter that backward needs is gathered again.

        `inside` says that the conversion is made in a layer: if layers are recomputed, it runs
        twice there, and what is gathered the second time serves backward.
        """
        gradient = self.setting.training and value.differentiable
        again = self.setting.recompute and (inside or value.name in self.block_values)
        needed = param and self.setting.training and value.name in self._needed_again
        key = (value.type, gradient, needed and not again, again, param)
        if key not in self._conversions:
            self._conversions[key] = Conversions(
                value.type,
                self.network,
                gradient=gradient,
                regather=needed and not again,
                again=again,
                param=param,
            )
        return self._conversions[key]

    def node_cost(self, node: Node, choices: tuple[Choice, ...]) -> NodeCost:
        """What one run of a node costs under its choices."""
        key = (node.name, choices)
        if key not in self._costs:
            setting = self.setting
            local = local_of(
                node,
                choices,
                self.sizes,
                training=setting.training,
                order=setting.order,
                imbalance=setting.expert_imbalance,
            )
            operator = operator_of(node)
            needs, gives = local.specs()
            specs = dict(zip((*node.operands, *node.outputs), (*needs, *gives), strict=True))
            held = 0
            if kind_of(node) != "view":
                held = sum(self.local_bytes(value, spec) for value, spec in specs.items())
                held += operator.buffers(local)
            rows = operator.extra_bytes(local)
            kept = saved_values(node) if setting.training else ()
            work = self.work(node, choices)
            self._costs[key] = NodeCost(
                work.forward_s,
                work.seconds,
                float(held) + rows,
                operator.remembered(local, setting.longest_run),
                rows if setting.training else 0.0,
                tuple((v.name, self.local_bytes(v, specs[v])) for v in kept),
                tuple(zip(node.operands, needs, strict=True)),
            )
        return self._costs[key]

    def local_bytes(self, value: Value, spec: Spec) -> int:
        """Bytes that one rank holds of `value` in `spec`."""
        key = (value.name, spec)
        if key not in self._bytes:
            self._bytes[key] = local_bytes(value, spec, self.sizes)
        return self._bytes[key]

    def work(self, node: Node, choices: tuple[Choice, ...]) -> Work:
        """Seconds of one node under its choices."""
        key = (node.name, choices)
        if key not in self._work:
            setting = self.setting
            self._work[key] = price(
                node,
                choices,
                self.network,
                training=setting.training,
                order=setting.order,
                imbalance=setting.expert_imbalance,
            )
        return self._work[key]

    def outer_name(self, name: str) -> str:
        """The name outside the loop of a value that a block takes in; others as they are."""
        return self._alias.get(name, name)

    def optimizer_s(self, ref: ParamRef, spec: Spec) -> float:
        """Seconds that one parameter adds to the (fused) optimizer step when stored in `spec`."""
        if not (ref.trainable and self.setting.training):
            return 0.0
        value, cluster = ref.param.value, self.network.cluster
        itemsize = value.type.dtype.itemsize
        numel = local_bytes(value, spec, self.sizes) // itemsize
        moved = optimizer_step_bytes(numel, itemsize, self.setting.optimizer)
        return float(elementwise_s(float(moved), cluster)) - float(elementwise_s(0.0, cluster))

    # -- the problem --------------------------------------------------------------------------

    def build(self, restriction: Restriction) -> Built:
        """The problem under a restriction, with what its nodes stand for."""
        return _Building(self, restriction).build()


def _block_values(graph: Graph) -> frozenset[str]:
    """Names of everything that belongs to a block of a loop."""
    names: set[str] = set()
    for loop in graph.loops:
        for block in loop.blocks:
            names |= {v.name for v in block.inputs} | {p.value.name for p in block.params}
            names |= {v.name for node in block.nodes for v in node.outputs}
    return frozenset(names)


def _needed_again(graph: Graph, alias: dict[str, str]) -> frozenset[str]:
    """Names of the parameters that autograd keeps for backward, themselves or as a view.

    A matrix product keeps its weight; a lookup does not keep its table.
    """
    source = {ref.param.value.name: ref.param.value.name for ref in all_params(graph)}
    source |= {inner: source[outer] for inner, outer in alias.items() if outer in source}
    needed: set[str] = set()
    for scope in scopes(graph):
        for node in scope.nodes:
            needed |= {source[v.name] for v in saved_values(node) if v.name in source}
            if is_view(node) and node.operands[0].name in source:
                source |= {v.name: source[node.operands[0].name] for v in node.outputs}
    return frozenset(needed)


def _aliases(graph: Graph) -> dict[str, str]:
    """Names inside blocks of values that come from outside: carried ones, and invariants."""
    alias: dict[str, str] = {}
    for loop in graph.loops:
        for block in loop.blocks:
            carried = block.inputs[: len(loop.carried)]
            for inner, out in zip(carried, loop.outputs, strict=True):
                alias[inner.name] = out.name
            for inner, outer in zip(block.inputs[len(carried) :], loop.invariants, strict=True):
                alias[inner.name] = outer.name
    return alias


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A problem, and what its nodes stand for.

    `strategies` are those of each region, as far as allowed, and `region_nodes` the regions' nodes;
    `flows` has the node and the specs of each value, `output_nodes` those of the model's outputs.
    `kept_usages`: how many of a node's usages, the first ones, are for backward or are caches;
    `gradient_usages`: how many of a parameter's, the last ones, are of its gradient.
    """

    builder: Builder
    nodes: tuple[ProblemNode, ...]
    edges: tuple[Edge, ...]
    flows: Mapping[str, Flow]
    strategies: tuple[tuple[Strategy, ...], ...]
    region_nodes: tuple[int, ...]
    output_nodes: Mapping[str, Flow]
    kept_usages: Mapping[int, int]
    gradient_usages: Mapping[int, int]
    horizon: int  # after all times at which anything is live

    def problem(self) -> ShardingProblem:
        """What a solver sees."""
        name = f"{self.builder.graph.name} on {self.builder.network.mesh}"
        limit = self.builder.setting.memory_bytes
        return ShardingProblem(name, self.nodes, self.edges, limit)

    def least_memory(self) -> float:
        """Bytes that are live at the fullest time when every node takes its smallest strategy."""
        return _least_memory(self.nodes, self.horizon)

    def read(self, assignment: Sequence[int]) -> Decisions:
        """The decisions that an assignment stands for."""
        choices: dict[str, tuple[Choice, ...]] = {}
        for region, index, strategies in zip(
            self.builder.regions, self.region_nodes, self.strategies, strict=True
        ):
            taken = strategies[assignment[index]]
            for node, choice in zip(region.nodes, taken.choices, strict=True):
                choices[node.name] = choice
        made = {value.name for region in self.builder.regions for value in region.values}
        specs = {
            name: flow.specs[assignment[flow.node]]
            for name, flow in self.flows.items()
            if name not in made
        }
        outputs = {n: out.specs[assignment[out.node]] for n, out in self.output_nodes.items()}
        setting = self.builder.setting
        return Decisions(choices, specs, outputs, setting.recompute, setting.order)

    def memory_at(self, assignment: Sequence[int], time: int | None) -> tuple[float, float, float]:
        """Bytes of gradients, of what is kept for backward or in KV caches, and of what runs, live
        at `time`."""
        gradients = kept = running = 0.0
        for index, node in enumerate(self.nodes):
            first_gradient = len(node.usages) - self.gradient_usages.get(index, 0)
            for position, usage in enumerate(node.usages):
                if time is None or not usage.start <= time < usage.end:
                    continue
                size = float(usage.bytes[assignment[index]])
                if index in self.gradient_usages:
                    gradients += size if position >= first_gradient else 0.0
                elif position < self.kept_usages.get(index, 0):
                    kept += size
                else:
                    running += size
        return gradients, kept, running


def _least_memory(nodes: Sequence[ProblemNode], horizon: int) -> float:
    """See `Built.least_memory`: more than the limit proves that no plan fits, before a single edge
    is priced."""
    change = np.zeros(horizon + 2)
    for node in nodes:
        for usage in node.usages:
            change[usage.start] += usage.bytes.min()
            change[usage.end] -= usage.bytes.min()
    return float(np.cumsum(change).max())


class _Building:
    """A problem under construction."""

    def __init__(self, builder: Builder, restriction: Restriction) -> None:
        self.builder = builder
        self.restriction = restriction
        self.nodes: list[ProblemNode] = []
        self.edges: list[Edge] = []
        self.flows: dict[str, _Flow] = {}
        self.strategies: list[tuple[Strategy, ...]] = []
        self.region_nodes: list[int] = []
        self.output_nodes: dict[str, Flow] = {}
        self.params = {ref.param.value.name for ref in all_params(builder.graph)}
        self.times = Times(builder.regions)
        self.kept_usages: dict[int, int] = {}
        self.gradient_usages: dict[int, int] = {}

    def build(self) -> Built:
        """The problem; without edges where nothing fits the memory."""
        self.add_sources()
        self.add_regions()
        self.add_outputs()
        limit = self.builder.setting.memory_bytes
        if limit is None or _least_memory(self.nodes, self.times.horizon) <= limit:
            self.add_edges()
        return Built(
            self.builder,
            tuple(self.nodes),
            tuple(self.edges),
            {name: Flow(flow.node, tuple(flow.specs)) for name, flow in self.flows.items()},
            tuple(self.strategies),
            tuple(self.region_nodes),
            self.output_nodes,
            self.kept_usages,
            self.gradient_usages,
            self.times.horizon,
        )

    # 1. sources ---------------------------------------------------------------------------------

    def add_sources(self) -> None:
        """Nodes for inputs, parameters and what loops carry."""
        for item in self.builder.graph.inputs:
            self._source(item.value, item.name, self._storage(item.value))
        for ref in all_params(self.builder.graph):
            self._param(ref)
        for loop in self.builder.graph.loops:
            for value in loop.outputs:
                specs = self._storage(value)
                usages = self._kept_inputs(loop, value, specs)
                self._source(value, f"{loop.path} carries {value.name}", specs, usages)

    def _kept_inputs(self, loop: Loop, value: Value, specs: list[Spec]) -> tuple[Usage, ...]:
        """Layers that are recomputed keep what they take in, one for each layer."""
        if not self.builder.setting.recompute:
            return ()
        scopes = [r.scope for r in self.builder.regions if r.scope.loop is loop]
        windows = [self.times.windows(scope) for scope in scopes]
        start = min(self.times.start(scope) for scope in scopes)
        size = np.array([float(self.builder.local_bytes(value, spec)) for spec in specs])
        one_left = max(first.stop for first, _ in windows)
        end = max(last.stop for _, last in windows)
        every = Usage(start, one_left, len(loop.order) * size)
        return (every, Usage(one_left, end, size)) if end > one_left else (every,)

    def _storage(self, value: Value, also: Iterable[Spec] = ()) -> list[Spec]:
        """Specs of `R` and `S` that divide evenly, and those of `also` that do not."""
        shape, sizes = value.type.shape, self.builder.sizes
        states = [R, *map(S, range(len(shape)))]
        every = product(states, repeat=len(sizes))
        extra = {s for s in also if all(a == R or is_shard(a) for a in s)}
        return [
            s
            for s in every
            if spec_fits(shape, s, sizes) and (_even(shape, s, sizes) or s in extra)
        ]

    def _source(
        self, value: Value, name: str, specs: list[Spec], usages: tuple[Usage, ...] = ()
    ) -> None:
        self.flows[value.name] = _Flow(value, len(self.nodes), specs)
        self.kept_usages[len(self.nodes)] = len(usages)
        self.nodes.append(ProblemNode(name, np.zeros(len(specs)), usages))

    def _param(self, ref: ParamRef) -> None:
        value, sizes = ref.param.value, self.builder.sizes
        needed = {
            spec
            for region in self.builder.regions
            for i, operand in enumerate(region.operands)
            if operand.name == value.name
            for strategy in region.strategies
            for spec in strategy.requires[i]
        }
        every = self._storage(value, needed)
        specs = [s for s in every if self.restriction.allows_storage(ref.param, ref.name, s)]
        if not specs:
            self.restriction.none_allowed(ref.param, ref.name, sizes)
            specs = every
        setting = self.builder.setting
        trainable = ref.trainable and setting.training
        numel = [local_bytes(value, s, sizes) // value.type.dtype.itemsize for s in specs]
        states = [
            parameter_state_bytes(
                n, value.type.dtype.itemsize, setting.optimizer, trainable=trainable
            )
            for n in numel
        ]
        costs = np.zeros(len(specs))
        if trainable:
            costs = np.array([self.builder.optimizer_s(ref, s) for s in specs])
        always = np.array([float(s.total - s.gradient) for s in states])
        gradient = np.array([float(s.gradient) for s in states])
        usages = [Usage(0, self.times.horizon, ref.weight * always)]
        if trainable:
            usages += self._gradient(value.name, ref.weight, gradient)
        self.gradient_usages[len(self.nodes)] = len(usages) - 1
        self.flows[value.name] = _Flow(value, len(self.nodes), specs, param=True)
        self.nodes.append(ProblemNode(ref.name, ref.weight * costs, tuple(usages)))

    def _gradient(self, name: str, weight: int, size: Floats) -> list[Usage]:
        """A gradient is there from the first backward that gives it, in one layer after another."""
        users = [
            region
            for region in self.builder.regions
            if any(self.builder.outer_name(value.name) == name for value in region.operands)
        ]
        windows = [self.times.windows(region.scope) for region in users]
        if not windows:
            return []
        first, last = min(windows, key=lambda pair: pair[0].start)
        if weight == 1 or first == last:
            return [Usage(first.start, self.times.horizon, weight * size)]
        return [
            Usage(first.start, last.start, size),
            Usage(last.start, self.times.horizon, weight * size),
        ]

    def flow(self, name: str) -> _Flow:
        """The flow of a value, also under the name that a block knows it by."""
        return self.flows[self.builder.outer_name(name)]

    # 2. regions ---------------------------------------------------------------------------------

    def add_regions(self) -> None:
        """A node for each region, and its needs as users of the values it takes."""
        keepers = self._keepers()
        for time, region in enumerate(self.builder.regions, start=1):
            allowed = [s for s in region.strategies if self.restriction.allows(region, s)]
            if not allowed:
                self.restriction.no_strategy(region, self.builder.sizes)
            strategies = tuple(allowed) or region.strategies
            index = len(self.nodes)
            self.strategies.append(strategies)
            self.region_nodes.append(index)
            self.nodes.append(self._region_node(region, strategies, time, keepers))
            for i, value in enumerate(region.values):
                specs = [s.produces[i] for s in strategies]
                self.flows[value.name] = _Flow(value, index, specs)
        for region, index, strategies in zip(
            self.builder.regions, self.region_nodes, self.strategies, strict=True
        ):
            for i, value in enumerate(region.operands):
                once = self._is_invariant(value.name, region)
                weight = 1 if once else region.scope.weight
                needs = [s.requires[i] for s in strategies]
                place = TopLevel() if once else region.scope.place
                self.flow(value.name).users.append(_User(index, needs, weight, place))
        for loop in self.builder.graph.loops:
            self._tie(loop)

    def _is_invariant(self, name: str, region: Region) -> bool:
        loop, block = region.scope.loop, region.scope.block
        if loop is None or block is None:
            return False
        return any(value.name == name for value in block.inputs[len(loop.carried) :])

    def _tie(self, loop: Loop) -> None:
        """What enters the loop, and what each block gives on, takes the carried value's spec."""
        for position, out in enumerate(loop.outputs):
            carried = self.flows[out.name]
            needs = [(spec,) for spec in carried.specs]
            entering = self.flow(loop.carried[position].name)
            entering.users.append(_User(carried.node, needs, 1, TopLevel()))
            for kind, block in enumerate(loop.blocks):
                inner = self.flow(block.outputs[position].name)
                place, weight = InLoop(loop.path, kind), loop.order.count(kind)
                inner.users.append(_User(carried.node, needs, weight, place))

    def _keepers(self) -> dict[str, int]:
        """Which region counts the memory of a value that autograd keeps: one region per value.

        Parameters are not counted: they are there anyway, or gathered again.
        """
        keepers: dict[str, int] = dict.fromkeys(self.params, -1)
        for index, region in enumerate(self.builder.regions):
            for node in region.nodes:
                for value in saved_values(node):
                    keepers.setdefault(value.name, index)
        for index, region in enumerate(self.builder.regions):
            kept = {v.name for node in region.nodes for v in saved_values(node)}
            for value in region.values:
                if value.name in kept:
                    keepers[value.name] = index
        return keepers

    def _region_node(
        self,
        region: Region,
        strategies: Sequence[Strategy],
        time: int,
        keepers: dict[str, int],
    ) -> ProblemNode:
        """Costs of each strategy; memory kept for backward and held while the region runs."""
        weight, training = region.scope.weight, self.builder.setting.training
        me = time - 1
        costs, kept, held = (np.zeros(len(strategies)) for _ in range(3))
        for i, strategy in enumerate(strategies):
            measured = self._measure(region, strategy, me, keepers)
            costs[i], kept[i], held[i] = measured
        if not training:
            last = max(self._last_use(region), time) + 1
            usages = [Usage(time, last, held)]
            caches = weight * np.array([self._cache(region, s) for s in strategies])
            if caches.any():
                self.kept_usages[len(self.nodes)] = 1
                usages.insert(0, Usage(0, self.times.horizon, caches))
            return ProblemNode(region.name, weight * costs, tuple(usages))
        first, last = self.times.windows(region.scope)
        if self._recomputed(region):  # one layer at a time, while its backward runs
            memory = [Usage(first.start, last.stop, kept)]
        else:
            memory = [Usage(self.times.start(region.scope), first.stop, weight * kept)]
            if last != first:
                memory.append(Usage(first.stop, last.stop, kept))
        running = [Usage(time, time + 1, held)]
        for at in self.times.backward(time):
            running.append(Usage(at, at + 1, 2 * held))  # values and their gradients
        self.kept_usages[len(self.nodes)] = len(memory)
        return ProblemNode(region.name, weight * costs, (*memory, *running))

    def _cache(self, region: Region, strategy: Strategy) -> float:
        """Bytes of KV cache that the region keeps."""
        pairs = zip(region.nodes, strategy.choices, strict=True)
        return sum(self.builder.node_cost(node, choices).cache for node, choices in pairs)

    def _recomputed(self, region: Region) -> bool:
        return self.builder.setting.recompute and region.scope.loop is not None

    def _last_use(self, region: Region) -> int:
        made = {value.name for value in region.values}
        uses = [
            time
            for time, other in enumerate(self.builder.regions, start=1)
            if any(value.name in made for value in other.operands)
        ]
        return max(uses, default=0)

    def _measure(
        self, region: Region, strategy: Strategy, me: int, keepers: dict[str, int]
    ) -> tuple[float, float, float]:
        """(seconds, bytes kept for backward, bytes held at the widest node) of one run."""
        produced = dict(zip((v.name for v in region.values), strategy.produces, strict=True))
        again = self._recomputed(region)
        seconds = widest = routed = 0.0
        kept: dict[str, int] = {}
        for node, choices in zip(region.nodes, strategy.choices, strict=True):
            cost = self.builder.node_cost(node, choices)
            seconds += cost.seconds + (cost.forward_s if again else 0.0)
            widest = max(widest, cost.held)
            kept |= {n: size for n, size in cost.kept if keepers.get(n) == me}
            routed += cost.routed
            for value, need in cost.needs:
                if produced.get(value.name, need) != need:  # the result of a reduction
                    conversions = self.builder.conversions(value, param=False)
                    seconds += conversions.seconds(produced[value.name], need)
        return seconds, sum(kept.values()) + routed, widest

    # 3. outputs ---------------------------------------------------------------------------------

    def add_outputs(self) -> None:
        """The model's outputs leave whole or sharded, never as partial sums."""
        for out in self.builder.graph.outputs:
            if out.value.name in self.output_nodes:
                continue
            index = len(self.nodes)
            flow = self.flow(out.value.name)
            specs = self._storage(out.value, flow.specs)
            self.output_nodes[out.value.name] = Flow(index, tuple(specs))
            self.nodes.append(ProblemNode(f"output {out.value.name}", np.zeros(len(specs))))
            flow.users.append(_User(index, [(spec,) for spec in specs], 1, TopLevel()))

    # 4. edges -----------------------------------------------------------------------------------

    def add_edges(self) -> None:
        """Conversions: direct edges, and shared ones through two-strategy nodes."""
        for flow in self.flows.values():
            by_place: dict[Place, list[_User]] = {}
            for user in flow.users:
                by_place.setdefault(user.place, []).append(user)
            for users in by_place.values():
                self._connect(flow, users)

    def _connect(self, flow: _Flow, users: list[_User]) -> None:
        inside = isinstance(users[0].place, InLoop)
        conversions = self.builder.conversions(flow.value, param=flow.param, inside=inside)
        sources = list(dict.fromkeys(flow.specs))
        row_of = np.array([sources.index(spec) for spec in flow.specs])
        shared = self._shared_targets(users)
        targets = list(dict.fromkeys(t for u in users for needs in u.needs for t in needs))
        prices = self._prices(flow, conversions, sources, targets)

        def column(target: Spec) -> Floats:
            return prices[:, targets.index(target)]

        for target in shared:
            seconds = column(target)
            if not seconds.any():
                continue
            index = len(self.nodes)
            self.nodes.append(ProblemNode(f"{flow.value.name} -> {target}", np.zeros(2)))
            weight = users[0].weight
            pay = np.stack([np.zeros(len(row_of)), weight * seconds[row_of]], axis=1)
            self.edges.append(Edge(flow.node, index, pay))
            for user in users:
                uses = np.array([target in needs for needs in user.needs])
                if uses.any():
                    rule = np.where(uses[:, None] & np.array([True, False])[None], np.inf, 0.0)
                    self.edges.append(Edge(user.node, index, rule))
        for user in users:
            targets = list(dict.fromkeys(t for needs in user.needs for t in needs))
            own = [t for t in targets if t not in shared]
            if not own:
                continue
            matrix = np.zeros((len(row_of), len(user.needs)))
            for target in own:
                uses = np.array([target in needs for needs in user.needs], dtype=float)
                seconds = column(target)[row_of]
                with np.errstate(invalid="ignore"):
                    extra = user.weight * seconds[:, None] * uses[None, :]
                matrix += np.where(uses[None, :] > 0, extra, 0.0)
            if matrix.any() and flow.node != user.node:
                self.edges.append(Edge(flow.node, user.node, matrix))

    def _prices(
        self, flow: _Flow, conversions: Conversions, sources: list[Spec], targets: list[Spec]
    ) -> Floats:
        """Seconds from each source to each target; inf where a parameter must not be gathered."""
        prices = conversions.matrix(sources, targets)
        if flow.param:
            for axis in range(len(self.builder.sizes)):
                if self.restriction.allows_gather(axis):
                    continue
                for i, a in enumerate(sources):
                    for j, b in enumerate(targets):
                        if is_shard(a[axis]) and a[axis] != b[axis]:
                            prices[i, j] = np.inf
        return prices

    def _shared_targets(self, users: list[_User]) -> list[Spec]:
        """Specs that at least two of the users may need."""
        count: dict[Spec, int] = {}
        for user in users:
            for target in dict.fromkeys(t for needs in user.needs for t in needs):
                count[target] = count.get(target, 0) + 1
        return [target for target, n in count.items() if n > 1]


def _even(shape: tuple[int, ...], spec: Spec, sizes: tuple[int, ...]) -> bool:
    for dim, size in enumerate(shape):
        ways = 1
        for state, n in zip(spec, sizes, strict=True):
            ways *= n if state == dim else 1
        if size % ways:
            return False
    return True
