"""A plan with other numbers of sequences: its decisions, and graphs in which these follow."""

from __future__ import annotations

from dataclasses import replace

from ...ir.reference.resizing import with_batch
from ..errors import PlanError
from ..plan.plan import PlanData


def with_sequences(plan: PlanData, batch: int) -> PlanData:
    """The plan for so many sequences a step, whose seconds and bytes are as they were: in as many
    micro-batches, which are larger or smaller, where there are no stages, else in as many more.

    Raises PlanError where that takes a capture.
    """
    request = plan.request
    if batch == request.batch:
        return plan
    if plan.pipeline is not None:
        return in_micro_batches(plan, batch)
    graph = with_batch(plan.graph, batch // request.micro_batches)
    if batch % request.micro_batches or plan.decode is not None or graph is None:
        why = "KV caches are planned for their number of sequences"
        if batch % request.micro_batches:
            why = f"they make no {request.micro_batches} equal micro-batches"
        elif plan.decode is None and request.phase == "train":
            why = "what the model does may depend on their number"
        raise PlanError(
            f"{batch} sequences instead of {request.batch}: {why}; plan MODEL --batch {batch}"
        )
    return replace(plan, request=replace(request, batch=batch), graph=graph)


def in_micro_batches(plan: PlanData, batch: int) -> PlanData:
    """The plan for so many sequences in more or fewer micro-batches, each of as many as now.

    Raises PlanError where these make no whole number of them, or no schedule.
    """
    request, pipeline = plan.request, plan.pipeline
    many, left = divmod(batch, request.batch // request.micro_batches)
    if left or not many:
        each = request.batch // request.micro_batches
        raise PlanError(
            f"{batch} sequences instead of {request.batch}: micro-batches have {each}, of which "
            f"they make no whole number; plan MODEL --batch {batch}"
        )
    asked = replace(request, batch=batch, micro_batches=many)
    if pipeline is None:
        return replace(plan, request=asked)
    try:
        pipeline.table(many)
    except ValueError as error:
        raise PlanError(f"{batch} sequences, {many} micro-batches: {error}") from error
    kinds = tuple(
        replace(kind, request=replace(kind.request, batch=batch, micro_batches=many))
        for kind in pipeline.kinds
    )
    return replace(plan, request=asked, pipeline=replace(pipeline, kinds=kinds))


__all__ = ["in_micro_batches", "with_sequences"]
