"""A plan as one HTML page that needs nothing else: what it takes, why, and how everything lies."""

from __future__ import annotations

from math import prod

from .costmodel.machines.cluster import Cluster, load_cluster
from .drawing import MOST_RANKS, box, caption, svg, table
from .facts.mesh import Mesh
from .facts.units import format_bytes, format_seconds
from .markup import COLOURS, document, safe
from .plan_layers import layers_of, parameters_of
from .plan_memory import memory_at_the_peak, memory_over_time
from .plan_time import moments_on, timeline
from .planner.plan.plan import PlanData
from .planner.report.report import format_plan
from .planner.search.again import Again
from .planner.search.ways import Ways, ways_of_plan

_STYLE = """
th, td { text-align: left; }
svg rect.on { cursor: pointer; }
svg .frame { fill: none; stroke: var(--ink); } svg .cell { fill: var(--fill); stroke: var(--line); }
svg .node text { fill: #fff; font-size: 12px; } svg .edge { fill: none; stroke: var(--soft); }
svg .limit { stroke: var(--ink); stroke-dasharray: 4 3; }
svg.small { width: 96px; max-width: 96px; }
"""


def page_of_plan(plan: PlanData) -> str:
    """The page as text.  Raises ClusterError where the plan's cluster file is not here."""
    machine = load_cluster(plan.request.cluster, plan.request.gpus)
    parts = [_head(plan), _mesh(plan, machine), _baselines(plan), memory_at_the_peak(plan)]
    programs = [] if plan.serves_in_stages else ways_of_plan(Again(plan, machine))
    if plan.pipeline is not None:
        parts.append(timeline(moments_on(plan, machine)))
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
        parts.append(timeline(moments_on(plan, machine)))
    found = program.again.memory()
    return [*parts, memory_over_time(program, found), layers_of(plan), parameters_of(plan)]


def fragment_of(plan: PlanData) -> str:
    """What a notebook shows of a plan: the sentence, the ordinary plans, and memory at its peak."""
    style = "<style>.shardwright svg { max-width: 720px; } .shardwright .limit { stroke: #888; }"
    style += " .shardwright text { fill: currentColor; font-size: 13px; }</style>"
    body = "\n".join([_head(plan), _baselines(plan), memory_at_the_peak(plan)])
    return f'<div class="shardwright">{style}{body}</div>'


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
    return f"<h2>How it was found</h2>\n{table(('', ''), rows)}\n{notes}"


# -- the mesh -------------------------------------------------------------------------------------


def _mesh(plan: PlanData, machine: Cluster) -> str:
    """GPUs as a grid: the innermost axis across, all others down; nodes framed."""
    mesh, node = plan.mesh, machine.gpus_per_node
    across, down = mesh.sizes[-1], prod(mesh.sizes[:-1])
    columns, rows = min(across, MOST_RANKS), min(down, MOST_RANKS)
    cell, left, top = min(36.0, 560 / columns), 90, 26
    parts = [caption(left, 16, f"{mesh.names[-1]} = {across}")]
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
            parts.append(box(x, y, cell - 3, cell - 3, colour, told))
    if columns < across or rows < down:
        parts.append(caption(left, top + rows * cell + 16, f"... {mesh.ranks} GPUs in all"))
    links = [f"inside a node {_rate(machine.intra_node.bytes_per_s)}"]
    links += [f"between nodes {_rate(machine.inter_node.bytes_per_s)}"] if mesh.ranks > node else []
    words = (
        f"{machine.device}; links of a GPU: {', '.join(links)}; a colour for each node of {node}"
    )
    picture = svg(top + rows * cell + 24, "".join(parts), f"the mesh {mesh}")
    return f'<h2>Mesh</h2>\n{picture}\n<p class="soft">{safe(words)}</p>'


def _place(rank: int, mesh: Mesh) -> str:
    return ", ".join(
        f"{name} {rank // mesh.stride(axis) % size}" for axis, (name, size) in enumerate(mesh.axes)
    )


def _rate(bytes_per_s: float) -> str:
    return f"{format_bytes(bytes_per_s)}/s"


# -- ordinary plans --------------------------------------------------------------------------------


def _baselines(plan: PlanData) -> str:
    """The plan's time beside that of the ordinary ones."""
    seconds = plan.whole_s
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
        caption(left - 8, 15 + i * step, name, "end")
        + box(
            left, i * step + 2, 400 * s / most, 16, colour, f"{name}\n{format_seconds(s)}\n{more}"
        )
        + caption(left + 400 * s / most + 6, 15 + i * step, format_seconds(s))
        for i, (name, s, colour, more) in enumerate(rows)
    ]
    none = [f"{b.name} on {b.mesh}" for b in plan.baselines if b.seconds is None]
    note = (
        f'<p class="soft">Not possible, or too large: {safe(", ".join(none))}.</p>' if none else ""
    )
    picture = svg(len(rows) * step + 6, "".join(parts), "ordinary plans beside this one")
    return f"<h2>Ordinary plans</h2>\n{picture}\n{note}"


__all__ = ["fragment_of", "page_of_plan"]
