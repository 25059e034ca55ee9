"""What people ask of a plan: how it compares, why not otherwise, and what if things were other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import sqrt

from .asked import Progress, silent
from .costmodel.machines.cluster import Cluster, load_cluster
from .facts.phases import find_phase
from .facts.units import format_bytes, format_seconds
from .ir.ops.registry import operator_of
from .planner.errors import InfeasibleError, LayoutError, PlanError
from .planner.plan.plan import PlanData
from .planner.report.differences import Side, main_difference, side_by_side
from .planner.report.ops import ways_of
from .planner.report.report import table
from .planner.search.again import Again
from .planner.strategies.pins import module_of
from .planner.strategies.regions import Region, Strategy

_ALIKE = 0.001  # relative differences below this are rounding
_FURTHEST = 64.0  # a figure is followed to so many times its value, and as far below
_NEAR = 1.02  # the break-even value is known to this factor

_FACTOR = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)x")


def seconds_of(plan: PlanData) -> float:
    """Of a step or a forward pass; in phase `serve` of a whole answer."""
    return plan.seconds if plan.decode is None else plan.answer_s


def _unit(plan: PlanData) -> str:
    return "answer" if plan.decode is not None else find_phase(plan.request.phase).run


def _check_no_pipeline(plan: PlanData, command: str) -> None:
    """Raises PlanError where a plan is a pipeline."""
    if plan.pipeline is not None:
        raise PlanError(
            f"plan {command} does not take pipelines apart yet, and this plan is one: `plan show` "
            "has its stages, `plan compare` sets it beside another"
        )


def parse_factor(option: str, text: str) -> float:
    """`0.5x` as 0.5.  Raises PlanError."""
    found = _FACTOR.fullmatch(text.strip())
    if found is None or not float(found[1]) > 0:
        raise PlanError(f"{option} `{text}`: expected how many times as fast, such as 0.5x or 2x")
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
    first, second = seconds_of(one.plan), seconds_of(other.plan)
    unit = _unit(one.plan)
    times = f"{format_seconds(first)} per {unit}, {other.name} {format_seconds(second)}"
    if abs(first - second) <= _ALIKE * max(first, second):
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
    """What would be other: another cluster, factors on its speeds, bytes of memory per GPU."""

    cluster: str | None = None
    links: float = 1.0
    between_nodes: float = 1.0
    gpu: float = 1.0
    memory_bytes: int | None = None

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
        return ", ".join(texts)

    def again(self, plan: PlanData, progress: Progress = silent) -> Again:
        """The plan, to be asked about the machine as it would be."""
        request = plan.request
        machine = load_cluster(self.cluster or request.cluster, request.gpus)
        memory = self.memory_bytes
        if memory is None and self.cluster is not None:
            memory = int(machine.memory_bytes)
        changed = machine.changed(links=self.links, between_nodes=self.between_nodes, gpu=self.gpu)
        return Again(plan, changed, memory, progress)


def what_if(plan: PlanData, change: Change, progress: Progress = silent) -> str:
    """What the plan takes then, and whether another would be better."""
    if change == Change():
        raise PlanError(
            "what would be other? Give --link 0.5x, --inter-node 0.5x, --gpu-speed 2x, --memory "
            "40GB or --cluster NAME"
        )
    _check_no_pipeline(plan, "what-if")
    again = change.again(plan, progress)
    progress("price the plan")
    same = again.same()
    limit = again.memory_bytes or plan.request.memory_bytes
    needed = max(each.memory.total for each in same.phases)
    unit, now, then = _unit(plan), seconds_of(plan), seconds_of(same)
    head = f"{str(change)[0].upper()}{str(change)[1:]}"
    takes = f"{format_seconds(then)} per {unit}, now {format_seconds(now)} ({then / now:.2f}x)"
    try:
        best = again.best()
    except InfeasibleError as error:
        return f"{head} no plan fits: {error}"
    sides = [Side("now", plan), Side("then", same)]
    if needed > limit:
        text = f"this plan does not fit: it needs {format_bytes(needed)} of {format_bytes(limit)}."
        text += f" The best that does takes {format_seconds(seconds_of(best))} per {unit}"
        text += f" (now {format_seconds(now)}), on mesh {best.mesh}."
        sides[1] = Side("best then", best)
    elif seconds_of(best) >= then * (1 - _ALIKE):
        text = f"this plan takes {takes}, and no other is better."
    else:
        ratio = then / seconds_of(best)
        text = f"this plan takes {takes}; another is {ratio:.2f}x faster: "
        text += f"{format_seconds(seconds_of(best))} on mesh {best.mesh}."
        sides.append(Side("best then", best))
    return "\n\n".join([f"{head} {text}", _tables(sides)])


def why_not(plan: PlanData, layout: str, progress: Progress = silent) -> str:
    """What an ordinary layout would take beside the plan, and what it would take it for."""
    _check_no_pipeline(plan, "explain")
    again = Change().again(plan, progress)
    try:
        other = again.with_layout(layout)
    except LayoutError as error:
        return f"{layout} is not possible here: {error}"
    except InfeasibleError as error:
        return f"{layout} does not fit: {error}"
    first, second = seconds_of(plan), seconds_of(other)
    sides = Side("this plan", plan), Side(layout, other)
    if abs(first - second) <= _ALIKE * first:
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


# -- one operator ---------------------------------------------------------------------------------


def explain(
    plan: PlanData, pattern: str, *, flip: str | None = None, progress: Progress = silent
) -> str:
    """Why operators of modules that match `pattern` run as they do: what each other way would cost.

    Of ways that differ from the plan's on one axis, all else decided anew around them; layers
    recomputed or kept, mesh and order of tokens as in the plan.  `flip`: `link`, `inter-node` or
    `gpu`: how many times as fast it must be for another way to win.  Raises PlanError where no
    module matches.
    """
    _check_no_pipeline(plan, "explain")
    if plan.decode is not None:
        raise PlanError(
            "an operator of a serve plan is decided for both phases together, which explain does "
            "not take apart yet: plan --phase prefill or --phase decode, and explain that"
        )
    again = Change().again(plan, progress)
    regions = _matching(plan, again.regions(), pattern)
    return "\n\n".join(_explained(again, region, flip) for region in regions)


def _matching(plan: PlanData, regions: Sequence[Region], pattern: str) -> list[Region]:
    def names(region: Region) -> set[str]:
        heavy = [node for node in region.nodes if operator_of(node).heavy]
        modules = {module_of(node.loc.module) for node in heavy or region.nodes}
        return {name for name in (*modules, region.name) if name}

    found = [r for r in regions if any(fnmatchcase(name, pattern) for name in names(r))]
    if not found:
        known = sorted({name for region in regions for name in names(region)})
        near = get_close_matches(pattern.strip("*."), known, n=4, cutoff=0.3) or known[:4]
        raise PlanError(f"no operator is called `{pattern}`; there are {', '.join(near)}")
    return found


def _explained(again: Again, region: Region, flip: str | None) -> str:
    plan, now = again.plan, again.taken(region)
    module = module_of(region.nodes[0].loc.module) or region.name
    words = ways_of(plan, region)
    rows: list[tuple[float, tuple[str, ...]]] = []
    for way in again.others(region):
        again.progress(f"{module}: {words(way)}")
        found = again.run_so(region, lambda other, way=way: other == way)
        if found is None:
            rows.append((float("inf"), ("", words(way), "not possible, or does not fit", "", "")))
            continue
        more = found.seconds - plan.seconds
        own = again.seconds_of(region, way) - again.seconds_of(region, now)
        cells = (format_seconds(found.seconds), _change(own), _change(more - own))
        rows.append((found.seconds, ("", words(way), *cells)))
    rows.sort(key=lambda row: row[0])
    head = ("", f"{module} ({region.scope.weight} times)", "step", "itself", "around it")
    mine = ("*", words(now), format_seconds(plan.seconds), "", "")
    text = [_verdict(plan, module, words(now), rows)]
    if flip is not None:
        text.append(_flips(again, region, now, flip, words))
    return "\n".join([*text, table([head, mine, *(cells for _, cells in rows)])])


def _verdict(
    plan: PlanData, module: str, now: str, rows: Sequence[tuple[float, tuple[str, ...]]]
) -> str:
    possible = [row for row in rows if row[0] < float("inf")]
    if not possible:
        return f"{module} runs {now}: no other way differs on one axis and is possible."
    seconds, cells = possible[0]
    more = seconds - plan.seconds
    if more <= _ALIKE * plan.seconds:
        return f"{module} runs {now}; {cells[1]} would take the same."
    dearer = "itself" if cells[3].startswith("+") else "what is around it"
    return (
        f"{module} runs {now}: the next best, {cells[1]}, makes a step {more / plan.seconds:.1%} "
        f"longer, for {dearer}."
    )


def _change(seconds: float) -> str:
    if abs(seconds) < 1e-9:
        return "same"
    sign = "+" if seconds > 0 else "-"
    return f"{sign}{format_seconds(abs(seconds))}"


_FLIPS: dict[str, tuple[str, Callable[[Cluster, float], Cluster]]] = {
    "link": ("links", lambda machine, factor: machine.changed(links=factor)),
    "inter-node": (
        "links between nodes",
        lambda machine, factor: machine.changed(between_nodes=factor),
    ),
    "gpu": ("GPUs", lambda machine, factor: machine.changed(gpu=factor)),
}


def _flips(
    again: Again, region: Region, now: Strategy, flip: str, words: Callable[[Strategy], str]
) -> str:
    """From which speed on another way wins, by planning again."""
    what, changed = _FLIPS[flip]
    first, plan = again.cluster, again.plan

    def taken_at(factor: float) -> Strategy | None:
        again.progress(f"{what} {factor:.3g} times as fast")
        asked = Again(plan, changed(first, factor), again.memory_bytes, again.progress)
        found = asked.run_so(region, lambda way: True)
        return None if found is None else asked.taken(region, found)

    found: list[str] = []
    for direction in (0.5, 2.0):
        inside, outside = 1.0, direction
        while taken_at(outside) in (now, None):
            inside, outside = outside, outside * direction
            if not 1 / _FURTHEST <= outside <= _FURTHEST:
                break
        else:
            while max(inside / outside, outside / inside) > _NEAR:
                middle = sqrt(inside * outside)
                inside, outside = (middle, outside) if taken_at(middle) == now else (inside, middle)
            other = taken_at(outside)
            assert other is not None
            found.append(f"{words(other)} wins at {outside:.3g} times their speed")
    if not found:
        return f"No speed of {what} from 1/{_FURTHEST:g} to {_FURTHEST:g} times theirs changes it."
    return f"{what[0].upper()}{what[1:]}: {'; '.join(found)} (found by planning again)."


FLIPS = tuple(_FLIPS)

__all__ = [
    "FLIPS", "Change", "compare", "explain", "parse_factor", "seconds_of", "what_if", "why_not",
]  # fmt: skip
