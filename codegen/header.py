"""What stands above a generated module: the mesh as a picture, who holds what, how to run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..facts.mesh import Mesh
from ..facts.moves import primitive
from ..facts.phases import find_phase
from ..facts.units import format_bytes, format_seconds
from ..ir.ops.labels import DimLabels, label_dims
from ..ir.ops.registry import operator_of, words_of
from ..planner.plan.plan import PlanData
from ..planner.plan.program import Compute, LoopCall, Program, Sharded

_SHOWN = 8  # rows and columns of ranks
# what an axis may cut, by what time is spent on, and what the header calls it
_CUT = (("attention", "attention"), ("experts", "experts"), ("matrix products", "products"))


def docstring(plan: PlanData) -> str:
    """The docstring of the generated module of `plan`."""
    request = plan.request
    unit = find_phase(find_phase(request.phase).programs[0]).run
    if plan.decode is not None:
        unit = f"{unit}, {format_seconds(plan.decode.seconds)} per output token"
    made = request.target or "a model given to shardwright.plan"
    batch = f"batch {request.batch} x {request.seq} tokens, {request.dtype}"
    conversion = sum(recache.seconds for recache in plan.recached)
    converted = f"KV caches are converted between the two in {format_seconds(conversion)}."
    return "\n".join(
        [
            f"{plan.graph.name} over {request.gpus} x {request.cluster}: {plan.mesh}.",
            "",
            *([*mesh_picture(plan.mesh), ""] if plan.mesh.ranks > 1 else []),
            *layout_sentences([each.program for each in plan.phases], plan.mesh),
            "",
            f"Made from {made}, {batch}.",
            f"Predicted: {format_seconds(plan.seconds)} per {unit}, "
            f"{format_bytes(plan.memory.total)} per GPU.",
            *([converted] if plan.recached else []),
            "",
            *_usage(plan),
            "",
            "Comments show shapes where they change, with the mesh axes that cut a dim (`4096/tp`)",
            "and those whose ranks hold summands (`+ tp`), and what is sent: kind, bytes, time.",
        ]
    )


def _usage(plan: PlanData) -> Iterator[str]:
    """How to run, load and serve the module."""
    yield f"    torchrun --nproc-per-node {plan.request.gpus} sharded_model.py    a demonstration"
    yield '    model = ShardedModel.from_checkpoint("folder with .safetensors")'
    if plan.training:
        yield "    model(**model.shard_inputs(**batch)).loss.backward()"
    else:
        yield "    model.generate(input_ids, max_new_tokens=256)"


def mesh_picture(mesh: Mesh) -> list[str]:
    """Where each rank stands, the mesh's last axis along a row; nothing for a single rank.

    >>> print("\\n".join(mesh_picture(Mesh((("dp", 2), ("tp", 4)))))
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
    """What each axis cuts: `tp cuts attention by heads, products by columns and rows.`"""
    lines: list[str] = []
    for axis, (name, _) in enumerate(mesh.axes):
        found: dict[str, None] = {}
        for program in programs:
            found |= dict.fromkeys(_cuts(program, axis))
        *most, last = [*found] or ["nothing"]
        lines.append(f"{name} cuts {', '.join(most)}{' and ' if most else ''}{last}.")
    return lines


def _cuts(program: Program, axis: int) -> Iterator[str]:
    """What an axis cuts in the layers of a program, or in all of it where it has no layers."""
    labels = label_dims(program.graph)
    loops = [item for item in program.statements if isinstance(item, LoopCall)]
    flowing = [value for loop in loops for value in loop.carried] or program.inputs
    bodies = [item for loop in loops for body in loop.bodies for item in body.statements]
    statements = bodies or [item for item, _ in program.flat()]
    if any(_cuts_dim(item, axis, "b", labels) for item in flowing):
        yield "the batch"
    weights = [weight for loop in loops for body in loop.bodies for weight in body.weights]
    matrices = [w for w in weights or program.weights if len(w.param.value.type.shape) > 1]
    gathered = [
        weight
        for weight in matrices
        if any(
            axis in priced.step.axes and primitive(priced.step.a, priced.step.b) == "all_gather"
            for priced in weight.steps
        )
    ]
    if gathered and 2 * len(gathered) >= len(matrices):
        yield "parameters, which are gathered for use (FSDP)"
    for spent_on, title in _CUT:
        words = [
            words_of(item.node, item.choices[axis])
            for item in statements
            if isinstance(item, Compute) and operator_of(item.node).spent_on == spent_on
        ]
        if any(words):
            yield f"{title} by {' and '.join(dict.fromkeys(word for word in words if word))}"
    if any(_cuts_dim(item, axis, "s", labels) for item in flowing):
        yield "the sequence between them" if bodies else "the sequence"


def _cuts_dim(item: Sharded, axis: int, label: str, labels: Mapping[str, DimLabels]) -> bool:
    """Does the axis cut a dim of that label?"""
    state, known = item.spec[axis], labels.get(item.value.name, ())
    return 0 <= state < len(known) and label in known[state]


__all__ = ["docstring", "layout_sentences", "mesh_picture"]
