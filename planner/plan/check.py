"""What in a plan must fit together: its decisions, prices and paths with the graph and the mesh.

`schema` has what each field may be; both are held to by what is read and by what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.schedules import FORWARD, refusal
from ...facts.spec import Spec, V, format_spec
from ...ir.graph import Graph, Node, Value
from ...ir.graph.check import GraphError, check_graph
from ...ir.ops.caches import cache_spec, keeps_tokens
from ...ir.ops.registry import local_of, rule_of
from ...ir.ops.typed import check_nodes
from ..errors import PlanError
from ..strategies.lattice import spec_fits
from ..strategies.params import all_params
from ..strategies.storage import Storage
from .plan import Pipeline, PlanData
from .program import PricedStep
from .recache import all_cached


def check_plan(plan: PlanData, *, operators: bool = True) -> None:
    """Raises PlanError for a plan that no search makes, with the name of what does not fit.

    Without `operators` these are not run on the meta device: in a plan that was made of a capture
    they give what the graph says, and running them loads a third of torch.
    """
    if plan.pipeline is not None:
        for each, pipeline in _pipelines(plan):
            _check_pipeline(each, pipeline)
        _check_kinds(plan, operators)
        return
    phases = find_phase(plan.request.phase).programs
    _check(len(plan.phases) == len(phases), f"phase {plan.request.phase} is {' and '.join(phases)}")
    for each in plan.phases:
        _check(each.mesh == plan.mesh, "the mesh of decode is another than that of prefill")
        _check(each.request.gpus == each.mesh.ranks, f"`mesh` has not {each.request.gpus} ranks")
        try:
            check_graph(each.graph)
            if operators:
                check_nodes(each.graph)
        except GraphError as error:
            raise PlanError(f"plan field `graph`: {error}") from error
        _check(not 0 < each.memory.cache < 1, "plan field `memory.cache` is less than a byte")
        _check_decisions(each)
        _check_paths(each)
        for weight, _ in each.program.brought():  # PlanError for a conversion that is not there
            field = f"plan field `homes.{weight.param.value.name}`"
            _check(not weight.is_astray, f"{field}: it is used otherwise than it is there")
    _check_recached(plan)


def _pipelines(plan: PlanData) -> list[tuple[PlanData, Pipeline]]:
    """Those of both phases, with the same stages in both."""
    found = [(each, each.pipeline) for each in plan.phases if each.pipeline is not None]
    alike = len({tuple((s.kind, s.first) for s in own.stages) for _, own in found}) == 1
    complete = len(found) == len(plan.phases) and (
        plan.decode is None or plan.decode.decode is None
    )
    same = alike and len({len(own.kinds) for _, own in found}) == 1
    _check(complete and same, "plan field `pipeline`: decode has other stages than prefill")
    return found


def _check_pipeline(plan: PlanData, pipeline: Pipeline) -> None:
    """Stages follow one another in the model and in what they exchange."""
    field, request = "plan field `pipeline`", plan.request
    decided = plan.decisions.choices or plan.paths or plan.recached
    _check(not decided, f"{field}: its stages alone are decided")
    stages, kinds = pipeline.stages, pipeline.kinds
    _check(
        bool(stages) and len(stages) % pipeline.ranks == 0,
        f"{field}: {len(stages)} stages are not shared out over {pipeline.ranks} ranks",
    )
    why = refusal(pipeline.schedule, pipeline.ranks, pipeline.per_rank, request.micro_batches)
    _check(not why, f"{field}: {why}")
    forward = pipeline.schedule == FORWARD
    _check(forward != plan.training, f"{field}: {pipeline.schedule} in phase {request.phase}")
    numbers = {stage.kind for stage in stages}
    _check(numbers == set(range(len(kinds))), f"{field}: its stages are not of its kinds")
    for kind in kinds:
        _check(kind.mesh == kinds[0].mesh, f"{field}: stages have different meshes")
        passes = request.micro_batches if plan.training else 1
        same = kind.request.micro_batches == passes and kind.training == plan.training
        _check(same, f"{field}: a stage has other micro-batches")
    ranks = pipeline.ranks * kinds[0].mesh.ranks
    _check(request.gpus == plan.mesh.ranks == ranks, f"`mesh` has not {request.gpus} ranks")
    _check(plan.mesh.axes[1:] == kinds[0].mesh.axes, f"{field}: `mesh` is not that of its stages")
    _check_stages(plan.graph, pipeline)


def _check_kinds(plan: PlanData, operators: bool) -> None:
    """Each kind of stage has a plan, that of decode beside that of prefill."""
    kinds = [own.kinds for _, own in _pipelines(plan)]
    for kind, *then in zip(*kinds, strict=True):
        phases = (kind, *then)
        single = all(each.pipeline is None and each.decode is None for each in phases)
        _check(single, "plan field `pipeline`: a stage is a pipeline, or has a plan of decode")
        if then:
            request = replace(kind.request, phase=plan.request.phase)
            kind = replace(kind, request=request, decode=then[0])
        check_plan(kind, operators=operators)


def _check_stages(graph: Graph, pipeline: Pipeline) -> None:
    """The layers of stages are those of the model, and what one gives the next one takes alike."""
    field = "plan field `pipeline.stages`"
    at = {loop.path: 0 for loop in graph.loops}
    for stage in pipeline.stages:
        own = pipeline.kinds[stage.kind].graph
        first = dict(stage.first)
        _check(set(first) == {loop.path for loop in own.loops}, f"{field}: other layers")
        for loop in own.loops:
            _check(at.get(loop.path) == first[loop.path], f"{field}: layers of {loop.path}")
            at[loop.path] += len(loop.order)
    ends = {loop.path: len(loop.order) for loop in graph.loops}
    _check(at == ends, f"{field}: they are not all layers of the model")
    for stage, after in pairwise(pipeline.stages):
        here, there = pipeline.kinds[stage.kind], pipeline.kinds[after.kind]
        given = {
            out.path[0]: (out.value.type, here.decisions.outputs[out.value.name])
            for out in here.graph.outputs
            if out.path and out.path[0] in stage.given
        }
        taken = {
            each.name: (each.value.type, there.decisions.specs[each.value.name])
            for each in there.graph.inputs
            if each.name in after.taken
        }
        _check(given == taken, f"{field}: one gives otherwise than the next takes")
    ends_taken = pipeline.stages[0].taken or pipeline.stages[-1].given
    _check(not ends_taken, f"{field}: the first takes or the last gives")


def _check_decisions(plan: PlanData) -> None:
    """Every node has legal choices and its seconds, every value a spec that can cut it."""
    graph, made, mesh = plan.graph, plan.decisions, plan.mesh
    longest = max((len(loop.order) for loop in graph.loops), default=0)
    _check(
        not made.kept_layers or (made.recompute and made.kept_layers < longest),
        f"plan field `kept_layers`: {made.kept_layers} of {longest} layers, of which others are"
        " recomputed, cannot be kept",
    )
    _check(
        not made.part_layers or (made.recompute and made.part_layers + made.kept_layers <= longest),
        f"plan field `part_layers`: {made.part_layers} of {longest} layers, of which"
        f" {made.kept_layers} keep all, cannot keep a part",
    )
    nodes = {node.name: node for node in graph.nodes}
    _same("choices", made.choices, nodes)
    _same("work", plan.work, nodes)
    for name, choices in made.choices.items():
        _check_choices(nodes[name], choices, mesh)
    for name, work in plan.work.items():
        _check_axes(f"moving.{name}", work.axes, mesh)
    held = _held(graph)
    _same("specs", made.specs, held)
    _check_specs("specs", made.specs, held, mesh)
    _check_homes(plan)
    outputs = {out.value.name: out.value for out in graph.outputs}
    _same("outputs", made.outputs, outputs)
    _check_specs("outputs", made.outputs, outputs, mesh)


def _check_homes(plan: PlanData) -> None:
    """Homes are of trained parameters; each is on every axis as it is stored, or whole with
    summands of the gradient, and its uses take it as it is there."""
    trained = {
        ref.param.value.name: ref.param
        for ref in all_params(plan.graph)
        if ref.trainable and plan.training
    }
    several = plan.request.micro_batches > 1
    for name, home in plan.decisions.homes.items():
        field = f"plan field `homes.{name}`"
        _check(name in trained, f"{field}: it is no parameter that is trained")
        stored = plan.decisions.specs[name]
        fits = len(home.spec) == len(stored)
        fits = fits and all(b in (a, V) for a, b in zip(stored, home.spec, strict=True))
        _check(
            fits, f"{field}: from {format_spec(stored)} nothing comes to {format_spec(home.spec)}"
        )
        _check(several or not home.late, f"{field}: one micro-batch has no late gradients")
        kept = Storage(stored, home)
        useful = kept.kept or (home.late and bool(kept.homebound))
        _check(useful, f"{field}: it has no use")


def _held(graph: Graph) -> dict[str, Value]:
    """What has a spec by its name: inputs, parameters, and what loops carry."""
    params = [param for loop in graph.loops for block in loop.blocks for param in block.params]
    found = [item.value for item in (*graph.inputs, *graph.params, *params)]
    found += [value for loop in graph.loops for value in loop.outputs]
    return {value.name: value for value in found}


def _check_choices(node: Node, choices: Sequence[str], mesh: Mesh) -> None:
    known = rule_of(node).choices()
    fits = len(choices) == len(mesh.axes) and set(choices) <= set(known)
    wanted = f"must have, per mesh axis, one of {', '.join(known)}"
    _check(fits, f"plan field `choices.{node.name}` {wanted}")
    try:
        local_of(node, tuple(choices), mesh.sizes)
    except ValueError as error:
        raise PlanError(f"plan field `choices.{node.name}`: {error}") from error


def _check_specs(
    field: str, specs: Mapping[str, Spec], values: Mapping[str, Value], mesh: Mesh
) -> None:
    for name, spec in specs.items():
        _check_fits(f"{field}.{name}", spec, values[name].type.shape, mesh)
        text = f"plan field `{field}.{name}`: {format_spec(spec)} is for what has a gradient"
        _check(values[name].differentiable or V not in spec, text)


def _check_fits(field: str, spec: Spec, shape: tuple[int, ...], mesh: Mesh) -> None:
    fits = len(spec) == len(mesh.axes) and spec_fits(shape, spec, mesh.sizes)
    _check(fits, f"plan field `{field}`: {format_spec(spec)} cannot cut {list(shape)} over {mesh}")


def _check_paths(plan: PlanData) -> None:
    """The steps of every conversion lead from its first spec to its last."""
    values = {value.name: value for value in _values(plan.graph)}
    for (name, a, b), steps in plan.paths.items():
        _check(name in values, f"plan field `conversions`: there is no value `{name}`")
        field = f"conversions.{name}"
        ends = _walk(field, a, steps, plan.mesh, values[name].type.shape)
        _check(ends == b, f"plan field `{field}`: its steps do not end in {format_spec(b)}")


def _values(graph: Graph) -> Iterable[Value]:
    """Every value of a graph, those of blocks too."""
    yield from (item.value for item in (*graph.inputs, *graph.params))
    yield from (value for node in graph.nodes for value in node.outputs)
    for loop in graph.loops:
        yield from loop.outputs
        for block in loop.blocks:
            yield from (*block.inputs, *(param.value for param in block.params))


def _walk(
    field: str, at: Spec, steps: Iterable[PricedStep], mesh: Mesh, shape: tuple[int, ...]
) -> Spec:
    """Where the steps lead from the spec `at`, over specs that can cut the shape."""
    _check_fits(field, at, shape, mesh)
    for priced in steps:
        step = priced.step
        _check_axes(field, step.axes, mesh)
        known = bool(step.axes) and all(at[axis] == step.a for axis in step.axes)
        _check(known, f"plan field `{field}`: step {step} does not follow {format_spec(at)}")
        for traffic in priced.traffic:
            _check_axes(field, traffic.axes, mesh)
        at = tuple(step.b if axis in step.axes else state for axis, state in enumerate(at))
        _check_fits(field, at, shape, mesh)
    return at


def _check_axes(field: str, axes: Sequence[int], mesh: Mesh) -> None:
    fits = len(set(axes)) == len(axes) and all(axis < len(mesh.axes) for axis in axes)
    _check(fits, f"plan field `{field}`: {list(axes)} are not axes of {mesh}")


def _check_recached(plan: PlanData) -> None:
    """Caches that are converted are prefill's and decode's, laid out as both decided."""
    if plan.decode is None:
        _check(not plan.recached, "plan field `recached`: there is one phase alone")
        return
    ours, theirs = all_cached(plan.graph), all_cached(plan.decode.graph)
    _check(set(ours) == set(theirs), "prefill and decode have not the same caches")
    found = {cached.node.name: (cached, theirs[key]) for key, cached in ours.items()}
    found = {name: pair for name, pair in found.items() if keeps_tokens(pair[0].node)}
    for recache in plan.recached:
        _check(recache.node in found, f"plan field `recached`: no cache is of `{recache.node}`")
        before, after = found[recache.node]
        chosen = plan.decisions.choices[before.node.name]
        wanted = plan.decode.decisions.choices[after.node.name]
        ends = (cache_spec(before.node, chosen), cache_spec(after.node, wanted))
        fits = (recache.source, recache.target) == ends and recache.path[-1] == recache.target
        _check(fits, f"plan field `recached.{recache.node}`: it does not lead from {ends}")


def _same(field: str, given: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    for name in given:
        _check(name in wanted, f"plan field `{field}`: the graph has no `{name}`")
    for name in wanted:
        _check(name in given, f"plan field `{field}` has no `{name}`")


def _check(good: bool, wrong: str) -> None:
    if not good:
        raise PlanError(wrong)


__all__ = ["check_plan"]
