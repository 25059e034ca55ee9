"""Fused projections whole or apart: both are planned, the faster plan is kept.

Apart, q, k and v can each be cut by heads; whole, they are one matrix product instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..costmodel.cluster import Cluster
from ..ir.graph import Graph
from ..ir.mesh import Mesh
from ..ir.unfuse import unfuse
from .build import all_params
from .errors import InfeasibleError, PlanError
from .plan import Baseline, Plan, Request
from .report import format_seconds
from .roles import Pin, Pins
from .search import Clock, Progress, make_plan


def make_faster_plan(
    graph: Graph,
    cluster: Cluster,
    request: Request,
    *,
    mesh: Mesh | None,
    pins: Sequence[str],
    solver: str,
    time_limit_s: float,
    clock: Clock,
    progress: Progress,
) -> Plan:
    """As `make_plan`; where projections are fused, the better of planning them whole and apart.

    Takes the time of two plans then.  Ordinary plans are the better of both, too.  Raises what
    `make_plan` raises where neither way gives a plan.
    """

    variants = _variants(graph, pins)
    found: list[Plan] = []
    errors: list[PlanError] = []
    for variant in variants:
        way = "" if variant is graph else ", fused projections in parts"
        try:
            found.append(
                make_plan(
                    variant,
                    cluster,
                    request,
                    mesh=mesh,
                    pins=pins,
                    solver=solver,
                    time_limit_s=time_limit_s,
                    clock=clock,
                    progress=_saying(progress, way),
                )
            )
        except PlanError as error:
            errors.append(error)
    if not found:
        raise errors[-1]
    if len(variants) == 1:
        return found[0]
    finished = all(isinstance(error, InfeasibleError) for error in errors)
    return _summed_up(found, _fused_names(variants[-1]), clock, finished)


def _variants(graph: Graph, pins: Sequence[str]) -> list[Graph]:
    """The graph whole and in parts, where they differ; without one that the pins do not know."""
    apart = unfuse(graph)
    if apart is graph:
        return [graph]
    known: list[Graph] = []
    for variant in (graph, apart):
        try:
            Pins([Pin.parse(text) for text in pins], variant)
        except PlanError:  # where neither knows them, planning says why
            continue
        known.append(variant)
    return known or [apart]


def _saying(progress: Progress, way: str) -> Progress:
    """`progress`, with `way` after each step."""

    def report(step: str) -> None:
        progress(step + way)

    return report


def _summed_up(found: Sequence[Plan], fused: str, clock: Clock, finished: bool) -> Plan:
    """The best plan, with what was found of both; optimal only if both problems were `finished`."""
    best = min(found, key=lambda plan: float(f"{plan.seconds:.9e}"))
    proven = finished and all(plan.search.status == "optimal" for plan in found)
    notes = best.notes
    for other in found:
        if other is not best:
            ways = ("whole", "in parts") if best is found[0] else ("in parts", "whole")
            seconds = format_seconds(other.seconds)
            notes += (f"Fused projections ({fused}) are computed {ways[0]}; {ways[1]}: {seconds}",)
    search = replace(
        best.search,
        status="optimal" if proven else "feasible",
        seconds=tuple(clock.seconds.items()),
    )
    baselines = _better([plan.baselines for plan in found])
    return replace(best, search=search, notes=notes, baselines=baselines)


def _fused_names(apart: Graph) -> str:
    """Names of the tensors that are in parts, each once, layers as `*`."""
    whole = {
        ref.name.removesuffix(ref.param.name) + ref.param.part.name: None
        for ref in all_params(apart)
        if ref.param.part is not None and not ref.param.part.name.endswith("bias")
    }
    return ", ".join(whole)


def _better(rows: Sequence[Sequence[Baseline]]) -> tuple[Baseline, ...]:
    """Of each ordinary plan the faster one; of those that do not fit the smaller one."""
    kept: dict[tuple[str, str], Baseline] = {}
    for row in (row for each in rows for row in each):
        other = kept.setdefault((row.name, row.mesh), row)
        if _rank(row) < _rank(other):
            kept[row.name, row.mesh] = row
    return tuple(sorted(kept.values(), key=lambda row: row.mesh.count("x")))


def _rank(row: Baseline) -> tuple[bool, float, float]:
    return (row.seconds is None, row.seconds or 0.0, row.peak_bytes)


__all__ = ["make_faster_plan"]
