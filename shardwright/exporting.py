"""Plans for other tools: their nearest layout where they have not the plan's own, and its price."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from .asked import Progress, silent
from .codegen.export.registry import TARGETS, find_target
from .codegen.export.target import Target, seconds_text
from .planner.errors import InfeasibleError, LayoutError, PlanError
from .planner.plan.named import name_of_plan
from .planner.plan.plan import PlanData
from .planner.strategies.layout import Layout
from .questions import Change

_MOST = 12  # differences that are told one by one


@dataclass(frozen=True, slots=True)
class Export:
    """A plan for another tool.  `print(export)` gives the text.

    `layout` is what the tool then runs, as `--layout` has it, and `predicted` its time, `seconds`
    that of a step or an answer; of an exact target they are the plan's own, and `layout` is "".
    `differences` say what of the plan the tool does not do.
    """

    target: str
    text: str
    layout: str
    predicted: str
    seconds: float
    differences: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


def export(plan: PlanData, to: str, progress: Progress = silent) -> Export:
    """A plan in the words of the target `to`.

    Where the tool has no such layout, the nearest that it has is planned and written; it is then
    named, with its price.  Raises PlanError for an unknown target, one that is for other phases,
    and a layout that is not possible, or does not fit.
    """
    target = find_target(to)
    target.check(plan)
    if target.exact:
        written = target.write(plan, None)
        found = Export(to, written.text, "", seconds_text(plan), plan.whole_s, written.lost)
        return found if target.name == "json" else _with_head(found, target)
    named = name_of_plan(plan)
    layout, lost = target.nearest(named)
    made, differences = plan, list(lost)
    if named.differences or layout.text != named.words:
        nearest = layout
        layout, made = _nearest(plan, layout, target, progress)
        if layout != nearest:
            differences.insert(0, f"the nearest layout that it has, {nearest.text}, does not fit")
        differences += [f"{each}" for each in named.differences[:_MOST]]
        more = len(named.differences) - _MOST
        differences += [f"... and {more} more"] if more > 0 else []
        differences.insert(0, _price(plan, made, layout))
    written = target.write(made, layout)
    told = (*differences, *written.lost)
    seconds = made.whole_s
    found = Export(to, written.text, layout.text, seconds_text(made), seconds, told)
    return _with_head(found, target)


def _nearest(
    plan: PlanData, layout: Layout, target: Target, progress: Progress
) -> tuple[Layout, PlanData]:
    """A layout of the tool and its plan; where that does not fit the memory, the fastest that does
    of those with other sizes of tensor parallelism."""
    again = Change().again(plan, progress)
    progress(f"price {layout.text}")
    why: Exception
    try:
        return layout, again.with_layout(layout.text)
    except (LayoutError, InfeasibleError) as error:
        why = error
    found: list[tuple[Layout, PlanData]] = []
    for other in target.ordinary(plan.request.gpus):
        progress(f"price {other.text}")
        with suppress(LayoutError, InfeasibleError):
            found.append((other, again.with_layout(other.text)))
    if found:
        return min(found, key=lambda each: each[1].whole_s)
    how = "does not fit" if isinstance(why, InfeasibleError) else "is not possible"
    raise PlanError(
        f"the layout of {target.name} that is nearest to this plan, {layout.text}, {how}, nor do "
        f"others: {why}"
    ) from why


def _price(plan: PlanData, made: PlanData, layout: Layout) -> str:
    now, then = plan.whole_s, made.whole_s
    return (
        f"it runs {layout.text}, predicted {seconds_text(made)}: {then / now - 1:+.1%} beside the"
        f" plan's {seconds_text(plan)}"
    )


def _with_head(found: Export, target: Target) -> Export:
    text = "\n".join([*_head(found, target), found.text])
    return Export(
        found.target, text, found.layout, found.predicted, found.seconds, found.differences
    )


def _head(found: Export, target: Target) -> Iterator[str]:
    """What stands in front of the text, as comments."""
    sign = target.comment
    runs = f"{found.layout}, {found.predicted}" if found.layout else found.predicted
    yield f"{sign} For {target.title}: {runs} (predicted by shardwright)."
    if found.differences:
        yield f"{sign} Not as in the plan:"
        yield from (f"{sign}   {' '.join(each.split())}" for each in found.differences)


__all__ = ["TARGETS", "Export", "export"]
