"""Does anything fit?  Which is asked of many sizes, where plans are wanted of one alone."""

from __future__ import annotations

from ...facts.mesh import Mesh
from ...ir.graph import Graph
from .search import Job, fits_on
from .serving import serving_plan_on, serving_variants
from .variants import forms


def any_fits(graphs: tuple[Graph, ...], job: Job) -> bool:
    """Is there a plan without stages of a request's graphs (two where it serves) in the memory?

    Layers run again where that is possible, so that it takes least.  Raises PlanError where the
    graphs can't be planned together, or the time was too short to find out.
    """
    if len(graphs) == 1:
        return any(
            fits_on(form.graph, mesh, job) for form in forms(graphs[0]) for mesh in _meshes(job)
        )
    return any(
        serving_plan_on(prefill, decode, mesh, job) is not None
        for prefill, decode in serving_variants(*graphs)
        for mesh in _meshes(job)
    )


def _meshes(job: Job) -> list[Mesh]:
    """Those of most axes first: they leave most ways to cut."""
    return sorted(job.meshes, key=lambda mesh: -len(mesh.axes))


__all__ = ["any_fits"]
