"""Seconds and bytes of one node on one rank, for a choice of factors.

Forward and backward are priced from the local sizes of the node's factors: matrix products and
attention by their shapes, everything else by the bytes it moves.  Causal attention is charged for
the scores that the busiest rank computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...costmodel.compute import matmul_s
from ...facts.blocks import local_shape
from ...facts.spec import Spec
from ...ir.graph import Node, Value
from ...ir.ops.registry import find_op, kind_of, matmul_dims, rule_of
from ...ir.ops.rule import Choice
from . import attention, experts
from .conversion import Network
from .regions import node_specs

# Loss over a sharded vocabulary: all-reduces of fp32 numbers per token, the maximum first, then
# the sum of exponentials and the label's logit together
_VOCABULARY_REDUCTIONS = (1, 2)


_LOOKUPS = ("aten.embedding.default", "shardwright.last_token")
_POSITION_BYTES = 8


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of one run of a node on one rank, forward and backward.

    The `moving` ones are those of them in which the op waits for collectives that it runs itself,
    over the mesh's `axes`.
    """

    forward_s: float
    backward_s: float
    forward_moving_s: float = 0.0
    backward_moving_s: float = 0.0
    axes: tuple[int, ...] = ()

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s

    @property
    def moving_s(self) -> float:
        """Forward and backward, of the collectives inside."""
        return self.forward_moving_s + self.backward_moving_s

    def moving(self, forward_s: float, backward_s: float, axes: tuple[int, ...]) -> Work:
        """This work, which is compute alone, and collectives over `axes` besides."""
        if not forward_s and not backward_s:
            return self
        return Work(
            self.forward_s + forward_s, self.backward_s + backward_s, forward_s, backward_s, axes
        )


def local_bytes(value: Value, spec: Spec, sizes: tuple[int, ...]) -> int:
    """Bytes that one rank holds of `value` in `spec`."""
    n = 1
    for size in local_shape(value.type.shape, spec, sizes):
        n *= size
    return n * value.type.dtype.itemsize


def price(
    node: Node,
    choices: tuple[Choice, ...],
    network: Network,
    *,
    training: bool,
    order: str = "contiguous",
    imbalance: float = 0.0,
) -> Work:
    """Seconds of `node` on the busiest rank under `choices` (one per mesh axis).

    `order` is that of the tokens on ranks which share a sequence: `contiguous` or `zigzag`;
    `imbalance` the load of the busiest rank's experts over the mean (0: a power-law router's).
    """
    sizes = network.mesh.sizes
    ways = rule_of(node).ways(choices, sizes)
    if ways is None:
        raise ValueError(f"{node.loc}: {node.op} cannot be cut {choices} over {network.mesh}")
    backward = training and any(value.differentiable for value in node.outputs)
    match kind_of(node):
        case "view" if find_op(node.op) is not None:
            return Work(0.0, 0.0)
        case "matmul":
            return _price_matmul(node, ways, network, backward)
        case "attention":
            return _price_attention(node, choices, network, backward, order)
        case "experts":
            local = experts.Local.of(node, choices, sizes, imbalance)
            dtype = str(node.output.type.dtype)
            alone = Work(*experts.seconds(local, dtype, network, backward=backward))
            sent = experts.exchange_seconds(local, network, backward=backward)
            return alone.moving(*sent, local.axes)
        case _:
            work = _price_traffic(node, choices, network, training, backward)
            reduced, axes = _price_inside(node, choices, network)
            return work.moving(reduced, 0.0, axes)


def buffer_bytes(node: Node, choices: tuple[Choice, ...], sizes: tuple[int, ...]) -> float:
    """Bytes that a node holds beside its operands and results while it runs."""
    if kind_of(node) != "attention":
        return 0.0
    return attention.buffer_bytes(attention.Local.of(node, choices, sizes, "contiguous"))


def routed_bytes(
    node: Node, choices: tuple[Choice, ...], sizes: tuple[int, ...], imbalance: float
) -> float:
    """Bytes of the rows, sorted by expert, that a layer of experts makes on the busiest rank."""
    if kind_of(node) != "experts":
        return 0.0
    return experts.saved_bytes(experts.Local.of(node, choices, sizes, imbalance))


def cache_bytes(
    node: Node, choices: tuple[Choice, ...], sizes: tuple[int, ...], run: int = 0
) -> float:
    """Bytes of the KV cache that one rank keeps for a node; `run` as in `attention.cache_bytes`."""
    if node.op != "shardwright.cached_attention":
        return 0.0
    local = attention.Local.of(node, choices, sizes, "contiguous")
    return float(attention.cache_bytes(local, run))


def _price_matmul(node: Node, ways: dict[str, int], network: Network, backward: bool) -> Work:
    batch, m, n, k = matmul_dims(node, ways)
    dtype = str(node.output.type.dtype)

    def product(m: int, n: int, k: int) -> float:
        return network.once(
            ("matmul", m, n, k, batch, dtype),
            lambda: matmul_s(m, n, k, batch, dtype, network.cluster),
        )

    back = 0.0
    if backward:
        left, right = _factors_operands(node)
        back += product(m, k, n) if left.differentiable else 0.0
        back += product(k, n, m) if right.differentiable else 0.0
    return Work(product(m, n, k), back)


def _factors_operands(node: Node) -> tuple[Value, Value]:
    """The two multiplied operands (an addmm's bias comes first)."""
    first = 1 if node.op == "aten.addmm.default" else 0
    return node.operands[first], node.operands[first + 1]


def _price_attention(
    node: Node, choices: tuple[Choice, ...], network: Network, backward: bool, order: str
) -> Work:
    local = attention.Local.of(node, choices, network.mesh.sizes, order)
    dtype = str(node.output.type.dtype)
    alone = attention.seconds(local, dtype, network, backward=backward, moving=False)
    if not local.algorithm:
        return Work(*alone)
    whole = attention.seconds(local, dtype, network, backward=backward)
    waits = [max(a - b, 0.0) for a, b in zip(whole, alone, strict=True)]
    return Work(*whole, waits[0], waits[1], (local.axis,))


def _price_traffic(
    node: Node, choices: tuple[Choice, ...], network: Network, training: bool, backward: bool
) -> Work:
    needs, gives = node_specs(node, rule_of(node), choices, training)
    sizes = network.mesh.sizes
    table = node.operands[0] if node.op in _LOOKUPS else None
    reads = sum(
        local_bytes(value, spec, sizes)
        for value, spec in zip(node.operands, needs, strict=True)
        if value is not table  # a lookup reads the rows it returns, not the table
    )
    writes = sum(local_bytes(v, spec, sizes) for v, spec in zip(node.outputs, gives, strict=True))
    if table is not None:
        reads += writes
    forward = network.traffic_seconds(float(reads + writes))
    if not backward:
        return Work(forward, 0.0)
    gradients = sum(
        local_bytes(value, spec, sizes)
        for value, spec in zip(node.operands, needs, strict=True)
        if value.differentiable
    )
    return Work(forward, network.traffic_seconds(float(reads + writes + gradients)))


def _price_inside(
    node: Node, choices: tuple[Choice, ...], network: Network
) -> tuple[float, tuple[int, ...]]:
    """Seconds of the collectives that an op runs itself, and over which axes: a loss over a
    sharded vocabulary, the last token of a sharded sequence."""
    if node.op == "shardwright.last_token":
        cut = tuple(axis for axis, choice in enumerate(choices) if choice == "s")
        rows = node.operands[0].type.shape[0] * _POSITION_BYTES
        return (network.seconds("all_reduce", cut, rows) if cut else 0.0), cut
    inside = rule_of(node).inside
    axes = tuple(axis for axis, choice in enumerate(choices) if choice in inside)
    if not axes:
        return 0.0, ()
    ways = rule_of(node).ways(choices, network.mesh.sizes) or {}
    rows = 1
    for dim in rule_of(node).operands[0][:-1]:
        for factor in dim:
            rows *= -(-rule_of(node).sizes[factor] // ways.get(factor, 1))
    reductions = (4.0 * n * rows for n in _VOCABULARY_REDUCTIONS)
    return sum(network.seconds("all_reduce", axes, n) for n in reductions), axes
