"""Which served pipeline is fastest: numbers of ranks, the mesh of a stage, and micro-batches.

Where links between nodes are slow, or a model does not fit a node, stages on different nodes send
activations alone.  Pipelines are planned one after another, those first whose stages fill a node;
each is given up as soon as its stage of most layers is known to be too slow for one that is faster
than the best so far: a stage runs once for each micro-batch, and each of them passes all stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isinf

from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.schedules import FORWARD
from ...facts.units import format_seconds
from ...ir.graph import Graph
from ...ir.passes.stages import layer_count
from ..errors import InfeasibleError, LayoutError, PlanError
from ..plan.plan import Baseline, PlanData
from ..strategies.layout import Layout
from .search import Clock, Job, candidate_meshes
from .served_stages import has_caches, make_served_pipeline, served_pipeline
from .shapes import Shape, most_that_divide

GraphsOf = Callable[[int], Sequence[Graph]]
"""The graphs of all phases of a micro-batch, where a run has so many of them."""

_RANKS = (2, 4, 8, 16)
_MORE = (2, 4)  # times as many micro-batches as ranks: the bubble of prefill is smaller


def with_served_stages(
    graphs_of: GraphsOf, job: Job, without: PlanData | InfeasibleError, *, several: bool
) -> PlanData:
    """The fastest plan of a model that is served, given that `without` stages, or why there is
    none.

    Pipelines are considered where there are several nodes, or where nothing else fits.  `several`:
    the number of micro-batches may be chosen.  Raises InfeasibleError where nothing fits.
    """
    plan = None if isinstance(without, InfeasibleError) else without
    few = job.request.gpus <= job.cluster.gpus_per_node and plan is not None
    if few or not has_caches(graphs_of(job.request.micro_batches)):
        return _given(without)
    with job.clock.step("pipelines"):
        search = _Search(graphs_of, job, inf if plan is None else plan.whole_s, several=several)
        search.run()
    best = search.best
    rows = tuple(search.rows)
    if best is None:
        made = _given(without)
        seconds = tuple(job.clock.seconds.items())
        return replace(
            made, baselines=(*made.baselines, *rows), notes=(*made.notes, search.told),
            search=replace(made.search, seconds=seconds),
        )  # fmt: skip
    return _with_notes(best, plan, rows, search)


def _given(without: PlanData | InfeasibleError) -> PlanData:
    if isinstance(without, InfeasibleError):
        raise without
    return without


def _with_notes(
    best: PlanData, plan: PlanData | None, rows: tuple[Baseline, ...], search: _Search
) -> PlanData:
    """The plan of a pipeline, which stands beside the best `plan` without stages."""
    alone, bound = "does not fit", search.least
    if plan is not None:
        alone = f"takes {format_seconds(plan.whole_s)} on mesh {plan.mesh}"
        bound = min(bound, plan.whole_s * (1 - plan.search.gap))
    found = replace(
        best.search, gap=max(0.0, 1 - bound / best.whole_s), status="feasible",
        seconds=tuple(search.job.clock.seconds.items()),
    )  # fmt: skip
    notes = (*best.notes, f"Without stages the fastest plan {alone}", search.told)
    baselines = (*(plan.baselines if plan is not None else ()), *rows)
    request = replace(best.request, layout="")
    return replace(best, request=request, search=found, baselines=baselines, notes=notes)


@dataclass
class _Search:
    """Pipelines one after another; `ceiling`: seconds that are to be beaten.

    `rows` are those of ordinary pipelines, `least` the least seconds that any takes, `unsolved` the
    number of those of which it was not found out.
    """

    graphs_of: GraphsOf
    job: Job
    ceiling: float
    several: bool
    best: PlanData | None = None
    rows: list[Baseline] = field(default_factory=list[Baseline])
    least: float = inf
    considered: int = 0
    unsolved: int = 0

    def run(self) -> None:
        """Consider all."""
        self._ordinary()
        fastest: tuple[int, Mesh] | None = None
        for place in self._places():
            if self._try(*place, self._counts(place[0])[0]):
                fastest = place
        if fastest is not None:
            for count in self._counts(fastest[0])[1:]:
                self._try(*fastest, count)

    @property
    def told(self) -> str:
        """What a report says of them."""
        if not self.considered:
            return "No pipelines were considered: no number of stages divides GPUs and layers"
        text = f"{self.considered} pipelines were considered"
        if self.best is not None and self.best.pipeline is not None:
            pipeline, many = self.best.pipeline, self.best.request.micro_batches
            text += f"; the best ({pipeline.ranks} ranks of {pipeline.kinds[0].mesh.ranks} GPUs,"
            text += f" {many} micro-batches) takes {format_seconds(self.best.whole_s)}"
        if self.unsolved:
            return f"{text}; of {self.unsolved} none was found in the time"
        if isinf(self.least):
            return f"{text}; none fits the memory and the sizes"
        return f"{text}; none can take less than {format_seconds(self.least)}"

    def _counts(self, ranks: int) -> list[int]:
        """Numbers of micro-batches to try."""
        request = self.job.request
        if not self.several:
            return [request.micro_batches]
        prompts = find_phase(find_phase(request.phase).programs[0]).tokens != 1
        wanted = [ranks, *(ranks * more for more in _MORE if prompts)]
        return list(dict.fromkeys(most_that_divide(request.batch, most) for most in wanted))

    def _places(self) -> Iterator[tuple[int, Mesh]]:
        """(ranks, mesh of a stage), those whose stages fill a node first."""
        gpus, node = self.job.request.gpus, self.job.cluster.gpus_per_node
        layers = layer_count(self.graphs_of(self.job.request.micro_batches)[0])
        fitting = [n for n in _RANKS if gpus % n == 0 and n <= layers]
        for ranks in sorted(fitting, key=lambda n: (gpus // n != node, n)):
            for mesh in candidate_meshes(gpus // ranks, self.job.cluster):
                yield ranks, mesh

    def _try(self, ranks: int, mesh: Mesh, micro_batches: int) -> bool:
        """Plan one.  Is it the fastest so far?"""
        text = f"a pipeline of {ranks} ranks"
        shape = Shape(ranks, 1, FORWARD, mesh, text)
        request = replace(self.job.request, micro_batches=micro_batches)
        own = replace(self.job, request=request, builders=self.job.builders.for_others())
        self.considered += 1
        try:
            found = served_pipeline(
                self.graphs_of(micro_batches), own.saying(f", {text}"), shape, self.ceiling
            )
        except (InfeasibleError, LayoutError):
            return False
        except PlanError:  # the time was too short: it may take anything
            self.unsolved += 1
            self.least = 0.0
            return False
        self.least = min(self.least, found.least)
        return found.plan is not None and self._take(found.plan)

    def _take(self, plan: PlanData) -> bool:
        if plan.whole_s >= self.ceiling:
            return False
        self.best, self.ceiling = plan, plan.whole_s
        return True

    def _ordinary(self) -> None:
        """Price the ordinary pipeline, tensor parallelism inside of nodes and stages across them;
        it is taken where it is faster than all so far."""
        gpus, node = self.job.request.gpus, self.job.cluster.gpus_per_node
        if not self.job.baselines or gpus <= node or gpus % node:
            return
        layout = Layout.parse(f"pp={gpus // node},tp={node}")
        count = self._counts(layout.pipeline)[0]
        request = replace(self.job.request, layout=layout.text, micro_batches=count)
        own = replace(
            self.job, request=request, layout=layout, mesh=layout.mesh, limit=layout.limit,
            clock=Clock(), progress=lambda _: None, builders=self.job.builders.for_others(),
        )  # fmt: skip
        mesh = f"{layout.pipeline}x{node}"
        try:
            plan = make_served_pipeline(self.graphs_of(count), own)
        except PlanError:  # sizes that do not divide, or too little memory
            return
        self.rows.append(Baseline(layout.name, mesh, plan.whole_s, plan.memory.total))
        self._take(plan)


__all__ = ["GraphsOf", "with_served_stages"]
