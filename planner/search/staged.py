"""The fastest plan of all, with stages or without."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf

from ...facts.units import format_seconds
from ..errors import InfeasibleError, PlanError
from ..plan.plan import Baseline, PlanData
from ..strategies.layout import Layout
from .pipeline import make_pipeline_plan
from .pipelines import GraphOf, Pipelines, no_stages, search_pipelines
from .search import Clock, Job

_RANKS, _PER_RANK = (2, 4, 8, 16), (1, 4)  # of ordinary pipelines


def may_have_stages(job: Job) -> bool:
    """Are pipelines among the plans of a request?  One that fixes the mesh, or wants outputs of
    every rank, has none."""
    request = job.request
    free = job.layout is None and job.mesh is None and not request.pins
    return free and request.gpus > 1 and request.output_layout == "sharded"


def with_stages(
    graph_of: GraphOf, job: Job, without: PlanData | InfeasibleError, *, several: bool
) -> PlanData:
    """The fastest plan, given that `without` stages, or why there is none.

    `several`: the number of micro-batches may be chosen.  Raises InfeasibleError where nothing
    fits, PlanError where a schedule was asked for and there is no pipeline by it.
    """
    plan = None if isinstance(without, InfeasibleError) else without
    asked = job.request.schedule
    ceiling = plan.seconds if plan is not None and not asked else inf
    none = no_stages(graph_of(job.request.micro_batches))
    ordinary = None if none else _ordinary(graph_of, job, plan)
    if ordinary is not None:
        ceiling = min(ceiling, ordinary.seconds)
    found = search_pipelines(graph_of, job, ceiling, several=several)
    best = ordinary if found.best is None else found.best[0]
    if ordinary is not None and best is not None and ordinary.seconds < best.seconds:
        best = ordinary
    rows = () if ordinary is None else (_row(ordinary),)
    if best is not None and (plan is None or asked or best.seconds < plan.seconds):
        return _with_notes(best, plan, rows, found, job)
    if asked:
        raise PlanError(f"--schedule {asked}: {found.why or found.told}")
    if isinstance(without, InfeasibleError):
        raise without
    return _joined(without, rows, (*without.notes, found.told), job)


def _with_notes(
    best: PlanData,
    plan: PlanData | None,
    rows: tuple[Baseline, ...],
    found: Pipelines,
    job: Job,
) -> PlanData:
    """The plan of a pipeline, which stands beside the best `plan` without stages."""
    alone = "does not fit"
    if plan is not None:
        alone = f"takes {format_seconds(plan.seconds)} on mesh {plan.mesh}"
    bound = found.least  # of what was asked for: by a schedule it is a pipeline
    if plan is not None and not job.request.schedule:
        bound = min(bound, plan.seconds * (1 - plan.search.gap))
    search = replace(best.search, gap=max(0.0, 1 - bound / best.seconds), status="feasible")
    request = replace(best.request, schedule=job.request.schedule, layout="")
    every = (*(plan.baselines if plan is not None else ()), *rows)
    notes = (*best.notes, f"Without stages the fastest plan {alone}", found.told)
    return _joined(replace(best, request=request, search=search), every, notes, job, own=True)


def _joined(
    plan: PlanData,
    rows: tuple[Baseline, ...],
    notes: tuple[str, ...],
    job: Job,
    *,
    own: bool = False,
) -> PlanData:
    """A plan with further rows of ordinary plans (`own`: with no others), and all notes."""
    seconds = tuple(job.clock.seconds.items())
    baselines = rows if own else (*plan.baselines, *rows)
    return replace(
        plan, baselines=baselines, notes=notes, search=replace(plan.search, seconds=seconds)
    )


def _ordinary(graph_of: GraphOf, job: Job, plan: PlanData | None) -> PlanData | None:
    """The fastest ordinary pipeline: tensor parallelism inside of nodes, stages and data
    parallelism with ZeRO-1 across; where there are several nodes, or nothing else fits."""
    node = job.cluster.gpus_per_node
    if not job.baselines or (job.request.gpus <= node and plan is not None):
        return None
    with job.clock.step("baselines"):
        tried = [_planned(graph_of, job, *ways) for ways in product(_RANKS, _PER_RANK)]
    return min((p for p in tried if p is not None), key=lambda p: p.seconds, default=None)


def _planned(graph_of: GraphOf, job: Job, ranks: int, per_rank: int) -> PlanData | None:
    """That of so many ranks, with one sequence of a micro-batch for each of data parallelism; None
    where there is no such plan."""
    if job.request.gpus % ranks:
        return None
    inner = job.request.gpus // ranks
    node = min(job.cluster.gpus_per_node, inner)
    tensor = next(n for n in range(node, 0, -1) if inner % n == 0)
    data = inner // tensor
    many = job.request.batch // data
    if many < ranks or job.request.batch % data:
        return None
    words = [f"pp={ranks}", f"vpp={per_rank}" * (per_rank > 1), f"zero1={data}" * (data > 1)]
    layout = Layout.parse(",".join(filter(None, [*words, f"tp={tensor},sp"])))
    request = replace(job.request, layout=layout.text, micro_batches=many)
    own = replace(
        job, request=request, layout=layout, mesh=layout.mesh, limit=layout.limit,
        clock=Clock(), progress=lambda _: None, builders=job.builders.for_others(),
    )  # fmt: skip
    try:
        return make_pipeline_plan(graph_of(many), own)
    except PlanError:  # sizes that do not divide, another schedule, or too little memory
        return None


def _row(plan: PlanData) -> Baseline:
    """An ordinary pipeline as a row of the table."""
    assert plan.pipeline is not None
    name = Layout.parse(plan.request.layout).name
    recompute = any(kind.decisions.recompute for kind in plan.pipeline.kinds)
    mesh = "x".join(map(str, plan.mesh.sizes))
    return Baseline(name, mesh, plan.seconds, plan.memory.total, (), recompute)


__all__ = ["may_have_stages", "with_stages"]
