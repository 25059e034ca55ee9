"""Plans of pipelines that serve: prefill and decode in stages, each over the caches of its layers.

Sequences pass the stages in micro-batches, each with caches of its own.  A run of all of them takes
what their forwards take when they are played through, and what the last stage takes to send logits
back to the others.  Steps of one token follow one another without a gap: the next token of a
micro-batch begins when its logits are there and those before it are through the first stage.  So a
token takes the sum of the stages (with what is sent), or all micro-batches in the slowest of them,
whichever is longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.schedules import FORWARD, schedule
from ...facts.spec import Spec
from ...ir.graph import Graph, Output
from ...ir.ops.registry import operator_of
from ...ir.passes.stages import Stage, cut_into_stages, layer_count
from ...ir.passes.unfuse import unfuse
from ..errors import InfeasibleError, LayoutError, PlanError
from ..plan.decide import Solved, decide, plan_of
from ..plan.plan import Pipeline, PlanData, PlannedStage, Request, Search
from ..plan.recache import recaches
from ..strategies.build import Decisions
from ..strategies.network import Network
from ..strategies.setting import Restriction
from .cuts import even_layers
from .infeasible import explain
from .search import Job, clash_at
from .serving import attempt, serving_variants
from .shapes import Shape
from .stages import AXIS, End, Ends, ends_of, played_stages, sent_bytes, specs_of
from .variants import forms

_TOKENS = "tokens"  # what inputs (b, t) are called, which lie alike in all stages


@dataclass(frozen=True, slots=True)
class Staged:
    """The fastest plan of a pipeline, None where none is as fast as was asked for, and the least
    seconds that any takes."""

    plan: PlanData | None
    least: float


def make_served_pipeline(graphs: Sequence[Graph], job: Job) -> PlanData:
    """The plan of a layout with stages for prefill, decode or append, or for prefill and decode.

    Raises PlanError, in a sentence, where there is none, InfeasibleError where none fits.
    """
    assert job.layout is not None
    found = served_pipeline(graphs, job, Shape.of(job.request, job.layout)).plan
    assert found is not None  # any time will do
    return found


def served_pipeline(
    graphs: Sequence[Graph], job: Job, shape: Shape, ceiling: float = inf
) -> Staged:
    """The fastest plan of a pipeline of some shape, if it takes less than `ceiling` seconds; layers
    are shared out evenly.

    All forms of attention are planned, and fused projections whole and in parts.  Errors as
    `make_served_pipeline`; PlanError where the time was too short for one of them.
    """
    if not has_caches(graphs):
        raise LayoutError(
            f"{shape.text}: {graphs[0].name} has no caches in phase {job.request.phase}, and stages"
            " are served over theirs; plan without stages"
        )
    best, least = None, inf
    error: PlanError | None = None
    for variant in _variants(graphs):
        try:
            for graph in variant:
                job.check(graph)
            planning = _Planning(variant, job, shape, ceiling)
            found = planning.plan()
        except (InfeasibleError, LayoutError) as caught:
            error = caught
            continue
        least = min(least, planning.least)
        if found is not None:
            best, ceiling = found, found.whole_s
    if error is not None and least == inf:
        raise error
    return Staged(best, least)


def has_caches(graphs: Sequence[Graph]) -> bool:
    """Does a model that is served keep anything from one run to the next?"""
    return any(operator_of(node).remembers for node in graphs[0].nodes)


def _variants(graphs: Sequence[Graph]) -> Iterator[Sequence[Graph]]:
    """The graphs of all phases, in each form of attention, fused projections whole and in parts."""
    whole: list[Sequence[Graph]]
    if len(graphs) == 1:
        whole = [(form.graph,) for form in forms(graphs[0])]
    else:
        whole = [*serving_variants(graphs[0], graphs[1])]
    for variant in whole:
        yield variant
        apart = [unfuse(graph) for graph in variant]
        if any(one is not other for one, other in zip(apart, variant, strict=True)):
            yield apart


@dataclass(slots=True)
class _Kind:
    """Stages that are alike in all phases, by their numbers; of each phase the first of them."""

    phases: list[Stage]
    numbers: list[int]
    solved: Sequence[Solved] = ()

    @property
    def layers(self) -> int:
        return layer_count(self.phases[0].graph)


class _Planning:
    """One cut of the graphs of all phases, for a plan that takes less than `ceiling` seconds.

    `least`: no plan of this cut takes less.
    """

    def __init__(self, graphs: Sequence[Graph], job: Job, shape: Shape, ceiling: float) -> None:
        self.graphs, self.job, self.shape, self.ceiling = graphs, job, shape, ceiling
        self.least = 0.0
        request = job.request
        layers = even_layers(layer_count(graphs[0]), shape.stages)
        try:
            cuts = [cut_into_stages(graph, layers) for graph in graphs]
        except ValueError as error:
            raise LayoutError(f"{shape.text}: {error}") from error
        self.stages = list(zip(*cuts, strict=True))
        self.table = schedule(FORWARD, shape.ranks, 1, request.micro_batches)
        self.setting = replace(job.setting, in_flight=request.micro_batches, micro_batches=1)
        self.network = Network(Mesh(((AXIS, shape.ranks), *shape.mesh.axes)), job.cluster)
        self.kinds: list[_Kind] = []
        for number, phases in enumerate(self.stages):
            _check_exchanged(shape, phases[0])
            same = [
                k for k in self.kinds if [x.graph for x in k.phases] == [x.graph for x in phases]
            ]
            if same:
                same[0].numbers.append(number)
            else:
                self.kinds.append(_Kind(list(phases), [number]))
        self.fixed: dict[End, Spec] = {}

    def plan(self) -> PlanData | None:
        """The plan, None where it is not below the ceiling."""
        self.job.progress(f"solving {len(self.kinds)} kinds of stages on {self.shape.mesh}")
        for kind in sorted(self.kinds, key=lambda each: -each.layers):
            kind.solved = self._solved(kind)
            if not kind.solved:
                return None
        names = find_phase(self.job.request.phase).programs
        plans = [self._plan_of(at, name) for at, name in enumerate(names)]
        decode = None if len(plans) == 1 else plans[1]
        plan = replace(plans[0], decode=decode, request=self.job.request)
        return plan if plan.whole_s < self.ceiling else None

    # --- stages ----------------------------------------------------------------------------------

    def _solved(self, kind: _Kind) -> Sequence[Solved]:
        """The plans of a kind of stage, of all phases together; none where the pipeline is known to
        reach the ceiling.  Raises InfeasibleError where none fits.

        A stage runs once for each micro-batch, and each of them passes all stages of the kind; but
        caches are converted in all stages at once.
        """
        job, mesh = self.job, self.shape.mesh
        times = job.request.micro_batches
        if len(kind.phases) == 1:
            times = max(times, len(kind.numbers))
        ends = {id(stage.graph): _all_ends(stage) for stage in kind.phases}

        def limit(graph: Graph, on: Mesh) -> Restriction:
            return Ends(job.limit(graph, on), ends[id(graph)], self.fixed, {})

        builders = [job.builder(stage.graph, mesh, self.setting) for stage in kind.phases]
        if len(builders) == 2:
            served, solution = attempt(builders, limit, job, self.ceiling / times)
            found = () if served is None else (served.prefill, served.decode)
        else:
            problem = (built := builders[0].build(limit(builders[0].graph, mesh))).problem()
            solution = job.solution(problem, mesh, self.ceiling / times)
            taken = solution.assignment
            found = () if taken is None else (decide(built, problem, taken, solution),)
        dearer = solution.status == "dearer"
        if not self.fixed:  # what holds with ends that others fixed bounds no other plan
            self.least = max(times * solution.bound, self.ceiling if dearer else 0.0)
        if dearer:
            return ()
        if not found:
            raise self._refused(kind, solution.clash)
        differing = self._differing(kind, found)
        if differing:
            self.fixed |= differing
            return self._solved(kind)
        for stage, solved in zip(kind.phases, found, strict=True):
            self.fixed |= {end: spec for end, spec in _where(stage, solved)}
        return found

    def _differing(self, kind: _Kind, found: Sequence[Solved]) -> dict[End, Spec]:
        """What a kind has in several specs under one name: the last of them, if it is not fixed."""
        differing: dict[End, Spec] = {}
        for stage, solved in zip(kind.phases, found, strict=True):
            first: dict[End, Spec] = {}
            for end, spec in _where(stage, solved):
                if first.setdefault(end, spec) != spec:
                    differing[end] = spec
        return differing

    def _refused(self, kind: _Kind, clash: str) -> PlanError:
        if clash:
            graphs = [stage.graph for stage in kind.phases]
            return LayoutError(f"{self.shape.text}: {clash_at(clash, graphs)}")
        whole = replace(self.job.request, gpus=self.shape.gpus)
        return InfeasibleError(
            f"{self.shape.text}: stages {', '.join(map(str, kind.numbers))} do not fit; "
            + explain(self.graphs[-1], self.job.cluster, self.job.setting, whole)
        )

    # --- the plan --------------------------------------------------------------------------------

    def _plan_of(self, at: int, phase: str) -> PlanData:
        """That of phase number `at`, without the next."""
        request = self._request(at, phase)
        own = replace(
            request, gpus=self.shape.mesh.ranks, batch=request.rows, micro_batches=1
        )  # fmt: skip
        kinds = [self._kind_plan(kind, at, own) for kind in self.kinds]
        rows = [self._row(number, at, kinds) for number in range(len(self.stages))]
        returned = rows[-1].send_back_s
        seconds = played_stages(self.table, rows).seconds + returned
        if find_phase(phase).tokens == 1:
            passing = sum(row.forward_s + row.send_s for row in rows) + returned
            seconds = max(passing, request.micro_batches * max(row.forward_s for row in rows))
        busy = request.micro_batches * sum(row.forward_s for row in rows)
        bubble = 1 - busy / (seconds * len(rows)) if seconds else 0.0
        mesh = Mesh(((AXIS, self.shape.ranks), *kinds[0].mesh.axes))
        status = [solved.solution.status for kind in self.kinds for solved in kind.solved]
        search = Search(
            self.job.solver, "optimal" if set(status) == {"optimal"} else "feasible", 0.0, 1,
            tuple(self.job.clock.seconds.items()),
        )  # fmt: skip
        return PlanData(
            request, self.graphs[at], mesh, Decisions({}, {}, {}), {}, {}, seconds, 0.0, 0.0,
            max((kind.memory for kind in kinds), key=lambda memory: memory.total), (), search,
            tuple(dict.fromkeys(note for kind in kinds for note in kind.notes)),
            pipeline=Pipeline(FORWARD, self.shape.ranks, bubble, tuple(rows), tuple(kinds)),
        )  # fmt: skip

    def _request(self, at: int, phase: str) -> Request:
        request = self.job.request
        if not at:
            return replace(request, phase=phase)
        longest = request.seq + request.decode_steps - 1
        return replace(request, phase=phase, seq=find_phase(phase).tokens, context=longest)

    def _kind_plan(self, kind: _Kind, at: int, request: Request) -> PlanData:
        search = Search(self.job.solver, kind.solved[at].solution.status, 0.0, 1, ())
        plan = plan_of(kind.solved[at], request, search, ())
        plan = replace(plan, mesh=self._named)
        if at or len(kind.solved) == 1:
            return plan
        ours, theirs = kind.solved
        network = ours.builder.network
        recached = recaches(
            ours.builder.graph, ours.decisions, theirs.builder.graph, theirs.decisions, network
        )
        return replace(plan, recached=recached)

    @property
    def _named(self) -> Mesh:
        """The mesh of a stage, its axes named as the largest kind uses them in the first phase."""
        solved = max(self.kinds, key=lambda kind: kind.layers).solved[0]
        return plan_of(solved, self.job.request, Search("", "", 0.0, 1, ()), ()).mesh

    def _row(self, number: int, at: int, kinds: Sequence[PlanData]) -> PlannedStage:
        """A stage; the last one sends logits back to all others."""
        stage = self.stages[number][at]
        kind = next(n for n, each in enumerate(self.kinds) if number in each.numbers)
        place = PlannedStage(
            kind, layer_count(stage.graph), stage.first, stage.taken, stage.given,
            kinds[kind].seconds, 0.0, 0.0, 0.0, 0.0,
        )  # fmt: skip
        ahead, _ = sent_bytes(kinds[kind], place)
        others = 0 if stage.given else self.shape.ranks - 1
        back = others * float(sum(map(_bytes, stage.graph.outputs)))
        send, returned = (
            self.network.seconds("send_recv", (0,), n) if n else 0.0 for n in (ahead, back)
        )
        return replace(place, send_s=send, send_back_s=returned)


def _bytes(out: Output) -> int:
    return out.value.type.numel * out.value.type.dtype.itemsize


def _check_exchanged(shape: Shape, stage: Stage) -> None:
    """Raises LayoutError for a stage that takes what is not of its tokens: its size is not known
    beforehand where prompts have any length."""
    tokens = stage.graph.inputs[-1].value.type.shape
    for item in stage.graph.inputs:
        if item.name in stage.taken and item.value.type.shape[:2] != tokens:
            raise LayoutError(
                f"{shape.text}: a stage would send {item.value.type}, and stages of a served model"
                f" send what is of each token ({', '.join(map(str, tokens))}, ...) alone; plan"
                " without stages"
            )


def _all_ends(stage: Stage) -> dict[str, End]:
    """What goes between stages, and tokens and positions, which lie alike in all of them."""
    own = [item for item in stage.graph.inputs if item.name not in stage.taken]
    return {
        **{item.value.name: (_TOKENS, item.value.type) for item in own},
        **ends_of(stage.graph, stage.taken, stage.given),
    }


def _where(stage: Stage, solved: Solved) -> list[tuple[End, Spec]]:
    """How a stage takes and gives what `_all_ends` has."""
    taken, given = specs_of(stage.graph, solved.decisions, stage.taken, stage.given)
    own = [item for item in stage.graph.inputs if item.name not in stage.taken]
    return [
        *given.items(),
        *taken.items(),
        *(((_TOKENS, x.value.type), solved.decisions.specs[x.value.name]) for x in own),
    ]


__all__ = ["Staged", "has_caches", "make_served_pipeline", "served_pipeline"]
