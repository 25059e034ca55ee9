"""The operators of a plan's layers, and how its parameters lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from .drawing import MOST_RANKS, box, caption, svg, table
from .facts.mesh import Mesh
from .facts.spec import Spec, format_spec, is_shard
from .facts.units import format_bytes, format_seconds
from .ir.ops.labels import label_dims
from .ir.ops.registry import operator_of
from .markup import COLOURS, legend, safe
from .planner.plan.plan import PlanData
from .planner.plan.program import Compute, Convert, LoopCall, Sharded
from .planner.plan.words import choices_text
from .planner.strategies.params import ParamRef, all_params


def layers_of(plan: PlanData) -> str:
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
        block = box(left, i * high + 2, width, high - 8, colour[kind], f"{told}\n{kind}")
        middle = caption(left + width / 2, i * high + 17, name, "middle")
        parts.append(f'<g class="node">{block}{middle}</g>')
    picture = svg(len(rows) * high + 6, "".join(parts), "a layer's operators", 620)
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


def parameters_of(plan: PlanData) -> str:
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
    return f"<h2>Parameters</h2>\n{table(head, rows, raw=4)}"


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
    down, across = (min(n, MOST_RANKS) for n in ways)
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
    return svg(height + 6, "".join(parts), label, 96, "small")


__all__ = ["layers_of", "parameters_of"]
