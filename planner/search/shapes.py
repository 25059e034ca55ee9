"""What a pipeline is before anything is planned, and which modules run."""

from __future__ import annotations

from dataclasses import dataclass

from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.schedules import default_stages, refusal
from ..errors import LayoutError, PlanError
from ..plan.plan import Request
from ..strategies.layout import Layout

_RUNNABLE = ("gpipe", "1f1b", "interleaved")  # schedules that modules run


@dataclass(frozen=True, slots=True)
class Shape:
    """What a pipeline is before anything is planned: its ranks, the stages of each, the schedule,
    and the mesh of a stage; `text` is what errors call it."""

    ranks: int
    per_rank: int
    schedule: str
    mesh: Mesh
    text: str

    @staticmethod
    def of(request: Request, layout: Layout) -> Shape:
        """That of a layout, by the schedule that was asked for, else 1F1B, interleaved where ranks
        have several stages."""
        name = request.schedule or ("interleaved" if layout.per_rank > 1 else "1f1b")
        per_rank = layout.per_rank if layout.per_rank > 1 else default_stages(name)
        return Shape(layout.pipeline, per_rank, name, layout.mesh, f"--layout {layout.text}")

    @property
    def gpus(self) -> int:
        """All of its ranks."""
        return self.ranks * self.mesh.ranks

    @property
    def stages(self) -> int:
        """Stages of all ranks together."""
        return self.ranks * self.per_rank


def check_runnable(name: str) -> None:
    """Raises PlanError for a schedule that modules do not run."""
    if name not in _RUNNABLE:
        raise PlanError(
            f"--schedule {name} has backward passes in two parts, which modules do not run yet;"
            f" take {', '.join(_RUNNABLE)}"
        )


def default_micro_batches(batch: int, layout: Layout, name: str) -> int:
    """As many micro-batches as make a small bubble, four times the ranks of the pipeline, where
    they divide the batch and leave each rank two rows; else as many as there can be."""
    ways = 1
    for role, size in zip(layout.roles, layout.mesh.sizes, strict=True):
        ways *= size if "ddp" in role or "fsdp" in role or "zero" in role else 1
    per_rank = layout.per_rank if layout.per_rank > 1 else default_stages(name)
    fitting = [
        n
        for n in range(1, batch + 1)
        if batch % n == 0
        and (batch // n) % ways == 0
        and not refusal(name, layout.pipeline, per_rank, n)
    ]
    fitting = [n for n in fitting if batch // n >= 2 * ways] or fitting
    wanted = [n for n in fitting if n >= 4 * layout.pipeline]
    return wanted[0] if wanted else max(fitting, default=1)


def refuse_phase(phase: str, layout: Layout) -> None:
    """Raises LayoutError for a pipeline outside of training."""
    if layout.pipeline > 1 and not find_phase(phase).backward:
        raise LayoutError(
            f"--layout {layout.text}: pipelines are planned for training, not for phase {phase}"
        )


__all__ = ["Shape", "check_runnable", "default_micro_batches", "refuse_phase"]
