"""A plan to the text of its generated module, and to the command that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..facts.mesh import Mesh
from ..facts.phases import find_phase
from ..facts.spec import Spec
from ..planner.plan.plan import Pipeline, PlanData
from ..planner.plan.program import Program
from .header import docstring, legend, pipeline_docstring, schedule_picture
from .module import Legend, no_legend, write_source
from .pipeline import Row, write_pipeline


def module_source(plan: PlanData) -> str:
    """The generated module of `plan`: one file for all ranks, the same bytes every time."""
    if plan.pipeline is not None:
        return _pipeline_source(plan, plan.pipeline)
    programs = [each.program for each in plan.phases]
    return programs_source(
        plan,
        programs,
        plan.mesh,
        summary=docstring(plan),
        optimizer=plan.request.optimizer,
        legend=partial(legend, plan),
    )


def _pipeline_source(plan: PlanData, pipeline: Pipeline) -> str:
    """The module of a pipeline."""
    rows: list[Row] = []
    for stage in pipeline.stages:
        graph = pipeline.kinds[stage.kind].graph
        values = {each.name: each.value for each in graph.inputs}
        constant = tuple(name for name in stage.taken if not values[name].differentiable)
        rows.append(Row(stage.kind, stage.first, stage.taken, stage.given, constant))
    then = None if plan.decode is None else plan.decode.pipeline
    widest = max(pipeline.kinds, key=lambda kind: kind.mesh.ranks)
    return write_pipeline(
        [kind.program for kind in pipeline.kinds],
        rows,
        widest.mesh,
        ranks=pipeline.ranks,
        schedule=pipeline.schedule,
        micro_batches=plan.request.micro_batches,
        summary=pipeline_docstring(plan, pipeline),
        optimizer=plan.request.optimizer,
        picture=schedule_picture(pipeline, plan.request.micro_batches),
        legend=partial(legend, widest),
        phase=find_phase(plan.request.phase).programs[0],
        decodes=[] if then is None else [kind.program for kind in then.kinds],
        recached=[_recached(kind) for kind in pipeline.kinds],
    )


def _recached(plan: PlanData) -> dict[str, tuple[Spec, ...]]:
    """By attention the ways of caches to the layout for decoding."""
    return {recache.node: recache.path for recache in plan.recached}


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
        recached=_recached(plan),
        legend=legend,
    )
