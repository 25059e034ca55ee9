"""Which pipeline is fastest: numbers of ranks and stages, the mesh of a stage, schedule and
micro-batches.

Each pipeline that is considered has a least time, by which the search goes, best first:

1. What the whole model takes on one GPU, shared out perfectly over all, with the waiting of a
   schedule of equal stages.  It costs next to nothing.
2. What the whole model takes on the mesh of a stage, if memory had no limit, shared out perfectly
   over the ranks: one integer program for all pipelines of stages on that mesh.  Its layers, cut
   as they best are, give a rough time; where that is no better than the best plan, so is the plan.
3. Its plan (`pipeline.py`): stages within memory, played through.

A pipeline whose least time is no better than the best plan so far is never planned.  So where none
can win, the search ends early; the least time of those that were left is a bound that no pipeline
considered goes below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import TypeAlias

from ...costmodel.timeline import peak_in_flight, played
from ...facts.mesh import Mesh
from ...facts.schedules import refusal, schedule
from ...facts.units import format_seconds
from ...ir.graph import Graph
from ...ir.ops.counted import counted_labels
from ...ir.ops.registry import operator_of
from ...ir.passes.stages import cut_into_stages, layer_count
from ..errors import PlanError
from ..plan.decide import Solved, decide
from ..plan.plan import PlanData
from ..strategies.build import Builder, Built
from ..strategies.launches import launches_s
from ..strategies.network import Network
from ..strategies.params import all_params
from ..strategies.regions import scopes
from ..strategies.setting import Restriction
from .cuts import even_layers
from .infeasible import state_bytes
from .pipeline import plan_pipeline
from .rough import Rough, rough_of
from .search import Clock, Job, candidate_meshes, token_orders
from .shapes import Shape, check_runnable

GraphOf: TypeAlias = Callable[[int], Graph]
"""The graph of a micro-batch where a step has so many of them."""

_STAGES_PER_RANK = (1, 2, 4)
_UNEVEN = 0.88  # of the time of even stages: what uneven ones take at least
_WAITING = 1.0  # ranks wait for one another at most as long as they compute
_TOKENS = 16384  # of a micro-batch on a GPU: more make kernels no faster
_SOLVED, _ROUND = 12, 4  # integer programs of whole models, all and before a pipeline is planned
_SOLVE_S = 4.0  # for each of them
_PLANNED = 4  # pipelines


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pipeline to be considered, of so many micro-batches."""

    shape: Shape
    micro_batches: int

    @property
    def words(self) -> str:
        """As reports call it."""
        shape = self.shape
        each = f", {shape.per_rank} stages on each rank" if shape.per_rank > 1 else ""
        return (
            f"{shape.ranks} ranks of {shape.mesh.ranks} GPUs{each}, {self.micro_batches}"
            f" micro-batches by {shape.schedule}"
        )


@dataclass(frozen=True, slots=True)
class Pipelines:
    """What became of a search: the fastest plan that was made, of how many that were considered,
    and the least seconds that any of them takes.

    `rough` is the best of those that were not planned because of their rough time, with that;
    `why` none was planned, if there is a reason.
    """

    best: tuple[PlanData, Candidate] | None
    considered: int
    least: float
    rough: tuple[float, Candidate] | None = None
    why: str = ""

    @property
    def told(self) -> str:
        """What a report says of them."""
        if not self.considered:
            return f"No pipelines were considered: {self.why}"
        text = f"{self.considered} pipelines were considered"
        if self.best is not None:
            plan, candidate = self.best
            text += f"; the best plan of one ({candidate.words}) takes"
            text += f" {format_seconds(plan.seconds)}"
        elif self.why:
            text += f", of which none was planned: {self.why}"
        if self.rough is not None:
            seconds, candidate = self.rough
            others = "others" if self.best is not None else f"the best of them ({candidate.words})"
            text += f"; {others} would take {format_seconds(seconds)} or more"
        return f"{text}; none can take less than {format_seconds(self.least)}"


def search_pipelines(graph_of: GraphOf, job: Job, ceiling: float, *, several: bool) -> Pipelines:
    """The fastest pipeline, as far as any is faster than `ceiling` seconds.

    `several`: numbers of micro-batches may be chosen; else the request's is kept.  Raises PlanError
    for a schedule that was asked for and that modules do not run.
    """
    if job.request.schedule:
        check_runnable(job.request.schedule)
    with job.clock.step("pipelines"):
        if why := no_stages(graph_of(job.request.micro_batches)):
            return Pipelines(None, 0, inf, why=why)
        return _Search(graph_of, job, ceiling).run(several=several)


def no_stages(graph: Graph) -> str:
    """Why a graph has no stages that modules could run and `plan verify` compare; "" where it has.

    Stages draw random numbers apart from one another, so that no single process has them.
    """
    drawn = next((node for node in graph.nodes if operator_of(node).draws), None)
    if drawn is not None:
        return f"{drawn.loc} draws random numbers, which could not be compared with one process"
    if layer_count(graph) < 2:
        return f"{graph.name} has no repeated layers to share out"
    if not any(o.value.type.shape == () and o.value.differentiable for o in graph.outputs):
        return f"{graph.name} returns no loss, whose gradients a pipeline's step gives"
    if isinstance(why := counted_labels(graph), str):
        return why
    try:
        cut_into_stages(graph, even_layers(layer_count(graph), 2))
    except ValueError as error:
        return str(error)
    return ""


def candidates(layers: int, job: Job, *, several: bool) -> list[Candidate]:
    """The pipelines to be considered for a model of so many layers."""
    request = job.request
    counts = _counts(request.batch) if several else [request.micro_batches]
    found: list[Candidate] = []
    for ranks in range(2, min(request.gpus, layers) + 1):
        if request.gpus % ranks:
            continue
        for mesh in _stage_meshes(request.gpus // ranks, job):
            for many in counts:
                if _suits(request.batch // many, mesh, request.seq):
                    shapes = _shapes(ranks, mesh, layers, request.schedule)
                    found += [Candidate(s, many) for s in shapes if _turns(s, many)]
    return found


def _counts(batch: int) -> list[int]:
    """Numbers of micro-batches: the batch divided by 1, 2, 4 and so on, as far as it divides."""
    return [batch // rows for rows in range(1, batch) if rows & (rows - 1) == 0 == batch % rows]


def _stage_meshes(gpus: int, job: Job) -> list[Mesh]:
    """Those of one and two axes that are searched without stages."""
    return [mesh for mesh in candidate_meshes(gpus, job.cluster) if len(mesh.axes) < 3]


def _suits(rows: int, mesh: Mesh, tokens: int) -> bool:
    """Are rows of a micro-batch few for its ranks, and not fewer than its outer axis cuts?"""
    outer = mesh.sizes[0] if len(mesh.axes) > 1 else 1
    return rows % outer == 0 and rows <= mesh.ranks * max(2, _TOKENS // tokens)


def _shapes(ranks: int, mesh: Mesh, layers: int, asked: str) -> Iterator[Shape]:
    """Schedules over so many ranks, the one that was asked for if one was."""
    text = f"a pipeline of {ranks} ranks on {mesh} each"
    for per_rank in _STAGES_PER_RANK:
        usual = "1f1b" if per_rank == 1 else "interleaved"
        name = "gpipe" if (asked, per_rank) == ("gpipe", 1) else usual
        if ranks * per_rank <= layers and asked in ("", name):
            yield Shape(ranks, per_rank, name, mesh, text)


def _turns(shape: Shape, many: int) -> bool:
    """Is there such a schedule, and do its ranks work most of the time?"""
    waiting = (shape.ranks - 1) / shape.per_rank
    return waiting <= _WAITING * many and not refusal(
        shape.schedule, shape.ranks, shape.per_rank, many
    )


def least_turns(shape: Shape, micro_batches: int) -> float:
    """The least that a schedule takes, in times of a micro-batch through all stages.

    Stages that take alike are best for 1F1B of more micro-batches than ranks.  With few, and with
    several stages on each rank, stages that take less and less are better: descent from random cuts
    finds up to a tenth (`tests/planner/test_free_pipelines.py`), and so much is allowed for.
    """
    ranks, many = shape.ranks, micro_batches
    even = (many + (ranks - 1) / shape.per_rank) / ranks
    if shape.per_rank == 1 and many > ranks:
        return even
    return max(many / ranks, 1.0, _UNEVEN * even)


@dataclass(order=True, slots=True)
class _Waiting:
    """A candidate with seconds that it takes at least; `told`: by those of its own micro-batches,
    its layers cut as they best are."""

    seconds: float
    serial: int
    told: bool = field(compare=False)
    candidate: Candidate = field(compare=False)


class _Search:
    def __init__(self, graph_of: GraphOf, job: Job, ceiling: float) -> None:
        self.graph_of, self.ceiling, self.asked = graph_of, ceiling, job
        self.aside = replace(
            job, clock=Clock(), progress=lambda _: None,
            time_limit_s=min(job.time_limit_s, _SOLVE_S),
        )  # fmt: skip
        whole = graph_of(job.request.micro_batches)
        self.layers = layer_count(whole)
        self.state = sum(state_bytes(whole, job.setting)) / job.request.gpus
        self.weights = sum(
            float(ref.weight * ref.param.value.type.numel * ref.param.value.type.dtype.itemsize)
            for ref in all_params(whole)
            if ref.trainable
        )
        self.jobs: dict[int, Job] = {}
        self.alone: dict[int, tuple[float, float]] = {}  # by micro-batches
        self.whole: dict[int, Solved] = {}  # the same, as it is solved
        self.bounds: dict[tuple[Mesh, int], float] = {}
        self.rough: dict[tuple[Mesh, int], Rough | None] = {}
        self.serial = count()
        self.waiting: list[_Waiting] = []
        self.known: list[tuple[float, int, Candidate]] = []  # by rough seconds, worth a plan
        self.slow: tuple[float, Candidate] | None = None
        self.best: tuple[PlanData, Candidate] | None = None
        self.planned, self.why = 0, ""

    def run(self, *, several: bool) -> Pipelines:
        found = candidates(self.layers, self.asked, several=several)
        if not found:
            return Pipelines(None, 0, inf, why=f"{self.layers} layers make no stages here")
        self._alone(min(each.micro_batches for each in found))
        for each in found:
            heappush(self.waiting, _Waiting(self._least(each), next(self.serial), False, each))
        while self.planned < _PLANNED:
            self._look_around()
            if not self.known:
                break
            self._plan(*heappop(self.known))
        for rest in self.waiting[:1]:  # what was not looked at
            self._note(rest.seconds, rest.candidate)
        least = min(self.ceiling, *map(self._least, found))
        return Pipelines(self.best, len(found), least, self.slow, self.why)

    def _look_around(self) -> None:
        """Find rough times of some that may be faster than the best, until one is."""
        before = len(self.rough)
        while self.waiting and self.waiting[0].seconds < self.ceiling:
            enough = len(self.rough) >= before + _ROUND and self.known
            if enough or len(self.rough) >= _SOLVED:
                return
            self._look(heappop(self.waiting))

    def _look(self, first: _Waiting) -> None:
        """Know more of one, and let it wait again where others may be faster then."""
        candidate, many = first.candidate, first.candidate.micro_batches
        if not first.told:
            self._alone(many)
            rough = rough_of(self.whole[many], candidate.shape.mesh.ranks)
            seconds = self._seconds(candidate, rough) + self._between_nodes(candidate.shape)
            heappush(self.waiting, _Waiting(seconds, next(self.serial), True, candidate))
            return
        self._solve(candidate)
        rough = self.rough[candidate.shape.mesh, many]
        if rough is not None and (seconds := self._seconds(candidate, rough)) < self.ceiling:
            heappush(self.known, (seconds, next(self.serial), candidate))

    def _job(self, many: int) -> Job:
        if many not in self.jobs:
            request = replace(self.asked.request, micro_batches=many)
            self.jobs[many] = replace(
                self.aside, request=request, builders=self.aside.builders.for_others()
            )
        return self.jobs[many]

    def _builder(self, mesh: Mesh, many: int) -> Builder:
        """What builds problems of the whole model on a mesh, without a limit of memory."""
        job, graph = self._job(many), self.graph_of(many)
        order = token_orders(graph, mesh)[0]
        return job.builder(graph, mesh, replace(job.setting, memory_bytes=None, order=order))

    # --- least seconds: more micro-batches, which are smaller, take no less together -------------

    def _alone(self, many: int) -> None:
        """Seconds of a step on one GPU, and of a micro-batch's kernels if they were empty."""
        if many not in self.alone:
            mesh = Mesh((("x", 1),))
            solved = self._solved(self._builder(mesh, many).build(Restriction()), many)
            assert solved is not None  # there is no choice
            builder = solved.builder
            each = sum(s.weight * launches_s(builder, s) for s in scopes(builder.graph))
            self.alone[many] = solved.cost, each
            self.whole[many] = solved

    def _parts(self, candidate: Candidate) -> tuple[float, float]:
        """Of a step on one GPU what GPUs can share, and what each micro-batch takes besides."""
        many = candidate.micro_batches
        known = max(n for n in self.alone if n <= many)
        step, launches = self.alone[known]
        return step - known * launches, launches

    def _least(self, candidate: Candidate) -> float:
        """The least that it takes, by its share of one GPU's time and, as far as problems of its
        mesh were solved, by that of the mesh."""
        shared, launches = self._parts(candidate)
        shape, many = candidate.shape, candidate.micro_batches
        equal = shared / shape.gpus + many * launches / shape.ranks
        known = [s for (mesh, n), s in self.bounds.items() if mesh == shape.mesh and n <= many]
        return max(equal, max(known, default=0.0) / shape.ranks) + self._waiting_s(candidate)

    def _waiting_s(self, candidate: Candidate) -> float:
        """Seconds beyond an equal share of work, by the least that a micro-batch takes."""
        shared, launches = self._parts(candidate)
        shape, many = candidate.shape, candidate.micro_batches
        each = shared / many / shape.mesh.ranks + launches
        return (least_turns(shape, many) - many / shape.ranks) * each

    def _solve(self, candidate: Candidate) -> None:
        """The problem of the whole model on the mesh of a stage."""
        shape, many = candidate.shape, candidate.micro_batches
        key = shape.mesh, many
        if key in self.bounds:
            return
        self.asked.progress(f"bounding pipelines whose stages run on {shape.mesh.ranks} GPUs")
        worth = self.ceiling * shape.ranks  # for any schedule
        self.bounds[key], self.rough[key] = 0.0, None
        with suppress(PlanError):  # there was too little time
            solved = self._solved(self._builder(*key).build(Restriction()), many, worth, key)
            self.rough[key] = None if solved is None else rough_of(solved)

    def _solved(
        self, built: Built, many: int, worth: float = inf, key: tuple[Mesh, int] | None = None
    ) -> Solved | None:
        """The optimum, if it is below `worth`; its bound is noted under the `key`."""
        problem = built.problem()
        solution = self._job(many).solution(problem, built.builder.network.mesh, worth)
        if key is not None:
            self.bounds[key] = solution.bound
        if solution.assignment is None:
            return None
        return decide(built, problem, solution.assignment, solution)

    # --- plans -----------------------------------------------------------------------------------

    def _seconds(self, candidate: Candidate, rough: Rough) -> float:
        """Its rough time, layers recomputed where they are not kept by the first rank."""
        shape = candidate.shape
        table = schedule(shape.schedule, shape.ranks, shape.per_rank, candidate.micro_batches)
        room = self.asked.request.memory_bytes - self.state
        ways = (rough, rough.in_part(), rough.recomputed())

        def fits(way: Rough) -> bool:
            return peak_in_flight(table, 0, [way.kept / shape.stages] * shape.stages) <= room

        rough = next(filter(fits, ways), ways[-1])
        seconds = played(table, rough.stages(shape.stages)).seconds
        if seconds >= self.ceiling:
            self._note(seconds, candidate)
        return seconds

    def _between_nodes(self, shape: Shape) -> float:
        """Seconds of summing gradients over the nodes of a stage, half of them hidden: what tells
        meshes apart before their problems are solved."""
        mesh, inner = shape.mesh, shape.mesh.sizes[-1] if len(shape.mesh.axes) > 1 else 1
        if mesh.ranks <= self.asked.cluster.gpus_per_node:
            return 0.0
        network = Network(mesh, self.asked.cluster)
        return 0.5 * network.seconds("all_reduce", (0,), self.weights / shape.ranks / inner)

    def _note(self, seconds: float, candidate: Candidate) -> None:
        """One that is not planned, as it takes so long or more."""
        if self.slow is None or seconds < self.slow[0]:
            self.slow = seconds, candidate

    def _plan(self, rough: float, _: int, candidate: Candidate) -> None:
        shape, many = candidate.shape, candidate.micro_batches
        if rough >= self.ceiling:
            return
        self.asked.progress(f"solving a pipeline: {candidate.words}")
        self.planned += 1
        try:
            plan = plan_pipeline(self.graph_of(many), self._job(many), shape, self.ceiling)
        except PlanError as error:
            self.why = self.why or str(error)
            return
        if self.best is None or plan.seconds < self.best[0].seconds:
            self.best = plan, candidate
            self.ceiling = min(self.ceiling, plan.seconds)


__all__ = [
    "Candidate", "GraphOf", "Pipelines", "candidates", "least_turns", "no_stages",
    "search_pipelines",
]  # fmt: skip
