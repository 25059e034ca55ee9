"""A plan to the text of its generated module, and to the command that runs it."""

from __future__ import annotations

from collections.abc import Sequence

from ..facts.mesh import Mesh
from ..facts.units import format_bytes, format_seconds
from ..planner.plan.plan import PlanData
from ..planner.plan.program import Program
from .module import write_source


def module_source(plan: PlanData) -> str:
    """The generated module of `plan`: one file for all ranks, the same bytes every time."""
    programs = [each.program for each in plan.phases]
    return programs_source(
        plan, programs, plan.mesh, summary=_summary(plan), optimizer=plan.request.optimizer
    )


def programs_source(
    plan: PlanData, programs: Sequence[Program], mesh: Mesh, *, summary: str, optimizer: str
) -> str:
    """The module of `programs`, one for each of the plan's phases, which may have other sizes."""
    return write_source(
        programs[0],
        mesh,
        summary=summary,
        phase=plan.request.phase if plan.decode is None else "prefill",
        optimizer=optimizer,
        decode=None if plan.decode is None else programs[1],
        recached={recache.node: recache.path for recache in plan.recached},
    )


def _summary(plan: PlanData) -> str:
    request = plan.request
    unit = "training step" if plan.training else request.phase
    if plan.decode is not None:
        unit = f"prefill, {format_seconds(plan.decode.seconds)} per output token"
    made = request.target or "a model given to shardwright.plan"
    batch = f"batch {request.batch} x {request.seq} tokens, {request.dtype}"
    conversion = sum(recache.seconds for recache in plan.recached)
    return "\n".join(
        [
            f"{plan.graph.name} over {request.gpus} x {request.cluster}: {plan.mesh}.",
            "",
            f"Made from {made}, {batch}.",
            f"Predicted: {format_seconds(plan.seconds)} per {unit}, "
            f"{format_bytes(plan.memory.total)} per GPU.",
            *(
                [f"KV caches are converted between the two in {format_seconds(conversion)}."]
                if plan.recached
                else []
            ),
            "",
            "Run a demonstration step:",
            f"    torchrun --nproc-per-node {request.gpus} sharded_model.py",
            "",
            "Comments show each result's shape, with the mesh axes that cut a dim (`4096/tp`) and",
            "those whose ranks hold summands (`+ tp`), and the line it comes from.",
        ]
    )
