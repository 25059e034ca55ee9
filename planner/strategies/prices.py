"""Seconds and bytes of what may be chosen in a graph: of its nodes, conversions and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...costmodel.compute import Kind, op_s
from ...costmodel.machines.cluster import Cluster
from ...costmodel.memory import (
    StateBytes,
    optimizer_step_bytes,
    parameter_state_bytes,
    stepped_by,
)
from ...facts.mesh import Mesh
from ...facts.spec import Spec
from ...ir.graph import Graph, Node, Value
from ...ir.graph.kinds import kind_of
from ...ir.ops.local import local_bytes
from ...ir.ops.registry import is_view, local_of, operator_of, saved_values
from ...ir.ops.rule import Choice
from .conversion import Conversions, conversions
from .fusing import Share, shares
from .lattice import Floats, Ints
from .network import Network
from .orthogonal import Orthogonal
from .params import ParamRef, all_params
from .pricing import Work, price
from .regions import TOP_LEVEL, InLoop, Place, Recomputed, make_regions, scopes
from .selected import kept_results
from .setting import Setting
from .steps import Moving, Repeats
from .storage import Held, Storage


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One run of a node on one rank: seconds, bytes that it holds beside operands and results, and
    in backward beside their gradients, bytes of its KV cache, bytes of rows that autograd keeps,
    what else it keeps (value, bytes), and the spec that each operand is needed in.

    In a layer that keeps a part: the bytes of rows that it keeps, and the seconds that a second run
    of the node goes without."""

    forward_s: float
    seconds: float
    beside: float
    behind: float
    cache: float
    routed: float
    kept: tuple[tuple[str, int], ...]
    needs: tuple[tuple[Value, Spec], ...]
    routed_in_part: float
    spared_s: float


class Prices:
    """What everything costs in one graph on one network, worked out when it is first asked for."""

    def __init__(self, graph: Graph, network: Network, setting: Setting) -> None:
        self.graph = graph
        self.network = network
        self.setting = setting
        self.sizes = network.mesh.sizes
        self.regions = make_regions(
            graph, self.sizes, training=setting.training, order=setting.order
        )
        self._bytes: dict[tuple[str, Spec], int] = {}
        self._costs: dict[tuple[str, tuple[Choice, ...]], NodeCost] = {}
        self._alias = _aliases(graph)
        self._viewed = _views(graph)
        self._shares = shares(graph, compiled=network.cluster.compiled, training=setting.training)
        self._needed_again = _needed_again(graph, self._alias)
        self.block_values = _block_values(graph)
        self.kept_results = kept_results(graph)
        self._known_shares: dict[Recomputed, Mapping[Place, tuple[float, float]]] = {}
        self.params = frozenset(ref.param.value.name for ref in all_params(graph))

    def conversions(self, value: Value, *, param: bool, place: Place = TOP_LEVEL) -> Conversions:
        """The conversions of a value's type; a parameter that backward needs is gathered again.

        `place` is where the conversion is made: in layers that are recomputed it runs twice, and
        what is gathered the second time serves backward.  In those that keep a part it does, too,
        unless what it makes is kept.
        """
        gradient = self.setting.training and value.differentiable
        full, part = self._again(value, place)
        again = full + part
        regather = self._regathers(value, again) if param else 0.0
        reduced = self.setting.reduced if param else None
        stays = part if value.name in self.kept_results else 0.0
        moving = Moving(value.type, gradient, param, reduced=reduced)
        return conversions(moving, self.network, Repeats(again, regather, stays))

    def inner_s(self, value: Value, a: Spec, b: Spec) -> tuple[float, float]:
        """Seconds of a conversion inside a region, and how many more it takes in a layer that runs
        again."""
        moving = Moving(value.type, self.setting.training and value.differentiable)
        once, twice = (
            conversions(moving, self.network, Repeats(again)).seconds(a, b) for again in (0.0, 1.0)
        )
        return once, twice - once

    def node_cost(self, node: Node, choices: tuple[Choice, ...]) -> NodeCost:
        """What one run of a node costs under its choices."""
        key = (node.name, choices)
        if key not in self._costs:
            of_all = self._alike("cost", node, choices)
            alike = self.network.once(of_all, lambda: self._cost(node, choices))
            kept = saved_values(node) if self.setting.training else ()
            sizes = (size for _, size in alike.kept)
            needs = (spec for _, spec in alike.needs)
            self._costs[key] = replace(
                alike,
                kept=tuple(zip((value.name for value in kept), sizes, strict=True)),
                needs=tuple(zip(node.operands, needs, strict=True)),
            )
        return self._costs[key]

    def _alike(self, what: str, node: Node, choices: tuple[Choice, ...]) -> tuple[object, ...]:
        """What all nodes share, of any graph, that cost the same on this network."""
        share = self.share_of(node)
        return what, kind_of(node), choices, self.setting.of_nodes, share and share.key

    def _cost(self, node: Node, choices: tuple[Choice, ...]) -> NodeCost:
        setting, operator = self.setting, operator_of(node)
        local = local_of(
            node,
            choices,
            self.sizes,
            training=setting.training,
            order=setting.order,
            imbalance=setting.expert_imbalance,
        )
        needs, gives = local.specs()
        specs = dict(zip((*node.operands, *node.outputs), (*needs, *gives), strict=True))
        buffers = (0.0, 0.0) if operator.free else operator.both_buffers(local)
        rows = operator.extra_bytes(local)
        if setting.training and not self.network.cluster.fused_norms:
            rows += operator.unfused_bytes(local)
        kept = saved_values(node) if setting.training else ()
        work = self.work(node, choices)
        return NodeCost(
            work.forward_s,
            work.seconds,
            buffers[0] + rows,
            buffers[1] + rows,
            operator.remembered(local, setting.longest_run),
            rows if setting.training else 0.0,
            tuple((v.name, self.local_bytes(v, specs[v])) for v in kept),
            tuple(zip(node.operands, needs, strict=True)),
            operator.part_bytes(local) if setting.training else 0.0,
            work.spared_s,
        )

    def local_bytes(self, value: Value, spec: Spec) -> int:
        """Bytes that one rank holds of `value` in `spec`."""
        key = (value.name, spec)
        if key not in self._bytes:
            self._bytes[key] = local_bytes(value, spec, self.sizes)
        return self._bytes[key]

    def work(self, node: Node, choices: tuple[Choice, ...]) -> Work:
        """Seconds of one node under its choices."""
        setting = self.setting
        return self.network.once(
            self._alike("work", node, choices),
            lambda: price(
                node,
                choices,
                self.network,
                training=setting.training,
                order=setting.order,
                imbalance=setting.expert_imbalance,
                share=self.share_of(node),
            ),
        )

    def share_of(self, node: Node) -> Share | None:
        """What a node moves of its chain of light operators; None where it does more than that."""
        return self._shares.get(node.name)

    def outer_name(self, name: str) -> str:
        """The name outside the loop of a value that a block takes in; others as they are."""
        return self._alias.get(name, name)

    def viewed(self, name: str) -> tuple[str, float]:
        """The name of the value that another is a view of, and which share of its bytes; its own if
        it is none."""
        return self._viewed.get(name, (name, 1.0))

    def home_conversions(self, ref: ParamRef) -> Conversions:
        """Those between where a trained parameter is stored and where it is kept for its uses:
        there once a step, in the dtype of its uses."""
        moving = Moving(ref.param.value.type, True, True, reduced=self.setting.reduced)
        return conversions(moving, self.network)

    def trains(self, ref: ParamRef) -> bool:
        """Does a step change the parameter?"""
        return ref.trainable and self.setting.training

    def numel(self, value: Value, spec: Spec) -> int:
        """Numbers that one rank holds of `value` in `spec`."""
        return self.local_bytes(value, spec) // value.type.dtype.itemsize

    def state_bytes(self, ref: ParamRef, spec: Spec) -> StateBytes:
        """What one parameter takes on a rank, with its gradient and optimizer's states, when it is
        stored in `spec`."""
        return parameter_state_bytes(
            self.numel(ref.param.value, spec),
            ref.param.dtype.itemsize,
            self._stepped_by(ref),
            trainable=self.trains(ref),
        )

    def optimizer_s(self, ref: ParamRef, spec: Spec) -> float:
        """Seconds that one parameter adds to the optimizer's step when stored in `spec`."""
        if not self.trains(ref):
            return 0.0
        numel, by = self.numel(ref.param.value, spec), self._stepped_by(ref)
        moved = optimizer_step_bytes(numel, ref.param.dtype.itemsize, by)
        seconds = moved * self._byte_s("optimizer")
        return seconds + (self.orthogonal.seconds(ref, spec) if by == "muon" else 0.0)

    def _stepped_by(self, ref: ParamRef) -> str:
        return stepped_by(self.setting.optimizer, matrix=ref.param.matrix)

    @cached_property
    def orthogonal(self) -> Orthogonal:
        """What Muon does with whole matrices."""
        return Orthogonal(self.graph, self.network)

    @property
    def byte_s(self) -> float:
        """Seconds that a byte adds to a cast that moves it."""
        return self._byte_s("mixed")

    def _byte_s(self, kind: Kind) -> float:
        """Seconds that a byte adds to a kernel that moves it."""
        cluster, many = self.network.cluster, 1e9

        def added() -> float:
            both = (op_s(0.0, size, "bf16", cluster, kind) for size in (many, 0.0))
            return float(next(both) - next(both)) / many

        return self.network.once(("byte", kind), added)

    def held(
        self, ref: ParamRef, storages: Sequence[Storage], used: Sequence[Spec]
    ) -> Callable[[Ints, Ints], Held]:
        """What a weight takes that is kept in one of some ways and used in one of some specs, by
        the numbers of both."""
        value = ref.param.value

        def sizes(specs: Iterable[Spec]) -> Floats:
            return np.array([float(self.numel(value, spec)) for spec in specs])

        stored, home = sizes(s.stored for s in storages), sizes(s.spec for s in storages)
        kept, late = np.array([s.kept for s in storages]), np.array([s.late for s in storages])
        wanted = sizes(used)

        def of(ways: Ints, uses: Ints) -> Held:
            return Held(
                stored[ways], home[ways], wanted[uses], kept[ways], late[ways],
                ref.param.dtype.itemsize,
                value.type.dtype.itemsize,
                (self.setting.reduced or value.type.dtype).itemsize,
            )  # fmt: skip

        return of

    def casting_s(self, ref: ParamRef, held: Held, *, again: float) -> Floats:
        """Seconds of a step's casts of a weight and its gradients, and of their sums.

        `again`: how often backward needs it once more, or its layer is run again there.
        """
        uses, gradients = 1 + again, int(self.trains(ref))
        return held.cast_bytes(uses, gradients, self.setting.micro_batches) * self.byte_s

    def comes_again(self, value: Value, place: Place = TOP_LEVEL) -> float:
        """How often backward, or a layer that is run again in it, needs a parameter once more."""
        again = sum(self._again(value, place))
        return again + self._regathers(value, again)

    def _again(self, value: Value, place: Place) -> tuple[float, float]:
        """The shares of the layers that make a conversion once more: of those that are run again
        whole, and in part."""
        if not self.setting.recompute:
            return 0.0, 0.0
        where = place if isinstance(place, InLoop) else self.block_values.get(value.name)
        return (0.0, 0.0) if where is None else self._shares_again[where]

    def _regathers(self, value: Value, again: float) -> float:
        needed = self.setting.training and value.name in self._needed_again
        return (1.0 - again) * needed

    @property
    def _shares_again(self) -> Mapping[Place, tuple[float, float]]:
        made = self.setting.recomputed
        if made not in self._known_shares:
            inside = [scope for scope in scopes(self.graph) if scope.loop is not None]
            self._known_shares[made] = {s.place: made.runs(s).shares() for s in inside}
        return self._known_shares[made]


def _block_values(graph: Graph) -> Mapping[str, InLoop]:
    """By name everything that belongs to a block of a loop, and that block's place."""
    found: dict[str, InLoop] = {}
    for loop in graph.loops:
        for kind, block in enumerate(loop.blocks):
            values = [*block.inputs, *(p.value for p in block.params)]
            values += [v for node in block.nodes for v in node.outputs]
            found |= dict.fromkeys((v.name for v in values), InLoop(loop.path, kind))
    return found


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


def _views(graph: Graph) -> dict[str, tuple[str, float]]:
    """Of views, what they are views of, however many are between, and which share of it."""
    found: dict[str, tuple[str, float]] = {}
    for scope in scopes(graph):
        for node in scope.nodes:
            if is_view(node):
                source = node.operands[0]
                whole, share = found.get(source.name, (source.name, 1.0))
                for value in node.outputs:
                    found[value.name] = whole, share * value.type.bytes / max(source.type.bytes, 1)
    return found


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


def network_for(graph: Graph, mesh: Mesh, cluster: Cluster) -> Network:
    """The mesh on a cluster, as the graph finds it: in training and prefill, or in steps of one
    token over a cache."""
    remembers = any(operator_of(node).remembers for node in graph.nodes)
    tokens = {
        size
        for item in graph.inputs
        for label, size in zip(item.labels, item.value.type.shape, strict=False)
        if label == "s"
    }
    return Network(mesh, cluster.in_steps() if remembers and tokens == {1} else cluster)


__all__ = ["NodeCost", "Prices", "network_for"]
