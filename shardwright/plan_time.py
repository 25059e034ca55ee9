"""When the streams of a plan do what: as pictures, and as a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .costmodel.machines.cluster import Cluster, load_cluster
from .drawing import MOST_RANKS, WIDTH, box, caption, svg
from .facts.units import format_seconds
from .markup import COLOURS, legend, safe
from .planner.plan.moments import Moment, Moments, by_unit, moments_of
from .planner.plan.plan import PlanData
from .planner.strategies.prices import network_for

_STREAMS = ("compute", "communication", "weights")
_PHASES = {  # of a step, and their colours
    "forward": COLOURS[0], "again": COLOURS[5], "backward": COLOURS[2], "optimizer": COLOURS[4],
}  # fmt: skip
_MOVING = {"communication": COLOURS[1], "weights": COLOURS[3]}


def moments_on(plan: PlanData, machine: Cluster) -> Moments:
    return moments_of(plan, network_for(plan.graph, plan.mesh, machine))


def timeline(found: Moments) -> str:
    """The step unit by unit, and one layer in the middle operator by operator."""
    if not found.moments:
        return ""
    whole = list(by_unit(found.moments))
    parts = [f"<h2>Time</h2>\n<p>{_played(found)}</p>", _rows(whole, "the step, layer by layer")]
    layers = [m.unit for m in found.moments if m.unit and m.phase == "forward" and m.rank == 0]
    if layers and not any(moment.rank for moment in found.moments):
        middle = layers[len(layers) // 2]
        for phase in ("forward", "backward"):
            mine = [m for m in found.moments if m.unit == middle and m.phase == phase]
            first = min((m.start for m in mine if m.stream == "compute"), default=0.0)
            last = max((m.end for m in mine if m.stream != "weights"), default=0.0)
            beside = [m for m in found.moments if m.start < last and m.end > first]
            if mine:
                parts.append(f'<p class="soft">{safe(middle)}, {phase}</p>')
                parts.append(_rows(beside, f"{middle}, {phase}", first, last))
    computed = {m.phase for m in found.moments if m.stream == "compute"}
    moved = {m.stream for m in found.moments}
    colours = [(name, colour) for name, colour in _PHASES.items() if name in computed]
    colours += [(name, colour) for name, colour in _MOVING.items() if name in moved]
    return "\n".join([*parts, legend(colours)])


def _played(found: Moments) -> str:
    words = format_seconds(found.seconds)
    if found.times > 1:
        return f"One of {found.times} micro-batches, and the optimizer; a step takes {words}."
    return f"Played through, it takes {words}."


def _rows(
    moments: Sequence[Moment], label: str, first: float = 0.0, last: float | None = None
) -> str:
    end = max(m.end for m in moments) if last is None else last
    left, high, gap = 110.0, 20.0, 6.0
    keys = sorted({(m.rank, _STREAMS.index(m.stream)) for m in moments})[: 3 * MOST_RANKS]
    scale = (WIDTH - left - 6) / max(end - first, 1e-12)
    several = any(rank for rank, _ in keys)
    parts = [
        caption(
            left - 8, i * (high + gap) + 15, f"pp {r}" if several else _STREAMS[s], "end"
        )
        for i, (r, s) in enumerate(keys)
    ]  # fmt: skip
    for moment in moments:
        key = moment.rank, _STREAMS.index(moment.stream)
        start, stop = max(moment.start, first), min(moment.end, end)
        if key not in keys or stop <= start:
            continue
        colour = _MOVING.get(moment.stream) or _PHASES[moment.phase]
        told = f"{moment.unit or 'outside of layers'}, {moment.phase}\n{moment.name}\n"
        told += format_seconds(moment.seconds)
        parts.append(
            box(
                left + (start - first) * scale,
                keys.index(key) * (high + gap),
                (stop - start) * scale,
                high,
                colour,
                told,
            )
        )
    bottom = len(keys) * (high + gap)
    parts.append(caption(left, bottom + 14, "0"))
    parts.append(caption(WIDTH - 6, bottom + 14, format_seconds(end - first), "end"))
    return svg(bottom + 20, "".join(parts), label)


# -- as a trace ------------------------------------------------------------------------------------


def trace_of(plan: PlanData) -> dict[str, Any]:
    """What is predicted of a step, as a Chrome trace, which Perfetto opens; times are in us.

    A process for each phase (or rank of a pipeline), with a thread for each stream.
    """
    machine = load_cluster(plan.request.cluster, plan.request.gpus)
    events: list[dict[str, Any]] = []
    for number, phase in enumerate(plan.phases):
        found = moments_on(phase, machine)
        title = f"{phase.request.phase}, {phase.mesh}"
        if plan.decode is not None:
            title = f"{('prefill', 'decode')[number]}, {phase.mesh}"
        for rank in sorted({moment.rank for moment in found.moments}):
            name = f"{title}, rank {rank} of pp" if phase.pipeline is not None else title
            events.append(_named("process_name", number + rank, 0, name))
            events += [_named("thread_name", number + rank, i, s) for i, s in enumerate(_STREAMS)]
        events += [_event(moment, number) for moment in found.moments]
    other = {"tool": "shardwright", "seconds": plan.seconds}
    return {"otherData": other, "displayTimeUnit": "ms", "traceEvents": events}


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _event(moment: Moment, number: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": moment.name,
        "cat": moment.phase,
        "pid": number + moment.rank,
        "tid": _STREAMS.index(moment.stream),
        "ts": moment.start * 1e6,
        "dur": moment.seconds * 1e6,
        "args": {"unit": moment.unit, "phase": moment.phase},
    }


def trace_text(plan: PlanData) -> str:
    """`trace_of` as text."""
    return json.dumps(trace_of(plan), allow_nan=False) + "\n"


__all__ = ["moments_on", "timeline", "trace_of", "trace_text"]
