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

from ...costmodel.timeline import StageTimes, played
from ...facts.mesh import Mesh
from ...facts.schedules import PipelineSchedule, refusal, schedule
from ...facts.spec import Spec
from ...facts.units import format_seconds
from ...ir.graph import Graph
from ...ir.passes.stages import Stage, cut_into_stages, layer_count, shared_params
from ...ir.passes.unfuse import unfuse
from ..errors import InfeasibleError, LayoutError, PlanError
from ..plan.decide import Solved, decide, plan_of
from ..plan.plan import Pipeline, PlanData, PlannedStage, Request, Search
from ..strategies.build import Decisions
from ..strategies.regions import scopes
from ..strategies.setting import Setting
from .cuts import balanced_layers, even_layers, improved_layers, stage_seconds
from .infeasible import explain
from .search import Job, clash_at, token_orders
from .shapes import Shape, check_runnable
from .stages import AXIS, End, Ends, ends_of, join, most_in_flight, specs_of

_TRIES = 20_000  # actions played for one move of a layer: more take longer than they are worth
_FULL = 0.95  # of the memory, what stages are given that take more than equal shares
_MORE = 1.5  # times those, where no plan fits them


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

    table = plan.pipeline.table(plan.request.micro_batches)
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
        self.fixed: dict[End, Spec] = {}
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
        limit = self.room * self.request.memory_bytes / self.shape.per_rank
        most = most_in_flight(self.table, numbers)
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
        ends = ends_of(kind.stage.graph, kind.stage.taken, kind.stage.given)
        clashes: list[str] = []
        for setting in self._settings(graph, kind.numbers):
            with job.clock.step("problem"):
                limit = Ends(job.limit(graph, self.mesh), ends, self.fixed, self.stored)
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

    def _differing(self, stage: Stage, solved: Solved) -> dict[End, Spec]:
        """What a stage gives in another spec than it takes under the same name."""
        taken, given = specs_of(stage.graph, solved.decisions, stage.taken, stage.given)
        return {end: given[end] for end in taken if end in given and taken[end] != given[end]}

    def _fix(self, stage: Stage, solved: Solved) -> None:
        """Other stages take and give as this one does, and store what they share with it alike."""
        taken, given = specs_of(stage.graph, solved.decisions, stage.taken, stage.given)
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
        places = [self._place(number) for number in range(len(self.stages))]
        joined = join(self.table, places, plans, self.job.cluster)
        mesh = Mesh(((AXIS, self.table.ranks), *names.axes))
        proven = all(plan.search.status == "optimal" for plan in plans)
        search = Search(
            self.job.solver, "optimal" if proven else "feasible", 0.0, 1,
            tuple(self.job.clock.seconds.items()),
        )  # fmt: skip
        notes = tuple(dict.fromkeys(note for plan in plans for note in plan.notes))
        return PlanData(
            self.request, self.graph, mesh, Decisions({}, {}, {}), {}, {}, joined.seconds,
            joined.optimizer_s, joined.casts_s,
            joined.memory, (), search, notes,
            pipeline=joined.pipeline,
        )  # fmt: skip

    @property
    def _ranks(self) -> range:
        return range(self.table.ranks)

    def _kind_of(self, number: int) -> int:
        return next(n for n, kind in enumerate(self.kinds) if number in kind.numbers)

    def _plan_of(self, solved: Solved, request: Request) -> PlanData:
        status = solved.solution.status
        search = Search(self.job.solver, status, 0.0, 1, ())
        return plan_of(solved, request, search, ())

    def _place(self, number: int) -> PlannedStage:
        """A stage, before its seconds are known."""
        stage = self.stages[number]
        return PlannedStage(
            self._kind_of(number), layer_count(stage.graph), stage.first, stage.taken, stage.given,
            0.0, 0.0, 0.0, 0.0, 0.0,
        )  # fmt: skip


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


__all__ = ["make_pipeline_plan", "plan_cut", "plan_pipeline"]
