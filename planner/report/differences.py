"""Plans side by side: what their time goes into, what they move, what fills their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from ...facts.collectives import find_collective
from ...facts.phases import find_phase
from ...facts.units import format_bytes, format_seconds
from ..plan.plan import Memory, PlanData
from ..plan.traffic import predicted_bytes
from .report import split_seconds, table

_SMALL = 0.001  # parts that are less than this share of a plan's total everywhere are not shown


@dataclass(frozen=True, slots=True)
class Side:
    """A plan of one phase under a name."""

    name: str
    plan: PlanData

    def seconds(self) -> dict[str, float]:
        """By part, what a step takes: they add up to its seconds.

        Of a pipeline those of the rank that works longest, which waits for the others besides.
        """
        plan = self.plan
        if plan.pipeline is not None:
            parts = _added(Side("", kind).seconds() for kind in self._stages())
            return {**parts, "waiting for other ranks": plan.seconds - sum(parts.values())}
        _, moving = split_seconds(plan)
        parts = dict(plan.spent.computing)
        parts |= {f"communication over {axis}": s for axis, s in moving.items()}
        parts |= {"casts": plan.casts_s, "optimizer": plan.optimizer_s}
        return {**parts, "other": plan.seconds - sum(parts.values())}

    def _stages(self) -> list[PlanData]:
        """The plans of the stages of a pipeline's rank that works longest."""
        pipeline, many = self.plan.pipeline, self.plan.request.micro_batches
        assert pipeline is not None
        table = pipeline.table(many)

        def works_s(rank: int) -> float:
            own = [pipeline.stages[n] for n in table.stages_of(rank)]
            return sum(many * (s.forward_s + s.backward_s) + s.once_s for s in own)

        longest = max(range(pipeline.ranks), key=works_s)
        return [pipeline.kinds[pipeline.stages[n].kind] for n in table.stages_of(longest)]

    def whole(self) -> dict[str, float]:
        """By part, what a step takes, or a whole answer in phase `serve`."""
        parts, decode = self.seconds(), self.plan.decode
        if decode is None:
            return parts
        steps = self.plan.request.decode_steps
        later = {what: steps * s for what, s in Side(self.name, decode).seconds().items()}
        parts["conversion of caches"] = self.plan.conversion_s
        return {what: parts.get(what, 0.0) + later.get(what, 0.0) for what in {**parts, **later}}

    def received(self) -> dict[str, float]:
        """By axis and collective, the bytes that a GPU receives in a step."""
        if self.plan.pipeline is not None:
            return _added(Side("", kind).received() for kind in self._stages())
        found: dict[str, float] = {}
        for (op, axis, _), n in predicted_bytes(self.plan.program, self.plan.mesh).items():
            what = f"{axis.replace('_', '+')} {find_collective(op).words}"
            found[what] = found.get(what, 0.0) + n
        return found

    def memory(self) -> dict[str, float]:
        """Bytes at the peak, by kind."""
        return {each.name: getattr(self.plan.memory, each.name) for each in fields(Memory)}


def side_by_side(sides: Sequence[Side]) -> str:
    """Three tables; with two plans, differences too (those of the second to the first).

    Of a pipeline they are of the rank that works longest, and memory of the one that holds most;
    what stages send each other is not among what is received.
    """
    run = find_phase(sides[0].plan.request.phase).run
    inside = ", between stages apart" if any(s.plan.pipeline for s in sides) else ""
    parts = [
        _table(f"time of a {run}", [side.seconds() for side in sides], sides, _time),
        _table(
            f"received per {run}{inside}", [side.received() for side in sides], sides, format_bytes
        ),
        _table("memory at the peak", [side.memory() for side in sides], sides, format_bytes),
    ]
    return "\n\n".join(parts)


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By part, the sum of all."""
    found: dict[str, float] = {}
    for each in parts:
        for what, amount in each.items():
            found[what] = found.get(what, 0.0) + amount
    return found


def main_difference(slower: Side, faster: Side) -> str:
    """The part that the slower plan spends most more on, in words; "" where there is none."""
    a, b = slower.whole(), faster.whole()
    more = {what: a.get(what, 0.0) - b.get(what, 0.0) for what in {**a, **b}}
    moved = {what for what in more if what.startswith("communication")}
    together = sum(more[what] for what in moved)
    rest = {what: s for what, s in more.items() if what not in moved}
    what, seconds = max([*rest.items(), ("communication", together)], key=lambda item: item[1])
    if seconds <= 0:
        return ""
    before, after = _sum(b, what), _sum(a, what)
    return f"{what} takes {_time(after)} instead of {_time(before)}"


def _sum(parts: Mapping[str, float], what: str) -> float:
    return sum(s for name, s in parts.items() if name == what or name.startswith(f"{what} over"))


def _time(seconds: float) -> str:
    return f"-{format_seconds(-seconds)}" if seconds < 0 else format_seconds(seconds)


def _table(
    title: str,
    columns: Sequence[Mapping[str, float]],
    sides: Sequence[Side],
    show: Callable[[float], str],
) -> str:
    rows = dict.fromkeys(what for column in columns for what in column)
    totals = [sum(column.values()) for column in columns]
    lines: list[tuple[str, ...]] = [(title, *(side.name for side in sides), *_head(sides))]
    for what in rows:
        values = [column.get(what, 0.0) for column in columns]
        if all(abs(v) <= _SMALL * t for v, t in zip(values, totals, strict=True)):
            continue
        shown = [show(v) if v else "" for v in values]
        lines.append((what, *shown, *_change(values, show, _SMALL * max(totals))))
    lines.append(("in all", *(show(t) for t in totals), *_change(totals, show, 0.0)))
    return table(lines)


def _head(sides: Sequence[Side]) -> tuple[str, ...]:
    return ("difference",) if len(sides) == 2 else ()


def _change(values: Sequence[float], show: Callable[[float], str], least: float) -> tuple[str, ...]:
    """What is more in the second than in the first, where that is more than `least`."""
    if len(values) != 2:
        return ()
    change = values[1] - values[0]
    shown = show(change) if change >= 0 else f"-{show(-change)}"
    return (f"+{shown}" if change > least else shown if change < -least else "",)


__all__ = ["Side", "main_difference", "side_by_side"]
