"""What stands above a generated module: the mesh as a picture, who holds what, how to run it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill

import torch

from ..facts.mesh import Mesh
from ..facts.moves import primitive
from ..facts.phases import find_phase
from ..facts.spec import R, V
from ..facts.units import format_bytes, format_seconds
from ..ir.graph import Graph, Param
from ..ir.ops.labels import DimLabels, label_dims
from ..ir.ops.registry import operator_of, words_of
from ..planner.plan.plan import Pipeline, PlanData
from ..planner.plan.program import Compute, LoopCall, Program, Sharded, Weight
from ..planner.plan.returned import told_outputs
from ..planner.strategies.steps import Step

_SHOWN = 8  # rows and columns of ranks
# what an axis may cut, by what time is spent on, and whether modules are named
_CUT = (("attention", False), ("experts", False), ("matrix products", True))
_WIDTH = 96  # of a line of the header
_PER_HOST = 8  # GPUs that most hosts have


def docstring(plan: PlanData) -> str:
    """The docstring of the generated module of `plan`."""
    request = plan.request
    unit = find_phase(find_phase(request.phase).programs[0]).run
    if plan.decode is not None:
        unit = f"{unit}, {format_seconds(plan.decode.seconds)} per output token"
    made = request.target or "a model given to shardwright.plan"
    batch = f"batch {request.batch} x {request.seq} tokens, {_formats(plan)}"
    conversion = plan.conversion_s
    converted = f"KV caches are converted between the two in {format_seconds(conversion)}."
    return "\n".join(
        [
            f"{plan.graph.name} over {request.gpus} x {request.cluster}: {plan.mesh}.",
            "",
            *([*mesh_picture(plan.mesh), ""] if plan.mesh.ranks > 1 else []),
            *layout_sentences([each.program for each in plan.phases], plan.mesh),
            *fill(told_outputs(plan), _WIDTH, break_on_hyphens=False).splitlines(),
            "",
            fill(f"Made from {made}, {batch}.", _WIDTH),
            f"Predicted: {format_seconds(plan.seconds)} per {unit}, "
            f"{format_bytes(plan.memory.total)} per GPU.",
            *([converted] if plan.recached else []),
            "",
            *_usage(plan),
        ]
    )


def pipeline_docstring(plan: PlanData, pipeline: Pipeline) -> str:
    """The docstring of the generated module of a pipeline."""
    request, inner = plan.request, pipeline.kinds[0].mesh
    made = request.target or "a model given to shardwright.plan"
    batch = f"batch {request.batch} x {request.seq} tokens, {_formats(plan)}"
    count = len(pipeline.stages)
    step = "A step runs" if plan.training else "Sequences pass in"
    unit = "step" if plan.training else find_phase(find_phase(request.phase).programs[0]).run
    if plan.decode is not None:
        unit += f", {format_seconds(plan.decode.seconds)} per output token"
    return "\n".join(
        [
            f"{plan.graph.name} over {request.gpus} x {request.cluster}: {plan.mesh}.",
            "",
            f"{count} stages over pp={pipeline.ranks}, each on {inner}: rank r is in group"
            f" r // {inner.ranks} of pp. {step}",
            f"{request.micro_batches} micro-batches by schedule {pipeline.schedule}, of which the"
            " picture at SCHEDULE shows the first.",
            "",
            fill(f"Made from {made}, {batch}.", _WIDTH),
            f"Predicted: {format_seconds(plan.seconds)} per {unit}, {pipeline.bubble:.0%} of it"
            f" waiting for others, {format_bytes(plan.memory.total)} per GPU.",
            "",
            *_usage(plan),
        ]
    )


def schedule_picture(pipeline: Pipeline, micro_batches: int) -> list[str]:
    """The first actions of each rank, one behind the other in a grid in which every action takes a
    place; `.` where a rank waits."""
    table = pipeline.table(micro_batches)
    several = pipeline.per_rank > 1
    width = 1 + max(len(str(action)) for each in table.actions for action in each) - (not several)
    done: dict[tuple[str, int, int], int] = {}
    ends = [0] * table.ranks
    lines: list[list[str]] = [[] for _ in range(table.ranks)]
    for rank, action in table.order:
        needed = action.needed
        start = ends[rank]
        if needed is not None:
            start = max(start, done.get((*needed, action.batch), 0))
        text = str(action) if several else f"{action.kind}{action.batch}"
        lines[rank] += ["."] * (start - ends[rank]) + [text]
        ends[rank] = start + 1
        done["F" if action.kind == "F" else "B", action.stage, action.batch] = start + 1
    places = (_WIDTH - 12) // width
    shown = ["".join(text.ljust(width) for text in line[:places]).rstrip() for line in lines]
    cut = [" ..." if len(line) > places else "" for line in lines]
    names = [
        f"{rank:>3}  {text}{end}" for rank, (text, end) in enumerate(zip(shown, cut, strict=True))
    ]
    return names[:_SHOWN] + (["..."] if len(names) > _SHOWN else [])


def _formats(plan: PlanData) -> str:
    """In which dtypes numbers are stored, that of most of them first, and used if in others."""
    params = _parameter_formats(plan.graph, lambda param: param.dtype)
    used = _parameter_formats(plan.graph, lambda param: param.value.type.dtype)
    return params if params == used else f"parameters in {params}, used in {used}"


def _parameter_formats(graph: Graph, dtype: Callable[[Param], torch.dtype]) -> str:
    blocks = [
        (block.params, loop.order.count(kind))
        for loop in graph.loops
        for kind, block in enumerate(loop.blocks)
    ]
    elements: Counter[str] = Counter()
    for params, times in [(graph.params, 1), *blocks]:
        for param in (param for param in params if param.kind != "constant"):
            if param.value.type.continuous:
                name = str(dtype(param)).removeprefix("torch.")
                elements[name] += times * param.value.type.numel
    return " and ".join(name for name, _ in elements.most_common()) or "no parameters"


def legend(plan: PlanData, text: str) -> Iterator[str]:
    """How to read those signs that comments and tables of the module's `text` have, in the names of
    the mesh's own axes."""
    if plan.mesh.ranks == 1:
        yield "Comments show the shape of what a statement makes, where it changes."
        return
    axis = plan.mesh.names[-1]
    summed = re.search(r"# .*\] \+ (\w+)", text)
    over = summed.group(1) if summed else ""
    through = ", through `via`" if "via=" in text else ""
    shape = f"shape that a statement makes, where it changes; 64 is cut over {axis}"
    zigzag = "cut along dim 1 in zigzag order: each rank has an early and a late block"
    together = "weights of a layer go there together before it"
    known = (
        (f"/{axis}", f"[b, 64/{axis}]", shape),
        (r"# .*\] \+ ", f"+ {over}", f"each rank of {over} holds a summand of it"),
        (
            r"# .*\d [kMGT]?B, ",
            "all-gather 8 MB, 9 us",
            "what is sent in the statement, and for how long",
        ),
        (r"# .*\binside\b", "inside", "sent by the operator itself, in all its steps"),
        (r"", "R, S0", "in tables, for each mesh axis: whole on each rank, cut along dim 0"),
        (r"\bZ\d", "Z1", zigzag),
        (r'"[^"]*\bV\b', "V", "whole, while each rank has a summand of its gradient"),
        (r"\bWeight\(", "Weight(stored, used)", together + through),
        (r"\bHome\(", "Home(spec)", "a copy is there for all uses, made once a step"),
        (r"\blate=True", "late=True", "gradients are summed at home, and reduced once a step"),
    )
    signs = {sign: meaning for pattern, sign, meaning in known if re.search(pattern, text)}
    width = max(map(len, signs))
    yield "Comments and tables:"
    yield from (f"    {sign:{width}}  {meaning}" for sign, meaning in signs.items())


def _usage(plan: PlanData) -> Iterator[str]:
    """How to run, load and serve the module."""
    yield f"    torchrun {_ranks_text(plan.request.gpus)}"
    yield '    model = ShardedModel.from_checkpoint("folder with .safetensors")'
    if any(operator_of(node).remembers for node in plan.graph.nodes):
        yield "    model.generate(input_ids, max_new_tokens=256)"
    elif plan.request.micro_batches > 1 or plan.pipeline is not None:
        yield "    loss = model.step(**rows)    forward and backward of all micro-batches"
    elif plan.training and any(out.path == ("loss",) for out in plan.graph.outputs):
        yield "    model(**model.shard_inputs(**batch)).loss.backward()"
    else:
        yield "    out = model(**model.shard_inputs(**batch))"


def _ranks_text(gpus: int) -> str:
    """The arguments of torchrun."""
    if gpus > _PER_HOST:
        return f"--nnodes N --nproc-per-node M sharded_model.py    a demonstration; N x M = {gpus}"
    return f"--nproc-per-node {gpus} sharded_model.py    a demonstration"


def mesh_picture(mesh: Mesh) -> list[str]:
    """Where each rank stands, the mesh's last axis along a row; nothing for a single rank.

    >>> print("\\n".join(mesh_picture(Mesh((("dp", 2), ("tp", 4))))))
           tp=0  tp=1  tp=2  tp=3
    dp=0      0     1     2     3
    dp=1      4     5     6     7
    """
    if mesh.ranks == 1:
        return []
    columns = [f"{mesh.names[-1]}={column}" for column in range(mesh.sizes[-1])]
    rows = [_coordinates(row, mesh.axes[:-1]) for row in range(mesh.ranks // len(columns))]
    width = max(len(title) for title in [*columns, str(mesh.ranks - 1)]) + 2
    margin = max(map(len, rows))

    def line(title: str, cells: Sequence[str]) -> str:
        shown = _shortened(cells, "..")
        return f"{title:{margin}} " + "".join(f"{cell:>{width}}" for cell in shown)

    ranks = [
        line(title, [str(rank) for rank in range(row * len(columns), (row + 1) * len(columns))])
        for row, title in enumerate(rows)
    ]
    return [line("", columns), *_shortened(ranks, "..")]


def _coordinates(row: int, axes: Sequence[tuple[str, int]]) -> str:
    """`pp=0 dp=1`."""
    parts: list[str] = []
    for name, size in reversed(axes):
        parts.append(f"{name}={row % size}")
        row //= size
    return " ".join(reversed(parts))


def _shortened(items: Sequence[str], mark: str) -> list[str]:
    """The first ones and the last, where there are too many."""
    return [*items] if len(items) <= _SHOWN else [*items[: _SHOWN - 2], mark, items[-1]]


def layout_sentences(programs: Sequence[Program], mesh: Mesh) -> list[str]:
    """What each axis cuts: `tp cuts attention by heads and the sequence between them.`

    Of two programs the first is for prefill, the second for decoding.
    """
    alike: dict[tuple[_Cuts, ...], list[str]] = {}
    for axis, (name, _) in enumerate(mesh.axes):
        found = tuple(_Cuts.of(program, axis) for program in programs)
        alike.setdefault(found, []).append(name)
    lines: list[str] = []
    for found, names in alike.items():
        told = [cuts.text(names) for cuts in found]
        text = told[0] if len(set(told)) == 1 else f"Prefill: {told[0]} Decoding: {told[1]}"
        lines += fill(text, _WIDTH, break_on_hyphens=False).splitlines()
    return lines


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What an axis cuts in a program: in its layers, or all of it, and around them."""

    layers: tuple[str, ...]
    outside: tuple[str, ...]

    @staticmethod
    def of(program: Program, axis: int) -> _Cuts:
        """Of one axis."""
        return _Cuts(tuple(_cuts(program, axis)), tuple(_outside(program, axis)))

    def text(self, names: Sequence[str]) -> str:
        """`tp cuts attention by heads. Around the layers it cuts lm_head by columns.`"""
        one = len(names) == 1
        cuts, they = ("cuts", "it cuts") if one else ("each cut", "they cut")
        text = f"{_listed(names)} {cuts} {_listed(self.layers)}."
        around = f" Around the layers {they} {_listed(self.outside)}."
        return text + around if self.outside else text


def _listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    *most, last = items or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def _cuts(program: Program, axis: int) -> Iterator[str]:
    """What an axis cuts, in the layers of a program, or in all of it where it has no layers."""
    labels = label_dims(program.graph)
    loops = [item for item in program.statements if isinstance(item, LoopCall)]
    flowing = [value for loop in loops for value in loop.carried] or program.inputs
    layers = [item for loop in loops for body in loop.bodies for item in body.statements]
    inner = [weight for loop in loops for body in loop.bodies for weight in body.weights]
    parameters = _parameters(inner or program.weights, axis)
    if any(_cuts_dim(item, axis, "b", labels) for item in flowing):
        yield "the batch" + ("" if parameters else _summed(inner or program.weights, axis))
    if parameters:
        yield parameters
    yield from _operators(layers or program.statements, axis)
    if any(_cuts_dim(item, axis, "s", labels) for item in flowing):
        yield "the sequence between them" if layers else "the sequence"


def _steps_of(weights: Sequence[Weight], axis: int) -> dict[str, list[Step]]:
    """By the name of a matrix the steps over an axis from how it is stored to how it is used."""
    matrices = [weight for weight in weights if len(weight.param.value.type.shape) > 1]
    return {w.name: [p.step for p in w.way if axis in p.step.axes] for w in matrices}


def _parameters(weights: Sequence[Weight], axis: int) -> str:
    """Which parameters are stored in parts over an axis, and gathered for use; empty if none."""
    steps = _steps_of(weights, axis)
    gathered = [
        weight
        for weight, each in steps.items()
        if any(primitive(step.a, step.b) == "all_gather" for step in each)
    ]
    if not gathered:
        return ""
    known = _known_as(weights, gathered)
    if len(gathered) == len(steps):
        return f"all matrices ({known})"
    names = dict.fromkeys(weight.removesuffix(".weight").rpartition(".")[2] for weight in gathered)
    return f"the parameters of {_listed([*names])} ({known})"


def _known_as(weights: Sequence[Weight], gathered: Sequence[str]) -> str:
    """What people call the way in which the weights `gathered` are kept."""
    kept = [w.kept for w in weights if w.name in gathered]
    if not all(each.gathered for each in kept):
        return "FSDP: gathered for use"
    if all(each.late for each in kept):
        return "ZeRO-1: gathered, and gradients reduced, once a step"
    return "ZeRO-2: gathered once a step, gradients reduced in each backward"


def _summed(weights: Sequence[Weight], axis: int) -> str:
    """Says so where the gradients of most matrices are summed over an axis."""
    steps = _steps_of(weights, axis).values()
    summed = sum(any((s.a, s.b) == (R, V) for s in each) for each in steps)
    return " (DDP: gradients are summed)" if steps and 2 * summed >= len(steps) else ""


def _operators(statements: Sequence[object], axis: int) -> Iterator[str]:
    """`matrix products by columns (q_proj, up_proj) and rows (down_proj)`."""
    for title, named in _CUT:
        ways: dict[str, dict[str, None]] = {}
        for item in statements:
            if isinstance(item, Compute) and operator_of(item.node).spent_on == title:
                word = words_of(item.node, item.choices[axis])
                ways.setdefault(word, {})[item.node.loc.module.rpartition(".")[2]] = None
        ways.pop("", None)
        words: list[str] = []
        for word, modules in ways.items():
            way, _, how = word.partition(", ")
            inside = ", ".join(filter(None, modules)) if named else how
            words.append(f"{way} ({inside})" if inside else way)
        if words:
            yield f"{title} by {_listed(words)}"


def _outside(program: Program, axis: int) -> list[str]:
    """`embed_tokens and loss by vocabulary`, `lm_head by columns`: what is cut outside them."""
    if not any(isinstance(item, LoopCall) for item in program.statements):
        return []
    found: dict[str, dict[str, None]] = {}
    for item in (item for item in program.statements if isinstance(item, Compute)):
        operator, tail = operator_of(item.node), item.node.loc.module.rpartition(".")[2]
        word = words_of(item.node, item.choices[axis])
        name = tail if operator.names_module and tail else operator.noun
        if word and name:
            found.setdefault(word, {})[name] = None
    return [f"{_listed([*names])} by {word}" for word, names in found.items()]


def _cuts_dim(item: Sharded, axis: int, label: str, labels: Mapping[str, DimLabels]) -> bool:
    """Does the axis cut a dim of that label?"""
    state, known = item.spec[axis], labels.get(item.value.name, ())
    return 0 <= state < len(known) and label in known[state]


__all__ = ["docstring", "layout_sentences", "mesh_picture"]
