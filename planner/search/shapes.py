"""What a pipeline is before anything is planned, and which modules run."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.schedules import FORWARD, default_stages, refusal
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
        have several stages; in inference forwards alone."""
        if not find_phase(request.phase).backward:
            return Shape(layout.pipeline, 1, FORWARD, layout.mesh, f"--layout {layout.text}")
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
    per_rank = layout.per_rank if layout.per_rank > 1 else default_stages(name)
    ways = _ways(layout)
    fitting = [n for n in _dividing(batch, ways) if not refusal(name, layout.pipeline, per_rank, n)]
    fitting = [n for n in fitting if batch // n >= 2 * ways] or fitting
    wanted = [n for n in fitting if n >= 4 * layout.pipeline]
    return wanted[0] if wanted else max(fitting, default=1)


def default_in_flight(batch: int, layout: Layout) -> int:
    """As many micro-batches of sequences as keep all stages of inference busy, where they divide
    the batch and leave each rank two rows; else fewer."""
    ways = _ways(layout)
    fitting = [n for n in _dividing(batch, ways) if batch // n >= 2 * ways]
    return max(n for n in [1, *fitting] if n <= layout.pipeline)


def most_that_divide(batch: int, most: int) -> int:
    """The largest number of micro-batches, `most` at the most, into which a batch goes."""
    return max(n for n in range(1, most + 1) if batch % n == 0)


def _ways(layout: Layout) -> int:
    """Into how many parts data axes cut the rows."""
    axes = zip(layout.roles, layout.mesh.sizes, strict=True)
    return prod(n for role, n in axes if "ddp" in role or "fsdp" in role or "zero" in role)


def _dividing(batch: int, ways: int) -> list[int]:
    """Numbers of micro-batches whose rows such axes divide."""
    return [n for n in range(1, batch + 1) if batch % n == 0 and (batch // n) % ways == 0]


def check_phase(phase: str, layout: Layout) -> None:
    """Raises LayoutError for a pipeline that is not one of the phase."""
    if layout.per_rank > 1 and not find_phase(phase).backward:
        raise LayoutError(
            f"--layout {layout.text}: in phase {phase} each rank of a pipeline has one stage; leave"
            " out vpp"
        )


__all__ = [
    "Shape", "check_phase", "check_runnable", "default_in_flight", "default_micro_batches",
    "most_that_divide",
]  # fmt: skip
