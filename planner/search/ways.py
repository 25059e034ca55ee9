"""The programs of a plan, and what comes of running one operator of them otherwise.

An ordinary plan has one program; that of a server has two, which are decided together; a pipeline
has one for each kind of its stages, whose ends stay as they are, so that the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...facts.mesh import Mesh
from ...ir.graph import Graph
from ..plan.decide import plan_of
from ..plan.plan import Pipeline, PlanData, Search
from ..strategies.build import Decisions
from ..strategies.regions import Region, Strategy
from ..strategies.setting import Restriction
from .again import Again, Choosing, NoWay
from .serving import serving_plan_on
from .stages import Ends, ends_of, join, specs_of

Allowed: TypeAlias = Callable[[Strategy], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes of a restriction: how the program is run then, and seconds of the whole step, or
    answer."""

    decisions: Decisions
    seconds: float


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways to run the operators of one program, on the plan's mesh.

    `name` tells programs of a plan apart ("": there is one), `again` is that program by itself,
    `whole` the plan that it is of; it runs `times` times a step, or answer, beside what its own
    plan says.
    """

    name: str
    again: Again
    whole: PlanData
    times: int = 1

    @property
    def plan(self) -> PlanData:
        """That of the program."""
        return self.again.plan

    @property
    def step(self) -> str:
        """What seconds are those of."""
        return "step" if self.whole.decode is None else "answer"

    @property
    def seconds(self) -> float:
        """Of a step, or an answer, as it is planned."""
        return self.whole.whole_s

    def regions(self) -> list[Region]:
        """What is decided together."""
        return self.again.regions()

    def taken(self, region: Region, outcome: Outcome | None = None) -> Strategy:
        """How the plan, or an outcome, runs it."""
        decided = self.plan.decisions if outcome is None else outcome.decisions
        return self.again.taken(region, decided)

    def others(self, region: Region) -> Iterator[Strategy]:
        """The ways to run a region that differ from the plan's on one axis."""
        return self.again.others(region)

    def seconds_of(self, region: Region, way: Strategy) -> float:
        """Seconds of a step, or an answer, that the nodes of a region take by themselves."""
        return self.times * self.again.seconds_of(region, way)

    def run_so(self, region: Region, allowed: Allowed) -> Outcome | None:
        """The best in which a region runs as `allowed` says; None if there is none, or none fits.

        Raises PlanError where the time was too short to find out.  What the plan does with layers
        (kept or recomputed) and the order of tokens stay.
        """
        solved = self.again.solved_with(region, allowed)
        return solved and Outcome(solved.decisions, solved.seconds)


@dataclass(frozen=True, slots=True)
class _Served(Ways):
    """One of the two programs of a server: the other is decided anew, too."""

    def run_so(self, region: Region, allowed: Allowed) -> Outcome | None:
        whole, decode, mine = self.whole, self.whole.decode, self.plan.graph
        assert decode is not None
        job = replace(self.again, plan=whole).job(whole.mesh)

        def limit(graph: Graph, mesh: Mesh) -> Restriction:
            inner = job.limit(graph, mesh)
            return Choosing(inner, region.name, allowed) if graph is mine else inner

        try:
            found = serving_plan_on(
                whole.graph, decode.graph, whole.mesh, replace(job, limit=limit)
            )
        except NoWay:
            return None
        if found is None:
            return None
        own = found if mine is whole.graph else found.decode
        assert own is not None
        return Outcome(own.decisions, found.answer_s)


@dataclass(frozen=True, slots=True)
class _Staged(Ways):
    """The program of a kind of stages, that number `kind` of a pipeline."""

    kind: int = 0

    def run_so(self, region: Region, allowed: Allowed) -> Outcome | None:
        solved = self.again.solved_with(region, allowed, self._as_sent)
        if solved is None:
            return None
        pipeline = self._pipeline
        plan = plan_of(solved, self.plan.request, Search("", "", 0.0, 1, ()), ())
        kinds = [plan if n == self.kind else kind for n, kind in enumerate(pipeline.kinds)]
        table = pipeline.table(self.whole.request.micro_batches)
        joined = join(table, pipeline.stages, kinds, self.again.cluster)
        return Outcome(solved.decisions, joined.seconds)

    def _as_sent(self, inner: Restriction) -> Restriction:
        """What `inner` allows that lies between stages, and of what several have, as planned."""
        plan = self.plan
        place = next(stage for stage in self._pipeline.stages if stage.kind == self.kind)
        taken, given = specs_of(plan.graph, plan.decisions, place.taken, place.given)
        ends = ends_of(plan.graph, place.taken, place.given)
        stored = {p.name: plan.decisions.specs[p.value.name] for p in plan.graph.params}
        return Ends(inner, ends, taken | given, stored)

    @property
    def _pipeline(self) -> Pipeline:
        assert self.whole.pipeline is not None
        return self.whole.pipeline


def ways_of_plan(again: Again) -> list[Ways]:
    """One for each program of a plan, on the machine that it is asked about.

    Raises PlanError for one that is not asked again.
    """
    again.check()
    plan = again.plan
    if (decode := plan.decode) is not None:
        alone = replace(plan, decode=None)
        later = replace(decode, request=plan.request)  # whose answers both are part of
        steps = plan.request.decode_steps
        return [
            _Served("prefill", replace(again, plan=alone), plan),
            _Served("decode", replace(again, plan=later), plan, steps),
        ]
    if plan.pipeline is None:
        return [Ways("", again, plan)]
    numbers = [stage.kind for stage in plan.pipeline.stages]
    found: list[Ways] = []
    for kind, alone in enumerate(again.kinds()):
        own = [n for n, each in enumerate(numbers) if each == kind]
        name = f"stage {own[0]}" if len(own) == 1 else f"stages {_listed(own)}"
        most = max(
            sum(n in own for n in range(rank, len(numbers), plan.pipeline.ranks))
            for rank in range(plan.pipeline.ranks)
        )
        found.append(_Staged(name, alone, plan, most, kind))
    return found


def _listed(numbers: list[int]) -> str:
    """`1 to 6`, or `1, 3, 5`."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


__all__ = ["Outcome", "Ways", "ways_of_plan"]
