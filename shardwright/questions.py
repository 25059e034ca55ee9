"""What people ask of a plan: how it compares, why not otherwise, and what if things were other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from .asked import Progress, silent
from .costmodel.machines.cluster import load_cluster
from .facts.phases import find_phase
from .facts.units import format_bytes, format_seconds
from .planner.errors import InfeasibleError, LayoutError, PlanError
from .planner.plan.plan import PlanData
from .planner.report.differences import Side, main_difference, side_by_side
from .planner.search.again import Again
from .planner.search.larger import in_micro_batches, with_sequences
from .planner.search.search import Builders

ALIKE = 0.001  # relative differences below this are rounding

_FACTOR = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)x")


def _unit(plan: PlanData) -> str:
    return "answer" if plan.decode is not None else find_phase(plan.request.phase).run


def parse_factor(option: str, text: str) -> float:
    """`0.5x` as 0.5.  Raises PlanError."""
    found = _FACTOR.fullmatch(text.strip())
    if found is None or not float(found[1]) > 0:
        raise PlanError(f"{option} `{text}`: expected a factor above 0, such as 0.5x or 2x")
    return float(found[1])


# -- two plans ------------------------------------------------------------------------------------


def compare(a: PlanData, b: PlanData, names: tuple[str, str]) -> str:
    """Which of two plans is faster, and where their time, bytes and memory differ.

    Raises PlanError where one serves and the other does not.
    """
    if (a.decode is None) != (b.decode is None):
        raise PlanError(
            f"{names[0]} is for phase {a.request.phase}, {names[1]} for {b.request.phase}: their "
            "times are not of the same"
        )
    sides = Side(names[0], a), Side(names[1], b)
    parts = [_faster(*sides), *_asked_apart(a, b)]
    return "\n\n".join(["\n".join(parts), _tables(sides)])


def _faster(one: Side, other: Side) -> str:
    first, second = one.plan.whole_s, other.plan.whole_s
    unit = _unit(one.plan)
    times = f"{format_seconds(first)} per {unit}, {other.name} {format_seconds(second)}"
    if abs(first - second) <= ALIKE * max(first, second):
        return f"{one.name} and {other.name} take the same: {format_seconds(first)} per {unit}."
    quick, slow = (one, other) if first < second else (other, one)
    ratio = max(first, second) / min(first, second)
    why = main_difference(slow, quick)
    because = f" In {slow.name} {why}." if why else ""
    return f"{quick.name} is {ratio:.2f}x faster: {one.name} takes {times}.{because}"


def _asked_apart(a: PlanData, b: PlanData) -> list[str]:
    """What was asked for differently."""
    fields = ("target", "gpus", "cluster", "phase", "batch", "seq", "context", "output_tokens")
    fields += ("precision", "dtype", "micro_batches", "memory_bytes", "layout")
    apart = [
        f"{name.replace('_', ' ')} {getattr(a.request, name) or 'none'} and "
        f"{getattr(b.request, name) or 'none'}"
        for name in fields
        if getattr(a.request, name) != getattr(b.request, name)
    ]
    return [f"Asked for differently: {', '.join(apart)}."] if apart else []


def _tables(sides: Sequence[Side]) -> str:
    decodes = [Side(s.name, s.plan.decode) for s in sides if s.plan.decode is not None]
    if not decodes:
        return side_by_side(sides)
    return "\n\n".join(["Prefill", side_by_side(sides), "Decode", side_by_side(decodes)])


# -- other machines -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What would be other: another cluster, factors on its speeds, bytes of memory per GPU, and so
    many times as many sequences."""

    cluster: str | None = None
    links: float = 1.0
    between_nodes: float = 1.0
    gpu: float = 1.0
    memory_bytes: int | None = None
    batch: float = 1.0

    def __str__(self) -> str:
        texts = [f"on {self.cluster}"] if self.cluster else []
        for factor, what in (
            (self.links, "links"),
            (self.between_nodes, "links between nodes"),
            (self.gpu, "GPUs"),
        ):
            texts += [f"with {what} {factor:g} times as fast"] if factor != 1 else []
        if self.memory_bytes is not None:
            texts.append(f"with {format_bytes(self.memory_bytes)} per GPU")
        if self.batch != 1:
            texts.append(f"with {self.batch:g} times as many sequences")
        return ", ".join(texts)

    def again(self, plan: PlanData, progress: Progress = silent) -> Again:
        """The plan, to be asked about the machine as it would be."""
        request = plan.request
        machine = load_cluster(self.cluster or request.cluster, request.gpus)
        memory = self.memory_bytes
        if memory is None and self.cluster is not None:
            memory = int(machine.memory_bytes)
        changed = machine.changed(links=self.links, between_nodes=self.between_nodes, gpu=self.gpu)
        return Again(self._of_batch(plan), changed, memory, progress)

    def _of_batch(self, plan: PlanData) -> PlanData:
        """The plan with as many sequences as are asked for.  Raises PlanError."""
        batch = plan.request.batch * self.batch
        if batch != int(batch) or batch < 1:
            raise PlanError(
                f"--batch {self.batch:g}x: the plan is for {plan.request.batch} sequences, and "
                f"{batch:g} is no number of them"
            )
        return with_sequences(plan, int(batch))


def what_if(plan: PlanData, change: Change, progress: Progress = silent) -> str:
    """What the plan takes then, and whether another would be better."""
    if change == Change():
        raise PlanError(
            "what would be other? Give --link 0.5x, --inter-node 0.5x, --gpu-speed 2x, --memory "
            "40GB, --batch 2x or --cluster NAME"
        )
    again = change.again(plan, progress)
    progress("price the plan")
    same = again.same()
    limit = again.memory_bytes or plan.request.memory_bytes
    needed = max(each.memory.total for each in same.phases)
    unit, now, then = _unit(plan), plan.whole_s, same.whole_s
    head = f"{str(change)[0].upper()}{str(change)[1:]}"
    takes = f"{format_seconds(then)} per {unit}, now {format_seconds(now)} ({then / now:.2f}x)"
    try:
        best = _best(again, plan)
    except InfeasibleError as error:
        return f"{head} no plan fits: {error}"
    sides = [Side("now", plan), Side("then", same)]
    if needed > limit:
        text = f"this plan does not fit: it needs {format_bytes(needed)} of {format_bytes(limit)}."
        text += f" The best that does takes {format_seconds(best.whole_s)} per {unit}"
        text += f" (now {format_seconds(now)}), on mesh {best.mesh}."
        sides[1] = Side("best then", best)
    elif best.whole_s >= then * (1 - ALIKE):
        text = f"this plan takes {takes}, and no other is better."
    else:
        ratio = then / best.whole_s
        text = f"this plan takes {takes}; another is {ratio:.2f}x faster: "
        text += f"{format_seconds(best.whole_s)} on mesh {best.mesh}."
        sides.append(Side("best then", best))
    return "\n\n".join([f"{head} {text}", _tables(sides)])


def _best(again: Again, before: PlanData) -> PlanData:
    """The best plan then; of more sequences than `before` also in micro-batches of as many as it
    has.  Raises InfeasibleError where none fits."""
    batch, several = again.plan.request.batch, before.training and before.pipeline is None
    found: list[PlanData] = []
    error = InfeasibleError()
    tries = [again]
    if several and batch > before.request.batch:
        with suppress(PlanError):  # they do not divide
            tries.append(replace(again, plan=in_micro_batches(before, batch), builders=Builders()))
    for each in tries:
        try:
            found.append(each.best())
        except InfeasibleError as none_fits:
            error = none_fits
    if not found:
        raise error
    return min(found, key=lambda plan: plan.whole_s)


def why_not(plan: PlanData, layout: str, progress: Progress = silent) -> str:
    """What an ordinary layout would take beside the plan, and what it would take it for."""
    again = Change().again(plan, progress)
    try:
        other = again.with_layout(layout)
    except LayoutError as error:
        return f"{layout} is not possible here: {error}"
    except InfeasibleError as error:
        return f"{layout} does not fit: {error}"
    first, second = plan.whole_s, other.whole_s
    sides = Side("this plan", plan), Side(layout, other)
    if abs(first - second) <= ALIKE * first:
        text = f"{layout} takes the same: {format_seconds(first)} per {_unit(plan)}."
    else:
        relation = "slower" if second > first else "faster"
        ratio = max(first, second) / min(first, second)
        text = f"{layout} takes {format_seconds(second)} per {_unit(plan)}, {ratio:.2f}x {relation}"
        text += f" than this plan ({format_seconds(first)})."
        why = main_difference(*(reversed(sides) if second > first else sides))
        text += f" First of all {why}." if why else ""
        if second < first and plan.request.pins:
            text += " This plan keeps to its pins."
    return "\n\n".join([text, _tables(sides)])


__all__ = ["ALIKE", "Change", "compare", "parse_factor", "what_if", "why_not"]
