"""Seconds and bytes of what may be chosen in a graph: of its nodes, conversions and parameters."""

from __future__ import annotations

from dataclasses import dataclass

from ...costmodel.compute import elementwise_s
from ...costmodel.memory import optimizer_step_bytes
from ...facts.spec import Spec
from ...ir.graph import Graph, Node, Value
from ...ir.ops.local import local_bytes
from ...ir.ops.registry import is_view, local_of, operator_of, saved_values
from ...ir.ops.rule import Choice
from .conversion import Conversions, Network
from .params import ParamRef, all_params
from .pricing import Work, price
from .regions import make_regions, scopes
from .setting import Setting


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
        self._conversions: dict[tuple[object, ...], Conversions] = {}
        self._work: dict[tuple[str, tuple[Choice, ...]], Work] = {}
        self._bytes: dict[tuple[str, Spec], int] = {}
        self._costs: dict[tuple[str, tuple[Choice, ...]], NodeCost] = {}
        self._alias = _aliases(graph)
        self._needed_again = _needed_again(graph, self._alias)
        self.block_values = _block_values(graph)
        self.params = frozenset(ref.param.value.name for ref in all_params(graph))

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
            if not operator.free:
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


__all__ = ["NodeCost", "Prices"]
