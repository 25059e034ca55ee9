"""Parameters that several stages of a pipeline have, tied embeddings: their gradients are added up
once a step, between the ranks of these stages at one place of their meshes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...facts.schedules import PipelineSchedule
from ...ir.ops.local import local_bytes
from .plan import PlanData, PlannedStage


@dataclass(frozen=True, slots=True)
class Tied:
    """A parameter, the numbers of the stages and of the pipeline's ranks that have it, and bytes of
    the gradient that each of these ranks has of it."""

    name: str
    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    gradient_bytes: float

    @property
    def received_bytes(self) -> float:
        """What the all-reduce brings to each of them."""
        return 2 * (len(self.ranks) - 1) / len(self.ranks) * self.gradient_bytes


def tied_parameters(
    table: PipelineSchedule, stages: Sequence[PlannedStage], plans: Sequence[PlanData]
) -> list[Tied]:
    """Those of stages whose kinds have these plans; what one rank alone has goes nowhere."""
    having: dict[str, list[int]] = {}
    sizes: dict[str, float] = {}
    for number, stage in enumerate(stages):
        plan = plans[stage.kind]
        for param in plan.graph.params:
            if plan.training and param.kind == "parameter" and param.value.differentiable:
                spec = plan.decisions.specs[param.value.name]
                used = local_bytes(param.value, spec, plan.mesh.sizes)
                sizes[param.name] = used / param.value.type.dtype.itemsize * param.dtype.itemsize
                having.setdefault(param.name, []).append(number)
    found: list[Tied] = []
    for name, numbers in having.items():
        ranks = tuple(sorted({table.rank_of[number] for number in numbers}))
        if len(ranks) > 1:
            found.append(Tied(name, tuple(numbers), ranks, sizes[name]))
    return found


__all__ = ["Tied", "tied_parameters"]
