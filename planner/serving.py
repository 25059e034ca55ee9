"""Prefill and decode planned together: one set of weights and one cache layout for both.

Each phase has its own problem, since the number of new tokens decides what is fast.  They are
solved as one, in which every parameter must be stored alike in both, and every KV cache laid out
alike; what is minimised is the time of a whole answer, TTFT + output tokens * time per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..costmodel.cluster import Cluster
from ..ir.graph import Graph, Loop
from ..ir.mesh import Mesh
from ..ir.spec import Spec
from .attention import cache_spec
from .build import Builder, Built, Floats, Restriction, all_params
from .conversion import Network
from .errors import InfeasibleError, PlanError
from .fused import Variant, fastest, forms, saying
from .infeasible import explain
from .plan import Baseline, Plan, Request
from .problem import Edge, ProblemNode, ShardingProblem, evaluate
from .roles import Roles, ordinary_roles
from .search import (
    Clock,
    Progress,
    Solved,
    assemble,
    baseline_meshes,
    candidate_meshes,
    name_axes,
    setting_of,
)  # fmt: skip
from .solvers import solve


@dataclass(frozen=True, slots=True)
class _Served:
    """The optimum of both phases on one mesh."""

    prefill: Solved
    decode: Solved
    seconds: float  # of a whole answer


def make_serving_plan(
    prefill: Graph,
    decode: Graph,
    cluster: Cluster,
    request: Request,
    *,
    mesh: Mesh | None,
    restriction: Callable[[Graph, Mesh], Restriction],
    solver: str,
    time_limit_s: float,
    clock: Clock,
    progress: Progress,
) -> Plan:
    """The plan of prefill, with that of decode as its `decode`.

    `decode` is the graph of one new token over the longest context.  Attention over latents is
    planned absorbed in both phases and in neither, which takes twice the time, and the faster plan
    is kept.  Raises PlanError where the graphs do not have the same layers, InfeasibleError if no
    mesh has the memory.
    """
    _check_alike(prefill, decode)
    decodes = {form.latent: form.graph for form in forms(decode)}
    variants = [form for form in forms(prefill) if form.latent in decodes]

    def made(variant: Variant) -> Plan:
        return _make_serving_plan(
            variant.graph,
            decodes[variant.latent],
            cluster,
            request,
            mesh=mesh,
            restriction=restriction,
            solver=solver,
            time_limit_s=time_limit_s,
            clock=clock,
            progress=saying(progress, variant.way),
        )

    return fastest(variants, made, _answer_s, clock)


def _answer_s(plan: Plan) -> float:
    """Seconds of a whole answer."""
    assert plan.decode is not None
    return plan.seconds + plan.request.output_tokens * plan.decode.seconds


def _make_serving_plan(
    prefill: Graph,
    decode: Graph,
    cluster: Cluster,
    request: Request,
    *,
    mesh: Mesh | None,
    restriction: Callable[[Graph, Mesh], Restriction],
    solver: str,
    time_limit_s: float,
    clock: Clock,
    progress: Progress,
) -> Plan:
    """As `make_serving_plan`, of these graphs."""
    setting = setting_of(request)
    meshes = [mesh] if mesh is not None else candidate_meshes(request.gpus, cluster)

    def attempt(
        mesh: Mesh, limit: Callable[[Graph, Mesh], Restriction], clock: Clock
    ) -> _Served | None:
        network = Network(mesh, cluster)
        with clock.step("problem"):
            builders = [Builder(graph, network, setting) for graph in (prefill, decode)]
            parts = [b.build(limit(b.graph, mesh)) for b in builders]
            problem = _joined(parts, request.output_tokens)
        with clock.step("solve"):
            solution = solve(problem, solver=solver, time_limit_s=time_limit_s)
        if solution.assignment is None:
            check_finished(solution, mesh, time_limit_s)
            return None
        cut = len(parts[0].nodes)
        halves = [solution.assignment[:cut], solution.assignment[cut:]]
        peak = evaluate(problem, solution.assignment)
        solved: list[Solved] = []
        for builder, part, half in zip(builders, parts, halves, strict=True):
            alone = evaluate(part.problem(), half)
            gradients, kept, running = part.memory_at(half, alone.peak_time)
            decisions = part.read(half)
            solved.append(
                Solved(
                    builder, decisions, solution, alone.cost, peak.peak_usage, gradients, kept,
                    running,
                )
            )  # fmt: skip
        return _Served(solved[0], solved[1], peak.cost)

    tried: list[_Served | None] = []
    for each in meshes:
        progress(f"solving {each}")
        tried.append(attempt(each, restriction, clock))
    found = [one for one in tried if one is not None]
    if not found:
        raise InfeasibleError(explain(decode, cluster, setting, request))
    best = min(found, key=lambda one: float(f"{one.seconds:.9e}"))
    progress("pricing the ordinary plans")
    baselines: list[Baseline] = []
    best_mesh = best.prefill.builder.network.mesh
    for each in baseline_meshes(meshes, best_mesh, cluster):
        for roles in ordinary_roles(each, prefill):
            if len(meshes) > 1 and len(each.axes) > 1 and len(set(roles)) == 1:
                continue
            named = Roles(roles, prefill, each)

            def limit(graph: Graph, mesh: Mesh, roles: tuple[str, ...] = roles) -> Restriction:
                return Roles(roles, graph, mesh)

            with clock.step("baselines"):
                one = attempt(each, limit, Clock())
            size = "x".join(map(str, each.sizes))
            if one is not None:
                row = Baseline(named.name, size, one.seconds, one.prefill.peak_bytes)
            else:
                network = Network(each, cluster)
                needed = [
                    Builder(graph, network, setting).build(limit(graph, each)).least_memory()
                    for graph in (prefill, decode)
                ]
                row = Baseline(named.name, size, None, max(needed))
            baselines.append(row)
    proven = all(one is None or one.prefill.solution.status == "optimal" for one in tried)
    plans = [
        assemble(
            solved.builder.graph,
            replace(request, phase=phase, seq=seq, context=context),
            solved,
            rows,
            len(meshes),
            solver,
            clock,
            proven,
        )
        for solved, phase, seq, context, rows in (
            (best.prefill, "prefill", request.seq, 0, tuple(baselines)),
            (best.decode, "decode", 1, request.seq + request.output_tokens - 1, ()),
        )
    ]
    named_mesh = name_axes(prefill, best_mesh, best.prefill.decisions)
    first, second = (replace(plan, mesh=named_mesh) for plan in plans)
    return replace(first, request=request, decode=second)


def _check_alike(prefill: Graph, decode: Graph) -> None:
    """Both graphs must have the same parameters in the same layers."""
    names = [[ref.name for ref in all_params(graph)] for graph in (prefill, decode)]
    loops = [[(loop.path, loop.order) for loop in graph.loops] for graph in (prefill, decode)]
    if names[0] != names[1] or loops[0] != loops[1]:
        raise PlanError(
            f"{prefill.name}: one token takes another path through the model than many do, so its"
            " layers cannot be planned together; plan --phase prefill and --phase decode apart"
        )


def _joined(parts: Sequence[Built], answers: int) -> ShardingProblem:
    """One problem: prefill, then decode as often as tokens are put out."""
    prefill, decode = parts
    shift = len(prefill.nodes)
    late = prefill.horizon + 1
    nodes: list[ProblemNode] = []
    for index, node in enumerate(prefill.nodes):
        kept = prefill.kept_usages.get(index, 0)  # the cache: decode's is there from the start
        nodes.append(replace(node, usages=node.usages[kept:]))
    for index, node in enumerate(decode.nodes):
        kept = decode.kept_usages.get(index, 0)
        usages = tuple(
            replace(usage, start=0 if at < kept else usage.start + late, end=usage.end + late)
            for at, usage in enumerate(node.usages)
        )
        nodes.append(replace(node, costs=answers * node.costs, usages=usages))
    edges = list(prefill.edges)
    edges += [Edge(e.a + shift, e.b + shift, answers * e.costs) for e in decode.edges]
    edges += [Edge(a, b + shift, costs) for a, b, costs in _ties(prefill, decode)]
    name = f"{prefill.builder.graph.name} served on {prefill.builder.network.mesh}"
    limit = prefill.builder.setting.memory_bytes
    return ShardingProblem(name, tuple(nodes), tuple(edges), limit)


def _ties(prefill: Built, decode: Built) -> list[tuple[int, int, Floats]]:
    """(node of prefill, node of decode, costs): infinite where a parameter or cache differs."""
    found: list[tuple[int, int, Floats]] = []
    pairs = zip(all_params(prefill.builder.graph), all_params(decode.builder.graph), strict=True)
    for one, other in pairs:
        a, b = prefill.flows[one.param.value.name], decode.flows[other.param.value.name]
        found.append((a.node, b.node, _alike(a.specs, b.specs)))
    ours, theirs = _caches(prefill), _caches(decode)
    for key, (node, specs) in ours.items():
        other_node, other_specs = theirs[key]
        found.append((node, other_node, _alike(specs, other_specs)))
    return found


def _alike(ours: Sequence[Spec], theirs: Sequence[Spec]) -> Floats:
    return np.array([[0.0 if a == b else np.inf for b in theirs] for a in ours])


def _caches(built: Built) -> dict[tuple[str, int, object], tuple[int, list[Spec]]]:
    """By (path of the loop, kind of block, name): the region's node, the cache's spec for each of
    its strategies."""
    found: dict[tuple[str, int, object], tuple[int, list[Spec]]] = {}
    for region, index, strategies in zip(
        built.builder.regions, built.region_nodes, built.strategies, strict=True
    ):
        for at, node in enumerate(region.nodes):
            if node.op == "shardwright.cached_attention":
                loop, block = region.scope.loop, region.scope.block
                kind = 0 if loop is None or block is None else _kind_of(loop, block.nodes)
                key = (loop.path if loop else "", kind, node.arg("cache"))
                specs = [cache_spec(node, s.choices[at]) for s in strategies]
                found[key] = (index, specs)
    return found


def _kind_of(loop: Loop, nodes: object) -> int:
    return next(kind for kind, block in enumerate(loop.blocks) if block.nodes is nodes)


__all__ = ["make_serving_plan"]
