"""Prefill and decode planned together: one set of weights for both.

Each phase has its own problem, since the number of new tokens decides what is fast.  They are
solved as one, in which every parameter must be stored alike in both, and a KV cache that is laid
out differently is converted, at its price (`recache.py`); what is minimised is the time of a whole
answer, TTFT + conversion + (output tokens - 1) * time per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeAlias

import numpy as np

from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.spec import Spec
from ...ir.graph import Graph
from ...ir.ops.caches import cache_bytes_in, cache_spec, keeps_tokens
from ...ir.ops.registry import operator_of
from ..errors import InfeasibleError, LayoutError, PlanError
from ..ilp.problem import Edge, ProblemNode, ShardingProblem, Usage, evaluate
from ..ilp.solve import Solution
from ..plan.decide import Solved, decide, name_axes
from ..plan.plan import Baseline, PlanData
from ..plan.recache import Cached, Key, Recaching, all_cached, key_of, recaches
from ..strategies.build import Builder, Built
from ..strategies.lattice import Floats
from ..strategies.params import all_params
from .infeasible import explain
from .search import (
    Clock,
    Job,
    Limit,
    Ordinary,
    Price,
    Searched,
    assemble,
    clash_at,
    price_ordinary,
)
from .variants import Variant, Way, forms, plan_variants

_Graphs: TypeAlias = tuple[Graph, Graph]  # of prefill, and of decode


@dataclass(frozen=True, slots=True)
class _Served:
    """The optimum of both phases on one mesh."""

    prefill: Solved
    decode: Solved
    cost: float  # seconds of a whole answer, as the problem counts them
    seconds: float  # and as the plan takes them


def make_serving_plan(prefill: Graph, decode: Graph, job: Job) -> PlanData:
    """The plan of prefill, with that of decode as its `decode`.

    `decode` is the graph of one new token over the longest context.  Attention over latents is
    planned absorbed in both phases, in neither, and expanded in prefill with absorbed in decode,
    which has the same caches; this takes three times the time, and the fastest plan is kept.
    Raises PlanError where the graphs do not have the same layers, InfeasibleError if no
    mesh has the memory.
    """
    variants = _variants(prefill, decode)

    def search(variant: Variant, rival: _Served | None) -> Searched[_Served]:
        return _search(_graphs(variant), job.saying(variant.way), rival)

    def ordinary(variant: Variant, best: _Served) -> Ordinary[_Served]:
        return _baselines(_graphs(variant), best, job.saying(variant.way))

    def finish(best: _Served, rows: tuple[Baseline, ...], proven: bool, _: float) -> PlanData:
        return _assembled(best, rows, proven, job)

    def explained(variant: Variant) -> InfeasibleError:
        graph = _graphs(variant)[1]
        return InfeasibleError(explain(graph, job.cluster, job.setting, job.request))

    return plan_variants(variants, Way(search, ordinary, finish, explained), job)


def _variants(prefill: Graph, decode: Graph) -> list[Variant]:
    """The forms of attention in both.  Raises PlanError where they have not the same layers."""
    _check_alike(prefill, decode)
    decodes = {form.form: form.graph for form in forms(decode)}
    pairs = [
        (form, decodes.get("absorbed" if form.form == "expanded" else form.form))
        for form in forms(prefill)
    ]
    return [replace(form, decode=graph) for form, graph in pairs if graph is not None]


def serving_variants(prefill: Graph, decode: Graph) -> list[_Graphs]:
    """The graphs of these in all forms of attention; raises as `make_serving_plan` does."""
    return [_graphs(variant) for variant in _variants(prefill, decode)]


def serving_plan_on(prefill: Graph, decode: Graph, mesh: Mesh, job: Job) -> PlanData | None:
    """The plan of both graphs, as they are, on one mesh; None where nothing fits."""
    served, solution = attempt(_builders((prefill, decode), mesh, job), job.limit, job)
    return served and _assembled(served, (), solution.status != "feasible", job)


def _graphs(variant: Variant) -> _Graphs:
    assert variant.decode is not None
    return variant.graph, variant.decode


def _search(graphs: _Graphs, job: Job, rival: _Served | None) -> Searched[_Served]:
    """The cheapest plan over all the job's meshes, if any is cheaper than the rival."""
    for graph in graphs:
        job.check(graph)
    searched = Searched[_Served].against(rival)
    for mesh in job.meshes:
        job.progress(f"solving {mesh}")
        searched.add(*attempt(_builders(graphs, mesh, job), job.limit, job, searched.ceiling))
    return searched


def _builders(graphs: _Graphs, mesh: Mesh, job: Job) -> list[Builder]:
    with job.clock.step("problem"):
        return [job.builder(graph, mesh, job.setting) for graph in graphs]


def attempt(
    builders: Sequence[Builder], limit: Limit, job: Job, ceiling: float = inf
) -> tuple[_Served | None, Solution]:
    """The optimum of both phases on one mesh, None if nothing fits its memory or is below the
    ceiling, and the solver's answer."""
    mesh = builders[0].network.mesh
    with job.clock.step("problem"):
        parts = [builder.build(limit(builder.graph, mesh)) for builder in builders]
        problem = _joined(parts, job.request.decode_steps)
    solution = job.solution(problem, mesh, ceiling)
    if solution.assignment is None:
        return None, solution
    whole = evaluate(problem, solution.assignment)
    cut = len(parts[0].nodes)
    halves = (solution.assignment[:cut], solution.assignment[cut:])
    solved: list[Solved] = []
    for part, half in zip(parts, halves, strict=True):
        alone = decide(part, part.problem(), half, solution)
        solved.append(replace(alone, peak_bytes=whole.peak_usage))
    first, then = (each.seconds - each.cost for each in solved)
    seconds = whole.cost + first + job.request.decode_steps * then
    return _Served(solved[0], solved[1], whole.cost, seconds), solution


def _baselines(graphs: _Graphs, best: _Served, job: Job) -> Ordinary[_Served]:
    """The ordinary plans, seconds of a whole answer."""
    aside = replace(job, clock=Clock())

    def price(mesh: Mesh, limit: Limit) -> Price[_Served]:
        builders = _builders(graphs, mesh, aside)
        served, solution = attempt(builders, limit, aside)
        if served is not None:
            return Price(served.prefill.peak_bytes, served)
        if solution.clash:
            raise LayoutError(clash_at(solution.clash, graphs))
        needed = [each.build(limit(each.graph, mesh)).least_memory() for each in builders]
        return Price(max(needed))

    return price_ordinary(graphs[0], job, best.prefill.builder.network.mesh, price)


def _assembled(best: _Served, baselines: tuple[Baseline, ...], proven: bool, job: Job) -> PlanData:
    """The plan of prefill, with the rows of whole answers, and in it that of decode."""
    request = job.request
    first, then = find_phase(request.phase).programs
    longest = request.seq + request.decode_steps - 1
    phases = (
        replace(request, phase=first),
        replace(request, phase=then, seq=find_phase(then).tokens, context=longest),
    )
    prefill, decode = (
        assemble(solved, rows, proven, solved.cost, replace(job, request=phase))
        for solved, phase, rows in zip(
            (best.prefill, best.decode), phases, (baselines, ()), strict=True
        )
    )
    solved = best.prefill
    network = solved.builder.network
    mesh = name_axes(solved.builder.graph, network.mesh, solved.decisions)
    recached = recaches(prefill.graph, prefill.decisions, decode.graph, decode.decisions, network)
    return replace(
        prefill,
        request=request,
        mesh=mesh,
        decode=replace(decode, mesh=mesh),
        recached=recached,
    )


def _check_alike(prefill: Graph, decode: Graph) -> None:
    """Both graphs must have the same parameters in the same layers."""
    names = [[ref.name for ref in all_params(graph)] for graph in (prefill, decode)]
    loops = [[(loop.path, loop.order) for loop in graph.loops] for graph in (prefill, decode)]
    if names[0] != names[1] or loops[0] != loops[1]:
        raise PlanError(
            f"{prefill.name}: one token takes another path through the model than many do, so its"
            " layers cannot be planned together; plan --phase prefill and --phase decode apart"
        )


def _joined(parts: Sequence[Built], decodes: int) -> ShardingProblem:
    """One problem: prefill, then `decodes` times decode."""
    prefill, decode = parts
    shift = len(prefill.nodes)
    late = prefill.horizon + 1
    ours, theirs = _caches(prefill), _caches(decode)
    many = prefill.builder.setting.in_flight
    pools = {cache.index: _pool(cache, theirs[key], late, many) for key, cache in ours.items()}
    nodes: list[ProblemNode] = []
    for index, node in enumerate(prefill.nodes):
        kept = prefill.uses.get(index, ()).count("kept")  # the cache of the prompt alone
        pool = (pools[index],) if index in pools else ()
        nodes.append(replace(node, usages=(*pool, *node.usages[kept:])))
    for node in decode.nodes:
        usages = tuple(
            replace(usage, start=usage.start + late, end=usage.end + late) for usage in node.usages
        )
        nodes.append(replace(node, costs=decodes * node.costs, usages=usages))
    edges = list(prefill.edges)
    edges += [Edge(e.a + shift, e.b + shift, decodes * e.costs) for e in decode.edges]
    edges += [Edge(a, b + shift, costs) for a, b, costs in _ties(prefill, decode, ours, theirs)]
    name = f"{prefill.builder.graph.name} served on {prefill.builder.network.mesh}"
    limit = prefill.builder.setting.memory_bytes
    return ShardingProblem(name, tuple(nodes), tuple(edges), limit)


@dataclass(frozen=True, slots=True)
class _Cache:
    """The region that fills a cache, and the cache's spec under each of its strategies."""

    index: int
    cached: Cached
    specs: list[Spec]
    sizes: tuple[int, ...]


def _pool(prefill: _Cache, decode: _Cache, until: int, many: int) -> Usage:
    """The cache in prefill's layout, which has room for the whole answer from the start; of `many`
    micro-batches."""
    node, specs = decode.cached.node, prefill.specs
    ours = prefill.cached.node
    run = ours.operands[0].type.shape[2] if keeps_tokens(ours) else 0  # tokens that come at once
    size = {spec: cache_bytes_in(node, spec, prefill.sizes, run) for spec in set(specs)}
    return Usage(0, until, np.array([many * prefill.cached.count * size[spec] for spec in specs]))


def _ties(
    prefill: Built, decode: Built, ours: Mapping[Key, _Cache], theirs: Mapping[Key, _Cache]
) -> list[tuple[int, int, Floats]]:
    """(node of prefill, node of decode, costs): infinite where a parameter differs, the price of
    the conversion where a cache does."""
    found: list[tuple[int, int, Floats]] = []
    pairs = zip(all_params(prefill.builder.graph), all_params(decode.builder.graph), strict=True)
    for one, other in pairs:
        a, b = prefill.flows[one.param.value.name], decode.flows[other.param.value.name]
        found.append((a.node, b.node, _alike(a.specs, b.specs)))
    for key, cache in ours.items():
        other = theirs[key]
        prices = Recaching(cache.cached, prefill.builder.network)
        found.append((cache.index, other.index, prices.seconds(cache.specs, other.specs)))
    return found


def _alike(ours: Sequence[Spec], theirs: Sequence[Spec]) -> Floats:
    return np.array([[0.0 if a == b else np.inf for b in theirs] for a in ours])


def _caches(built: Built) -> dict[Key, _Cache]:
    """The regions with a cache or a state."""
    cached = all_cached(built.builder.graph)
    found: dict[Key, _Cache] = {}
    for region, index, strategies in zip(
        built.builder.regions, built.region_nodes, built.strategies, strict=True
    ):
        for at, node in enumerate(region.nodes):
            if operator_of(node).remembers:
                key = key_of(region.scope, node)
                specs = [cache_spec(node, s.choices[at]) for s in strategies]
                found[key] = _Cache(index, cached[key], specs, built.builder.sizes)
    return found


__all__ = ["make_serving_plan", "serving_plan_on", "serving_variants"]
