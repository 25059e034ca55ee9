"""What fills the memory of a plan: at its peak, and over a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .drawing import WIDTH, box, caption, svg
from .facts.units import format_bytes
from .markup import COLOURS, legend, safe
from .planner.plan.plan import Memory, PlanData
from .planner.search.again import Live
from .planner.search.ways import Ways
from .planner.strategies.bringing import Use

_USES: dict[Use, tuple[str, str]] = {  # what memory is for, and its colours
    "state": ("parameters and optimizer states", COLOURS[0]),
    "copy": ("weights gathered", COLOURS[5]),
    "gradient": ("gradients", COLOURS[1]),
    "kept": ("activations or KV caches kept", COLOURS[2]),
    "running": ("what runs", COLOURS[4]),
}
_KINDS = (  # of bytes at the peak, as `Memory` has them
    ("parameters", COLOURS[0]), ("optimizer", COLOURS[5]), ("gradients", COLOURS[1]),
    ("activations", COLOURS[2]), ("cache", COLOURS[3]), ("transient", COLOURS[4]),
)  # fmt: skip


def memory_at_the_peak(plan: PlanData) -> str:
    """Bytes at the peak by kind, and the limit."""
    last = plan.decode or plan
    memory, limit = last.memory, plan.request.memory_bytes
    most, x, parts = max(memory.total, limit), 0.0, list[str]()
    for name, colour in _KINDS:
        size = _bytes_of(memory, name)
        if size > 0:
            width = 700 * size / most
            parts.append(box(x, 4, width, 28, colour, f"{name}\n{format_bytes(size)}"))
            x += width
    at = 700 * limit / most
    parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="36"/>')
    named = [(n, c) for n, c in _KINDS if _bytes_of(memory, n) > 0]
    words = f"{format_bytes(memory.total)} of {format_bytes(limit)} for each GPU at the peak"
    picture = svg(40, "".join(parts), words)
    return f"<h2>Memory</h2>\n<p>{words}</p>\n{picture}\n{legend(named)}"


def _bytes_of(memory: Memory, kind: str) -> float:
    return {
        "parameters": memory.parameters, "optimizer": memory.optimizer,
        "gradients": memory.gradients, "activations": memory.activations, "cache": memory.cache,
        "transient": memory.transient,
    }[kind]  # fmt: skip


def memory_over_time(program: Ways, found: Sequence[Live]) -> str:
    """Bytes over time, one kind on the other."""
    plan = program.plan
    if not found:
        return ""
    height, left = 220.0, 70.0
    limit, peak = plan.request.memory_bytes, max(sum(each.bytes.values()) for each in found)
    near = limit < 3 * peak  # then it is worth the room
    most = max(limit, peak) if near else peak
    step = (WIDTH - left - 10) / len(found)
    base, parts = [0.0] * len(found), list[str]()
    for use, (name, colour) in _USES.items():
        upper = [low + each.bytes.get(use, 0.0) for low, each in zip(base, found, strict=True)]
        if upper == base:
            continue
        ahead = _line(upper, left, step, height, most)
        back = list(reversed(_line(base, left, step, height, most)))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*ahead, *back))
        parts.append(f'<polygon fill="{colour}" points="{points}"><title>{name}</title></polygon>')
        base = upper
    parts += _memory_axis(most, height, left)
    parts += _places(found, left, step, height)
    if near:
        y = max(height * (1 - limit / most), 0.5)
        parts.append(f'<line class="limit" x1="{left}" x2="{WIDTH - 10}" y1="{y}" y2="{y}"/>')
    for i, each in enumerate(found):
        told = "\n".join(
            [f"{each.place or 'outside of layers'}, {each.phase}"]
            + [f"{_USES[u][0]} {format_bytes(n)}" for u, n in each.bytes.items() if n > 0]
            + [f"in all {format_bytes(sum(each.bytes.values()))}"]
        )
        parts.append(
            f'<rect class="on" x="{left + i * step:.1f}" y="0" width="{step:.2f}"'
            f' height="{height}" fill="transparent" data-text="{safe(told)}"/>'
        )
    named = [pair for use, pair in _USES.items() if any(each.bytes.get(use) for each in found)]
    picture = svg(height + 40, "".join(parts), "memory over a step, by kind")
    words = "Operator by operator"
    words += "; of layers the first and the last of each kind" if plan.graph.loops else ""
    words += f"; the limit is {format_bytes(limit)}."
    words += _counted(program)
    words = f'<p class="soft">{words}</p>'
    return f"<h2>Memory over a step</h2>\n{picture}\n{legend(named)}\n{words}"


def _counted(program: Ways) -> str:
    """What is counted in memory over time beside what the program itself runs."""
    if program.whole.pipeline is not None:
        many = program.again.in_flight
        return f" With {many} micro-batches in flight; a rank has all of its stages' states."
    if program.name == "prefill":
        return " With caches of the prompt alone."
    return " With caches of the longest context." if program.name == "decode" else ""


def _line(
    values: Sequence[float], left: float, step: float, height: float, most: float
) -> list[tuple[float, float]]:
    """A stair through values."""
    found: list[tuple[float, float]] = []
    for i, value in enumerate(values):
        y = height * (1 - value / most)
        found += [(left + i * step, y), (left + (i + 1) * step, y)]
    return found


def _memory_axis(most: float, height: float, left: float) -> Iterator[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = height * (1 - share)
        yield f'<line class="grid" x1="{left}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield caption(left - 6, max(y + 4, 11), format_bytes(share * most), "end")


def _places(found: Sequence[Live], left: float, step: float, height: float) -> Iterator[str]:
    """Where one phase ends and the next begins."""
    for phase in ("forward", "backward"):
        mine = [i for i, each in enumerate(found) if each.phase == phase]
        if mine:
            middle = left + (mine[0] + mine[-1] + 1) / 2 * step
            yield caption(middle, height + 18, phase, "middle")
            x = left + mine[0] * step
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height + 8}"/>'


__all__ = ["memory_at_the_peak", "memory_over_time"]
