"""What the seconds of a step are spent on: compute by kind of op, and communication.

The one place that says what counts as what.  Collectives that an op runs itself (experts'
exchanges, the hops of a ring that compute does not hide, the sums of a loss over a sharded
vocabulary) are communication, as conversions are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.graph import Graph
from ...ir.ops.operator import Operator
from ...ir.ops.registry import OPS, operator_of
from ..strategies.build import Decisions
from ..strategies.pricing import Work
from ..strategies.regions import scopes


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one step in ops: computing, by kind of op, and moving, by the mesh axes."""

    computing: dict[str, float]
    moving: dict[tuple[int, ...], float]

    def rows(
        self, seconds: float, optimizer_s: float, casts_s: float
    ) -> tuple[tuple[str, float], ...]:
        """(what, seconds) of a step of `seconds`: what neither ops nor casts nor the optimizer take
        is communication."""
        moving = seconds - optimizer_s - casts_s - sum(self.computing.values())
        rows = (
            *self.computing.items(),
            ("casts", casts_s),
            ("communication", moving),
            ("optimizer", optimizer_s),
        )
        return tuple((what, s) for what, s in rows if s > 0)


def spent_in_ops(
    graph: Graph, work: Mapping[str, Work], decisions: Decisions, *, times: int = 1
) -> Spent:
    """What the ops of `graph` take, given the `work` of one run of each node (by its name).

    Nodes of layers that are recomputed run forward twice.  `times`: micro-batches of a step.
    """
    kinds = dict.fromkeys(operator.spent_on for operator in OPS.values())
    kinds.pop(Operator.spent_on)  # last
    computing = dict.fromkeys((*kinds, Operator.spent_on), 0.0)
    moving: dict[tuple[int, ...], float] = {}
    for scope in scopes(graph):
        again = decisions.again(scope)
        for node in scope.nodes:
            one, more = work[node.name], again[node.name]
            runs = times * scope.weight
            whole = runs * (one.seconds + one.again_s(more))
            waits = runs * (one.moving_s + one.again_moving_s(more))
            computing[operator_of(node).spent_on] += whole - waits
            if one.axes:
                moving[one.axes] = moving.get(one.axes, 0.0) + waits
    return Spent(computing, moving)


__all__ = ["Spent", "spent_in_ops"]
