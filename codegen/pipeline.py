"""A pipeline to one Python file: a class for each kind of stage, their table, the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..facts.mesh import Mesh
from ..facts.phases import DECODE, TRAIN
from ..facts.schedules import FORWARD
from ..facts.spec import Spec
from ..ir.ops.users import imports_in
from ..planner.plan.program import Program
from .body import axis_names
from .classes import Classes, names_of
from .functions import Functions
from .module import DECODING, Legend, Writer, file_of, no_legend, sharing_tables
from .source import comment_lines, statement

AXIS = "pp"  # the mesh axis of a pipeline, the outermost


@dataclass(frozen=True, slots=True)
class Row:
    """A stage: the number of its program, of each loop its first layer, and what it exchanges."""

    kind: int
    first: tuple[tuple[str, int], ...]
    taken: tuple[str, ...]
    given: tuple[str, ...]
    constant: tuple[str, ...]  # of `taken`, without a gradient


def write_pipeline(
    programs: Sequence[Program],
    rows: Sequence[Row],
    mesh: Mesh,
    *,
    ranks: int,
    schedule: str,
    micro_batches: int,
    summary: str,
    optimizer: str,
    picture: Sequence[str] = (),
    legend: Legend = no_legend,
    phase: str = TRAIN.name,
    decodes: Sequence[Program] = (),
    recached: Sequence[Mapping[str, Sequence[Spec]]] = (),
) -> str:
    """The generated module of a pipeline over `ranks` times the stages' `mesh`, as text.

    `programs` are those of the kinds of stages that `rows`, in the model's order, consist of;
    `picture` shows the schedule, a line for each rank.  Of a pipeline that serves `decodes` are the
    kinds' programs for single tokens, and `recached` as in `write_source`, of each kind.
    """
    graphs = [each.graph for each in (*programs, *decodes)]
    imports = list(dict.fromkeys(item for graph in graphs for item in imports_in(graph)))
    users = names_of(imports, mesh.names)
    kinds = [row.kind for row in rows]
    names = [f"Stage{kinds.index(kind)}" for kind in range(len(programs))]
    functions = Functions(graphs, [*users.values(), *names, *axis_names(mesh)])
    classes = Classes([*users.values(), *names, *functions.names])
    models: list[list[str]] = []
    for kind, (name, program) in enumerate(zip(names, programs, strict=True)):
        title = _title(rows, kind, program)
        second = [
            Writer(
                each,
                mesh,
                DECODE.name,
                optimizer,
                classes,
                functions,
                users,
                f"{name}{DECODING}",
                title=title,
            )  # fmt: skip
            for each in decodes[kind : kind + 1]
        ]
        first = Writer(
            program, mesh, phase, optimizer, classes, functions, users, name, second,
            recached[kind] if recached else {}, title,
        )  # fmt: skip
        models += [writer.model_class() for writer in sharing_tables((*second, first))]
    whole = _model(
        rows, names, programs[0], mesh, ranks, schedule, micro_batches, optimizer, picture
    )
    parts = [*classes.parts(), *models, whole]
    return file_of(summary, parts, functions, legend, imports, users)


def _title(rows: Sequence[Row], kind: int, program: Program) -> str:
    """`Stages 1 to 6 of Llama`."""
    own = [number for number, row in enumerate(rows) if row.kind == kind]
    many = f"Stages {', '.join(map(str, own))}" if len(own) > 1 else f"Stage {own[0]}"
    return f"{many} of {program.graph.name}"


def _model(
    rows: Sequence[Row],
    names: Sequence[str],
    program: Program,
    mesh: Mesh,
    ranks: int,
    schedule: str,
    micro_batches: int,
    optimizer: str,
    picture: Sequence[str],
) -> list[str]:
    """The lines of the class of the whole model."""
    sizes = ", ".join(f'"{name}": {size}' for name, size in ((AXIS, ranks), *mesh.axes))
    table: list[str] = []
    for row in rows:
        first = ", ".join(f'"{path}": {number}' for path, number in row.first)
        args = [names[row.kind], f"{{{first}}}"]
        args += [f"taken={_strings(row.taken)}"] if row.taken else []
        args += [f"given={_strings(row.given)}"] if row.given else []
        args += [f"constant={_strings(row.constant)}"] if row.constant else []
        table += statement(f"Stage({', '.join(args)}),", 2)
    what = f"{program.graph.name} in {len(rows)} stages over {AXIS}={ranks}, each on {mesh}."
    told = f"ranks 0 to {ranks - 1} of {AXIS} over time: F a forward, B a backward, . waits"
    if schedule == FORWARD:
        told = told.replace(", B a backward", " of micro-batch 0, 1, ...")
    return [
        "class ShardedModel(PipelinedModule):",
        f'    """{what}"""',
        "",
        f"    MESH = {{{sizes}}}",
        *comment_lines("`Stage`: class, first of the model's layers, what stages exchange", 1),
        "    STAGES = (",
        *table,
        "    )",
        *([f"    # {told}"] if picture else []),
        *(f"    #   {line}" for line in picture),
        f'    SCHEDULE = "{schedule}"',
        f"    MICRO_BATCHES = {micro_batches}",
        f'    OPTIMIZER = "{optimizer}"',
    ]


def _strings(items: Sequence[str]) -> str:
    joined = ", ".join(f'"{item}"' for item in items)
    return f"({joined}{',' if len(items) == 1 else ''})"


__all__ = ["AXIS", "Row", "write_pipeline"]
