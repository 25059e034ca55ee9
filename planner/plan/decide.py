"""From a solver's assignment to the plan: choices in the graph's words, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...facts.mesh import Mesh
from ...facts.nested import dotted
from ...facts.spec import Spec
from ...facts.units import format_bytes
from ...ir.graph import Graph, Node, Value
from ...ir.ops.labels import DimLabels, factor_labels, label_dims
from ...ir.ops.local import local_bytes
from ...ir.ops.registry import is_ruled, local_of, operator_of, rule_of
from ...ir.ops.users import is_users
from ..ilp.problem import ShardingProblem, evaluate
from ..ilp.solve import Solution
from ..strategies.bringing import Use
from ..strategies.build import Builder, Built, Decisions
from ..strategies.params import ParamRef, all_params
from ..strategies.pricing import Work
from ..strategies.regions import scopes
from .brought import brought_steps
from .overlap import hidden_s
from .plan import Baseline, Memory, PlanData, Request, Search
from .program import PricedStep, Program, Weight, lower, priced_path
from .split import spent_in_ops
from .traffic import brought_together

REPLICAS = "replicas"  # an axis over which no work is cut
_LARGE = 0.05  # of the memory: an output that takes more is worth a word


@dataclass(frozen=True, slots=True)
class Solved:
    """An assignment in the graph's words: what it decides, its seconds, and its bytes at the peak.

    `cost` are the seconds that the problem counts; in `seconds` collectives of weights have the
    price of what they take together, without what computing hides of it.
    `paths` holds every conversion that is run.
    `casts_s` are those of them that casts of weights and gradients take, and sums of the latter.
    `live` says what the bytes at the peak are for.
    `solution` is the solver's answer that it is taken from.
    """

    builder: Builder
    decisions: Decisions
    solution: Solution
    paths: dict[tuple[str, Spec, Spec], tuple[PricedStep, ...]]
    cost: float
    seconds: float
    casts_s: float
    peak_bytes: float
    live: dict[Use, float]


def decide(
    built: Built, problem: ShardingProblem, assignment: Sequence[int], solution: Solution
) -> Solved:
    """What an assignment of `problem`, that of `built`, stands for.

    `solution` is the solver's answer to it, or to one of which it is a part.
    """
    builder = built.builder
    evaluation = evaluate(problem, assignment)
    decisions = _plain_order(builder.graph, built.read(assignment))
    paths, brought, casts_s = _paths(builder, decisions)
    return Solved(
        builder,
        decisions,
        solution,
        paths,
        evaluation.cost,
        evaluation.cost - built.bringing_s(assignment) + brought + casts_s,
        casts_s,
        evaluation.peak_usage,
        built.memory_at(assignment, evaluation.peak_time),
    )


def _paths(
    builder: Builder, decisions: Decisions
) -> tuple[dict[tuple[str, Spec, Spec], tuple[PricedStep, ...]], float, float]:
    """Every conversion that the program runs, and the seconds of those of weights that nothing
    hides, and of casts."""
    paths: dict[tuple[str, Spec, Spec], tuple[PricedStep, ...]] = {}
    refs = {ref.param.value.name: ref for ref in all_params(builder.graph)}
    setting, program = builder.setting, program_of(builder, decisions, paths)
    together = brought_together(program, builder.network.mesh)
    brought = brought_steps(program, together, builder)
    seconds, casts_s = -hidden_s(program, builder, decisions, together), 0.0
    for weight, layers in program.brought():
        name, kept = weight.param.value.name, weight.kept
        if weight.way:
            steps, ends = brought[weight.item], len(weight.homecoming)
            if weight.homecoming:
                paths[name, kept.stored, kept.spec] = steps[:ends]
            if weight.steps:
                paths[name, kept.spec, weight.used] = steps[ends:]
            seconds += layers * sum(step.seconds for step in steps)
        if setting.training:
            casts_s += layers * _casts_s(builder, refs[name], weight)
    return paths, seconds, casts_s


def program_of(
    builder: Builder,
    decisions: Decisions,
    paths: dict[tuple[str, Spec, Spec], tuple[PricedStep, ...]],
) -> Program:
    """What one rank runs; every conversion that it takes is added to `paths`."""
    refs = {ref.param.value.name: ref for ref in all_params(builder.graph)}

    def price_path(value: Value, a: Spec, b: Spec) -> tuple[PricedStep, ...]:
        home, name = decisions.homes.get(value.name), value.name
        if home is not None and (a, b) == (decisions.specs[name], home.spec):
            conversions = builder.home_conversions(refs[name])
        else:
            conversions = builder.conversions(value, param=name in builder.params)
        paths[name, a, b] = priced_path(conversions, a, b)
        return paths[name, a, b]

    setting = builder.setting
    return lower(
        builder.graph,
        decisions,
        price_path,
        training=setting.training,
        micro_batches=setting.micro_batches,
        reduced=setting.reduced,
    )


def _casts_s(builder: Builder, ref: ParamRef, weight: Weight) -> float:
    """Seconds of a step's casts of one weight."""
    first = np.zeros(1, dtype=np.int64)
    held = builder.held(ref, [weight.kept], [weight.used])(first, first)
    again = builder.comes_again(ref.param.value)
    return float(builder.casting_s(ref, held, again=again)[0])


def _plain_order(graph: Graph, decisions: Decisions) -> Decisions:
    """Without a causal attention over a sharded sequence the order of tokens does not matter."""
    uses = any(
        way.balanced and name in decisions.choices[node.name]
        for scope in scopes(graph)
        for node in scope.nodes
        if operator_of(node).causal(node)
        for name, way in rule_of(node).algorithms.items()
    )
    return decisions if uses else replace(decisions, order="contiguous")


def spent(solved: Solved) -> tuple[tuple[str, float], ...]:
    """What the seconds of a solution go into."""
    builder, decided = solved.builder, solved.decisions
    work = _work(builder, decided)
    times = builder.setting.micro_batches
    ops = spent_in_ops(builder.graph, work, decided, times=times)
    return ops.rows(solved.seconds, _optimizer_s(builder, decided), solved.casts_s)


def plan_of(
    best: Solved, request: Request, search: Search, baselines: tuple[Baseline, ...]
) -> PlanData:
    """The plan that was decided, with every conversion that its program runs."""
    builder, decisions = best.builder, best.decisions
    graph = builder.graph
    mesh = name_axes(graph, builder.network.mesh, decisions)
    work, optimizer_s = _work(builder, decisions), _optimizer_s(builder, decisions)
    return PlanData(
        request, graph, mesh, decisions, best.paths, work, best.seconds, optimizer_s, best.casts_s,
        _memory(graph, best), baselines, search, (*_notes(graph), *_large_outputs(best)),
    )  # fmt: skip


def _work(builder: Builder, decisions: Decisions) -> dict[str, Work]:
    """One run of each node, by its name."""
    return {
        node.name: builder.work(node, decisions.choices[node.name])
        for scope in scopes(builder.graph)
        for node in scope.nodes
    }


def _optimizer_s(builder: Builder, decisions: Decisions) -> float:
    """Seconds of the optimizer's step."""
    return sum(
        ref.weight * builder.optimizer_s(ref, decisions.specs[ref.param.value.name])
        for ref in all_params(builder.graph)
    )


def _memory(graph: Graph, best: Solved) -> Memory:
    """Peak bytes by kind."""
    builder, live = best.builder, best.live
    parameters, states = live["copy"], 0.0
    for ref in all_params(graph):
        state = builder.state_bytes(ref, best.decisions.specs[ref.param.value.name])
        parameters += ref.weight * state.parameter
        states += ref.weight * state.optimizer
    kept = (live["kept"], 0.0) if builder.setting.training else (0.0, live["kept"])
    return Memory(parameters, live["gradient"], states, kept[0], live["running"], kept[1])


def name_axes(graph: Graph, mesh: Mesh, decisions: Decisions) -> Mesh:
    """The mesh with its axes named by their main use: dp, cp (sequence of attention), tp or ep.

    Each matrix product and attention votes with its FLOPs for what it cuts over the axis.  One over
    which none is cut has `replicas`.
    """
    labels = label_dims(graph)
    names: list[str] = []
    for axis, _ in enumerate(mesh.axes):
        votes: dict[str, float] = {}
        for scope in scopes(graph):
            for node in scope.nodes:
                choice = decisions.choices[node.name][axis]
                flops = operator_of(node).flops(local_of(node))
                if flops and choice not in ("R", "V"):
                    use = _use_of(node, choice, labels)
                    votes[use] = votes.get(use, 0.0) + scope.weight * flops
        names.append(max(votes, key=lambda use: votes[use]) if votes else REPLICAS)
    for name in list(names):
        if names.count(name) > 1:
            same = [k for k, other in enumerate(names) if other == name]
            for count, k in enumerate(same, start=1):
                names[k] = f"{name}{count}"
    return Mesh(tuple((name, size) for name, (_, size) in zip(names, mesh.axes, strict=True)))


def _use_of(node: Node, choice: str, labels: Mapping[str, DimLabels]) -> str:
    if operator_of(node).experts in rule_of(node).cuts(choice):
        return "ep"
    label = factor_labels(node, labels).get(choice, "")
    return {"b": "dp", "s": "cp"}.get(label, "tp")


def _notes(graph: Graph) -> tuple[str, ...]:
    """Ops that have no rule run replicated: say which and where."""
    seen: dict[str, Node] = {}
    for scope in scopes(graph):
        for node in scope.nodes:
            if not is_ruled(node):
                seen.setdefault(operator_of(node).title(node), node)
    return tuple(
        f"`{title}` ({node.loc}) has no sharding rule and runs replicated"
        + (", until `shardwright.rule` gives it one" if is_users(node) else "")
        for title, node in seen.items()
    )


def _large_outputs(best: Solved) -> Iterator[str]:
    """What training returns besides the loss and takes much of the memory: say how to do without.

    The gradient of an output is as large as the output.
    """
    graph, limit = best.builder.graph, best.builder.setting.memory_bytes
    scalars = (out for out in graph.outputs if out.value.type.shape == ())
    loss = next((out for out in scalars if out.value.differentiable), None)
    if not best.builder.setting.training or loss is None or limit is None:
        return
    for out in graph.outputs:
        spec = best.decisions.outputs[out.value.name]
        size = local_bytes(out.value, spec, best.builder.sizes)
        if out is not loss and out.value.differentiable and size > _LARGE * limit:
            yield (
                f"the output `{dotted(out.path)}` takes {format_bytes(size)} of each GPU, and its"
                f" gradient as much; `--outputs {dotted(loss.path)}` does without it"
            )


__all__ = ["REPLICAS", "Solved", "decide", "name_axes", "plan_of", "program_of", "spent"]
