"""What a plan does with each heavy operator, as data: the rows of the report's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...facts.spec import format_spec
from ...ir.ops.labels import label_dims
from ...ir.ops.registry import operator_of
from ..plan.plan import PlanData
from ..plan.program import Compute, LoopCall, Program
from ..plan.words import choices_text
from ..strategies.regions import Region, Strategy
from .report import op_name


@dataclass(frozen=True, slots=True)
class PlannedOp:
    """An operator of a plan that is decided by itself.

    `name` is that of the layer it is in, or its own; `within` the list of layers that it is in
    (`model.layers`), "" outside of any; `count` how many layers run it.  `strategy` says what is
    cut over each axis, `result` the spec of its result.  `compute_s` and `moving_s` are seconds of
    one run on one rank, forward and backward, the latter of collectives inside of it.
    """

    name: str
    within: str
    count: int
    strategy: str
    result: str
    compute_s: float
    moving_s: float


def planned_ops(plan: PlanData) -> tuple[PlannedOp, ...]:
    """Every heavy operator, in the order in which a rank runs them; those of a layer once."""
    labels = label_dims(plan.graph)
    found: list[PlannedOp] = []
    for item, within, count in _computed(plan.program):
        if not operator_of(item.node).heavy:
            continue
        work = plan.work[item.node.name]
        strategy = choices_text(item.node, item.choices, plan.mesh, labels)
        result = format_spec(item.outputs[0].spec)
        compute_s = work.seconds - work.moving_s
        name = op_name(plan, item.node)
        found.append(PlannedOp(name, within, count, strategy, result, compute_s, work.moving_s))
    return tuple(found)


def ways_of(plan: PlanData, region: Region) -> Callable[[Strategy], str]:
    """What a way to run a region cuts over each axis, in words: that of its heavy operator."""
    labels = label_dims(plan.graph)
    head = next((i for i, node in enumerate(region.nodes) if operator_of(node).heavy), 0)

    def words(way: Strategy) -> str:
        return choices_text(region.nodes[head], way.choices[head], plan.mesh, labels)

    return words


def _computed(program: Program) -> Iterator[tuple[Compute, str, int]]:
    """(what is computed, the list of layers around it, how many of them run it)."""
    for item in program.statements:
        if isinstance(item, Compute):
            yield item, "", 1
        elif isinstance(item, LoopCall):
            for kind, body in enumerate(item.bodies):
                for inner in body.statements:
                    if isinstance(inner, Compute):
                        yield inner, item.loop.path, item.loop.order.count(kind)


__all__ = ["PlannedOp", "planned_ops", "ways_of"]
