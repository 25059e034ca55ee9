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
   backward time, operands and results of a node while it runs (`live.py`).
6. Between a parameter and its users stand nodes that bring it (`bringing.py`), with the seconds
   of its conversion and the bytes of what is there or on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import inf

import numpy as np

from ...facts.spec import R, S, Spec, V, format_spec, is_shard
from ...facts.updated import updated_buffer
from ...ir.graph import Graph, Loop, Value
from ...ir.ops.rule import Choice
from ..ilp.problem import Edge, ProblemNode, ShardingProblem, Usage, least_cost
from .bringing import USES, Bringing, Use, weighty
from .flows import Flow, User, ValueFlow
from .lattice import Floats, spec_fits
from .live import Live
from .network import Network
from .params import ParamRef, all_params
from .prices import Prices
from .pricing import Again
from .regions import InLoop, Place, Recomputed, Region, Scope, Strategy, TopLevel, units
from .runs import Runs, keepers, runs_of
from .selected import again_in_part
from .setting import Restriction, Setting
from .storage import Home, Storage, storages
from .times import Times


@dataclass(frozen=True, slots=True)
class Decisions:
    """A solved problem in the graph's own words; keys are names of nodes and values.

    `choices`: per node its choice on each axis.  `specs`: the spec of every input, parameter,
    loop-carried value (under the name of the loop's output) and output (`outputs`, by value).
    `homes`: of the parameters that have one, where they are between their uses.
    """

    choices: dict[str, tuple[Choice, ...]]
    specs: dict[str, Spec]
    outputs: dict[str, Spec]
    homes: dict[str, Home] = field(default_factory=dict[str, Home])
    recompute: bool = False  # layers of loops run forward again in backward
    order: str = "contiguous"  # how ranks that share a sequence hold its tokens; or `zigzag`
    kept_layers: int = 0  # but not so many last ones of each
    part_layers: int = 0  # and of the others so many last ones keep a part

    @property
    def recomputed(self) -> Recomputed:
        """Which layers run again."""
        return Recomputed(self.recompute, self.kept_layers, self.part_layers)

    def again(self, scope: Scope) -> dict[str, Again]:
        """By node, how often backward runs its forward again, on average over a scope's runs."""
        full, part = self.recomputed.runs(scope).shares()
        some = again_in_part(scope.nodes)
        return {node.name: Again(full, part * (node.name in some)) for node in scope.nodes}

    def __str__(self) -> str:
        """A line for each spec and for each node's choices."""
        return "\n".join(
            [
                f"tokens {self.order}, layers {self.recomputed}",
                *(f"spec {name} {format_spec(spec)}" for name, spec in self.specs.items()),
                *(f"home {name} {home}" for name, home in self.homes.items()),
                *(f"output {name} {format_spec(spec)}" for name, spec in self.outputs.items()),
                *(f"node {name} {','.join(choices)}" for name, choices in self.choices.items()),
            ]
        )


class Builder(Prices):
    """Builds problems of one graph on one network, under any restriction."""

    def __init__(self, graph: Graph, network: Network, setting: Setting) -> None:
        super().__init__(graph, network, setting)
        self._keepers = keepers(self)
        self._runs: dict[int, Runs] = {}

    def under(self, setting: Setting) -> Builder:
        """The same under another setting, in which each node costs what it does in this one
        (`Setting.of_nodes`).  The two share all that depends on no more than that."""
        other = copy(self)
        other.setting = setting
        return other

    def recomputed(self, kept_layers: int, part_layers: int = 0) -> Builder:
        """The same where layers of loops run forward again in backward, but for so many last ones;
        so many of the others keep a part."""
        how = {"recompute": True, "kept_layers": kept_layers, "part_layers": part_layers}
        return self.under(replace(self.setting, **how))

    def runs(self, me: int) -> Runs:
        """What region number `me` takes."""
        if me not in self._runs:
            self._runs[me] = runs_of(self, me, self._keepers)
        return self._runs[me].mean(self.setting.recomputed.runs(self.regions[me].scope))

    def build(self, restriction: Restriction, ceiling: float = inf) -> Built:
        """The problem under a restriction, with what its nodes stand for; without edges where
        nothing fits the memory, or nothing costs less than `ceiling`."""
        return _Building(self, restriction).build(ceiling)


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A problem, and what its nodes stand for.

    `strategies` are those of each region, as far as allowed, and `region_nodes` the regions' nodes;
    `flows` has the node and the specs of each value, `output_nodes` those of the model's outputs;
    `storages` by parameter the ways to keep it, one for each of its specs.
    `uses` says what a node's usages are for, the first of them; the others are of what runs.
    `bringing` are the nodes whose costs are what it takes to bring weights.
    """

    builder: Builder
    nodes: tuple[ProblemNode, ...]
    edges: tuple[Edge, ...]
    flows: Mapping[str, Flow]
    storages: Mapping[str, Sequence[Storage]]
    strategies: tuple[tuple[Strategy, ...], ...]
    region_nodes: tuple[int, ...]
    output_nodes: Mapping[str, Flow]
    uses: Mapping[int, Sequence[Use]]
    bringing: tuple[int, ...]
    times: Times  # at which anything may be live

    @property
    def horizon(self) -> int:
        """After all times at which anything is live."""
        return self.times.horizon

    def problem(self) -> ShardingProblem:
        """What a solver sees."""
        name = f"{self.builder.graph.name} on {self.builder.network.mesh}"
        limit = self.builder.setting.memory_bytes
        return ShardingProblem(name, self.nodes, self.edges, limit)

    def least_memory(self) -> float:
        """Bytes that are live at the fullest time when every node takes its smallest strategy."""
        return _least_memory(self.nodes, self.times.horizon)

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
        homes = {
            name: home
            for name, of in self.storages.items()
            if (home := of[assignment[self.flows[name].node]].home) is not None
        }
        return Decisions(
            choices, specs, outputs, homes, setting.recompute, setting.order, setting.kept_layers,
            setting.part_layers,
        )  # fmt: skip

    def bringing_s(self, assignment: Sequence[int]) -> float:
        """Seconds of a step that the problem counts for bringing weights."""
        return sum(float(self.nodes[i].costs[assignment[i]]) for i in self.bringing)

    def memory_at(self, assignment: Sequence[int], time: int | None) -> dict[Use, float]:
        """Bytes that are live at `time`, by what they are for."""
        found: dict[Use, float] = dict.fromkeys(USES, 0.0)
        for index, node in enumerate(self.nodes):
            uses = self.uses.get(index, ())
            for position, usage in enumerate(node.usages):
                if time is not None and usage.start <= time < usage.end:
                    use = uses[position] if position < len(uses) else "running"
                    found[use] += float(usage.bytes[assignment[index]])
        return found


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
        self.times_a_step = builder.setting.micro_batches  # each of them runs the graph
        self.nodes: list[ProblemNode] = []
        self.edges: list[Edge] = []
        self.flows: dict[str, ValueFlow] = {}
        self.strategies: list[tuple[Strategy, ...]] = []
        self.region_nodes: list[int] = []
        self.output_nodes: dict[str, Flow] = {}
        self.times = Times(
            builder.regions,
            units(builder.graph),
            weighty(builder),
            training=builder.setting.training,
            modes=builder.setting.recomputed.runs,
        )
        self.live = Live(builder, self.times)
        self.uses: dict[int, Sequence[Use]] = {}
        self.bringing = Bringing(builder, self.times, self.nodes, self.edges, self.uses)

    def build(self, ceiling: float) -> Built:
        """See `Builder.build`.  Edges, which take the most time, never make a plan cheaper."""
        self.add_sources()
        self.add_regions()
        self.add_outputs()
        limit = self.builder.setting.memory_bytes
        fits = limit is None or _least_memory(self.nodes, self.times.horizon) <= limit
        if fits and least_cost(self.nodes) < ceiling:
            self.add_edges()
        return Built(
            self.builder,
            tuple(self.nodes),
            tuple(self.edges),
            {name: Flow(flow.node, tuple(flow.specs)) for name, flow in self.flows.items()},
            {name: flow.storages for name, flow in self.flows.items() if flow.param is not None},
            tuple(self.strategies),
            tuple(self.region_nodes),
            self.output_nodes,
            self.uses,
            tuple(self.bringing.paid),
            self.times,
        )

    # 1. sources ---------------------------------------------------------------------------------

    def add_sources(self) -> None:
        """Nodes for inputs, parameters and what loops carry."""
        for item in self.builder.graph.inputs:
            self._source(item.value, item.name, self._ends(item.value, self._storage(item.value)))
        for ref in all_params(self.builder.graph):
            self._param(ref)
        for loop in self.builder.graph.loops:
            for value in loop.outputs:
                specs = self._storage(value)
                usages = self.live.carried(loop, value, specs)
                self._source(value, f"{loop.path} carries {value.name}", specs, usages)

    def _ends(self, value: Value, specs: list[Spec]) -> list[Spec]:
        """The specs that an input or output may have; all of them where none may."""
        return [s for s in specs if self.restriction.allows_end(value, s)] or specs

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
        self.flows[value.name] = ValueFlow(value, len(self.nodes), specs)
        self.uses[len(self.nodes)] = _all_for("kept", len(usages))
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
        ways = self._storages(ref, specs)
        specs = [way.stored for way in ways]
        states = [self.builder.state_bytes(ref, spec) for spec in specs]
        costs = np.array([self.builder.optimizer_s(ref, spec) for spec in specs])
        always = np.array([float(s.total - s.gradient) for s in states])
        usages = [Usage(0, self.times.horizon, ref.weight * always)]
        if self.builder.trains(ref):
            gradient = np.array([float(s.gradient) for s in states])
            late = np.array([way.late for way in ways])
            several = np.full(len(ways), self.times_a_step > 1)
            usages += self.live.gradient(
                value.name, ref.weight, gradient, several & ~late, several & late
            )
        self.uses[len(self.nodes)] = ("state", *_all_for("gradient", len(usages) - 1))
        self.flows[value.name] = ValueFlow(value, len(self.nodes), specs, param=ref, storages=ways)
        self.nodes.append(ProblemNode(ref.name, ref.weight * costs, tuple(usages)))

    def _storages(self, ref: ParamRef, specs: Sequence[Spec]) -> list[Storage]:
        """The ways to keep a parameter that is stored in one of some specs."""
        if not self.builder.trains(ref):
            return list(map(Storage, specs))
        several, homeless = self.times_a_step > 1, self.homeless.get(ref.param.value.name, set())

        def allowed(way: Storage) -> bool:
            return not homeless.intersection(way.homebound) and self.restriction.allows_home(
                ref.param, ref.name, way, several=several, homeless=homeless
            )

        home = self.builder.home_conversions(ref)
        ways = storages(specs, allowed, home.seconds, several=several)
        if not ways:
            self.restriction.none_allowed(ref.param, ref.name, self.builder.sizes)
        return ways or list(map(Storage, specs))

    @cached_property
    def homeless(self) -> Mapping[str, set[int]]:
        """By parameter the axes on which some user never leaves summands of its gradient, so that
        it can have no home there."""
        found: dict[str, set[int]] = {}
        for region in self.builder.regions:
            names = [self.builder.outer_name(operand.name) for operand in region.operands]
            own = [(i, name) for i, name in enumerate(names) if name in self.builder.params]
            if not own:
                continue
            allowed = [s for s in region.strategies if self.restriction.allows(region, s)]
            for i, name in own:
                taken = {spec for strategy in allowed for spec in strategy.requires[i]}
                axes = range(len(self.builder.sizes))
                never = {x for x in axes if taken and all(spec[x] != V for spec in taken)}
                found.setdefault(name, set()).update(never)
        return found

    def flow(self, name: str) -> ValueFlow:
        """The flow of a value, also under the name that a block knows it by."""
        return self.flows[self.builder.outer_name(name)]

    # 2. regions ---------------------------------------------------------------------------------

    def add_regions(self) -> None:
        """A node for each region, and its needs as users of the values it takes."""
        for me, region in enumerate(self.builder.regions):
            every = range(len(region.strategies))
            allowed = [k for k in every if self.restriction.allows(region, region.strategies[k])]
            if not allowed:
                self.restriction.no_strategy(region, self.builder.sizes)
                allowed = list(every)
            strategies = tuple(region.strategies[k] for k in allowed)
            index = len(self.nodes)
            self.strategies.append(strategies)
            self.region_nodes.append(index)
            self.nodes.append(self._region_node(region, me, allowed))
            for i, value in enumerate(region.values):
                specs = [s.produces[i] for s in strategies]
                self.flows[value.name] = ValueFlow(value, index, specs)
        for region, index, strategies in zip(
            self.builder.regions, self.region_nodes, self.strategies, strict=True
        ):
            for i, value in enumerate(region.operands):
                once = self._is_invariant(value.name, region)
                weight = 1 if once else region.scope.weight
                needs = [s.requires[i] for s in strategies]
                place = TopLevel() if once else region.scope.place
                self.flow(value.name).users.append(User(index, needs, weight, place, region))
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
            entering.users.append(User(carried.node, needs, 1, TopLevel()))
            for kind, block in enumerate(loop.blocks):
                inner = self.flow(block.outputs[position].name)
                place, weight = InLoop(loop.path, kind), loop.order.count(kind)
                inner.users.append(User(carried.node, needs, weight, place))

    def _region_node(self, region: Region, me: int, allowed: Sequence[int]) -> ProblemNode:
        """Costs of each allowed strategy; memory kept for backward and held while the region
        runs."""
        weight, runs = region.scope.weight, self.builder.runs(me).of(allowed)
        kept_usages: list[Usage] = []
        if self.builder.setting.training:
            kept_usages = self.live.kept(region, runs)
        elif runs.cached.any():
            all_cached = self.builder.setting.in_flight * weight * runs.cached
            kept_usages = [Usage(0, self.times.horizon, all_cached)]
        self.uses[len(self.nodes)] = _all_for("kept", len(kept_usages))
        usages = (*kept_usages, *self.live.running(me, runs, allowed))
        return ProblemNode(region.name, weight * self.times_a_step * runs.seconds, usages)

    # 3. outputs ---------------------------------------------------------------------------------

    def add_outputs(self) -> None:
        """The model's outputs leave whole or sharded, never as partial sums."""
        for out in self.builder.graph.outputs:
            if out.value.name in self.output_nodes:
                continue
            index = len(self.nodes)
            flow = self.flow(out.value.name)
            specs = self._storage(out.value, flow.specs)
            if updated_buffer(out.path) or self.builder.setting.whole_outputs:
                # of a buffer each rank then keeps what it stores
                specs = [(R,) * len(self.builder.sizes)]
            specs = self._ends(out.value, specs)
            self.output_nodes[out.value.name] = Flow(index, tuple(specs))
            self.nodes.append(ProblemNode(f"output {out.value.name}", np.zeros(len(specs))))
            flow.users.append(User(index, [(spec,) for spec in specs], 1, TopLevel()))

    # 4. edges -----------------------------------------------------------------------------------

    def add_edges(self) -> None:
        """Conversions: direct edges, and shared ones through two-strategy nodes."""
        axes = range(len(self.builder.sizes))
        kept = [axis for axis in axes if not self.restriction.allows_gather(axis)]
        for flow in self.flows.values():
            by_place: dict[Place, list[User]] = {}
            for user in flow.users:
                by_place.setdefault(user.place, []).append(user)
            for users in by_place.values():
                if flow.param is not None:
                    self.bringing.connect(flow, flow.param, users, kept)
                else:
                    self._connect(flow, users)
        self.bringing.share_latencies()

    def _connect(self, flow: ValueFlow, users: list[User]) -> None:
        conversions = self.builder.conversions(flow.value, param=False, place=users[0].place)
        sources = list(dict.fromkeys(flow.specs))
        row_of = np.array([sources.index(spec) for spec in flow.specs])
        shared = self._shared_targets(users)
        targets = list(dict.fromkeys(t for u in users for needs in u.needs for t in needs))
        prices = self.times_a_step * conversions.matrix(sources, targets)

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
            mine = dict.fromkeys(t for needs in user.needs for t in needs)
            own = [t for t in mine if t not in shared]
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

    def _shared_targets(self, users: list[User]) -> list[Spec]:
        """Specs that at least two of the users may need."""
        count: dict[Spec, int] = {}
        for user in users:
            for target in dict.fromkeys(t for needs in user.needs for t in needs):
                count[target] = count.get(target, 0) + 1
        return [target for target, n in count.items() if n > 1]


def _all_for(use: Use, times: int) -> tuple[Use, ...]:
    return (use,) * times


def _even(shape: tuple[int, ...], spec: Spec, sizes: tuple[int, ...]) -> bool:
    for dim, size in enumerate(shape):
        ways = 1
        for state, n in zip(spec, sizes, strict=True):
            ways *= n if state == dim else 1
        if size % ways:
            return False
    return True
