"""Several ways to compute the same: all are planned, the fastest plan is kept.

- Fused projections whole or apart.  Apart, q, k and v can each be cut by heads; whole, they are one
  matrix product instead of three.
- Attention over keys and values that are made from a latent: of all heads, absorbed, or expanded
  (see `ir.latent`).  With the last two the KV cache is a fraction.  Absorbed, scores cost more;
  expanded, keys and values are made again in every step, which pays for many new tokens.  In
  training, expanded, a fraction is sent over a sharded sequence and kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Generic, Literal, TypeAlias

from ...facts.units import format_seconds
from ...ir.graph import Graph, Node
from ...ir.ops.registry import operator_of
from ...ir.passes.latent import absorbed, expanded, numbers_per_token
from ...ir.passes.unfuse import unfuse
from ..errors import InfeasibleError, LayoutError, PlanError
from ..plan.decide import Solved
from ..plan.plan import Baseline, PlanData
from ..strategies.params import all_params
from ..strategies.pins import Pin, Pins
from .infeasible import explain
from .pipeline import make_pipeline_plan
from .search import (
    Found,
    Job,
    Ordinary,
    Searched,
    assemble,
    clash_at,
    ordinary_plans,
    search_meshes,
)

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
        return _READ[self.form] + (" in prefill and latents in decode" if both else "")


@dataclass(frozen=True, slots=True)
class Way(Generic[Found]):
    """How a variant is planned.

    `search` finds the best plan if one beats the rival, `ordinary` prices the ordinary plans beside
    it, `finish` makes the plan, given the least seconds that any may take, `explain` says why
    nothing fits.
    """

    search: Callable[[Variant, Found | None], Searched[Found]]
    ordinary: Callable[[Variant, Found], Ordinary[Found]]
    finish: Callable[[Found, tuple[Baseline, ...], bool, float], PlanData]
    explain: Callable[[Variant], InfeasibleError]


def make_plan(graph: Graph, job: Job) -> PlanData:
    """The cheapest plan of the graph's variants over all the job's meshes.

    Attention over latents is planned in all its forms, then fused projections in parts in the best
    of these.  Raises InfeasibleError where nothing fits the memory, PlanError where the time is too
    short to find a plan.
    """

    def search(variant: Variant, rival: Solved | None) -> Searched[Solved]:
        return search_meshes(variant.graph, job.saying(variant.way), rival)

    def ordinary(variant: Variant, best: Solved) -> Ordinary[Solved]:
        return ordinary_plans(variant.graph, best, job.saying(variant.way))

    def finish(best: Solved, rows: tuple[Baseline, ...], proven: bool, bound: float) -> PlanData:
        return assemble(best, rows, proven, bound, job)

    def explained(variant: Variant) -> InfeasibleError:
        return InfeasibleError(explain(variant.graph, job.cluster, job.setting, job.request))

    if job.layout is not None and job.layout.pipeline > 1:
        return make_pipeline_plan(graph, job)
    known = _known(forms(graph), job.request.pins)
    return plan_variants(known, Way(search, ordinary, finish, explained), job)


@dataclass(frozen=True, slots=True)
class _Tried(Generic[Found]):
    """What became of a variant."""

    variant: Variant
    searched: Searched[Found] | None  # None where the time was too short

    @property
    def time(self) -> str:
        """What its best plan takes, as far as that is known."""
        if self.searched is None:
            return "no plan found"
        if self.searched.best is not None:
            return format_seconds(self.searched.best.seconds)
        least = self.searched.least
        return f"at least {format_seconds(least)}" if isfinite(least) else "does not fit"


def plan_variants(variants: Sequence[Variant], way: Way[Found], job: Job) -> PlanData:
    """The plan of fewest seconds among those of the variants, with notes on the others.

    What is whole is planned first, and in parts what has the form of the best of these.  Optimal
    only if all problems were solved to the end.  Ordinary plans have the form of the best, too, and
    one that is faster than all that were found is taken: what computing hides is not in problems.
    """
    tried: list[_Tried[Found]] = []
    best: tuple[Variant, Found] | None = None
    error = PlanError()
    for apart in (False, True):
        for variant in variants:
            if variant.apart != apart or (best and apart and variant.form != best[0].form):
                continue
            try:
                searched = way.search(variant, best[1] if best else None)
            except PlanError as caught:
                searched, error = None, caught
            tried.append(_Tried(variant, searched))
            if searched is not None and searched.best is not None:
                best = variant, searched.best
    if best is None:
        raise error if any(one.searched is None for one in tried) else _none(tried, way, job)
    rows: list[Sequence[Baseline]] = []
    for variant in (one.variant for one in tried if one.variant.form == best[0].form):
        ordinary = way.ordinary(variant, best[1])
        rows.append(ordinary.rows)
        fastest = ordinary.fastest  # which knows no pins
        if fastest is not None and not job.request.pins and fastest.seconds < best[1].seconds:
            best = variant, fastest
    proven = all(one.searched is not None and one.searched.proven for one in tried)
    bound = min(one.searched.least for one in tried if one.searched is not None)
    plan = way.finish(best[1], _better(rows), proven, bound)
    notes = (*plan.notes, *_fused_note(best[0], tried), *_latent_note(best[0], tried))
    return replace(plan, notes=notes)


def _none(tried: Sequence[_Tried[Found]], way: Way[Found], job: Job) -> PlanError:
    """Why there is no plan: what was asked for does not go together, or the memory."""
    clashes = [one.searched.clash for one in tried if one.searched is not None]
    if not all(clashes) or clashes[-1] is None:
        return way.explain(tried[-1].variant)
    variant, request = tried[-1].variant, job.request
    asked = [f"--layout {request.layout}"] if request.layout else []
    asked += [f"--pin {pin}" for pin in request.pins]
    graphs = [variant.graph, *([variant.decode] if variant.decode else [])]
    return LayoutError(
        f"{' '.join(asked) or '--mesh'}: {clash_at(clashes[-1], graphs)}, whatever the memory"
    )


def _known(found: Sequence[Variant], pins: Sequence[str]) -> list[Variant]:
    """These variants and those with fused projections in parts, if the pins know them."""
    variants: list[Variant] = []
    for form in found:
        variants.append(form)
        apart = unfuse(form.graph)
        if apart is not form.graph:
            variants.append(replace(form, graph=apart, apart=True))
    if len(variants) == 1:
        return variants
    known: list[Variant] = []
    for variant in variants:
        try:
            Pins([Pin.parse(text) for text in pins], variant.graph)
        except PlanError:  # where none knows them, planning says why
            continue
        known.append(variant)
    return known or variants[-1:]


def forms(graph: Graph) -> list[Variant]:
    """The graph, and where it has attention over latents the other forms of that.

    Training has no absorbed form, and one new token no expanded one: it would make the keys of all
    cached tokens for itself.
    """
    others: dict[Form, Graph] = {"absorbed": absorbed(graph)}
    if _queries(graph) > 1:
        others["expanded"] = expanded(graph)
    changed = [Variant(other, form=form) for form, other in others.items() if other is not graph]
    return [Variant(graph), *changed]


def _attentions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if operator_of(node).attends]


def _queries(graph: Graph) -> int:
    """Queries of each sequence, in the attention with most."""
    return max((node.operands[0].type.shape[2] for node in _attentions(graph)), default=0)


def _fused_note(best: Variant, tried: Sequence[_Tried[Found]]) -> Sequence[str]:
    """How much slower it is to compute projections the other way."""
    same = [one for one in tried if one.variant.form == best.form]
    others = [one for one in same if one.variant.apart != best.apart]
    if not others:
        return ()
    fused = _fused_names(next(one.variant.graph for one in same if one.variant.apart))
    now, other = ("in parts", "whole") if best.apart else ("whole", "in parts")
    return (f"Fused projections ({fused}) are computed {now}; {other}: {others[0].time}",)


def _latent_note(best: Variant, tried: Sequence[_Tried[Found]]) -> Sequence[str]:
    """What the KV cache holds per token, or training sends and saves, and what other forms take."""
    others = {one.variant.form: one for one in tried if one.variant.form != best.form}
    if not others:
        return ()
    cached = any(operator_of(node).remembers for node in _attentions(best.graph))
    what = "the KV cache holds" if cached else "sent, and saved for backward, are"
    text = f"Attention reads {best.reads}: {what} {numbers_per_token(best.graph):,} values"
    text += " per token and layer"
    rest = [
        f"{one.variant.reads} ({numbers_per_token(one.variant.graph):,} values): {one.time}"
        for one in reversed(others.values())
    ]
    return (f"{text}; instead, {'; '.join(rest)}",)


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
        if _rank(row) < _rank(other) or (row.refused and other.refused):  # the later is in parts
            kept[row.name, row.mesh] = row
    return tuple(sorted(kept.values(), key=lambda row: row.mesh.count("x")))


def _rank(row: Baseline) -> tuple[bool, bool, float, float]:
    return (bool(row.refused), row.seconds is None, row.seconds or 0.0, row.peak_bytes)


__all__ = ["Form", "Variant", "Way", "forms", "make_plan", "plan_variants"]
