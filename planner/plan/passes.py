"""Where the computing of a step goes: by layer and pass, and by kind of kernel.

What a run on one device can be held against: communication is in none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ...facts.work import Kernel, Product, Scores
from ...ir.graph import Node
from ...ir.ops.local import Local
from ...ir.ops.registry import local_of, operator_of
from ..strategies.fusing import streams
from ..strategies.network import Network
from ..strategies.pricing import Again, kernel_seconds
from ..strategies.regions import InLoop, Scope, scopes
from .plan import PlanData

Kind: TypeAlias = tuple[str, int]
OUTSIDE: Kind = ("", 0)


@dataclass(frozen=True, slots=True)
class Passes:
    """Seconds of computing in a step, forward and backward, by the path of a loop and the number of
    the kind of layer (`OUTSIDE`: of layers), and how much of all is products and attention;
    `casts_s` and `optimizer_s` are apart.
    """

    forward: dict[Kind, float]
    backward: dict[Kind, float]
    products_s: float
    attention_s: float
    casts_s: float
    optimizer_s: float

    @property
    def ops_s(self) -> float:
        """All operators."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def light_s(self) -> float:
        """What is neither product nor attention, casts among it."""
        return self.ops_s - self.products_s - self.attention_s + self.casts_s

    @property
    def seconds(self) -> float:
        """All computing."""
        return self.ops_s + self.casts_s + self.optimizer_s


def passes_of(plan: PlanData, network: Network) -> Passes:
    """The computing of one step, or run, of a plan without stages, on the machine of `network`."""
    forward, backward = {OUTSIDE: 0.0}, {OUTSIDE: 0.0}
    products = attention = 0.0
    for scope, node, runs, again in _runs(plan):
        at = (scope.place.path, scope.place.kind) if isinstance(scope.place, InLoop) else OUTSIDE
        work, local = plan.work[node.name], _local(plan, node)
        ahead = work.forward_s - work.forward_moving_s
        behind = work.backward_s - work.backward_moving_s
        forward[at] = forward.get(at, 0.0) + runs * ahead
        behind += work.again_s(again) - work.again_moving_s(again)
        backward[at] = backward.get(at, 0.0) + runs * behind
        if streams(node):
            continue
        operator = operator_of(node)
        kernels, spared = operator.work(local), operator.spares(local)[0]
        all_runs = 1 + again.full + again.part
        for steps, times in (
            (kernels.forward, all_runs), (kernels.backward, 1.0), ((spared,), -again.part),
        ):  # fmt: skip
            for kernel in (kernel for step in steps for kernel in step):
                seconds = runs * times * kernel_seconds(kernel, network)
                products += seconds * _is(kernel, Product)
                attention += seconds * _is(kernel, Scores)
    return Passes(forward, backward, products, attention, plan.casts_s, plan.optimizer_s)


def experts_load(plan: PlanData) -> float:
    """The load that is planned of the busiest rank's experts over the mean, where tokens go to
    them."""
    loads = [operator_of(node).load(_local(plan, node)) for node in plan.graph.nodes]
    return max(loads, default=1.0)


def _runs(plan: PlanData) -> Iterator[tuple[Scope, Node, int, Again]]:
    """(scope, node, how often it runs in a step, how often backward runs its forward again)."""
    times = plan.request.micro_batches
    for scope in scopes(plan.graph):
        again = plan.decisions.again(scope)
        yield from ((scope, n, times * scope.weight, again[n.name]) for n in scope.nodes)


def _local(plan: PlanData, node: Node) -> Local:
    decisions = plan.decisions
    return local_of(
        node, decisions.choices[node.name], plan.mesh.sizes, training=plan.training,
        order=decisions.order, imbalance=plan.request.expert_imbalance,
    )  # fmt: skip


def _is(kernel: Kernel, kind: type[Product] | type[Scores]) -> bool:
    return isinstance(kernel, kind)


__all__ = ["OUTSIDE", "Kind", "Passes", "experts_load", "passes_of"]
