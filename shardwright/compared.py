"""Several layouts of one model beside the plan that is best: a table, and the plans in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .api import Plan, planned
from .asked import Asked, Progress, silent
from .capturing import Captures
from .facts.units import format_bytes, format_seconds
from .planner.errors import InfeasibleError, LayoutError, PlanError
from .planner.report.report import table
from .planner.strategies.layout import Layout


@dataclass(frozen=True)
class Compared:
    """One row: a layout ("": the best plan of all), and its plan, or why there is none."""

    layout: str
    plan: Plan | None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Row 0 is the best plan of all, the others are in the order that they were asked for in."""

    rows: tuple[Compared, ...]

    def __str__(self) -> str:
        head = ("", "layout", "plan", "mesh", "time", "memory per GPU", "layers")
        cells = [(str(number), *_cells(row)) for number, row in enumerate(self.rows)]
        whys = [f"{number}: {row.why}" for number, row in enumerate(self.rows) if row.why]
        return "\n".join([table([head, *cells]), *whys])

    def plan(self, number: int) -> Plan:
        """The plan of a row.  Raises PlanError where there is none."""
        if not 0 <= number < len(self.rows):
            raise PlanError(f"--write {number}: there are rows 0 to {len(self.rows) - 1}")
        row = self.rows[number]
        if row.plan is None:
            raise PlanError(f"--write {number}: {row.why}")
        return row.plan


def compare_file(
    target: str,
    layouts: Sequence[str],
    *,
    batch: int | None,
    seq: int,
    options: Mapping[str, Any],
    progress: Progress = silent,
) -> Comparison:
    """`plan_file` for each of several layouts, and without any; the model is captured once.

    `options` are the further ones of `plan_file`.  Raises PlanError for what cannot be asked for.
    """
    gpus = options["gpus"] or Layout.parse(layouts[0]).ranks
    given: dict[str, Any] = {**options, "gpus": gpus, "progress": progress}
    requests = [
        Asked(**_with_schedule(given, layout), layout=layout) for layout in (None, *layouts)
    ]
    jobs = [asked.job(target, batch or gpus, seq) for asked in requests]
    captures = Captures.of_target(jobs[0], options["outputs"], kept=requests[0].cache)
    jobs = [captures.in_own_formats(job) for job in jobs]
    rows: list[Compared] = []
    for layout, job in zip(("", *layouts), jobs, strict=True):
        try:
            rows.append(Compared(layout, planned(captures.graphs(job), job)))
        except (LayoutError, InfeasibleError) as error:
            rows.append(Compared(layout, None, str(error)))
    return Comparison(tuple(rows))


def _with_schedule(options: Mapping[str, Any], layout: str | None) -> dict[str, Any]:
    """The options, without a schedule for what is no pipeline."""
    piped = layout is not None and Layout.parse(layout).pipeline > 1
    return {**options, "schedule": options.get("schedule") if piped else None}


def _cells(row: Compared) -> tuple[str, ...]:
    """Layout, its name, mesh, time, memory and what is done with layers."""
    name = Layout.parse(row.layout).name if row.layout else "best of all"
    plan = row.plan
    if plan is None:
        return (row.layout, name, "", "none", "", "")
    last = plan.decode or plan
    seconds = plan.whole_s
    sizes = "x".join(str(size) for size in plan.mesh.sizes)
    plans = (plan,) if plan.pipeline is None else plan.pipeline.kinds
    again = next((each for each in plans if each.decisions.recompute), plans[0])
    longest = max((len(loop.order) for loop in again.graph.loops), default=0)
    layers = again.decisions.recomputed.words(longest) if plan.training else ""
    memory = format_bytes(last.memory.total)
    return (row.layout, name, sizes, format_seconds(seconds), memory, layers)


__all__ = ["Compared", "Comparison", "compare_file"]
