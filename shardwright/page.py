"""A sweep as one HTML page that needs nothing else: the answer, a plot per sequence, the table."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

from .facts.units import format_bytes, format_seconds
from .figures import Figures
from .markup import COLOURS, document, legend, safe
from .sweeping import Row, Sweep, times_of

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 16, 52
_DECADES = 3  # more of them on one axis are marked by powers of ten alone
_ROOM = 0.06  # of the plot's width on each side of its points

_STYLE = """
svg .front { fill: none; stroke: var(--soft); }
svg .point { stroke: var(--back); stroke-width: 1.5; cursor: pointer; }
svg .best { stroke: var(--ink); stroke-width: 2.5; }
th:nth-child(-n+6), td:nth-child(-n+6) { text-align: left; }
tr.best td { font-weight: 600; } tr.lit td { background: var(--mark); }
"""


def page_of(sweep: Sweep) -> str:
    """The page as text."""
    title = f"{sweep.asking.model}: {len(sweep.rows)} points"
    answer = "".join(f'<p class="answer">{safe(line)}</p>' for line in _lines(sweep.answer()))
    plots = "".join(_plot(sweep, seq) for seq in sweep.asking.seqs)
    commands = "".join(
        f"<p><code>{safe(sweep.command(best))}</code></p>"
        for seq in sweep.asking.seqs
        if (best := sweep.best(seq)) is not None
    )
    body = (
        f"<h1>{safe(title)}</h1>\n{answer}\n{commands}\n{_legend(sweep)}\n{plots}\n"
        f"<h2>All points</h2>\n{_table(sweep)}\n"
        '<p class="soft">Predicted by the cost model of shardwright; =&gt; to take, * no other is '
        "better both ways.</p>"
    )
    return document(title, body, _STYLE)


def _lines(text: str) -> list[str]:
    return text.splitlines()


def _colour(sweep: Sweep, cluster: str) -> str:
    return COLOURS[sweep.asking.clusters.index(cluster) % len(COLOURS)]


def _legend(sweep: Sweep) -> str:
    return legend([(name, _colour(sweep, name)) for name in sweep.asking.clusters])


# -- the plot -------------------------------------------------------------------------------------


class Scale:
    """Numbers above 0 to places between two ends, by their logarithm."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        logs = [log10(value) for value in values]
        least, most = min(logs), max(logs)
        room = max((most - least) * _ROOM, 0.08)
        self.least, self.most, self.start, self.end = least - room, most + room, start, end

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        part = (log10(value) - self.least) / (self.most - self.least)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within the scale: powers of ten, with 2 and 5 times those where few."""
        digits = (1,) if self.most - self.least > _DECADES else (1, 2, 5)
        found = [
            digit * 10.0**power
            for power in range(floor(self.least), ceil(self.most) + 1)
            for digit in digits
        ]
        return [value for value in found if self.least <= log10(value) <= self.most]


def _plot(sweep: Sweep, seq: int) -> str:
    rows = [(n, row) for n, row in enumerate(sweep.rows) if sweep.group(row.point) == seq]
    found = [(n, row.figures) for n, row in rows if row.figures is not None]
    if not found:
        return ""
    longest = sweep.asking.max_seq
    answers = found[0][1].tpot_s is not None and not longest
    xs = [sweep.axes(one)[0] for _, one in found]
    ys = [-sweep.axes(one)[1] for _, one in found]
    across = Scale(xs, _LEFT, _WIDTH - _RIGHT)
    up = Scale(ys, _HEIGHT - _BOTTOM, _TOP)
    counts = sorted({x for x in xs}) if not answers and not sweep.priced else across.ticks()
    shown = [(x, _seconds(x) if answers else f"{x:g}") for x in counts]
    parts = [
        f'<line class="grid" x1="{across.place(x):.1f}" x2="{across.place(x):.1f}" y1="{_TOP}" '
        f'y2="{_HEIGHT - _BOTTOM}"/><text text-anchor="middle" x="{across.place(x):.1f}" '
        f'y="{_HEIGHT - _BOTTOM + 18}">{text}</text>'
        for x, text in shown
    ]
    parts += [
        f'<line class="grid" y1="{up.place(y):.1f}" y2="{up.place(y):.1f}" x1="{_LEFT}" '
        f'x2="{_WIDTH - _RIGHT}"/><text text-anchor="end" x="{_LEFT - 8}" '
        f'y="{up.place(y) + 4:.1f}">{_short(y)}</text>'
        for y in up.ticks()
    ]
    name = "time per output token" if answers else "cost per hour" if sweep.priced else "GPUs"
    upward = "tokens of a sequence" if longest else "tokens/s per GPU" if answers else "tokens/s"
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text text-anchor="middle" x="{middle}" y="{_HEIGHT - 10}">{name}</text>')
    parts.append(
        f'<text text-anchor="middle" transform="translate(14 {_HEIGHT / 2 - 18}) rotate(-90)">'
        f"{upward}</text>"
    )
    parts.append(_front_line(sweep, seq, across, up))
    parts += [_dot(sweep, n, one, across, up) for n, one in found]
    title = "The longest sequences" if longest else f"Sequences of {seq:,} tokens"
    label = f"{upward} against {name}: {title}"
    return (
        f"<h2>{title}</h2>\n"
        f'<div class="scroll picture"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></div>\n'
    )


def _front_line(sweep: Sweep, seq: int, across: Scale, up: Scale) -> str:
    ends = sorted(sweep.axes(one) for one in sweep.front() if sweep.group(one.point) == seq)
    points = " ".join(f"{across.place(x):.1f},{up.place(-y):.1f}" for x, y in ends)
    return f'<polyline class="front" points="{points}"/>'


def _dot(sweep: Sweep, number: int, one: Figures, across: Scale, up: Scale) -> str:
    x, y = sweep.axes(one)
    best = one == sweep.best(sweep.group(one.point))
    times = "\n".join(f"{name} {format_seconds(s)}" for name, s in times_of(one))
    text = (
        f"{one.point}\n{one.layout}\n{times}\n{one.tokens_per_s:,.0f} tokens/s, "
        f"{one.tokens_per_s_per_gpu:,.0f} per GPU\nMFU {one.mfu:.0%}, "
        f"{format_bytes(one.memory_bytes)} per GPU"
    )
    return (
        f'<circle class="point{" best" if best else ""}" cx="{across.place(x):.1f}" '
        f'cy="{up.place(-y):.1f}" r="{8 if best else 6}" '
        f'fill="{_colour(sweep, one.point.cluster)}" data-row="row{number}" '
        f'data-text="{safe(text)}"><title>{safe(text)}</title></circle>'
    )


def _seconds(seconds: float) -> str:
    return format_seconds(seconds)


def _short(value: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


# -- the table ------------------------------------------------------------------------------------


def _table(sweep: Sweep) -> str:
    head, *lines = sweep.cells()
    top = "".join(f"<th>{safe(cell)}</th>" for cell in head)
    rows = [
        _line(sweep, n, row, line)
        for n, (row, line) in enumerate(zip(sweep.rows, lines, strict=True))
    ]
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _line(sweep: Sweep, number: int, row: Row, cells: Sequence[str]) -> str:
    best = row.figures is not None and row.figures == sweep.best(sweep.group(row.point))
    inside = "".join(f"<td>{safe(cell)}</td>" for cell in cells)
    return f'<tr id="row{number}"{" class=best" if best else ""}>{inside}</tr>'


__all__ = ["page_of"]
