"""Stages of a pipeline by their plans: how their ends lie, what they take, and with them a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...costmodel.machines.cluster import Cluster
from ...costmodel.timeline import StageTimes, Timeline, in_flight, peak_in_flight, played
from ...facts.mesh import Mesh
from ...facts.schedules import PipelineSchedule
from ...facts.spec import Spec
from ...ir.graph import Graph, Param, TensorType, Value
from ...ir.ops.local import local_bytes
from ..plan.plan import Memory, Pipeline, PlanData, PlannedStage
from ..plan.program import Convert, Program
from ..plan.tied import tied_parameters
from ..strategies.build import Decisions
from ..strategies.network import Network
from ..strategies.regions import scopes
from ..strategies.setting import Restriction, Within

AXIS = "pp"  # the outermost axis of the mesh, between stages

End: TypeAlias = tuple[str, TensorType]
"""What goes between stages, by what it is called there, and its type: names alone may be of
several."""


class Ends(Within):
    """What `inner` allows of a stage whose ends, and shared parameters, lie as `fixed` says.

    `ends` are by the names of values, `stored` by those of parameters.
    """

    def __init__(
        self,
        inner: Restriction,
        ends: dict[str, End],
        fixed: dict[End, Spec],
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


def ends_of(graph: Graph, taken: Collection[str], given: Collection[str]) -> dict[str, End]:
    """The ends of a stage's graph that takes and gives these, by the names of their values."""
    ends = {x.value.name: (x.name, x.value.type) for x in graph.inputs if x.name in taken}
    for out in graph.outputs:
        if out.path and out.path[0] in given:
            ends[out.value.name] = (str(out.path[0]), out.value.type)
    return ends


def specs_of(
    graph: Graph, decisions: Decisions, taken: Collection[str], given: Collection[str]
) -> tuple[dict[End, Spec], dict[End, Spec]]:
    """How a stage takes and gives what goes between stages."""
    took = {
        (x.name, x.value.type): decisions.specs[x.value.name]
        for x in graph.inputs
        if x.name in taken
    }
    gave = {
        (str(out.path[0]), out.value.type): decisions.outputs[out.value.name]
        for out in graph.outputs
        if out.path and out.path[0] in given
    }
    return took, gave


# --- seconds -------------------------------------------------------------------------------------


def stage_of(plan: PlanData, place: PlannedStage, ranks: int, machine: Cluster) -> PlannedStage:
    """The stage at a place of a pipeline over `ranks` groups, with the seconds of its `plan`."""
    forward, backward, once = _times(plan)
    network = Network(Mesh(((AXIS, ranks), *plan.mesh.axes)), machine)
    sent = sent_bytes(plan, place)
    send, back = (network.seconds("send_recv", (0,), n) if n else 0.0 for n in sent)
    return replace(
        place, forward_s=forward, backward_s=backward, once_s=once, send_s=send, send_back_s=back
    )


def sent_bytes(plan: PlanData, place: PlannedStage) -> tuple[float, float]:
    """Bytes that each rank of a stage sends for a micro-batch: what it gives, and gradients of what
    it took."""
    sizes, decided = plan.mesh.sizes, plan.decisions
    ahead = sum(
        local_bytes(out.value, decided.outputs[out.value.name], sizes)
        for out in plan.graph.outputs
        if out.path and out.path[0] in place.given
    )
    back = sum(
        local_bytes(each.value, decided.specs[each.value.name], sizes)
        for each in plan.graph.inputs
        if each.name in place.taken and each.value.differentiable
    )
    return ahead, back


def played_stages(table: PipelineSchedule, stages: Sequence[PlannedStage]) -> Timeline:
    """The schedule with the seconds of these stages."""
    times = [StageTimes(s.forward_s, s.backward_s, 0.0, s.send_s, s.send_back_s) for s in stages]
    return played(table, times)


def most_in_flight(table: PipelineSchedule, numbers: Sequence[int]) -> int:
    """The micro-batches that the one of these stages which has most keeps at once."""
    kept = in_flight(table)
    return max(kept[number] for number in numbers)


@dataclass(frozen=True, slots=True)
class Joined:
    """Stages together: as a pipeline, seconds of a step and, of the rank that has most of them, of
    the optimizer and of casts; bytes of the rank that holds most."""

    pipeline: Pipeline
    seconds: float
    optimizer_s: float
    casts_s: float
    memory: Memory


def join(
    table: PipelineSchedule,
    places: Sequence[PlannedStage],
    plans: Sequence[PlanData],
    machine: Cluster,
) -> Joined:
    """The stages at these places with the seconds of `plans`, those of their kinds."""
    stages = [stage_of(plans[each.kind], each, table.ranks, machine) for each in places]
    stages = _with_tied(table, stages, plans, machine)
    timeline, ranks = played_stages(table, stages), range(table.ranks)
    seconds = max(  # when the last rank has done what it does once a step, too
        timeline.ends(rank) + sum(stages[n].once_s for n in table.stages_of(rank)) for rank in ranks
    )
    memory = max((_memory(table, r, stages, plans) for r in ranks), key=lambda m: m.total)
    pipeline = Pipeline(table.name, table.ranks, timeline.bubble_share, tuple(stages), tuple(plans))
    own = [[plans[stages[n].kind] for n in table.stages_of(rank)] for rank in ranks]
    optimizer_s = max(sum(plan.optimizer_s for plan in each) for each in own)
    casts_s = max(sum(plan.casts_s for plan in each) for each in own)
    return Joined(pipeline, seconds, optimizer_s, casts_s, memory)


def _with_tied(
    table: PipelineSchedule,
    stages: Sequence[PlannedStage],
    plans: Sequence[PlanData],
    machine: Cluster,
) -> list[PlannedStage]:
    """The stages with the seconds in which gradients of what several of them have are added up.

    That is an all-reduce in a ring of the ranks that have it, whose hops are those between stages;
    a rank that has it in two stages does it once.
    """
    network = Network(Mesh(((AXIS, table.ranks), *plans[0].mesh.axes)), machine)
    found = list(stages)
    for tied in tied_parameters(table, stages, plans):
        many = len(tied.ranks)
        hop = network.seconds("send_recv", (0,), tied.gradient_bytes / many)
        for rank in tied.ranks:
            at = next(number for number in tied.stages if table.rank_of[number] == rank)
            once = found[at].once_s + 2 * (many - 1) * hop
            found[at] = replace(found[at], once_s=once)
    return found


def _memory(
    table: PipelineSchedule, rank: int, stages: Sequence[PlannedStage], plans: Sequence[PlanData]
) -> Memory:
    """What a rank holds at its peak: all of its stages' states, what micro-batches in flight keep
    of each, and one operator that runs."""
    own = table.stages_of(rank)
    parts = [plans[stages[number].kind].memory for number in own]
    kept = [0.0] * table.stages
    for number, part in zip(own, parts, strict=True):
        alike = [n for n, each in enumerate(stages) if each.kind == stages[number].kind]
        kept[number] = part.activations / most_in_flight(table, alike)
    return Memory(
        sum(part.parameters for part in parts),
        sum(part.gradients for part in parts),
        sum(part.optimizer for part in parts),
        peak_in_flight(table, rank, kept),
        max(part.transient for part in parts),
    )


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
            back += scope.weight * (work.backward_s + work.again_s(again[node.name]))
    for item, times in program.flat():
        if isinstance(item, Convert):
            first, total = item.priced.forward, sum(t.bytes for t in item.priced.traffic)
            share = (first.bytes if first else 0) / total if total else 0.5  # others come again
            ahead += times * share * item.priced.seconds
            back += times * (1 - share) * item.priced.seconds
    return ahead, back


__all__ = [
    "AXIS", "End", "Ends", "Joined", "ends_of", "join", "most_in_flight", "played_stages",
    "sent_bytes", "specs_of", "stage_of",
]  # fmt: skip
