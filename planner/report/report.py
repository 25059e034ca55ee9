"""A plan in words: the winner against the ordinary plans, what binds, each block, memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import prod

from ...facts.collectives import find_collective
from ...facts.mesh import Mesh
from ...facts.phases import find_phase
from ...facts.spec import S, Spec, format_spec
from ...facts.units import format_bytes, format_seconds
from ...facts.updated import updated_buffer
from ...ir.graph import Node, originals
from ...ir.ops.labels import DimLabels, label_dims
from ...ir.ops.registry import operator_of
from ..plan.plan import MIXED, Baseline, Pipeline, PlanData
from ..plan.program import Compute, Convert, LoopCall, PricedStep, Weight
from ..plan.recache import recached_bytes, state_bytes
from ..plan.returned import told_outputs
from ..plan.tied import tied_parameters
from ..plan.traffic import Moved, predicted_bytes
from ..plan.words import choices_text, machine_text
from ..strategies.orthogonal import matrices_of, received_bytes
from ..strategies.params import all_params
from ..strategies.regions import Recomputed

_ROUNDING = 1e-9
_PROVEN = 5e-4  # of the time: a gap to the bound that says no more than sums of roundings
_SMALL = 0.002  # differences below this share of the time are not worth telling


def format_plan(plan: PlanData, throughput: str = "") -> str:
    """The whole report, as `plan` prints it; `throughput` is a line of it."""
    if plan.decode is not None:
        return _format_serving(plan, plan.decode)
    if plan.pipeline is not None:
        parts = [_winner(plan), _ordinary(plan), _stages(plan, plan.pipeline), throughput]
        parts.append(_memory(plan))
        return "\n\n".join(part for part in [*parts, _search(plan), _notes(plan)] if part)
    parts = [
        _winner(plan),
        _ordinary(plan),
        _differences(plan),
        "\n".join(
            [
                _binding(plan),
                *([throughput] if throughput else []),
                *_moved(plan, _unit(plan)),
                *_step(plan),
                *_outputs(plan),
            ]
        ),
        *_tables(plan),
        _memory(plan),
        _search(plan),
        _notes(plan),
    ]
    return "\n\n".join(part for part in parts if part)


def _stages(plan: PlanData, pipeline: Pipeline) -> str:
    """The schedule, and a line for each stage."""
    count, request = len(pipeline.stages), plan.request
    head = ("stage", "rank", "layers", "forward", "backward", "sends", "once a step")
    rows: list[tuple[str, ...]] = [(*_of_phase(plan, head), "memory", "plan")]
    rank_of = pipeline.table(request.micro_batches).rank_of
    for which, same in groupby(enumerate(pipeline.stages), key=lambda each: each[1].kind):
        numbers, kind = [number for number, _ in same], pipeline.kinds[which]
        first, last, stage = numbers[0], numbers[-1], pipeline.stages[numbers[0]]
        kept = kind.decisions.recomputed.words(stage.layers)
        row = (
            f"{first} to {last}" if numbers[1:] else f"{first}",
            _ranks([rank_of[number] for number in numbers]),
            f"{stage.layers} {kept}" if plan.training else f"{stage.layers}",
            format_seconds(stage.forward_s),
            format_seconds(stage.backward_s),
            format_seconds(stage.send_s + stage.send_back_s),
            format_seconds(stage.once_s),
        )
        rows.append((*_of_phase(plan, row), format_bytes(kind.memory.total), f"{kind.mesh}"))
    each = f", {pipeline.per_rank} on each rank" if pipeline.per_rank > 1 else ""
    by = f"by {pipeline.schedule}" if plan.training else "one behind the other"
    told = (
        f"Pipeline: {count} stages over pp={pipeline.ranks}{each}, {request.micro_batches}"
        f" micro-batches of {request.rows} sequences {by}; ranks wait for others"
        f" {pipeline.bubble:.0%} of a {_unit(plan)}."
    )
    return "\n".join([told, table(rows), *_tied(plan, pipeline)])


def _tied(plan: PlanData, pipeline: Pipeline) -> Iterator[str]:
    """A line for each parameter that several stages have."""
    schedule_ = pipeline.table(plan.request.micro_batches)
    for tied in tied_parameters(schedule_, pipeline.stages, pipeline.kinds):
        yield (
            f"Stages {' and '.join(map(str, tied.stages))} have `{tied.name}`: its gradients,"
            f" {format_bytes(tied.gradient_bytes)} on each rank, are added up once a step."
        )


def _of_phase(plan: PlanData, row: tuple[str, ...]) -> tuple[str, ...]:
    """Without what inference does not have: backward passes, and what is done once a step."""
    return row if plan.training else tuple(x for n, x in enumerate(row) if n not in (4, 6))


def _ranks(ranks: Sequence[int]) -> str:
    """`3`, `0 to 3`; `all` where stages come round to the first one again."""
    if len(ranks) > 1 and ranks != sorted(set(ranks)):
        return "all" if len(set(ranks)) == max(ranks) + 1 else ", ".join(map(str, sorted({*ranks})))
    return f"{ranks[0]} to {ranks[-1]}" if ranks[1:] else f"{ranks[0]}"


def _notes(plan: PlanData) -> str:
    notes = [*plan.notes, *plan.graph.bounds, *_changed_buffers(plan)]
    return "\n".join(["Notes", *(f"  {note}" for note in notes)]) if notes else ""


def _changed_buffers(plan: PlanData) -> Iterator[str]:
    """That a forward pass changes buffers, and of what its sums and means are."""
    changed = [name for out in plan.graph.outputs if (name := updated_buffer(out.path))]
    parameters = {p.value.name for p in originals(plan.graph.params) if p.kind == "parameter"}
    for what, names in (
        ("buffers", [name for name in changed if name not in parameters]),
        ("parameters", [name for name in changed if name in parameters]),
    ):
        if names:
            more = ", ..." if len(names) > 1 else ""
            yield (
                f"A forward pass changes {len(names)} {what} ({names[0]}{more}) as one process does"
                " that has the whole batch: statistics of batch norms are those of all ranks"
                " together."
            )


def _format_serving(plan: PlanData, decode: PlanData) -> str:
    """Both phases: what an answer costs, then each one's tables."""
    request, mesh = plan.request, plan.mesh
    whole = plan.answer_s
    rate = request.batch * request.output_tokens / whole
    head = (
        f"{plan.graph.name} on {machine_text(plan.request)}, mesh {mesh}: {request.batch} sequences"
        f" of {request.seq} tokens are answered with {request.output_tokens} tokens each "
        f"in {format_seconds(whole)} (predicted){_versus(plan, whole)}\n"
        f"  time to the first token (TTFT)   {format_seconds(plan.seconds)}\n"
        f"{_conversion_time(plan)}"
        f"  time per output token            {format_seconds(decode.seconds)}\n"
        f"  output tokens                    {rate:.4g}/s, {rate / request.gpus:.4g}/s/GPU\n"
        f"{_layouts(plan)}"
    )
    tokens = f"{request.batch} x {request.seq} tokens"
    parts = [
        head,
        _ordinary(plan),
        *_phase(f"Prefill of {tokens}", plan, "prefill"),
        *_phase("Decode of one token", decode, "output token"),
        _memory(decode),
        _search(plan),
        _notes(plan),
    ]
    return "\n\n".join(part for part in parts if part)


def _phase(title: str, plan: PlanData, unit: str) -> list[str]:
    """What one of two phases does, its stages where it has some."""
    if plan.pipeline is not None:
        return [f"{title}\n{_stages(plan, plan.pipeline)}"]
    return ["\n".join([title, _binding(plan), *_moved(plan, unit)]), *_tables(plan)]


def _conversion_time(plan: PlanData) -> str:
    seconds = plan.conversion_s
    return f"  conversion of the KV caches      {format_seconds(seconds)}\n" if seconds else ""


def _layouts(plan: PlanData) -> str:
    """What both phases share, and which caches are converted between them."""
    if plan.pipeline is not None and plan.conversion_s:
        return "One set of weights serves both phases; after prefill stages convert KV caches."
    if not plan.recached:
        return "One set of weights and one cache layout serve both phases."
    lines = ["One set of weights serves both phases; after prefill KV caches are converted:"]
    for recache in plan.recached:
        ends = f"{_cuts(recache.source, plan.mesh)} -> {_cuts(recache.target, plan.mesh)}"
        moves = _communication(recache.steps, plan.mesh)
        steps = [*([moves] if moves else []), "reading and writing its pages"]
        each = format_seconds(recache.seconds / recache.count)
        lines.append(
            f"  {recache.count} x {recache.name}: {ends} ({each} each: {', '.join(steps)})"
        )
    moved = _received(recached_bytes(plan), plan.mesh)
    return "\n".join([*lines, *([f"Each GPU receives for it: {moved}."] if moved else [])])


def _cuts(spec: Spec, mesh: Mesh) -> str:
    """What a cache's layout cuts over each axis: `dp: batch, tp: heads`."""
    words = {S(0): "batch", S(1): "heads", S(2): "tokens"}
    cut = zip(mesh.names, spec, strict=True)
    parts = [f"{name}: {words[state]}" for name, state in cut if state in words]
    return ", ".join(parts) or "whole"


# -- the sentence ---------------------------------------------------------------------------------


def _winner(plan: PlanData) -> str:
    text = (
        f"{plan.graph.name} on {machine_text(plan.request)}, mesh {plan.mesh}: "
        f"{format_seconds(plan.seconds)} per {_unit(plan)}{_rate(plan)} (predicted)"
    )
    return text + _versus(plan, plan.seconds)


def _versus(plan: PlanData, seconds: float) -> str:
    """How the plan, which takes `seconds`, stands beside the best ordinary one."""
    if plan.request.layout:
        return f", as --layout {plan.request.layout} has it."
    if not plan.baselines:
        return "."  # one GPU: there is nothing to cut
    fitting = [b for b in plan.baselines if b.seconds is not None]
    if not fitting:
        return "; no ordinary plan fits the memory."
    best = min(fitting, key=lambda b: b.seconds or 0.0)
    assert best.seconds is not None
    ratio = best.seconds / seconds
    versus = (
        f"the best ordinary plan, {best.name} on {best.mesh}, takes {format_seconds(best.seconds)}"
    )
    if ratio >= 1.005:
        return f", {ratio:.2f}x faster: {versus}."
    if plan.request.pins:
        return f"; {versus}: this plan keeps to its pins."
    if plan.request.schedule:
        return f"; {versus}: this plan keeps to its schedule."
    if ratio >= 0.995 and is_proven(plan):
        return f"; {versus}: no better plan exists{_among(plan)} under this cost model."
    mixed = _is_mixed(plan)
    if is_proven(plan) and not mixed:
        return f"; {versus}, although this one is proven optimal: report this as a bug."
    if plan.search.status == "optimal" and mixed:
        return f"; {versus}: how many layers are recomputed is searched, and not proven."
    if plan.search.status == "optimal" or plan.pipeline is not None:
        return f"; {versus}: no plan is more than {plan.search.gap:.1%} faster than this one."
    return f"; {versus}: the solver did not finish, --time-limit gives it more time."


def _unit(plan: PlanData) -> str:
    """What the seconds are for."""
    return find_phase(find_phase(plan.request.phase).programs[0]).run


def _rate(plan: PlanData) -> str:
    """New tokens per second, in serving: `, 5200 tokens/s, 650 tokens/s/GPU`."""
    if plan.training:
        return ""
    rate = plan.request.batch * plan.request.seq / plan.seconds
    return f", {rate:,.0f} tokens/s, {rate / plan.request.gpus:,.0f} tokens/s/GPU"


def _ordinary(plan: PlanData) -> str:
    possible = [b for b in plan.baselines if not b.refused]
    refused = [b for b in plan.baselines if b.refused]
    lines: list[str] = []
    if possible:
        head = ("ordinary plan", "mesh", "time", "memory per GPU", "layers")
        rows: list[tuple[str, ...]] = [head]
        layers = _longest(plan)
        rows += [(*_baseline_row(b), _layers(b, layers)) for b in possible]
        columns = 5 if any(b.recompute for b in possible) else 4
        lines.append(table([row[:columns] for row in rows]))
    for why, group in groupby(sorted(refused, key=lambda b: b.refused), key=lambda b: b.refused):
        lines.append(f"Not possible: {', '.join(f'{b.name} on {b.mesh}' for b in group)}: {why}.")
    for b in possible:
        for first in b.whole[:1]:
            more = f" and {len(b.whole) - 1} more" if len(b.whole) > 1 else ""
            lines.append(f"{b.name} on {b.mesh}: GPUs divide no dim of {first}{more}: not sharded.")
    return "\n".join(lines)


def _baseline_row(b: Baseline) -> tuple[str, str, str, str]:
    if b.seconds is None:
        return (b.name, b.mesh, "does not fit", f"at least {format_bytes(b.peak_bytes)}")
    return (b.name, b.mesh, format_seconds(b.seconds), format_bytes(b.peak_bytes))


def _layers(b: Baseline, layers: int) -> str:
    if b.seconds is None:
        return ""
    return Recomputed(b.recompute, b.kept_layers, b.part_layers).words(layers)


def _longest(plan: PlanData) -> int:
    return max((len(loop.order) for loop in plan.graph.loops), default=0)


def _is_mixed(plan: PlanData) -> bool:
    """Are not all layers kept, nor all recomputed whole?"""
    return plan.decisions.kept_layers > 0 or plan.decisions.part_layers > 0


def _differences(plan: PlanData) -> str:
    """What the best ordinary plan spends more and less on than this one, the most first."""
    fitting = [b for b in plan.baselines if b.seconds is not None and b.spent]
    if not fitting:
        return ""
    best = min(fitting, key=lambda b: b.seconds or 0.0)
    spent = plan.spent
    ours, theirs = dict(spent.rows(plan.seconds, plan.optimizer_s, plan.casts_s)), dict(best.spent)
    pairs = {what: (theirs.get(what, 0.0), ours.get(what, 0.0)) for what in {**ours, **theirs}}
    order = sorted(pairs, key=lambda what: -abs(pairs[what][0] - pairs[what][1]))
    rows = [
        f"{what} {format_seconds(pairs[what][0])} (here {format_seconds(pairs[what][1])})"
        for what in order
        if abs(pairs[what][0] - pairs[what][1]) > _SMALL * plan.seconds
    ]
    return f"Of its time {best.name} on {best.mesh} spends: {', '.join(rows)}." if rows else ""


def _binding(plan: PlanData) -> str:
    compute, communication = split_seconds(plan)
    limit = plan.request.memory_bytes
    share = plan.memory.total / limit
    axes = ", ".join(f"{name} {format_seconds(s)}" for name, s in communication.items() if s)
    total, hidden = sum(communication.values()), hidden_seconds(plan)
    text = (
        f"Time: compute {format_seconds(compute)}, communication {format_seconds(total)}"
        + (f" ({axes})" if axes else "")
        + (f", of which {format_seconds(hidden)} pass behind it" if hidden else "")
        + (f", casts {format_seconds(plan.casts_s)}" if plan.casts_s else "")
        + (f", optimizer {format_seconds(plan.optimizer_s)}" if plan.optimizer_s else "")
        + "."
    )
    if share > 0.9:
        bound = f"memory binds ({share:.0%} of {format_bytes(limit)})"
    elif total - hidden > compute:
        busiest = max(communication, key=lambda name: communication[name])
        bound = f"the links of {busiest} bind"
    elif plan.training:
        bound = "compute binds"
    else:  # of few new tokens most time goes into reading weights and caches
        bound = "kernels bind (products, or reading weights and caches for them)"
    return f"{text} What limits it: {bound}.{_recomputed(plan)}"


def _recomputed(plan: PlanData) -> str:
    """Which layers run forward again, in a sentence."""
    layers = plan.decisions.recomputed
    if not layers.any:
        return ""
    loops = [(loop.path, layers.of(loop)) for loop in plan.graph.loops]
    if not layers.kept and not layers.part:
        return " Layers keep only their inputs and are recomputed in backward."
    if not any(modes.full or modes.kept for _, modes in loops):
        return f" Layers {_PART}."
    whole = [f"{m.full} of {sum(m)} layers of {path}" for path, m in loops if m.full]
    part = [f"{m.part} of {sum(m)} layers of {path}" for path, m in loops if m.part]
    said = f" The first {', '.join(whole)} keep only their inputs and are recomputed in backward"
    if whole and part:
        return f"{said}; the last {', '.join(part)} {_PART}: as many as were found to fit."
    if part:
        said = f" The first {', '.join(part)} {_PART}"
    return f"{said}: the fewest that were found to pay."


_PART = (
    "keep their inputs and the results of products and attention, and run again in backward what is"
    " between"
)


def _moved(plan: PlanData, unit: str) -> list[str]:
    """What a rank receives over each axis, as the runtime would count it; most first."""
    moved = _received(predicted_bytes(plan.program, plan.mesh), plan.mesh)
    return [f"Each GPU receives per {unit}: {moved}."] if moved else []


def _step(plan: PlanData) -> Iterator[str]:
    """In which formats it is trained, and in how many parts, where that is not one of each."""
    request = plan.request
    if request.precision == MIXED:
        own = request.reduce_dtype == "own"
        reduced = "as products give them" if own else f"added up in {request.reduce_dtype}"
        yield (
            "Trained parameters, their gradients and optimizer states are in float32, products in "
            f"bfloat16; gradients between ranks are {reduced}."
        )
    if request.optimizer == "muon":
        yield _muon(plan)
    if request.micro_batches > 1:
        yield (
            f"A step has {request.micro_batches} micro-batches of {request.rows} sequences: "
            "`model.step` runs them one after another. Tables show one of them."
        )


def _outputs(plan: PlanData) -> list[str]:
    """Which outputs a rank returns its part of."""
    return [text] if (text := told_outputs(plan)) else []


def _received(moved: Mapping[Moved, float], mesh: Mesh) -> str:
    """`tp 67 MB (all-gather 67 MB); dp ...`, the axis with the most first."""
    axes: dict[str, dict[str, float]] = {}
    for (op, axis, _), n in moved.items():
        name = axis if axis in mesh.names else axis.replace("_", "+")
        kinds = axes.setdefault(name, {})
        kinds[op] = kinds.get(op, 0.0) + n
    parts = [
        f"{axis} {format_bytes(sum(kinds.values()))} ({', '.join(_by_size(kinds))})"
        for axis, kinds in sorted(axes.items(), key=lambda entry: -sum(entry[1].values()))
    ]
    return "; ".join(parts)


def _by_size(kinds: dict[str, float]) -> list[str]:
    order = sorted(kinds, key=lambda kind: -kinds[kind])
    return [f"{find_collective(kind).words} {format_bytes(kinds[kind])}" for kind in order]


def split_seconds(plan: PlanData) -> tuple[float, dict[str, float]]:
    """(seconds of compute, seconds of communication per mesh axis) of one step."""
    axes = dict.fromkeys(plan.mesh.names, 0.0)
    spent = plan.spent
    moving = list(spent.moving.items())
    moving += [(priced.step.axes, n * priced.seconds) for priced, n in plan.program.moves()]
    for over, seconds in moving:
        name = _axes(over, plan.mesh)
        axes[name] = axes.get(name, 0.0) + seconds
    return sum(spent.computing.values()), axes


def is_proven(plan: PlanData) -> bool:
    """Was every problem solved to its end, and is the plan as fast as what they count?"""
    return plan.search.status == "optimal" and plan.search.gap < _PROVEN


def _muon(plan: PlanData) -> str:
    """What Muon does with matrices in a step."""
    found = matrices_of(plan.graph).values()
    many = sum(matrix.layers * prod(matrix.shape[:-2]) * matrix.share for matrix in found)
    text = f"Muon makes {many:,.0f} matrices orthogonal, each on one GPU"
    if plan.pipeline is not None or plan.mesh.ranks == 1:
        return f"{text}; AdamW steps the rest."
    received = received_bytes(plan.graph, plan.decisions.specs, plan.mesh.sizes)
    return f"{text}, for which each receives {format_bytes(received)} a step; AdamW steps the rest."


def _among(plan: PlanData) -> str:
    """Among which plans it is proven the best: how many layers are recomputed, and what a stage is
    given by another, are no parts of a problem."""
    if plan.pipeline is not None:
        return " for each kind of stage, one after the other, with this cut"
    if _is_mixed(plan):
        return " for this mesh, order of tokens and number of recomputed layers"
    return " with all layers kept or all recomputed" if plan.may_recompute else ""


def hidden_seconds(plan: PlanData) -> float:
    """Seconds of communication that pass behind computing: parts of a step less the step."""
    compute, communication = split_seconds(plan)
    parts = compute + sum(communication.values()) + plan.casts_s + plan.optimizer_s
    hidden = parts - plan.seconds
    return hidden if hidden > _ROUNDING * parts else 0.0


def _axes(over: Sequence[int], mesh: Mesh) -> str:
    """`dp+tp`: several axes taken as one."""
    return "+".join(mesh.names[axis] for axis in over)


# -- tables ---------------------------------------------------------------------------------------


def _tables(plan: PlanData) -> list[str]:
    labels = label_dims(plan.graph)
    out: list[str] = []
    outside: list[Compute | Convert] = []
    for statement in plan.program.statements:
        if not isinstance(statement, LoopCall):
            outside.append(statement)
            continue
        for kind, body in enumerate(statement.bodies):
            times = statement.loop.order.count(kind)
            title = f"{statement.loop.path}: {times} x {body.block.class_name}"
            out.append(f"{title}\n{_block_table(plan, body.statements, body.weights, labels)}")
    first = _block_table(plan, outside, plan.program.weights, labels)
    return [f"outside the layers\n{first}", *out]


def _block_table(
    plan: PlanData,
    statements: Iterable[Compute | Convert],
    weights: Iterable[Weight],
    labels: Mapping[str, DimLabels],
) -> str:
    """A row per heavy op, with what was moved for it since the last; weights at their first use."""
    rows: list[tuple[str, ...]] = [("op", "strategy", "result", "communication", "time")]
    unused = {weight.item: weight for weight in weights}
    pending: list[PricedStep] = []
    for light, group in groupby(statements, key=_is_light):
        items = list(group)
        for item in items:
            if isinstance(item, Convert):
                pending.append(item.priced)
                continue
            used = [unused.pop(read) for read in item.operands if read in unused]
            pending += [step for weight in used for step in weight.way]
            if not light:
                rows.append(_row(plan, item, pending, labels))
                pending = []
        if light:
            rows += _light_rows(plan, [i for i in items if isinstance(i, Compute)])
    pending += [step for weight in unused.values() for step in weight.way]
    for priced in pending:
        rows.append(("", "", "", _communication([priced], plan.mesh), ""))
    return table(rows)


def _is_light(item: Compute | Convert) -> bool:
    if isinstance(item, Convert):
        return False
    return not operator_of(item.node).heavy


def _light_rows(plan: PlanData, items: list[Compute]) -> list[tuple[str, ...]]:
    """Consecutive elementwise ops and views in one row."""
    seconds = sum(plan.work[item.node.name].seconds for item in items)
    if not seconds:
        return []
    result = format_spec(items[-1].outputs[0].spec)
    return [(f"{len(items)} elementwise ops", "", result, "", format_seconds(seconds))]


def _row(
    plan: PlanData, item: Compute, before: list[PricedStep], labels: Mapping[str, DimLabels]
) -> tuple[str, ...]:
    node = item.node
    work = plan.work[node.name]
    inside = f"{_axes(work.axes, plan.mesh)} inside {format_seconds(work.moving_s)}"
    inside = inside if work.moving_s else ""
    return (
        op_name(plan, node),
        choices_text(item.node, item.choices, plan.mesh, labels),
        format_spec(item.outputs[0].spec),
        ", ".join(filter(None, (_communication(before, plan.mesh), inside))),
        format_seconds(work.seconds - work.moving_s),
    )


def op_name(plan: PlanData, node: Node) -> str:
    """The layer's name, and of a part of a fused projection the part's weight: `qkv.weight_q`."""
    name = node.loc.module.rsplit(".", 1)[-1]
    if operator_of(node).attends or not name or name.isdigit():
        title = operator_of(node).title(node)
        return title.split(".")[1] if title == node.op else title
    parts = {ref.param.value for ref in all_params(plan.graph) if ref.param.part is not None}
    matrices = [value for value in node.operands if value in parts and len(value.type.shape) == 2]
    return ".".join([name, *(value.name.rsplit(".", 1)[-1] for value in matrices)])


def _communication(steps: Iterable[PricedStep], mesh: Mesh) -> str:
    """`tp all-gather 67 MB 0.2 ms`, summed over steps of the same kind."""
    totals: dict[tuple[str, str], list[float]] = {}
    for priced in steps:
        step = priced.step
        kinds = [find_collective(t.kind).words for t in priced.traffic if not t.backward]
        kinds = kinds or [f"backward {find_collective(t.kind).words}" for t in priced.traffic]
        if not kinds:
            continue
        axes = _axes(step.axes, mesh)
        entry = totals.setdefault((axes, kinds[0]), [0.0, 0.0])
        entry[0] += max(t.bytes for t in priced.traffic)
        entry[1] += priced.seconds
    return ", ".join(
        f"{axes} {kind} {format_bytes(n)} {format_seconds(s)}"
        for (axes, kind), (n, s) in totals.items()
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  " + "  ".join("-" * width for width in widths), *lines[1:]])


def _memory(plan: PlanData) -> str:
    memory, limit, states = plan.memory, plan.request.memory_bytes, state_bytes(plan)
    kinds = (
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("KV cache", memory.cache - states),
        ("states of sequences", states),
        ("running op", memory.transient),
    )
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in kinds if n)
    return (
        f"Memory per GPU at its peak: {format_bytes(memory.total)} of {format_bytes(limit)} "
        f"({memory.total / limit:.0%}): {parts}.{_capacity(plan)}"
    )


def _capacity(plan: PlanData) -> str:
    """What a sequence's state takes; how many tokens fit the KV cache, and how many sequences as
    long as planned beside the planned states."""
    request, memory, states = plan.request, plan.memory, state_bytes(plan)
    state = f" The state of a sequence takes {format_bytes(states / request.batch)} of each GPU."
    keys = memory.cache - states
    if not keys:
        return state if states else ""
    length = request.context + 1 if request.output_tokens else request.context + request.seq
    per_token = keys / (request.batch * length)
    tokens = int((request.memory_bytes - memory.total + keys) / per_token)
    return (
        f"{state if states else ''} A cached token takes {format_bytes(per_token)} of each GPU: "
        f"{tokens:,} tokens fit, or {tokens // length:,} sequences of {length:,}."
    )


def _search(plan: PlanData) -> str:
    search = plan.search
    times = ", ".join(f"{name} {format_seconds(s)}" for name, s in search.seconds)
    proof = search.status
    if is_proven(plan):
        proof = f"proven optimal{_among(plan)}"
    elif search.status == "optimal":
        proof = f"proven within {search.gap:.1%} of the optimum"
    return (
        f"Solver: {search.solver}, {proof}, gap {search.gap:.1e}, {search.meshes} "
        f"mesh{'es' if search.meshes > 1 else ''} tried. Planning: {times}."
    )
