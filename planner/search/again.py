"""A plan asked again: its own decisions under other prices, and what else could have been decided.

Nothing is captured anew: the graph is the plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ...costmodel.machines.cluster import Cluster
from ...facts.mesh import Mesh
from ...facts.spec import Spec
from ...ir.graph import Graph, Param
from ...ir.reference.resizing import with_batch
from ..errors import InfeasibleError, PlanError
from ..plan.decide import Solved, decide, plan_of
from ..plan.plan import Pipeline, PlanData, Search
from ..strategies.bringing import Use
from ..strategies.build import Built, Decisions
from ..strategies.layout import Layout, limited
from ..strategies.regions import InLoop, Region, Strategy
from ..strategies.setting import Restriction, Setting, Within
from ..strategies.storage import Storage
from .search import Builders, Clock, Job, Progress
from .serving import make_serving_plan, serving_plan_on
from .shapes import default_micro_batches
from .staged import may_have_stages, with_stages
from .stages import join, most_in_flight
from .variants import make_plan

_TIME_LIMIT_S = 60.0
_NO_LIMIT = 1e18  # bytes


class Decided(Restriction):
    """What was decided, and nothing else."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """The choices that were taken."""
        return strategy.choices == _taken(region, self._decisions)

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """The spec that was taken."""
        return spec == self._decisions.specs[param.value.name]

    def allows_home(
        self, param: Param, name: str, storage: Storage, *, several: bool, homeless: Collection[int]
    ) -> bool:
        """The home that was taken, or none."""
        return storage.home == self._decisions.homes.get(param.value.name)


class NoWay(Exception):
    """A region cannot run as it was chosen to."""


class Choosing(Within):
    """What another restriction allows, with one region run only as `allowed` says."""

    def __init__(self, inner: Restriction, name: str, allowed: Callable[[Strategy], bool]) -> None:
        super().__init__(inner)
        self._name, self._allowed = name, allowed

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """As the other says, and in that region as asked for."""
        if region.name == self._name and not self._allowed(strategy):
            return False
        return super().allows(region, strategy)

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        """That region cannot run so."""
        if region.name == self._name:
            raise NoWay
        super().no_strategy(region, sizes)


def _taken(region: Region, decisions: Decisions) -> tuple[tuple[str, ...], ...]:
    return tuple(decisions.choices[node.name] for node in region.nodes)


Narrower: TypeAlias = Callable[[Restriction], Restriction]


def _as_it_is(restriction: Restriction) -> Restriction:
    """The same restriction."""
    return restriction


def _silent(step: str) -> None:
    """No progress is shown."""


@dataclass(frozen=True, slots=True)
class Live:
    """Bytes that are live while a region of `place` (`model.layers.3`, "" outside of layers) runs,
    `forward` or `backward`, by what they are for."""

    place: str
    phase: str
    bytes: dict[Use, float]


def _times(built: Built) -> Iterator[tuple[str, str, int]]:
    """(place, phase, time) of every time of a problem, in order."""
    found: dict[int, tuple[str, str]] = {}
    for region in built.builder.regions:
        scope = region.scope
        for phase, windows in (
            ("forward", built.times.ahead(scope)),
            ("backward", built.times.back(scope)),
        ):
            for window in windows:
                name = ""
                if scope.loop is not None and isinstance(scope.place, InLoop):
                    kinds = [i for i, k in enumerate(scope.loop.order) if k == scope.place.kind]
                    done = window.done if phase == "forward" else len(kinds) - 1 - window.done
                    name = f"{scope.loop.path}.{kinds[done]}"
                found |= dict.fromkeys(window.times, (name, phase))
    yield from ((*found[time], time) for time in sorted(found))


@dataclass(frozen=True, slots=True)
class Again:
    """A plan, and the machine that it is asked about; bytes of memory per GPU, None: the plan's.

    `in_flight`: the micro-batches that a stage keeps at once, if the plan is that of one.
    """

    plan: PlanData
    cluster: Cluster
    memory_bytes: float | None = None
    progress: Progress = _silent
    builders: Builders = field(default_factory=Builders)
    in_flight: int = 1

    def job(self, mesh: Mesh | None = None, layout: str = "", *, pinned: bool = True) -> Job:
        """What is searched for on `mesh` (None: on all candidates); pins and layout of the plan
        hold, unless another `layout` is asked for or they are not `pinned`."""
        limit = self.memory_bytes or self.plan.request.memory_bytes
        request = replace(self.plan.request, memory_bytes=limit)
        if layout or not pinned:
            request = replace(request, layout=layout, pins=())
        by_layout = Layout.parse(request.layout) if request.layout else None
        return Job(
            self.cluster,
            request,
            mesh if by_layout is None else by_layout.mesh,
            limited(request.pins, request.layout),
            "highs",
            _TIME_LIMIT_S,
            Clock(),
            self.progress,
            by_layout,
            baselines=False,
            builders=self.builders,
        )

    def check(self) -> None:
        """Raises PlanError for a plan that is not asked again."""
        plan = self.plan
        if plan.serves_in_stages:
            raise PlanError(
                f"{plan.graph.name} is served in stages, and such a plan is not asked again: plan"
                " it anew as you would have it, or ask a plan without stages (--mesh)"
            )

    def same(self) -> PlanData:
        """The plan's own decisions as they are priced here, whether or not they fit the memory."""
        plan = self.plan
        self.check()
        if plan.decode is not None:
            return self._same_served(plan, plan.decode)
        if plan.pipeline is not None:
            return self._same_staged(plan, plan.pipeline)
        job = self.job(plan.mesh)
        solved = self._solved(job, Decided(plan.decisions), limited_memory=False)
        assert solved is not None  # it has no limit, and its decisions were possible before
        return self._plan(solved, job)

    def _same_served(self, plan: PlanData, decode: PlanData) -> PlanData:
        def limit(graph: Graph, mesh: Mesh) -> Restriction:
            return Decided(plan.decisions if graph is plan.graph else decode.decisions)

        job = self.job(plan.mesh)
        free = replace(job, limit=limit, request=replace(job.request, memory_bytes=_NO_LIMIT))
        served = serving_plan_on(plan.graph, decode.graph, plan.mesh, free)
        assert served is not None
        return served

    def _same_staged(self, plan: PlanData, pipeline: Pipeline) -> PlanData:
        kinds = [kind.same() for kind in self.kinds()]
        joined = join(
            pipeline.table(plan.request.micro_batches), pipeline.stages, kinds, self.cluster
        )
        return replace(
            plan, seconds=joined.seconds, optimizer_s=joined.optimizer_s, casts_s=joined.casts_s,
            memory=joined.memory, pipeline=joined.pipeline,
        )  # fmt: skip

    def kinds(self) -> list[Again]:
        """The plans of the stages of a pipeline, each to be asked about by itself, with as much of
        a rank's memory as its stages have at most."""
        plan, found = self.plan, list[Again]()
        pipeline = plan.pipeline
        assert pipeline is not None
        limit = (self.memory_bytes or plan.request.memory_bytes) / pipeline.per_rank
        table = pipeline.table(plan.request.micro_batches)
        for number, kind in enumerate(pipeline.kinds):
            stages = [n for n, stage in enumerate(pipeline.stages) if stage.kind == number]
            most = most_in_flight(table, stages)
            room = max(limit, kind.memory.total)  # stages with more than equal shares have them
            found.append(
                Again(kind, self.cluster, room, self.progress, self.builders, in_flight=most)
            )
        return found

    def best(self) -> PlanData:
        """The best plan here, with as many micro-batches as the plan has: on any mesh that was
        tried for it, or on its own if that was given, with stages if it may have them.  Raises
        InfeasibleError where nothing fits."""
        plan = self.plan
        one = plan.mesh if plan.search.meshes == 1 and plan.pipeline is None else None
        job = self.job(plan.mesh if plan.request.pins else one)
        if plan.decode is not None:
            return make_serving_plan(plan.graph, plan.decode.graph, job)
        found: PlanData | InfeasibleError
        try:
            found = make_plan(plan.graph, job)
        except InfeasibleError as error:
            found = error
        if plan.training and may_have_stages(job):
            return with_stages(lambda _: plan.graph, job, found, several=False)
        if isinstance(found, InfeasibleError):
            raise found
        return found

    def with_layout(self, layout: str) -> PlanData:
        """The plan that an ordinary layout gives, with the micro-batches of the plan; a pipeline
        beside one without stages with as many as it wants, and that beside a pipeline with as few
        as fit.

        Raises LayoutError where it is not possible, InfeasibleError where it does not fit.
        """
        asked, request = Layout.parse(layout), self.plan.request
        if asked.ranks != request.gpus:
            raise PlanError(
                f"--why-not {layout}: it is for {asked.ranks} GPUs, the plan for {request.gpus}"
            )
        self.check()
        if asked.pipeline > 1 and not self.plan.training:
            raise PlanError(
                f"--why-not {layout}: a plan of phase {request.phase} is not set beside one with"
                f" stages; plan that, --layout {layout}, and compare the two"
            )
        job, graph = self.job(layout=layout), self.plan.graph
        if self.plan.decode is not None:
            return make_serving_plan(graph, self.plan.decode.graph, job)
        error: PlanError | None = None
        for many, smaller in self._micro_batches(asked):
            try:
                return make_plan(
                    smaller, replace(job, request=replace(job.request, micro_batches=many))
                )
            except InfeasibleError as none_fits:
                error = error or none_fits
        assert error is not None  # there is one number of micro-batches at least
        raise error

    def _micro_batches(self, asked: Layout) -> Iterator[tuple[int, Graph]]:
        """Numbers of micro-batches to try for a layout, and the graph of one: those of the plan,
        but where the plan has stages and the layout has none or the other way round, and the graph
        tells what it is of other numbers of sequences."""
        request, graph = self.plan.request, self.plan.graph
        if (asked.pipeline > 1) == (self.plan.pipeline is not None):
            yield request.micro_batches, graph
            return
        counts = [2**k for k in range(request.batch.bit_length())]
        if asked.pipeline > 1:
            name = "interleaved" if asked.per_rank > 1 else "1f1b"
            counts = [default_micro_batches(request.batch, asked, name)]
        sizes = [(n, request.batch // n) for n in counts if request.batch % n == 0]
        found = [(n, made) for n, rows in sizes if (made := with_batch(graph, rows)) is not None]
        yield from found or [(request.micro_batches, graph)]

    def memory(self) -> list[Live]:
        """What is live when, in a step of the plan's own decisions.

        Of a loop's layers those that the problem has times for: the first and the last of each
        kind that have the same weights on their way.
        """
        plan, job = self.plan, self.job(self.plan.mesh)
        setting = replace(self._setting(job), memory_bytes=None)
        built = job.builder(plan.graph, plan.mesh, setting).build(Decided(plan.decisions))
        solution = job.solution(built.problem(), plan.mesh)
        assert solution.assignment is not None  # what was decided was possible before
        return [
            Live(place, phase, built.memory_at(solution.assignment, time))
            for place, phase, time in _times(built)
        ]

    # -- one operator -----------------------------------------------------------------------------

    def regions(self) -> list[Region]:
        """What is decided together."""
        plan, job = self.plan, self.job(self.plan.mesh)
        return job.builder(plan.graph, plan.mesh, self._setting(job)).regions

    def taken(self, region: Region, decided: Decisions) -> Strategy:
        """How decisions run it."""
        choices = _taken(region, decided)
        return next(way for way in region.strategies if way.choices == choices)

    def solved_with(
        self, region: Region, allowed: Callable[[Strategy], bool], within: Narrower = _as_it_is
    ) -> Solved | None:
        """The best on the plan's mesh in which a region runs as `allowed` says, and that is
        `within` a restriction made of the plan's; None if there is none, or none fits.

        Raises PlanError where the time was too short to find out.
        """
        plan, job = self.plan, self.job(self.plan.mesh)
        inner = within(job.limit(plan.graph, plan.mesh))
        return self._solved(job, Choosing(inner, region.name, allowed))

    def seconds_of(self, region: Region, way: Strategy) -> float:
        """Seconds of a step that the nodes of a region take by themselves."""
        plan, job = self.plan, self.job(self.plan.mesh)
        builder = job.builder(plan.graph, plan.mesh, self._setting(job))
        again = plan.decisions.again(region.scope)
        runs = region.scope.weight * plan.request.micro_batches
        pairs = zip(region.nodes, way.choices, strict=True)
        works = [(builder.work(node, choices), again[node.name]) for node, choices in pairs]
        return runs * sum(work.seconds + work.again_s(more) for work, more in works)

    def others(self, region: Region) -> Iterator[Strategy]:
        """The ways to run a region that differ from the plan's on one axis."""
        now, sizes = self.taken(region, self.plan.decisions), self.plan.mesh.sizes
        for way in region.strategies:
            apart = _axes_apart(way, now)
            if len(apart) == 1 and sizes[min(apart)] > 1:
                yield way

    def _setting(self, job: Job) -> Setting:
        decided = self.plan.decisions
        return replace(
            job.setting, recompute=decided.recompute, order=decided.order,
            kept_layers=decided.kept_layers, part_layers=decided.part_layers,
            in_flight=self.in_flight,
        )  # fmt: skip

    def _solved(
        self, job: Job, restriction: Restriction, *, limited_memory: bool = True
    ) -> Solved | None:
        graph, mesh = self.plan.graph, self.plan.mesh
        setting = self._setting(job)
        if not limited_memory:
            setting = replace(setting, memory_bytes=None)
        try:
            built = job.builder(graph, mesh, setting).build(restriction)
        except NoWay:
            return None
        problem = built.problem()
        solution = job.solution(problem, mesh)
        if solution.assignment is None:
            return None
        return decide(built, problem, solution.assignment, solution)

    def _plan(self, solved: Solved, job: Job) -> PlanData:
        search = Search(job.solver, solved.solution.status, 0.0, 1, ())
        made = plan_of(solved, job.request, search, ())
        return replace(made, mesh=self.plan.mesh)


def _axes_apart(one: Strategy, other: Strategy) -> set[int]:
    """On which axes two strategies differ."""
    return {
        axis
        for a, b in zip(one.choices, other.choices, strict=True)
        for axis, (x, y) in enumerate(zip(a, b, strict=True))
        if x != y
    }


__all__ = ["Again", "Choosing", "Decided", "Live", "Narrower", "NoWay"]
