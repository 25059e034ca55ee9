"""A plan as one HTML page that needs nothing else: what it takes, why, and how everything lies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from .costmodel.machines.cluster import Cluster, load_cluster
from .facts.mesh import Mesh
from .facts.spec import Spec, format_spec, is_shard
from .facts.units import format_bytes, format_seconds
from .ir.ops.labels import label_dims
from .ir.ops.registry import operator_of
from .markup import COLOURS, document, legend, safe
from .planner.plan.moments import Moment, Moments, by_unit, moments_of
from .planner.plan.plan import Memory, PlanData
from .planner.plan.program import Compute, Convert, LoopCall, Sharded
from .planner.plan.words import choices_text
from .planner.report.report import format_plan
from .planner.search.again import Again, Live
from .planner.search.ways import Ways, ways_of_plan
from .planner.strategies.bringing import Use
from .planner.strategies.params import ParamRef, all_params
from .planner.strategies.prices import network_for

_WIDTH = 720
_MOST_RANKS = 16  # that a picture of the mesh has on one axis
_STREAMS = ("compute", "communication", "weights")
_PHASES = {  # of a step, and their colours
    "forward": COLOURS[0], "again": COLOURS[5], "backward": COLOURS[2], "optimizer": COLOURS[4],
}  # fmt: skip
_MOVING = {"communication": COLOURS[1], "weights": COLOURS[3]}
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

_STYLE = """
th, td { text-align: left; }
svg rect.on { cursor: pointer; }
svg .frame { fill: none; stroke: var(--ink); } svg .cell { fill: var(--fill); stroke: var(--line); }
svg .node text { fill: #fff; font-size: 12px; } svg .edge { fill: none; stroke: var(--soft); }
svg .limit { stroke: var(--ink); stroke-dasharray: 4 3; }
.picture svg { min-width: 560px; }
svg.small { width: 96px; max-width: 96px; }
"""


def page_of_plan(plan: PlanData) -> str:
    """The page as text.  Raises ClusterError where the plan's cluster file is not here."""
    machine = load_cluster(plan.request.cluster, plan.request.gpus)
    parts = [_head(plan), _mesh(plan, machine), _baselines(plan), _memory_bars(plan)]
    programs = ways_of_plan(Again(plan, machine))
    if plan.pipeline is not None:
        parts.append(_timeline(_moments(plan, machine)))
    for program in programs:
        parts += _program(program, machine)
    parts.append(_search(plan))
    return document(f"{plan.graph.name}: a plan", "\n".join(filter(None, parts)), _STYLE)


def _program(program: Ways, machine: Cluster) -> list[str]:
    """What one program takes and does: a phase of a server, or a kind of stages of a pipeline,
    whose time is in that of all ranks."""
    plan = program.plan
    title = {"prefill": "Prefill", "decode": "Decode of one token"}.get(program.name, program.name)
    parts = [f"<h2>{safe(title[0].upper() + title[1:])}</h2>"] if title else []
    if program.whole.pipeline is None:
        parts.append(_timeline(_moments(plan, machine)))
    found = program.again.memory()
    return [*parts, _memory(program, found), _layers(plan), _tensors(plan)]


def _moments(plan: PlanData, machine: Cluster) -> Moments:
    return moments_of(plan, network_for(plan.graph, plan.mesh, machine))


def fragment_of(plan: PlanData) -> str:
    """What a notebook shows of a plan: the sentence, the ordinary plans, and memory at its peak."""
    style = "<style>.shardwright svg { max-width: 720px; } .shardwright .limit { stroke: #888; }"
    style += " .shardwright text { fill: currentColor; font-size: 13px; }</style>"
    body = "\n".join([_head(plan), _baselines(plan), _memory_bars(plan)])
    return f'<div class="shardwright">{style}{body}</div>'


def trace_of(plan: PlanData) -> dict[str, Any]:
    """What is predicted of a step, as a Chrome trace, which Perfetto opens; times are in us.

    A process for each phase (or rank of a pipeline), with a thread for each stream.
    """
    machine = load_cluster(plan.request.cluster, plan.request.gpus)
    events: list[dict[str, Any]] = []
    for number, phase in enumerate(plan.phases):
        found = _moments(phase, machine)
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


# -- the head -------------------------------------------------------------------------------------


def _head(plan: PlanData) -> str:
    first = format_plan(plan).split("\n\n")[0].splitlines()
    lines = "".join(f'<p class="answer">{safe(line.strip())}</p>' for line in first)
    request = plan.request
    asked = f"{request.batch} sequences of {request.seq:,} tokens, phase {request.phase}"
    if request.micro_batches > 1:
        asked += f", {request.micro_batches} micro-batches"
    return f'<h1>{safe(plan.graph.name)}</h1>\n{lines}\n<p class="soft">{safe(asked)}</p>'


def _search(plan: PlanData) -> str:
    found = plan.search
    rows = [
        ("solver", found.solver),
        ("status", found.status),
        ("gap to the bound", f"{found.gap:.2%}"),
        ("meshes tried", f"{found.meshes}"),
        *((name, format_seconds(seconds)) for name, seconds in found.seconds),
    ]
    notes = "".join(f"<p>{safe(note)}</p>" for note in (*plan.notes, *plan.graph.bounds))
    return f"<h2>How it was found</h2>\n{_table(('', ''), rows)}\n{notes}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, raw: int = -1) -> str:
    """A table that scrolls by itself; column `raw` is HTML."""
    top = "".join(f"<th>{safe(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{c if i == raw else safe(c)}</td>" for i, c in enumerate(cells))
        + "</tr>"
        for cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _svg(height: float, inside: str, label: str, width: float = _WIDTH, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    picture = (
        f'<svg{named} viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
        f' aria-label="{safe(label)}">{inside}</svg>'
    )
    return picture if kind else f'<div class="scroll picture">{picture}</div>'


def _box(x: float, y: float, w: float, h: float, colour: str, told: str) -> str:
    return (
        f'<rect class="on" x="{x:.2f}" y="{y:.1f}" width="{max(w, 0.3):.2f}" height="{h:.1f}"'
        f' fill="{colour}" data-text="{safe(told)}"/>'
    )


def _words(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(text)}</text>'


# -- the mesh -------------------------------------------------------------------------------------


def _mesh(plan: PlanData, machine: Cluster) -> str:
    """GPUs as a grid: the innermost axis across, all others down; nodes framed."""
    mesh, node = plan.mesh, machine.gpus_per_node
    across, down = mesh.sizes[-1], prod(mesh.sizes[:-1])
    columns, rows = min(across, _MOST_RANKS), min(down, _MOST_RANKS)
    cell, left, top = min(36.0, 560 / columns), 90, 26
    parts = [_words(left, 16, f"{mesh.names[-1]} = {across}")]
    if len(mesh.axes) > 1:
        outer = " x ".join(f"{name} = {size}" for name, size in mesh.axes[:-1])
        parts.append(
            f'<text transform="translate(14 {top + rows * cell / 2:.0f}) rotate(-90)"'
            f' text-anchor="middle">{safe(outer)}</text>'
        )
    for row in range(rows):
        for column in range(columns):
            rank = row * across + column
            colour = COLOURS[rank // node % len(COLOURS)]
            told = f"GPU {rank}, node {rank // node}\n{_place(rank, mesh)}"
            x, y = left + column * cell, top + row * cell
            parts.append(_box(x, y, cell - 3, cell - 3, colour, told))
    if columns < across or rows < down:
        parts.append(_words(left, top + rows * cell + 16, f"... {mesh.ranks} GPUs in all"))
    links = [f"inside a node {_rate(machine.intra_node.bytes_per_s)}"]
    links += [f"between nodes {_rate(machine.inter_node.bytes_per_s)}"] if mesh.ranks > node else []
    words = (
        f"{machine.device}; links of a GPU: {', '.join(links)}; a colour for each node of {node}"
    )
    picture = _svg(top + rows * cell + 24, "".join(parts), f"the mesh {mesh}")
    return f'<h2>Mesh</h2>\n{picture}\n<p class="soft">{safe(words)}</p>'


def _place(rank: int, mesh: Mesh) -> str:
    return ", ".join(
        f"{name} {rank // mesh.stride(axis) % size}" for axis, (name, size) in enumerate(mesh.axes)
    )


def _rate(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s"


# -- ordinary plans and memory --------------------------------------------------------------------


def _baselines(plan: PlanData) -> str:
    """The plan's time beside that of the ordinary ones."""
    seconds = plan.seconds if plan.decode is None else plan.answer_s
    rows = [("this plan", seconds, COLOURS[2], f"mesh {plan.mesh}")]
    fitting = [b for b in plan.baselines if b.seconds is not None]
    rows += [
        (f"{b.name}, {b.mesh}", b.seconds or 0.0, COLOURS[7], format_bytes(b.peak_bytes))
        for b in sorted(fitting, key=lambda b: b.seconds or 0.0)
    ]
    if len(rows) == 1:
        return ""
    most, step, left = max(row[1] for row in rows), 24, 190
    parts = [
        _words(left - 8, 15 + i * step, name, "end")
        + _box(
            left, i * step + 2, 400 * s / most, 16, colour, f"{name}\n{format_seconds(s)}\n{more}"
        )
        + _words(left + 400 * s / most + 6, 15 + i * step, format_seconds(s))
        for i, (name, s, colour, more) in enumerate(rows)
    ]
    none = [f"{b.name} on {b.mesh}" for b in plan.baselines if b.seconds is None]
    note = (
        f'<p class="soft">Not possible, or too large: {safe(", ".join(none))}.</p>' if none else ""
    )
    picture = _svg(len(rows) * step + 6, "".join(parts), "ordinary plans beside this one")
    return f"<h2>Ordinary plans</h2>\n{picture}\n{note}"


def _memory_bars(plan: PlanData) -> str:
    """Bytes at the peak by kind, and the limit."""
    last = plan.decode or plan
    memory, limit = last.memory, plan.request.memory_bytes
    most, x, parts = max(memory.total, limit), 0.0, list[str]()
    for name, colour in _KINDS:
        size = _bytes_of(memory, name)
        if size > 0:
            width = 700 * size / most
            parts.append(_box(x, 4, width, 28, colour, f"{name}\n{format_bytes(size)}"))
            x += width
    at = 700 * limit / most
    parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="36"/>')
    named = [(n, c) for n, c in _KINDS if _bytes_of(memory, n) > 0]
    words = f"{format_bytes(memory.total)} of {format_bytes(limit)} for each GPU at the peak"
    picture = _svg(40, "".join(parts), words)
    return f"<h2>Memory</h2>\n<p>{words}</p>\n{picture}\n{legend(named)}"


def _bytes_of(memory: Memory, kind: str) -> float:
    return {
        "parameters": memory.parameters, "optimizer": memory.optimizer,
        "gradients": memory.gradients, "activations": memory.activations, "cache": memory.cache,
        "transient": memory.transient,
    }[kind]  # fmt: skip


def _memory(program: Ways, found: Sequence[Live]) -> str:
    """Bytes over time, one kind on the other."""
    plan = program.plan
    if not found:
        return ""
    height, left = 220.0, 70.0
    limit, peak = plan.request.memory_bytes, max(sum(each.bytes.values()) for each in found)
    near = limit < 3 * peak  # then it is worth the room
    most = max(limit, peak) if near else peak
    step = (_WIDTH - left - 10) / len(found)
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
        parts.append(f'<line class="limit" x1="{left}" x2="{_WIDTH - 10}" y1="{y}" y2="{y}"/>')
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
    picture = _svg(height + 40, "".join(parts), "memory over a step, by kind")
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
        yield f'<line class="grid" x1="{left}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _words(left - 6, max(y + 4, 11), format_bytes(share * most), "end")


def _places(found: Sequence[Live], left: float, step: float, height: float) -> Iterator[str]:
    """Where one phase ends and the next begins."""
    for phase in ("forward", "backward"):
        mine = [i for i, each in enumerate(found) if each.phase == phase]
        if mine:
            middle = left + (mine[0] + mine[-1] + 1) / 2 * step
            yield _words(middle, height + 18, phase, "middle")
            x = left + mine[0] * step
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height + 8}"/>'


# -- time -----------------------------------------------------------------------------------------


def _timeline(found: Moments) -> str:
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
    keys = sorted({(m.rank, _STREAMS.index(m.stream)) for m in moments})[: 3 * _MOST_RANKS]
    scale = (_WIDTH - left - 6) / max(end - first, 1e-12)
    several = any(rank for rank, _ in keys)
    parts = [
        _words(
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
            _box(
                left + (start - first) * scale,
                keys.index(key) * (high + gap),
                (stop - start) * scale,
                high,
                colour,
                told,
            )
        )
    bottom = len(keys) * (high + gap)
    parts.append(_words(left, bottom + 14, "0"))
    parts.append(_words(_WIDTH - 6, bottom + 14, format_seconds(end - first), "end"))
    return _svg(bottom + 20, "".join(parts), label)


# -- a layer --------------------------------------------------------------------------------------


def _layers(plan: PlanData) -> str:
    """The graph of each kind of layer, coloured by what is cut over which axis."""
    labels, parts = label_dims(plan.graph), list[str]()
    for call in plan.program.statements:
        if not isinstance(call, LoopCall):
            continue
        for kind, body in enumerate(call.bodies):
            count = call.loop.order.count(kind)
            words = {
                item.node.name: choices_text(item.node, item.choices, plan.mesh, labels)
                for item in body.statements
                if isinstance(item, Compute)
            }
            title = f"{call.loop.path}: {count} x {body.block.class_name}"
            parts += [f"<h2>{safe(title)}</h2>", _graph(body.statements, words)]
    return "\n".join(parts)


def _graph(statements: Sequence[Compute | Convert], words: Mapping[str, str]) -> str:
    """Heavy operators and conversions between ranks from top to bottom, light ones as dots."""
    made: dict[Sharded, int] = {}
    rows: list[tuple[str, str, str]] = []  # name, kind, told
    edges: set[tuple[int, int]] = set()
    for item in statements:
        reads = item.operands if isinstance(item, Compute) else (item.source,)
        sources = {made[read] for read in reads if read in made}
        shown = _shown(item, words)
        if shown is None and len(sources) == 1:
            at = next(iter(sources))  # a light one stands in its source's place
        else:
            at = len(rows)
            rows.append(shown or (_light(item), words.get(_name(item), ""), _name(item)))
            edges |= {(source, at) for source in sources}
        for output in item.outputs if isinstance(item, Compute) else (item.target,):
            made[output] = at
    kinds = list(dict.fromkeys(kind for _, kind, _ in rows))
    colour = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    high, left, width = 30.0, 150.0, 330.0
    parts = [_edge(a, b, left, high) for a, b in sorted(edges)]
    for i, (name, kind, told) in enumerate(rows):
        box = _box(left, i * high + 2, width, high - 8, colour[kind], f"{told}\n{kind}")
        middle = _words(left + width / 2, i * high + 17, name, "middle")
        parts.append(f'<g class="node">{box}{middle}</g>')
    picture = _svg(len(rows) * high + 6, "".join(parts), "a layer's operators", 620)
    return f"{picture}\n{legend([(kind, c) for kind, c in colour.items()])}"


def _name(item: Compute | Convert) -> str:
    return item.node.name if isinstance(item, Compute) else item.target.value.name


def _light(item: Compute | Convert) -> str:
    """What several values meet in, or where a chain of light operators begins."""
    if isinstance(item, Convert):
        return item.primitive
    return operator_of(item.node).title(item.node).removeprefix("aten.").split(".")[0]


def _shown(item: Compute | Convert, words: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Name, kind and what is told of what has a box of its own."""
    if isinstance(item, Convert):
        traffic = [*filter(None, (item.priced.forward, item.priced.backward))]
        if not traffic:
            return None
        name = item.primitive.replace("_", "-")
        moved = format_bytes(max(each.bytes for each in traffic))
        told = f"{item.target.value.name}: {moved}, {format_seconds(item.priced.seconds)}"
        ends = f"{format_spec(item.source.spec)} to {format_spec(item.target.spec)}"
        return f"{name} {moved}", "conversion between ranks", f"{told}\n{ends}"
    node = item.node
    if not operator_of(node).heavy:
        return None
    module = node.loc.module.rsplit(".", 1)[-1]
    name = operator_of(node).title(node) if not module or module.isdigit() else module
    return name, words[node.name], f"{node.loc.module}\n{operator_of(node).title(node)}"


def _edge(a: int, b: int, left: float, high: float) -> str:
    """From one row to another: straight to the next, else around on the left."""
    x, y1, y2 = left + 165, a * high + high - 6, b * high + 2
    if b == a + 1:
        return f'<line class="edge" x1="{x}" x2="{x}" y1="{y1}" y2="{y2}"/>'
    out = left - 12 - 10 * min(b - a, 12)
    y1, y2 = a * high + high / 2, b * high + high / 2
    return f'<path class="edge" d="M{left} {y1} C {out} {y1}, {out} {y2}, {left} {y2}"/>'


# -- tensors --------------------------------------------------------------------------------------


def _tensors(plan: PlanData) -> str:
    """Each parameter: its shape, how it is stored, and what of it each rank has."""
    decided, rows = plan.decisions, list[tuple[str, ...]]()
    for ref in all_params(plan.graph):
        if ref.param.kind != "parameter":
            continue
        spec, home = decided.specs[ref.param.value.name], decided.homes.get(ref.param.value.name)
        shape = " x ".join(map(str, ref.param.value.type.shape)) or "a number"
        rows.append(
            (
                ref.name,
                shape,
                _lies(spec, plan.mesh),
                "" if home is None else f"{home}",
                _blocks(ref, spec, plan.mesh),
            )
        )
    head = ("parameter", "shape", "stored", "between its uses", "blocks over the mesh")
    return f"<h2>Parameters</h2>\n{_table(head, rows, raw=4)}"


def _lies(spec: Spec, mesh: Mesh) -> str:
    """`dim 0 over dp, copies over tp`."""
    parts = [
        f"dim {state} over {name}" if is_shard(state) else f"copies over {name}"
        for state, (name, size) in zip(spec, mesh.axes, strict=True)
        if size > 1
    ]
    return ", ".join(parts) or "whole"


def _blocks(ref: ParamRef, spec: Spec, mesh: Mesh) -> str:
    """Its first two dims as a square, cut into blocks, that of GPU 0 marked."""
    ways = [prod(n for n, s in zip(mesh.sizes, spec, strict=True) if s == d) for d in (0, 1)]
    down, across = (min(n, _MOST_RANKS) for n in ways)
    flat = len(ref.param.value.type.shape) < 2
    width, height = 90.0, 18.0 if flat else 54.0
    down, across = (1, down) if flat else (down, across)
    parts = [
        f'<rect class="cell" x="{3 + c * width / across:.1f}" y="{3 + r * height / down:.1f}"'
        f' width="{width / across:.2f}" height="{height / down:.2f}"'
        + (f' style="fill:{COLOURS[0]}"' if not (c or r) else "")
        + "/>"
        for r in range(down)
        for c in range(across)
    ]
    parts.append(f'<rect class="frame" x="3" y="3" width="{width}" height="{height}"/>')
    label = f"{ref.name} is {ways[0]} x {ways[1]} blocks"
    return _svg(height + 6, "".join(parts), label, 96, "small")


def trace_text(plan: PlanData) -> str:
    """`trace_of` as text."""
    return json.dumps(trace_of(plan), allow_nan=False) + "\n"


__all__ = ["fragment_of", "page_of_plan", "trace_of", "trace_text"]
