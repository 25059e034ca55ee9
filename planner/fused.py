"""Several ways to compute the same: all are planned, the fastest plan is kept.

- Fused projections whole or apart.  Apart, q, k and v can each be cut by heads; whole, they are one
  matrix product instead of three.
- Attention over keys and values that are made from a latent: of all heads, absorbed, or expanded
  (see `ir.latent`).  With the last two the KV cache is a fraction.  Absorbed, scores cost more;
  expanded, keys and values are made again in every step, which pays for many new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..ir.graph import Graph
from ..ir.latent import absorbed, cached_numbers, expanded
from ..ir.unfuse import unfuse
from .build import all_params
from .errors import InfeasibleError, PlanError
from .plan import Baseline, Plan
from .report import format_seconds
from .roles import Pin, Pins
from .search import Clock, Job, make_plan

Form: TypeAlias = Literal["plain", "absorbed", "expanded"]
_READ: dict[Form, str] = {
    "plain": "keys and values of all heads",
    "absorbed": "latents",
    "expanded": "keys and values made from latents",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A graph of the model; `apart`: its fused projections are, `form`: that of its attention.

    `decode` is the graph of single tokens that is planned with it, if one is.
    """

    graph: Graph
    apart: bool = False
    form: Form = "plain"
    decode: Graph | None = None

    @property
    def way(self) -> str:
        """What is said of it after each step of planning."""
        parts = ", fused projections in parts" if self.apart else ""
        return parts + ("" if self.form == "plain" else f", attention over {_READ[self.form]}")

    @property
    def reads(self) -> str:
        """What attention reads, in both phases where they differ."""
        both = self.form == "expanded" and self.decode is not None
        return _READ[self.form] + (", and latents in decode" if both else "")


Tried = list[tuple[Variant, Plan | PlanError]]


def make_faster_plan(graph: Graph, job: Job) -> Plan:
    """As `make_plan`; the best of planning each of the graph's variants.

    Takes the time of two plans where projections are fused, of three where attention is over
    latents (two for one new token), of their product where both are.  Ordinary plans are the best
    of all, too.  Raises what `make_plan` raises where no variant gives a plan.
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
    """The graph, and where it has attention over latents the other forms of that.

    One new token has no expanded form: it would make the keys of all cached tokens for itself.
    """
    found, absorbed_graph = [Variant(graph)], absorbed(graph)
    if absorbed_graph is not graph:
        found.append(Variant(absorbed_graph, form="absorbed"))
        if _new_tokens(graph) > 1:
            found.append(Variant(expanded(graph), form="expanded"))
    return found


def _new_tokens(graph: Graph) -> int:
    """New tokens of each sequence, in a graph with attention over a cache."""
    return max(
        node.operands[0].type.shape[2]
        for node in graph.nodes
        if node.op == "shardwright.cached_attention"
    )


def _fused_note(best: Variant, tried: Tried, seconds: Callable[[Plan], float]) -> Sequence[str]:
    """How much slower it is to compute projections the other way."""
    same = [(v, plan) for v, plan in tried if v.form == best.form]
    others = [plan for v, plan in same if v.apart != best.apart and isinstance(plan, Plan)]
    if not others:
        return ()
    fused = _fused_names(next(variant.graph for variant, _ in same if variant.apart))
    now, other = ("in parts", "whole") if best.apart else ("whole", "in parts")
    time = format_seconds(seconds(others[0]))
    return (f"Fused projections ({fused}) are computed {now}; {other}: {time}",)


def _latent_note(best: Variant, tried: Tried, seconds: Callable[[Plan], float]) -> Sequence[str]:
    """What the KV cache holds per token, and what the other forms would take."""
    others = dict.fromkeys(v.form for v, _ in reversed(tried) if v.form != best.form)
    if not others:
        return ()
    text = f"Attention reads {best.reads}: the KV cache holds {cached_numbers(best.graph):,} values"
    text += " per token and layer"
    for form in others:
        same = [(v, plan) for v, plan in tried if v.form == form]
        times = [seconds(plan) for _, plan in same if isinstance(plan, Plan)]
        fits = any(not isinstance(result, InfeasibleError) for _, result in same)
        time = format_seconds(min(times)) if times else "no plan found" if fits else "does not fit"
        other = same[0][0]
        text += f"; with {other.reads} {cached_numbers(other.graph):,}: {time}"
    return (text,)


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


__all__ = ["Form", "Variant", "fastest", "forms", "make_faster_plan"]
