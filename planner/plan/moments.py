"""A step as it is predicted to pass: what the streams of a rank do when.

Played through from what is priced: operators and conversions of activations one after another, as
the program has them; weights come while the unit before is used, and gradients leave while the next
one runs backward, as `overlap.py` has it.  A collective of weights that runs once a step counts as
its share of each micro-batch.  What is played is one micro-batch, with the optimizer behind it; a
pipeline's ranks run the actions of its schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from ...costmodel.timeline import StageTimes, played
from ...ir.ops.registry import operator_of
from ..strategies.network import Network
from ..strategies.pricing import IN_PART
from ..strategies.regions import InLoop, Unit, scopes, units
from ..strategies.selected import again_in
from .overlap import MovedWeights, moved_by_unit
from .plan import Pipeline, PlanData
from .program import Compute, Convert, LoopCall, PricedStep
from .traffic import brought_together

# Computing, the collectives that it waits for, and those of weights and their gradients
Stream: TypeAlias = Literal["compute", "communication", "weights"]


@dataclass(frozen=True, slots=True)
class Moment:
    """What a stream does from `start` on, in seconds from the step's begin.

    `unit` is where: `model.layers.3`, or "" outside of layers; `phase` is `forward`, `backward`,
    `again` (forward, recomputed) or `optimizer`.  `rank` is that of a pipeline.
    """

    stream: Stream
    name: str
    unit: str
    phase: str
    start: float
    seconds: float
    rank: int = 0

    @property
    def end(self) -> float:
        """When it is done."""
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Moments:
    """What is played through, `times` times in a step but for the optimizer; `seconds` of all."""

    moments: tuple[Moment, ...]
    times: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Part:
    """An operator or a conversion: seconds of computing and of communication, both ways; the name
    of the operator's node.  `remade` are those of its forward in a layer that keeps a part."""

    name: str
    node: str
    forward: tuple[float, float]
    backward: tuple[float, float]
    remade: tuple[float, float] = (0.0, 0.0)


@dataclass(slots=True)
class _Run:
    """One run of a unit: its parts, the weights that move for it, and the nodes that backward runs
    again, `in_part` where it keeps a part."""

    unit: Unit
    name: str
    parts: Sequence[_Part]
    weights: MovedWeights  # of one run
    again: frozenset[str]
    in_part: bool = False


@dataclass(slots=True)
class _Streams:
    """Streams as they are filled: until when a rank computes (or waits), and weights move."""

    contention: float
    computing: float = 0.0
    moving: float = 0.0
    found: list[Moment] = field(default_factory=list[Moment])

    def move(self, name: str, unit: str, phase: str, ready: float, seconds: float) -> float:
        """A collective beside computing; when it is done."""
        if seconds <= 0:
            return ready
        start = max(self.moving, ready)
        self.found.append(Moment("weights", name, unit, phase, start, seconds))
        self.moving = start + seconds
        return self.moving

    def run(self, part: _Part, unit: str, phase: str, stretch: float) -> None:
        """A part, whose communication is waited for; computing takes `stretch` times as long."""
        computing, moving = part.backward if phase == "backward" else part.forward
        if computing > 0:
            seconds = computing * stretch
            self.found.append(Moment("compute", part.name, unit, phase, self.computing, seconds))
            self.computing += seconds
        if moving > 0:
            start = self.computing
            self.found.append(Moment("communication", part.name, unit, phase, start, moving))
            self.computing += moving


def moments_of(plan: PlanData, network: Network) -> Moments:
    """The step, forward pass or token of a plan on its machine."""
    if plan.pipeline is not None:
        return _piped(plan, plan.pipeline)
    streams = _Streams(network.cluster.contention)
    runs = _runs(plan, network)
    _forward(streams, runs)
    if plan.training:
        _backward(streams, runs)
    end = max(streams.computing, streams.moving)
    times = plan.request.micro_batches
    streams.computing = end
    for name, seconds in (("casts", plan.casts_s), ("optimizer", plan.optimizer_s)):
        streams.run(_Part(name, "", (seconds, 0.0), (0.0, 0.0)), "", "optimizer", 1.0)
    whole = times * end + plan.casts_s + plan.optimizer_s
    return Moments(tuple(streams.found), times, whole)


def _forward(streams: _Streams, runs: Sequence[_Run]) -> None:
    there = streams.move("weights", runs[0].name, "forward", 0.0, runs[0].weights.forward)
    for run, after in zip(runs, [*runs[1:], None], strict=True):
        streams.computing = max(streams.computing, there)
        there = 0.0
        beside = 0.0
        if after is not None and _hides(run):
            beside = after.weights.forward
            there = streams.move("weights", after.name, "forward", streams.computing, beside)
        _compute(streams, run, "forward", beside)
        if after is not None and not _hides(run):
            seconds = after.weights.forward
            there = streams.move("weights", after.name, "forward", streams.computing, seconds)


def _backward(streams: _Streams, runs: Sequence[_Run]) -> None:
    order = list(reversed(runs))
    there = streams.move(
        "weights", order[0].name, "backward", streams.computing, order[0].weights.again
    )
    for run, after in zip(order, [*order[1:], None], strict=True):
        streams.computing = max(streams.computing, there)
        began, there, beside = streams.computing, 0.0, 0.0
        if after is not None and _hides(run):
            beside = after.weights.again
            there = streams.move("weights", after.name, "backward", began, beside)
        waiting = max(streams.moving - began, 0.0) if _hides(run) else 0.0
        for part in run.parts:
            if part.node in run.again:
                taken = replace(part, forward=part.remade) if run.in_part else part
                streams.run(taken, run.name, "again", 1.0)
        _compute(streams, run, "backward", waiting)
        if after is not None and not _hides(run):
            there = streams.move(
                "weights", after.name, "backward", streams.computing, after.weights.again
            )
        leaving = run.weights.backward - run.weights.again
        streams.move("gradients", run.name, "backward", streams.computing, leaving)


def _compute(streams: _Streams, run: _Run, phase: str, beside: float) -> None:
    """The parts of a unit while collectives of `beside` seconds pass."""
    parts = reversed(run.parts) if phase == "backward" else run.parts
    each = list(parts)
    computing = sum((p.backward if phase == "backward" else p.forward)[0] for p in each)
    stretch = 1 + streams.contention * beside / computing if computing else 1.0
    if streams.contention < 1:  # all of it is beside a collective
        stretch = min(stretch, 1 / (1 - streams.contention))
    for part in each:
        streams.run(part, run.name, phase, stretch)


def _hides(run: _Run) -> bool:
    """Do weights of others move behind what it computes?"""
    return isinstance(run.unit, InLoop)


def _runs(plan: PlanData, network: Network) -> list[_Run]:
    program, decided = plan.program, plan.decisions
    together = brought_together(program, plan.mesh)
    moved = moved_by_unit(program, network, decided, together)
    parts = _parts(plan, network)
    scope_of = {scope.unit: scope for scope in scopes(plan.graph)}
    order, at = units(plan.graph), dict[Unit, int]()
    found: list[_Run] = []
    layers: dict[str, int] = {}
    for unit in order:
        whole, count = (
            moved.get(unit, MovedWeights()),
            order.count(unit) * plan.request.micro_batches,
        )
        each = MovedWeights(whole.forward / count, whole.backward / count, whole.again / count)
        name = ""
        if isinstance(unit, InLoop):
            number = layers[unit.path] = layers.get(unit.path, -1) + 1
            name = f"{unit.path}.{number}"
        before = at[unit] = at.get(unit, -1) + 1
        again, mode = frozenset[str](), "kept"
        if (scope := scope_of.get(unit)) is not None:
            mode = decided.recomputed.runs(scope).mode(before)
            again = again_in(scope.nodes, mode)
        found.append(_Run(unit, name, parts.get(unit, ()), each, again, mode == "part"))
    return found


def _parts(plan: PlanData, network: Network) -> dict[Unit, list[_Part]]:
    """What each unit runs, in order."""
    found: dict[Unit, list[_Part]] = {0: []}
    stage = 0
    for item in plan.program.statements:
        if not isinstance(item, LoopCall):
            found[stage].append(_part(plan, network, item))
            continue
        for kind, body in enumerate(item.bodies):
            place = InLoop(item.loop.path, kind)
            found[place] = [_part(plan, network, each) for each in body.statements]
        stage += 1
        found[stage] = []
    return found


def _part(plan: PlanData, network: Network, item: Compute | Convert) -> _Part:
    if isinstance(item, Convert):
        forward, backward = _both_ways(item.priced, network)
        name = f"{item.target.value.name}: {item.primitive.replace('_', '-')}"
        return _Part(name, "", (0.0, forward), (0.0, backward))
    work = plan.work[item.node.name]
    module = item.node.loc.module.rsplit(".", 1)[-1]
    title = operator_of(item.node).title(item.node)
    return _Part(
        f"{module}: {title}" if module and not module.isdigit() else title,
        item.node.name,
        (work.forward_s - work.forward_moving_s, work.forward_moving_s),
        (work.backward_s - work.backward_moving_s, work.backward_moving_s),
        (work.again_s(IN_PART) - work.again_moving_s(IN_PART), work.again_moving_s(IN_PART)),
    )


def _both_ways(priced: PricedStep, network: Network) -> tuple[float, float]:
    """Seconds of a step forward and backward: of its collectives as they are priced, and what it
    takes besides as these are."""
    ways = [0.0, 0.0]
    for traffic in priced.traffic:
        seconds = traffic.times * network.seconds(traffic.kind, traffic.axes, traffic.bytes)
        ways[traffic.backward] += seconds
    known = sum(ways)
    if known <= 0:
        return priced.seconds, 0.0
    return priced.seconds * ways[0] / known, priced.seconds * ways[1] / known


def _piped(plan: PlanData, pipeline: Pipeline) -> Moments:
    """The actions of all ranks of a pipeline."""
    table = pipeline.table(plan.request.micro_batches)
    stages = [
        StageTimes(s.forward_s, s.backward_s, 0.0, s.send_s, s.send_back_s) for s in pipeline.stages
    ]
    timeline = played(table, stages)
    words = {"F": "forward", "B": "backward", "I": "backward", "W": "backward"}
    found = [
        Moment(
            "compute",
            f"stage {span.action.stage}, micro-batch {span.action.batch}",
            f"stage {span.action.stage}",
            words[span.action.kind],
            span.start,
            span.end - span.start,
            rank,
        )
        for rank, spans in enumerate(timeline.spans)
        for span in spans
    ]
    for rank in range(pipeline.ranks):  # reductions and the optimizer, behind the schedule
        own = [s.once_s for i, s in enumerate(pipeline.stages) if table.rank_of[i] == rank]
        found.append(
            Moment("compute", "once a step", "", "optimizer", timeline.seconds, sum(own), rank)
        )
    return Moments(tuple(found), 1, plan.seconds)


def by_unit(moments: Sequence[Moment]) -> Iterator[Moment]:
    """Neighbours of one stream, unit and phase as one, as a picture of a whole step has them."""
    last: Moment | None = None
    for moment in sorted(moments, key=lambda m: (m.rank, m.stream, m.start)):
        if last is not None and _alike(last, moment):
            last = replace(last, seconds=moment.end - last.start)
            continue
        if last is not None:
            yield last
        last = moment
    if last is not None:
        yield last


def _alike(one: Moment, other: Moment) -> bool:
    same = (one.rank, one.stream, one.unit, one.phase) == (
        other.rank, other.stream, other.unit, other.phase
    )  # fmt: skip
    return same and other.start <= one.end * (1 + 1e-9) + 1e-12


__all__ = ["Moment", "Moments", "by_unit", "moments_of"]
