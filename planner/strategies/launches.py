"""What kernels take that have nothing to do: no sharding makes a graph faster than that."""

from __future__ import annotations

from ...costmodel.compute import matmul_s
from ...facts.work import Kernel, Product, Scores, Stream
from ...ir.graph import Node
from ...ir.ops.registry import local_of, operator_of
from .network import Network
from .prices import Prices
from .regions import Scope


def launches_s(prices: Prices, scope: Scope) -> float:
    """Seconds of all kernels of one run of a scope, forward and backward, if they were empty."""
    return sum(_node_s(prices, node) for node in scope.nodes)


def _node_s(prices: Prices, node: Node) -> float:
    network, training = prices.network, prices.setting.training
    share = prices.share_of(node)
    if share is not None:
        return (1 + training) * network.traffic_seconds(0.0) if share.first else 0.0
    kernels = operator_of(node).work(local_of(node, training=training))
    return sum(
        _empty_s(kernel, network)
        for steps in (kernels.forward, kernels.backward)
        for step in steps
        for kernel in step
    )


def _empty_s(kernel: Kernel, network: Network) -> float:
    match kernel:
        case Stream():
            return network.traffic_seconds(0.0, mixed=kernel.mixed)
        case Product():
            return float(matmul_s(1, 1, 1, 1, kernel.dtype, network.cluster))
        case Scores():
            return network.cluster.attention.floor_s


__all__ = ["launches_s"]
