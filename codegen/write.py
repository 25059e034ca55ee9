"""A plan to the text of its generated module, and to the command that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..facts.mesh import Mesh
from ..facts.phases import find_phase
from ..planner.plan.plan import PlanData
from ..planner.plan.program import Program
from .header import docstring, legend
from .module import Legend, no_legend, write_source


def module_source(plan: PlanData) -> str:
    """The generated module of `plan`: one file for all ranks, the same bytes every time."""
    programs = [each.program for each in plan.phases]
    return programs_source(
        plan,
        programs,
        plan.mesh,
        summary=docstring(plan),
        optimizer=plan.request.optimizer,
        legend=partial(legend, plan),
    )


def programs_source(
    plan: PlanData,
    programs: Sequence[Program],
    mesh: Mesh,
    *,
    summary: str,
    optimizer: str,
    legend: Legend = no_legend,
) -> str:
    """The module of `programs`, one for each of the plan's phases, which may have other sizes."""
    return write_source(
        programs[0],
        mesh,
        summary=summary,
        phase=find_phase(plan.request.phase).programs[0],
        optimizer=optimizer,
        decode=None if plan.decode is None else programs[1],
        recached={recache.node: recache.path for recache in plan.recached},
        legend=legend,
    )
