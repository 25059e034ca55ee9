"""Seconds and bytes of one node on one rank, for a choice of factors.

Operators declare what they compute and move, as numbers of FLOPs and bytes (`ir.ops.operator`);
here the cost model turns them into seconds, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...costmodel.compute import attention_s, matmul_s
from ...facts.traffic import Traffic
from ...facts.work import Kernel, Product, Scores, Stream
from ...ir.graph import Node
from ...ir.ops.registry import local_of, operator_of
from ...ir.ops.rule import Choice
from .fusing import Share
from .network import Network


class Again(NamedTuple):
    """How often a node runs again in backward, on average: in layers that are recomputed whole, and
    in such as keep a part."""

    full: float
    part: float


NEVER, WHOLE, IN_PART = Again(0.0, 0.0), Again(1.0, 0.0), Again(0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of one run of a node on one rank, forward and backward.

    The `moving` ones are those of them in which the op waits for collectives that it runs itself,
    over the mesh's `axes`.  The `spared` ones are those of the forward pass that a layer goes
    without which keeps a part and runs the node again.
    """

    forward_s: float
    backward_s: float
    forward_moving_s: float = 0.0
    backward_moving_s: float = 0.0
    axes: tuple[int, ...] = ()
    spared_s: float = 0.0
    spared_moving_s: float = 0.0

    def again_s(self, again: Again) -> float:
        """Of what runs again, collectives among it."""
        return (again.full + again.part) * self.forward_s - again.part * self.spared_s

    def again_moving_s(self, again: Again) -> float:
        """Of the collectives inside alone."""
        return (again.full + again.part) * self.forward_moving_s - again.part * self.spared_moving_s

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s

    @property
    def moving_s(self) -> float:
        """Forward and backward, of the collectives inside."""
        return self.forward_moving_s + self.backward_moving_s


def price(
    node: Node,
    choices: tuple[Choice, ...],
    network: Network,
    *,
    training: bool,
    order: str = "contiguous",
    imbalance: float = 0.0,
    share: Share | None = None,
) -> Work:
    """Seconds of `node` on the busiest rank under `choices` (one per mesh axis).

    `share` is what it moves of its chain of light operators, where it only streams numbers through.

    `order` is that of the tokens on ranks which share a sequence: `contiguous` or `zigzag`;
    `imbalance` the load of the busiest rank's experts over the mean (0: a power-law router's).
    """
    local = local_of(
        node, choices, network.mesh.sizes, training=training, order=order, imbalance=imbalance
    )
    operator = operator_of(node)
    if share is not None:
        mixed = not share.fused and (operator.rowwise or _casts(node))
        ahead, behind = share.bytes(local)
        return Work(
            _streamed_s(ahead, share, network, mixed=mixed),
            _streamed_s(behind, share, network, mixed=mixed),
        )
    kernels, traffic = operator.work(local), operator.traffic(local)
    forward, ahead = pass_seconds(kernels.forward, [t for t in traffic if not t.backward], network)
    backward, behind = pass_seconds(kernels.backward, [t for t in traffic if t.backward], network)
    axes = tuple(sorted({axis for t in traffic for axis in t.axes}))
    without = operator.spares(local) if training else ((), ())
    spared, unmoved = pass_seconds([without[0]], without[1], network)
    return Work(forward, backward, ahead, behind, axes, spared, unmoved)


def _streamed_s(size: int, share: Share, network: Network, *, mixed: bool) -> float:
    """Seconds of one pass: a chain has one kernel, which its first node pays for."""
    seconds = network.traffic_seconds(float(size), mixed=mixed)
    if share.first:
        return seconds if size else 0.0
    return seconds - network.traffic_seconds(0.0, mixed=mixed)


def _casts(node: Node) -> bool:
    """Are numbers read in another format than they are written in?"""
    widths = {value.type.dtype.itemsize for value in (*node.operands[:1], *node.outputs)}
    return len(widths) > 1


def pass_seconds(
    steps: Sequence[Sequence[Kernel]], traffic: Sequence[Traffic], network: Network
) -> tuple[float, float]:
    """Seconds of one pass, what moves included, and those of them that are spent waiting.

    Hidden messages pass while each step but the last computes, or the only one.
    """
    compute = [sum(kernel_seconds(kernel, network) for kernel in step) for step in steps]
    once = [(t, network.seconds(t.kind, t.axes, t.bytes)) for t in traffic if not t.told]
    hop = sum(seconds for t, seconds in once if t.hidden)
    exposed = sum(t.times * seconds for t, seconds in once if not t.hidden)
    meanwhile = compute[:-1] or compute or [0.0]  # the last of several steps waits for nothing
    waits = exposed + sum(max(hop - step, 0.0) for step in meanwhile)
    return sum(compute) + waits, waits


def kernel_seconds(kernel: Kernel, network: Network) -> float:
    """Seconds of one launch."""
    match kernel:
        case Stream():
            return network.traffic_seconds(kernel.bytes, mixed=kernel.mixed)
        case Product(m, n, k, batch, dtype):
            return network.once(
                ("matmul", m, n, k, batch, dtype),
                lambda: float(matmul_s(m, n, k, batch, dtype, network.cluster)),
            )
        case Scores():
            return kernel.times * network.once(
                (kernel,),
                lambda: float(
                    attention_s(
                        kernel.batch, kernel.heads, kernel.kv_heads, kernel.queries, kernel.keys,
                        kernel.head_dim, kernel.dtype, network.cluster, kernel.share,
                        values_in_keys=kernel.values_in_keys, split_keys=kernel.split_keys,
                        backward=kernel.backward,
                    )
                ),
            )  # fmt: skip


__all__ = ["Work", "kernel_seconds", "pass_seconds", "price"]
