"""Why one operator runs as it does: what each other way would cost, and when one would win."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from math import inf, sqrt
from typing import TypeAlias

from .asked import Progress, silent
from .costmodel.machines.cluster import Cluster
from .facts.units import format_seconds
from .ir.ops.registry import operator_of
from .planner.errors import PlanError
from .planner.plan.plan import PlanData
from .planner.report.ops import ways_of
from .planner.report.report import table
from .planner.search.again import Again
from .planner.search.ways import Outcome, Ways, ways_of_plan
from .planner.strategies.pins import module_of
from .planner.strategies.regions import Region, Strategy
from .questions import ALIKE, Change

_FURTHEST = 64.0  # a figure is followed to so many times its value, and as far below
_NEAR = 1.02  # the break-even value is known to this factor

_Rows: TypeAlias = Sequence[tuple[float, tuple[str, ...]]]


def explain(
    plan: PlanData, pattern: str, *, flip: str | None = None, progress: Progress = silent
) -> str:
    """Why operators of modules that match `pattern` run as they do: what each other way would cost.

    Of ways that differ from the plan's on one axis, all else decided anew around them; layers
    recomputed or kept, mesh and order of tokens as in the plan.  Of a server both programs are
    decided anew; of a pipeline the stages of that kind, between ends that stay as they are.
    `flip`: `link`, `inter-node` or `gpu`: how many times as fast it must be for another way to win.
    Raises PlanError where no module matches.
    """
    again = Change().again(plan, progress)
    programs = ways_of_plan(again)
    matching = [(n, r) for n, each in enumerate(programs) for r in _matching(each, pattern)]
    if not matching:
        raise PlanError(_none_called(programs, pattern))
    return "\n\n".join(_explained(again, programs, n, region, flip) for n, region in matching)


def _names(region: Region) -> set[str]:
    heavy = [node for node in region.nodes if operator_of(node).heavy]
    modules = {module_of(node.loc.module) for node in heavy or region.nodes}
    return {name for name in (*modules, region.name) if name}


def _matching(program: Ways, pattern: str) -> list[Region]:
    regions = program.regions()
    return [r for r in regions if any(fnmatchcase(name, pattern) for name in _names(r))]


def _none_called(programs: Sequence[Ways], pattern: str) -> str:
    """That no operator is called so, and which names end most like it."""
    known = {name for each in programs for region in each.regions() for name in _names(region)}

    def likeness(name: str) -> float:
        asked, end = (text.rpartition(".")[2] for text in (pattern, name))
        whole = SequenceMatcher(None, pattern, name).ratio()
        return SequenceMatcher(None, asked, end).ratio() + whole

    near = sorted(known, key=lambda name: (-likeness(name), name))[:4]
    return f"no operator is called `{pattern}`; there are {', '.join(near)}"


def _explained(
    again: Again, programs: Sequence[Ways], number: int, region: Region, flip: str | None
) -> str:
    program = programs[number]
    now, words = program.taken(region), ways_of(program.plan, region)
    module = module_of(region.nodes[0].loc.module) or region.name
    if program.name:
        module += f" in {program.name}"
    rows: list[tuple[float, tuple[str, ...]]] = []
    for way in program.others(region):
        again.progress(f"{module}: {words(way)}")
        found = program.run_so(region, lambda other, way=way: other == way)
        rows.append(_row(program, region, way, words(way), found))
    rows.sort(key=lambda row: row[0])
    count = region.scope.weight
    title = module if count == 1 else f"{module} ({count} times)"
    head = ("", title, program.step, "itself", "around it")
    mine = ("*", words(now), format_seconds(program.seconds), "", "")
    text = [_verdict(program, module, words(now), rows)]
    if flip is not None:
        text.append(_flips(again, number, region, now, flip, words))
    return "\n".join([*text, table([head, mine, *(cells for _, cells in rows)])])


def _row(
    program: Ways, region: Region, way: Strategy, words: str, found: Outcome | None
) -> tuple[float, tuple[str, ...]]:
    """Seconds of a step, and the line of a table."""
    if found is None:
        return inf, ("", words, "not possible, or does not fit", "", "")
    more = found.seconds - program.seconds
    own = program.seconds_of(region, way) - program.seconds_of(region, program.taken(region))
    return found.seconds, (
        "",
        words,
        format_seconds(found.seconds),
        _change(own),
        _change(more - own),
    )


def _verdict(program: Ways, module: str, now: str, rows: _Rows) -> str:
    possible = [row for row in rows if row[0] < inf]
    if not possible:
        return f"{module} runs {now}: no other way differs on one axis and is possible."
    seconds, cells = possible[0]
    more = seconds - program.seconds
    if abs(more) <= ALIKE * program.seconds:
        return f"{module} runs {now}; {cells[1]} would take the same."
    if more < 0:
        return (
            f"{module} runs {now}; {cells[1]} would make this {program.step} "
            f"{-more / program.seconds:.1%} shorter: the search, which counts what computing hides "
            "as a bound alone, did not find it, or was asked otherwise."
        )
    dearer = "itself" if cells[3].startswith("+") else "what is around it"
    article = "an" if program.step == "answer" else "a"
    return (
        f"{module} runs {now}: the next best, {cells[1]}, makes {article} {program.step} "
        f"{more / program.seconds:.1%} longer, for {dearer}."
    )


def _change(seconds: float) -> str:
    if abs(seconds) < 1e-9:
        return "same"
    sign = "+" if seconds > 0 else "-"
    return f"{sign}{format_seconds(abs(seconds))}"


# -- when another way wins ------------------------------------------------------------------------

_FLIPS: dict[str, tuple[str, Callable[[Cluster, float], Cluster]]] = {
    "link": ("links", lambda machine, factor: machine.changed(links=factor)),
    "inter-node": (
        "links between nodes",
        lambda machine, factor: machine.changed(between_nodes=factor),
    ),
    "gpu": ("GPUs", lambda machine, factor: machine.changed(gpu=factor)),
}


def _flips(
    again: Again, number: int, region: Region, now: Strategy, flip: str,
    words: Callable[[Strategy], str],
) -> str:  # fmt: skip
    """From which speed on another way wins, by planning again."""
    what, changed = _FLIPS[flip]

    def taken_at(factor: float) -> Strategy | None:
        again.progress(f"{what} {factor:.3g} times as fast")
        asked = Again(
            again.plan, changed(again.cluster, factor), again.memory_bytes, again.progress
        )
        program = ways_of_plan(asked)[number]
        found = program.run_so(region, lambda way: True)
        return found and program.taken(region, found)

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

__all__ = ["FLIPS", "explain"]
