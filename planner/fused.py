"""Two ways to compute the same: both are planned, the faster plan is kept.

- Fused projections whole or apart.  Apart, q, k and v can each be cut by heads; whole, they are one
  matrix product instead of three.
- Attention over keys and values that are made from a latent: of all heads, or absorbed (see
  `ir.latent`).  Absorbed, the KV cache is a fraction; of all heads, scores cost less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir.graph import Graph
from ..ir.latent import absorbed, cached_numbers
from ..ir.unfuse import unfuse
from .build import all_params
from .errors import InfeasibleError, PlanError
from .plan import Baseline, Plan
from .report import format_seconds
from .roles import Pin, Pins
from .search import Clock, Job, make_plan


@dataclass(frozen=True, slots=True)
class Variant:
    """A graph of the model; `apart`: its fused projections are, `latent`: attention is absorbed."""

    graph: Graph
    apart: bool
    latent: bool

    @property
    def way(self) -> str:
        """What is said of it after each step of planning."""
        parts = ", fused projections in parts" if self.apart else ""
        return parts + (", attention over latents" if self.latent else "")


Tried = list[tuple[Variant, Plan | PlanError]]


def make_faster_plan(graph: Graph, job: Job) -> Plan:
    """As `make_plan`; the best of planning each of the graph's variants.

    Takes the time of two plans where projections are fused or attention is over latents, of four
    where both are.  Ordinary plans are the best of all, too.  Raises what `make_plan` raises where
    no variant gives a plan.
    """

    def made(variant: Variant) -> Plan:
        return make_plan(variant.graph, job.saying(variant.way))

    variants = _variants(graph, job.request.pins)
    return fastest(variants, made, lambda plan: plan.seconds, job.clock)


def fastest(
    variants: Sequence[Variant],
    make: Callable[[Variant], Plan],
    seconds: Callable[[Plan], float],
    clock: Clock,
) -> Plan:
    """The plan of fewest `seconds` among those of the variants, with notes on the others.

    Optimal only if all problems were solved to the end.  Raises the last error if all fail.
    """
    tried: Tried = []
    for variant in variants:
        try:
            tried.append((variant, make(variant)))
        except PlanError as error:
            tried.append((variant, error))
    found = [(variant, plan) for variant, plan in tried if isinstance(plan, Plan)]
    errors = [error for _, error in tried if isinstance(error, PlanError)]
    if not found:
        raise errors[-1]
    variant, best = min(found, key=lambda pair: float(f"{seconds(pair[1]):.9e}"))
    if len(tried) == 1:
        return best
    finished = all(isinstance(error, InfeasibleError) for error in errors)
    proven = finished and all(plan.search.status == "optimal" for _, plan in found)
    search = replace(
        best.search,
        status="optimal" if proven else "feasible",
        seconds=tuple(clock.seconds.items()),
    )
    notes = (*best.notes, *_fused_note(variant, tried, seconds))
    notes += tuple(_latent_note(variant, tried, seconds))
    baselines = _better([plan.baselines for _, plan in found])
    return replace(best, search=search, notes=notes, baselines=baselines)


def _variants(graph: Graph, pins: Sequence[str]) -> list[Variant]:
    """The graph's variants that differ; without those that the pins do not know."""
    found: list[Variant] = []
    for form in forms(graph):
        found.append(form)
        apart = unfuse(form.graph)
        if apart is not form.graph:
            found.append(replace(form, graph=apart, apart=True))
    if len(found) == 1:
        return found
    known: list[Variant] = []
    for variant in found:
        try:
            Pins([Pin.parse(text) for text in pins], variant.graph)
        except PlanError:  # where none knows them, planning says why
            continue
        known.append(variant)
    return known or found[-1:]


def forms(graph: Graph) -> list[Variant]:
    """The graph, and with attention over latents absorbed where it has such."""
    absorbed_graph = absorbed(graph)
    plain = Variant(graph, False, False)
    return [plain] if absorbed_graph is graph else [plain, Variant(absorbed_graph, False, True)]


def _fused_note(best: Variant, tried: Tried, seconds: Callable[[Plan], float]) -> Sequence[str]:
    """How much slower it is to compute projections the other way."""
    same = [(v, plan) for v, plan in tried if v.latent == best.latent]
    others = [plan for v, plan in same if v.apart != best.apart and isinstance(plan, Plan)]
    if not others:
        return ()
    fused = _fused_names(next(variant.graph for variant, _ in same if variant.apart))
    now, other = ("in parts", "whole") if best.apart else ("whole", "in parts")
    time = format_seconds(seconds(others[0]))
    return (f"Fused projections ({fused}) are computed {now}; {other}: {time}",)


def _latent_note(best: Variant, tried: Tried, seconds: Callable[[Plan], float]) -> Sequence[str]:
    """What the KV cache holds per token, and what the other form would take."""
    others = [(v, plan) for v, plan in tried if v.latent != best.latent]
    if not others:
        return ()
    ours, theirs = (cached_numbers(graph) for graph in (best.graph, others[0][0].graph))
    times = [seconds(plan) for _, plan in others if isinstance(plan, Plan)]
    fits = any(not isinstance(result, InfeasibleError) for _, result in others)
    time = format_seconds(min(times)) if times else "no plan found" if fits else "does not fit"
    now, other = ("latents", "keys and values of all heads")[:: 1 if best.latent else -1]
    return (
        f"Attention reads {now}: the KV cache holds {ours:,} values per token and layer; with"
        f" {other} {theirs:,}: {time}",
    )


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


__all__ = ["Variant", "fastest", "forms", "make_faster_plan"]
