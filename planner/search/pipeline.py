"""Plans of pipelines: a graph cut into stages, each with a plan of its own on an equal part of the
GPUs, and a schedule.

Every stage has as many ranks, in a mesh of one shape.  Layers are shared out evenly first; what the
ends do besides then tells how to share them out so that the slowest stage is fastest, and the
faster of the two plans is kept.  Stages of one kind (as many layers of each kind, the same ends)
have one plan, which is that of the first of them: it has most micro-batches in flight.  What goes
from stage to stage is sent as it lies, so that it lies alike in both; that is decided with the kind
of most layers, and so is how a parameter of several stages is stored.

A step takes what the schedule takes when it is played through (`costmodel/timeline.py`), with what
each rank does once a step besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from ...costmodel.timeline import StageTimes, Timeline, in_flight, peak_in_flight, played
from ...facts.mesh import Mesh
from ...facts.schedules import PipelineSchedule, refusal, schedule
from ...facts.spec import Spec
from ...facts.units import format_seconds
from ...ir.graph import Graph, Param, TensorType, Value
from ...ir.ops.local import local_bytes
from ...ir.passes.stages import Stage, cut_into_stages, layer_count, shared_params
from ...ir.passes.unfuse import unfuse
from ..errors import InfeasibleError, LayoutError, PlanError
from ..plan.decide import Solved, decide, plan_of
from ..plan.plan import Memory, Pipeline, PlanData, PlannedStage, Request, Search
from ..plan.program import Convert, Program
from ..strategies.build import Decisions
from ..strategies.network import Network
from ..strategies.regions import scopes
from ..strategies.setting import Restriction, Setting, Within
from .cuts import balanced_layers, even_layers, improved_layers, stage_seconds
from .infeasible import explain
from .search import Job, clash_at, token_orders
from .shapes import Shape, check_runnable

_TRIES = 20_000  # actions played for one move of a layer: more take longer than they are worth
_FULL = 0.95  # of the memory, what stages are given that take more than equal shares
_MORE = 1.5  # times those, where no plan fits them
AXIS = "pp"  # the outermost axis of the mesh, between stages


def make_pipeline_plan(graph: Graph, job: Job) -> PlanData:
    """The plan of a layout with a pipeline.

    Raises PlanError, in a sentence, where there is none, InfeasibleError where none fits.
    """
    assert job.layout is not None
    return plan_pipeline(graph, job, Shape.of(job.request, job.layout))


def plan_pipeline(graph: Graph, job: Job, shape: Shape, ceiling: float = inf) -> PlanData:
    """The fastest plan of a shape, its layers shared out evenly or by what stages take.

    Raises as `make_pipeline_plan` does, and PlanError where all take `ceiling` seconds or more.
    """
    found: list[PlanData] = []
    errors: list[PlanError] = []
    apart = unfuse(graph)
    for variant in [graph] if apart is graph else [graph, apart]:
        try:
            job.check(variant)
            even = even_layers(layer_count(variant), shape.stages)
            found.append(_within(variant, job, shape, even, ceiling))
            layers = _better_layers(found[-1], ceiling)
            if layers is not None:
                found.append(_within(variant, job, shape, layers, ceiling))
            best = min(found, key=lambda plan: plan.seconds)
            if (room := _room(best)) > 1.0:
                own = [stage.layers for stage in _pipeline(best).stages]
                roomy = _Planning(variant, job, shape, own, ceiling, room).plan()
                found += [roomy] if roomy.memory.total <= job.request.memory_bytes else []
        except PlanError as error:
            errors.append(error)
    if not found:
        raise errors[-1]
    return min(found, key=lambda plan: plan.seconds)


def _within(
    graph: Graph, job: Job, shape: Shape, layers: Sequence[int], ceiling: float
) -> PlanData:
    """The plan of a cut, whose stages take equal shares of a rank's memory, or more where none fits
    and the rank's is not full."""
    try:
        return _Planning(graph, job, shape, layers, ceiling).plan()
    except InfeasibleError:
        if shape.per_rank == 1:
            raise
        plan = _Planning(graph, job, shape, layers, ceiling, _MORE).plan()
        if plan.memory.total > job.request.memory_bytes:
            raise
        return plan


def _pipeline(plan: PlanData) -> Pipeline:
    assert plan.pipeline is not None
    return plan.pipeline


def _room(plan: PlanData) -> float:
    """How much more than equal shares of memory stages may take; 1 where they need no more."""
    pipeline = _pipeline(plan)
    short = any(kind.decisions.recompute for kind in pipeline.kinds)
    if pipeline.per_rank == 1 or not short:
        return 1.0
    return _FULL * plan.request.memory_bytes / plan.memory.total


def plan_cut(graph: Graph, job: Job, shape: Shape, layers: Sequence[int]) -> PlanData:
    """The plan of a shape whose stages have so many layers; raises as `make_pipeline_plan`."""
    return _Planning(graph, job, shape, layers).plan()


def _better_layers(plan: PlanData, ceiling: float) -> list[int] | None:
    """How to share out layers by the times of stages that have them evenly; None for as they are,
    and where that takes no less than `ceiling`.

    Layers of different kinds take what their work does; a stage whose layers are recomputed takes
    longer for each.
    """
    assert plan.pipeline is not None
    stages, kinds = plan.pipeline.stages, plan.pipeline.kinds
    works = [_layer_work(kinds[stage.kind]) for stage in stages]
    each = [stage.forward_s + stage.backward_s for stage in stages]
    again = [kinds[stage.kind].decisions.recomputed for stage in stages]
    rates = {  # seconds for one of work, where nothing is done besides
        mode: min(s / sum(w) for s, w, m in zip(each, works, again, strict=True) if m == mode)
        for mode in set(again)
    }
    paces = [rates[mode] for mode in again]
    besides = [s - sum(w) * p for s, w, p in zip(each, works, paces, strict=True)]
    flat = [work for own in works for work in own]
    forward = sum(s.forward_s for s in stages) / sum(each)

    def seconds(layers: Sequence[int]) -> float:
        """Of the schedule, its layers shared out so."""
        own = stage_seconds(layers, flat, besides, paces)
        times = [
            StageTimes(forward * s, (1 - forward) * s, 0.0, stage.send_s, stage.send_back_s)
            for s, stage in zip(own, stages, strict=True)
        ]
        return played(table, times).seconds

    table = schedule(
        plan.pipeline.schedule, plan.pipeline.ranks, plan.pipeline.per_rank,
        plan.request.micro_batches,
    )  # fmt: skip
    now = [stage.layers for stage in stages]
    layers: Sequence[int] = balanced_layers(flat, besides, paces)
    if len(stages) ** 3 * plan.request.micro_batches <= _TRIES:
        layers = improved_layers(layers, seconds)
    worth = min(0.995, 1.05 * ceiling / plan.seconds) if plan.seconds else 0.0
    return list(layers) if seconds(layers) < worth * seconds(now) else None


def _layer_work(plan: PlanData) -> list[float]:
    """Seconds of the work of each layer of a stage, kept for backward."""
    of_block = {
        id(scope.block): sum(plan.work[node.name].seconds for node in scope.nodes)
        for scope in scopes(plan.graph)
        if scope.block is not None
    }
    return [of_block[id(loop.blocks[kind])] for loop in plan.graph.loops for kind in loop.order]


class _Ends(Within):
    """What `inner` allows of a stage whose ends, and shared parameters, lie as `fixed` says.

    Keys are names of inputs and outputs with their types, and names of parameters.
    """

    def __init__(
        self,
        inner: Restriction,
        ends: dict[str, tuple[str, TensorType]],
        fixed: dict[tuple[str, TensorType], Spec],
        stored: dict[str, Spec],
    ) -> None:
        super().__init__(inner)
        self._ends, self._fixed, self._stored = ends, fixed, stored

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """May the parameter be stored so?"""
        as_shared = self._stored.get(name, spec) == spec
        return as_shared and super().allows_storage(param, name, spec)

    def allows_end(self, value: Value, spec: Spec) -> bool:
        """May an input or output come and go so?"""
        end = self._ends.get(value.name)
        as_sent = end is None or self._fixed.get(end, spec) == spec
        return as_sent and super().allows_end(value, spec)


@dataclass(slots=True)
class _Kind:
    """Stages with equal graphs, by their numbers."""

    stage: Stage
    numbers: list[int]
    solved: Solved | None = None

    @property
    def layers(self) -> int:
        return layer_count(self.stage.graph)


class _Planning:
    """One cut of one graph, with one schedule."""

    def __init__(
        self,
        graph: Graph,
        job: Job,
        shape: Shape,
        layers: Sequence[int],
        ceiling: float = inf,
        room: float = 1.0,
    ) -> None:
        """`room`: by how much the stages of a rank may take more than equal shares of its memory,
        as they are not all at their peaks at once."""
        self.room = room
        self.graph, self.job, self.shape, self.ceiling = graph, job, shape, ceiling
        self.request, self.mesh = job.request, shape.mesh
        self.table = self._schedule()
        try:
            self.stages = cut_into_stages(graph, layers)
        except ValueError as error:
            raise PlanError(f"{shape.text}: {error}") from error
        self.shared = shared_params(self.stages)
        self.kinds = _kinds(self.stages)
        self.fixed: dict[tuple[str, TensorType], Spec] = {}
        self.stored: dict[str, Spec] = {}

    def _schedule(self) -> PipelineSchedule:
        shape, count = self.shape, self.request.micro_batches
        if why := refusal(shape.schedule, shape.ranks, shape.per_rank, count):
            raise PlanError(f"{shape.text}, {count} micro-batches: {why}")
        check_runnable(shape.schedule)
        return schedule(shape.schedule, shape.ranks, shape.per_rank, count)

    def plan(self) -> PlanData:
        self.job.progress(f"solving {len(self.kinds)} kinds of stages on {self.mesh}")
        for kind in sorted(self.kinds, key=lambda each: -each.layers):
            kind.solved = self._solved(kind)
            self._check_speed(kind)
            self._fix(kind.stage, kind.solved)
        orders = {self._decisions(kind).order for kind in self.kinds}
        if len(orders) > 1:  # what is sent has one order of tokens; stages that do not care take it
            for kind in self.kinds:
                decisions = replace(self._decisions(kind), order="zigzag")
                kind.solved = replace(_found(kind), decisions=decisions)
        return self._assembled()

    def _check_speed(self, kind: _Kind) -> None:
        """Raises PlanError where ranks take the ceiling or more for stages of a kind alone."""
        own = max(sum(n in kind.numbers for n in self.table.stages_of(r)) for r in self._ranks)
        seconds = own * _found(kind).seconds
        if seconds >= self.ceiling:
            raise PlanError(
                f"{self.shape.text}: a rank takes {format_seconds(seconds)} or more for its stages"
            )

    def _decisions(self, kind: _Kind) -> Decisions:
        return _found(kind).decisions

    # --- stages ----------------------------------------------------------------------------------

    def _settings(self, graph: Graph, numbers: Sequence[int]) -> list[Setting]:
        """Those to try: layers kept, recomputed in part, then whole."""
        kept = in_flight(self.table)
        limit = self.room * self.request.memory_bytes / self.shape.per_rank
        most = max(kept[number] for number in numbers)
        order = token_orders(self.graph, self.mesh)[0]
        settings = list(self.job.settings(graph))
        layers = max((len(loop.order) for loop in graph.loops), default=0)
        if len(settings) > 1 and layers:
            settings.insert(1, replace(settings[-1], part_layers=layers))
        return [
            replace(setting, in_flight=most, memory_bytes=limit, order=order)
            for setting in settings
        ]

    def _solved(self, kind: _Kind) -> Solved:
        """The plan of a kind of stage; InfeasibleError where none fits."""
        graph, job = kind.stage.graph, self.job
        ends = _ends_of(kind.stage)
        clashes: list[str] = []
        for setting in self._settings(graph, kind.numbers):
            with job.clock.step("problem"):
                limit = _Ends(job.limit(graph, self.mesh), ends, self.fixed, self.stored)
                built = job.builder(graph, self.mesh, setting).build(limit)
            problem = built.problem()
            solution = job.solution(problem, self.mesh)
            if solution.assignment is None:
                clashes.append(solution.clash)
                continue
            solved = decide(built, problem, solution.assignment, solution)
            twice = self._differing(kind.stage, solved)
            if not twice:
                return solved
            self.fixed |= twice  # it takes a value otherwise than it gives it
            return self._solved(kind)
        whole = replace(job.request, gpus=self.shape.gpus)
        if clashes and all(clashes):
            raise LayoutError(f"{self.shape.text}: {clash_at(clashes[-1], [graph])}")
        raise InfeasibleError(
            f"{self.shape.text}: stages {', '.join(map(str, kind.numbers))} do not fit; "
            + explain(self.graph, job.cluster, job.setting, whole)
        )

    def _differing(self, stage: Stage, solved: Solved) -> dict[tuple[str, TensorType], Spec]:
        """What a stage gives in another spec than it takes under the same name."""
        taken, given = _specs_of(stage, solved)
        return {end: given[end] for end in taken if end in given and taken[end] != given[end]}

    def _fix(self, stage: Stage, solved: Solved) -> None:
        """Other stages take and give as this one does, and store what they share with it alike."""
        taken, given = _specs_of(stage, solved)
        self.fixed |= {**taken, **given, **self.fixed}
        for param in stage.graph.params:
            if param.name in self.shared:
                self.stored.setdefault(param.name, solved.decisions.specs[param.value.name])

    # --- the plan --------------------------------------------------------------------------------

    def _assembled(self) -> PlanData:
        own = replace(self.request, gpus=self.mesh.ranks)
        plans = [self._plan_of(_found(kind), own) for kind in self.kinds]
        names = plans[max(range(len(plans)), key=lambda n: self.kinds[n].layers)].mesh
        plans = [replace(plan, mesh=names) for plan in plans]
        rows = [self._row(number, plans) for number in range(len(self.stages))]
        timeline = played(
            self.table,
            [StageTimes(r.forward_s, r.backward_s, 0.0, r.send_s, r.send_back_s) for r in rows],
        )
        seconds = self._seconds(timeline, rows)
        pipeline = Pipeline(
            self.table.name, self.table.ranks, timeline.bubble_share, tuple(rows), tuple(plans)
        )
        mesh = Mesh(((AXIS, self.table.ranks), *names.axes))
        memory = max((self._memory(r, rows, plans) for r in self._ranks), key=lambda m: m.total)
        proven = all(plan.search.status == "optimal" for plan in plans)
        search = Search(
            self.job.solver, "optimal" if proven else "feasible", 0.0, 1,
            tuple(self.job.clock.seconds.items()),
        )  # fmt: skip
        notes = tuple(dict.fromkeys(note for plan in plans for note in plan.notes))
        return PlanData(
            self.request, self.graph, mesh, Decisions({}, {}, {}), {}, {}, seconds,
            max(sum(plans[k].optimizer_s for k in self._kinds_of(r)) for r in self._ranks),
            max(sum(plans[k].casts_s for k in self._kinds_of(r)) for r in self._ranks),
            memory, (), search, notes,
            pipeline=pipeline,
        )  # fmt: skip

    def _memory(self, rank: int, rows: Sequence[PlannedStage], plans: Sequence[PlanData]) -> Memory:
        """What a rank holds at its peak: all of its stages' states, what micro-batches in flight
        keep of each, and one operator that runs."""
        own = self.table.stages_of(rank)
        parts = [plans[rows[number].kind].memory for number in own]
        kept = [0.0] * self.table.stages
        for number, part in zip(own, parts, strict=True):
            most = _found(self.kinds[rows[number].kind]).builder.setting.in_flight
            kept[number] = part.activations / most
        return Memory(
            sum(part.parameters for part in parts),
            sum(part.gradients for part in parts),
            sum(part.optimizer for part in parts),
            peak_in_flight(self.table, rank, kept),
            max(part.transient for part in parts),
        )

    @property
    def _ranks(self) -> range:
        return range(self.table.ranks)

    def _kinds_of(self, rank: int) -> list[int]:
        return [self._kind_of(number) for number in self.table.stages_of(rank)]

    def _kind_of(self, number: int) -> int:
        return next(n for n, kind in enumerate(self.kinds) if number in kind.numbers)

    def _plan_of(self, solved: Solved, request: Request) -> PlanData:
        status = solved.solution.status
        search = Search(self.job.solver, status, 0.0, 1, ())
        return plan_of(solved, request, search, ())

    def _row(self, number: int, plans: Sequence[PlanData]) -> PlannedStage:
        stage, kind = self.stages[number], self._kind_of(number)
        plan = plans[kind]
        forward, backward, once = _times(plan)
        send, back = self._sending(stage, plan)
        return PlannedStage(
            kind, layer_count(stage.graph), stage.first, stage.taken, stage.given,
            forward, backward, once, send, back,
        )  # fmt: skip

    def _sending(self, stage: Stage, plan: PlanData) -> tuple[float, float]:
        """Seconds to send what a stage gives, and gradients of what it took."""
        mesh = Mesh(((AXIS, self.table.ranks), *self.mesh.axes))
        network = Network(mesh, self.job.cluster)
        sizes = self.mesh.sizes
        ahead = sum(
            local_bytes(out.value, plan.decisions.outputs[out.value.name], sizes)
            for out in stage.graph.outputs
            if out.path and out.path[0] in stage.given
        )
        back = sum(
            local_bytes(each.value, plan.decisions.specs[each.value.name], sizes)
            for each in stage.graph.inputs
            if each.name in stage.taken and each.value.differentiable
        )
        found = [network.seconds("send_recv", (0,), n) if n else 0.0 for n in (ahead, back)]
        return found[0], found[1]

    def _seconds(self, timeline: Timeline, rows: Sequence[PlannedStage]) -> float:
        """Of a step: when the last rank has done what it does once a step, too."""
        return max(
            timeline.ends(rank) + sum(rows[n].once_s for n in self.table.stages_of(rank))
            for rank in self._ranks
        )


def _found(kind: _Kind) -> Solved:
    assert kind.solved is not None
    return kind.solved


def _kinds(stages: Sequence[Stage]) -> list[_Kind]:
    found: list[_Kind] = []
    for number, stage in enumerate(stages):
        same = [kind for kind in found if kind.stage.graph == stage.graph]
        if same:
            same[0].numbers.append(number)
        else:
            found.append(_Kind(stage, [number]))
    return found


def _ends_of(stage: Stage) -> dict[str, tuple[str, TensorType]]:
    """By value what it is called between stages, with its type: names alone may be of several."""
    graph = stage.graph
    ends = {x.value.name: (x.name, x.value.type) for x in graph.inputs if x.name in stage.taken}
    for out in graph.outputs:
        if out.path and out.path[0] in stage.given:
            ends[out.value.name] = (str(out.path[0]), out.value.type)
    return ends


def _specs_of(
    stage: Stage, solved: Solved
) -> tuple[dict[tuple[str, TensorType], Spec], dict[tuple[str, TensorType], Spec]]:
    """How a stage takes and gives what goes between stages."""
    decisions, graph = solved.decisions, stage.graph
    taken = {
        (x.name, x.value.type): decisions.specs[x.value.name]
        for x in graph.inputs
        if x.name in stage.taken
    }
    given = {
        (str(out.path[0]), out.value.type): decisions.outputs[out.value.name]
        for out in graph.outputs
        if out.path and out.path[0] in stage.given
    }
    return taken, given


def _times(plan: PlanData) -> tuple[float, float, float]:
    """Seconds of a stage: forward and backward of a micro-batch, and once a step.

    What a step takes is that of its plan; between forward and backward it is divided as the work
    of nodes is, and conversions by the traffic that they have there.
    """
    program = plan.program
    home = sum(
        layers * sum(step.seconds for step in weight.homecoming)
        for weight, layers in program.brought()
    )
    once = plan.optimizer_s + plan.casts_s + home
    ahead, back = _shares(plan, program)
    each = max(plan.seconds - once, 0.0) / plan.request.micro_batches
    share = ahead / (ahead + back) if ahead + back else 1 / 3
    return share * each, (1 - share) * each, once


def _shares(plan: PlanData, program: Program) -> tuple[float, float]:
    """Seconds of forward and backward of a micro-batch, as far as they are told apart."""
    ahead = back = 0.0
    for scope in scopes(plan.graph):
        again = plan.decisions.again(scope)
        for node in scope.nodes:
            work = plan.work[node.name]
            ahead += scope.weight * work.forward_s
            back += scope.weight * (work.backward_s + again[node.name] * work.forward_s)
    for item, times in program.flat():
        if isinstance(item, Convert):
            first, total = item.priced.forward, sum(t.bytes for t in item.priced.traffic)
            share = (first.bytes if first else 0) / total if total else 0.5  # others come again
            ahead += times * share * item.priced.seconds
            back += times * (1 - share) * item.priced.seconds
    return ahead, back


__all__ = ["make_pipeline_plan", "plan_cut", "plan_pipeline"]
