"""The Python API: what the command `plan` does, as functions."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .asked import AXES, Asked, Progress, check_inputs, check_model, silent
from .capturing import Captures
from .codegen.write import module_source
from .costmodel.machines.cluster import ClusterError, load_cluster
from .facts.given import shown, whole
from .facts.mesh import Mesh
from .facts.phases import find_phase
from .facts.units import format_seconds
from .folder import write_module, write_plan
from .ir.graph import Graph
from .ir.ops.registry import operator_of
from .launching import By, Launch
from .loading import (
    Loaded,
    check_formats,
    in_formats_apart,
)
from .planner.errors import InfeasibleError, LayoutError, PlanError
from .planner.ilp.problem import ShardingProblem
from .planner.iopddl import write_problem
from .planner.plan.check import check_plan
from .planner.plan.decide import REPLICAS
from .planner.plan.plan import PlanData, Request
from .planner.plan.store import checked_json, read_plan
from .planner.report.model_graph import PlannedGraph
from .planner.report.ops import PlannedOp, planned_ops
from .planner.report.report import format_plan
from .planner.report.throughput import throughput
from .planner.search.search import Job, setting_of
from .planner.search.served_pipelines import with_served_stages
from .planner.search.served_stages import make_served_pipeline
from .planner.search.serving import make_serving_plan
from .planner.search.staged import may_have_stages, with_stages
from .planner.search.variants import make_plan
from .planner.strategies.build import Builder
from .planner.strategies.layout import limited
from .planner.strategies.pins import module_of
from .planner.strategies.prices import network_for

if TYPE_CHECKING:
    from .exporting import Export
    from .rehearse import Rehearsal
    from .verify import Verification

_USES = ("dp", "tp", "cp", "ep")  # names of axes that say what is cut over them
STAGES = ("strategies", "problem", "plan")  # of planning, which `Plan.dump` shows


@dataclass(frozen=True)
class Plan(PlanData):
    """How to cut a model over a mesh.  `print(plan)` explains it.

    The data of a plan with what the rooms make of it: the report, the file, the module, the
    problem, the command to run.  `graph.to_networkx()` is the model as a networkx graph.
    """

    graph: PlannedGraph
    decode: Plan | None = None

    @staticmethod
    def of(data: PlanData) -> Plan:
        """The plan with this data."""
        values: dict[str, Any] = {f.name: getattr(data, f.name) for f in fields(data)}
        values["graph"] = PlannedGraph.of(data)
        if data.decode is not None:
            values["decode"] = Plan.of(data.decode)
        return Plan(**values)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote.  Raises PlanError naming the field that is malformed."""
        return Plan.of(read_plan(Path(path)))

    def __str__(self) -> str:
        return format_plan(self, self._throughput())

    def _repr_html_(self) -> str:
        """What a notebook shows: the sentence, the ordinary plans, and memory at its peak."""
        from .plan_page import fragment_of

        return fragment_of(self)

    def to_html(self) -> str:
        """The plan as one page that needs nothing else.

        Raises ClusterError where the plan's cluster file is not here.
        """
        from .plan_page import page_of_plan

        return page_of_plan(self)

    def trace(self) -> dict[str, Any]:
        """The predicted step as a Chrome trace, which Perfetto opens, as JSON data.

        Raises ClusterError where the plan's cluster file is not here.
        """
        from .plan_time import trace_of

        return trace_of(self)

    def _throughput(self) -> str:
        """Tokens per second, MFU and costs; "" where the cluster's file is not here."""
        try:
            cluster = load_cluster(self.request.cluster, self.request.gpus)
            return throughput(self, cluster.peak, cluster.price_per_gpu_hour)
        except ClusterError:
            return ""

    @property
    def ops(self) -> tuple[PlannedOp, ...]:
        """What is cut over each axis for every heavy operator, and its seconds."""
        self._refuse_pipeline("operators")
        return planned_ops(self)

    def check(self) -> None:
        """Raises PlanError where decisions, prices and graph do not fit together.

        What is loaded and what is saved is held to it, but that operators give what the graph says
        is looked at here and in loading; a plan that was made by hand may not be.
        """
        check_plan(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON data, of the schema that `plan schema` prints.

        Raises PlanError where what belongs together does not fit.
        """
        return checked_json(self)

    def save(self, path: str | Path) -> None:
        """Write `plan.json`; `load_plan` gives an equal plan back.

        Raises FileExistsError rather than replace what is no plan.
        """
        write_plan(self, Path(path))

    def module_source(self) -> str:
        """The generated module as text."""
        return module_source(self)

    def write_module(self, path: str | Path) -> None:
        """Write the module that runs this plan under torchrun.

        Raises FileExistsError rather than replace what is no generated module.
        """
        write_module(self, Path(path))

    def launch_command(self, module: str) -> str:
        """The torchrun command that runs the module's demonstration."""
        module = shlex.quote(module)
        node = load_cluster(self.request.cluster, self.request.gpus).gpus_per_node
        gpus = self.request.gpus
        if gpus <= node:
            return f"torchrun --nproc-per-node {gpus} {module}"
        return (
            f"torchrun --nnodes {-(-gpus // node)} --nproc-per-node {node} --rdzv-backend c10d "
            f"--rdzv-endpoint HOST:29500 {module}"
        )

    def launch_script(
        self,
        by: By,
        program: Sequence[str],
        *,
        nodes: int | None = None,
        time_limit: str = "24:00:00",
        max_restarts: int = 3,
    ) -> str:
        """The bash script that starts `program`, a Python file and its arguments, on all machines.

        `by` is `torchrun`, to be run on each of them, or `slurm`.  Raises ValueError for another
        number of `nodes` than planned, and a `time_limit` that is not `[D-]HH:MM:SS`.
        """
        node = load_cluster(self.request.cluster, self.request.gpus).gpus_per_node
        mesh = dict(zip(self.mesh.names, self.mesh.sizes, strict=True))
        launch = Launch.of(self.graph.name, mesh, node, nodes, program, time_limit, max_restarts)
        return launch.script(by)

    def export(self, to: str) -> Export:
        """The plan in the words of another tool: `dtensor`, `torchtitan`, `megatron`, `vllm`, ...

        `print` shows the text; `.differences` says what of the plan the tool does not do, and what
        that costs.  Raises PlanError for an unknown tool, and where it has no such layout.
        """
        from .exporting import export

        return export(self, to)

    def explain(self, pattern: str, *, flip: str | None = None) -> str:
        """Why operators of modules that match `pattern` run as they do: what other ways would cost.

        `flip` (`link`, `inter-node`, `gpu`): how many times as fast these must be for another to
        win.  Raises PlanError where no module matches.
        """
        from .explaining import explain

        return explain(self, pattern, flip=flip)

    def why_not(self, layout: str) -> str:
        """What an ordinary layout (`"tp=8"`) would take beside the plan, part by part."""
        from .questions import why_not

        return why_not(self, layout)

    def what_if(
        self,
        *,
        cluster: str | None = None,
        link: float = 1.0,
        inter_node: float = 1.0,
        gpu_speed: float = 1.0,
        memory_bytes: int | None = None,
        batch: float = 1.0,
    ) -> str:
        """What the plan takes on another machine, or with `batch` times as many sequences, and
        whether another is better then.  Factors are of speeds.

        Raises PlanError where nothing is other, or sequences need a capture.
        """
        from .questions import Change, what_if

        memory = None if memory_bytes is None else int(memory_bytes)
        return what_if(self, Change(cluster, link, inter_node, gpu_speed, memory, batch))

    def compare(self, other: Plan, names: tuple[str, str] = ("this plan", "the other")) -> str:
        """Which of two plans is faster, and where their time, bytes and memory differ.

        Raises PlanError where one serves and the other does not.
        """
        from .questions import compare

        return compare(self, other, names)

    def dump_problem(self, path: str | Path) -> None:
        """Write the sharding problem on this plan's mesh in the IOPDDL format."""
        write_problem(self._problem(), Path(path))

    def dump(self, stage: str) -> str:
        """What planning went through on this plan's mesh, as text that a test can compare.

        `strategies`: what is decided together, and all ways to run it; `problem`: the integer
        program; `plan`: the choices and specs that were taken.  Raises PlanError for other stages.
        """
        if stage == "strategies":
            return "\n".join(map(str, self._builder().regions))
        if stage == "problem":
            return str(self._problem())
        if stage == "plan":
            return str(self.decisions)
        raise PlanError(f"unknown stage `{stage}`; expected one of {', '.join(STAGES)}")

    def strategies_of(self, pattern: str) -> str:
        """All ways to run the operators of modules that match `pattern`, that of the plan marked.

        Raises PlanError where no module matches.
        """
        regions = [
            region
            for region in self._builder().regions
            if any(fnmatchcase(module_of(node.loc.module), pattern) for node in region.nodes)
        ]
        if not regions:
            raise PlanError(f"--ops {pattern}: no module has such a name, as in '*.q_proj'")
        axes = ", ".join(self.mesh.names)
        lines = [f"What is cut over {axes}: states needed -> states made; * is the plan's."]
        for region in regions:
            values = ", ".join(value.name for value in region.operands)
            module = module_of(region.nodes[0].loc.module) or region.name
            lines.append(f"{module}: {values} -> {region.values[-1].name}")
            taken = tuple(self.decisions.choices[node.name] for node in region.nodes)
            head = next((i for i, n in enumerate(region.nodes) if operator_of(n).heavy), 0)
            for way in region.strategies:
                lines.append(f"  {'*' if way.choices == taken else ' '} {way.line(head)}")
        return "\n".join(lines)

    def _refuse_pipeline(self, what: str) -> None:
        """Raises PlanError for a pipeline, which has none of `what` as a whole."""
        if self.pipeline is not None:
            raise PlanError(
                f"this plan is a pipeline, whose {what} are those of its stages: they are plans of"
                " their own, plan.pipeline.kinds"
            )

    def _problem(self) -> ShardingProblem:
        limit = limited(self.request.pins, self.request.layout)(self.graph, self.mesh)
        return self._builder().build(limit).problem()

    def _builder(self) -> Builder:
        """What builds the problem again that this plan is the solution of."""
        self._refuse_pipeline("decisions")
        cluster = load_cluster(self.request.cluster, self.request.gpus)
        decided = self.decisions
        setting = replace(
            setting_of(self.request),
            recompute=decided.recompute,
            order=decided.order,
            kept_layers=decided.kept_layers,
            part_layers=decided.part_layers,
        )
        return Builder(self.graph, network_for(self.graph, self.mesh, cluster), setting)


def plan(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    gpus: int | None = None,
    cluster: str = "h100",
    phase: str = "train",
    context: int | None = None,
    output_tokens: int | None = None,
    expert_imbalance: float | None = None,
    mesh: str | None = None,
    pins: Sequence[str] = (),
    memory_bytes: int | None = None,
    optimizer: str | None = None,
    outputs: Sequence[str] = (),
    output_layout: str = "sharded",
    layout: str | None = None,
    precision: str | None = None,
    reduce_dtype: str | None = None,
    micro_batches: int | None = None,
    schedule: str | None = None,
    solver: str = "highs",
    time_limit_s: float = 60.0,
    progress: Progress = silent,
) -> Plan:
    """The cheapest way to run `model(**inputs)` on `gpus` GPUs, proven under the cost model.

    `model` and `inputs` may be on the meta device; nothing is run and no weight is allocated.
    `inputs` are a dict by name or a tuple by position, with tensors anywhere in dicts, lists,
    tuples and dataclasses; numbers, flags, text and None among them are fixed in the plan.
    Dim 0 of every tensor is taken as the batch and dim 1 as the sequence: with `phase` `prefill`,
    `decode` or `append` the new tokens, to which `context` cached ones are added.  Models with
    causal attention and an input `position_ids` are then planned with a KV cache.  `serve` plans
    prefill and the decoding of `output_tokens` together, with one set of weights; the plan's
    `decode` is that of one output token, `recached` the caches that are converted in between.
    `cluster` is a built-in name or the path of a TOML file; `memory_bytes` overrides its memory per
    GPU; `mesh` (`2x4`) fixes the mesh, which is otherwise searched; `pins`
    (`"*.q_proj.weight=R,S0"`) are kept and priced.  `expert_imbalance` is the load of the busiest
    rank's experts over the mean (default: that of a power-law router).  `outputs` are those that
    training returns (default: all of them): with `["loss"]` the logits of a language model are
    never there as a whole.  `output_layout` is `sharded`, each rank returns the part that it has,
    or `replicated`, all of it.  `layout` (`"ddp=4,fsdp=8"`) asks for an ordinary plan, on a mesh of
    its own, innermost axis last; `gpus` may then be left out.

    `precision`: `mixed`, the default for training where products in bfloat16 are faster, stores
    trained parameters in float32 and computes in bfloat16 (a model all of whose parameters are
    float32 is cast, as are its buffers; another computes as it is); `own` stores and computes as
    the model has it.  `reduce_dtype` (`float32`, `bfloat16`) is that of gradients between ranks;
    by default float32 in mixed precision.  `micro_batches` of a step are computed one after another
    (default: one, or as few as fit, or a few more where layers would be recomputed, if that is
    faster), and their gradients added up; the inputs are those of all.
    A `layout` with `pp` is a pipeline, whose `schedule` is `gpipe`, `1f1b` (the default) or
    `interleaved`.

    Raises PlanError for a request that cannot be planned, InfeasibleError if no plan fits memory.
    """
    asked = Asked(
        gpus, cluster, phase, context, output_tokens, expert_imbalance, mesh, pins, memory_bytes,
        optimizer, solver, time_limit_s, progress, outputs, output_layout, layout, None,
        precision, reduce_dtype, micro_batches, schedule,
    )  # fmt: skip
    check_model(model)
    check_formats(model)
    tensors = check_inputs(model, inputs)
    labels = {name: ("b", "s", *[""] * x.ndim)[: x.ndim] for name, x in tensors.items()}
    first = next(iter(tensors.values()))
    batch, seq = (*first.shape[:2], 1, 1)[:2]
    job = asked.job("", batch, seq)
    formats = job.request.formats
    loaded = in_formats_apart(Loaded(model, inputs, labels, None), formats)
    captures = Captures(lambda: loaded, formats, outputs)
    return plan_steps(captures, job, several=micro_batches is None)


def plan_file(
    target: str,
    *,
    gpus: int | None,
    cluster: str,
    phase: str,
    batch: int | None,
    seq: int,
    dtype: str | None,
    memory_bytes: int | None,
    mesh: str | None,
    pins: Sequence[str],
    optimizer: str,
    solver: str,
    time_limit_s: float,
    context: int | None = None,
    output_tokens: int | None = None,
    expert_imbalance: float | None = None,
    outputs: Sequence[str] = (),
    output_layout: str = "sharded",
    layout: str | None = None,
    precision: str | None = None,
    reduce_dtype: str | None = None,
    micro_batches: int | None = None,
    schedule: str | None = None,
    cache: bool = True,
    progress: Progress = silent,
) -> Plan:
    """Like `plan`, for a model named as on the command line (`model.py`, `config.json`).

    `batch` is one sequence for each GPU where it is None.  With `cache` what an earlier run
    captured of the same configuration serves again.
    """
    asked = Asked(
        gpus, cluster, phase, context, output_tokens, expert_imbalance, mesh, pins, memory_bytes,
        optimizer, solver, time_limit_s, progress, outputs, output_layout, layout, dtype,
        precision, reduce_dtype, micro_batches, schedule, cache,
    )  # fmt: skip
    batch = asked.ranks if batch is None else batch
    job = asked.job(target, batch, seq)
    captures = Captures.of_target(job, outputs, kept=asked.cache)
    return plan_steps(captures, job, several=micro_batches is None)


_MORE = 3  # numbers of micro-batches that are tried where layers would be recomputed
_NOT_MIXED = (
    "mixed precision has nothing to mix here: the model's parameters are neither all in float32 "
    "nor any in fewer bits, and are stored and used as they are"
)


def plan_steps(captures: Captures, job: Job, *, several: bool) -> Plan:
    """The plan of a step, with stages or without; of as few micro-batches as fit without them, if
    there may be `several`.

    Raises PlanError for a request that cannot be planned, InfeasibleError if no plan fits memory.
    """
    asked, job = job, captures.in_own_formats(job)
    plan: Plan | InfeasibleError
    try:
        plan = _in_parts(captures, job, several=several)
    except InfeasibleError as error:
        if not may_have_stages(job):
            raise
        plan = error
    if may_have_stages(job):
        plan = Plan.of(_staged(captures, job, plan, several=several))
    assert isinstance(plan, Plan)
    return plan if job is asked else replace(plan, notes=(*plan.notes, _NOT_MIXED))


def _staged(
    captures: Captures, job: Job, without: Plan | InfeasibleError, *, several: bool
) -> PlanData:
    """The fastest plan, given that `without` stages, or why there is none."""

    @cache
    def graphs_of(micro_batches: int) -> tuple[Graph, ...]:
        request = replace(job.request, micro_batches=micro_batches)
        return captures.graphs(replace(job, request=request))

    if find_phase(job.request.phase).backward:
        return with_stages(lambda many: graphs_of(many)[0], job, without, several=several)
    return with_served_stages(graphs_of, job, without, several=several)


def _in_parts(captures: Captures, job: Job, *, several: bool) -> Plan:
    """The plan without stages, of as few micro-batches as fit, if there may be `several`.

    Where that recomputes layers, a few more micro-batches whose layers are all kept may be faster.
    """
    request = job.request
    counts = micro_batch_counts(request) if several else [request.micro_batches]
    none_fits = InfeasibleError()
    for at, count in enumerate(counts):
        tried = job if not at else _of_micro_batches(job, count)
        try:
            plan = planned(captures.graphs(tried), tried)
        except InfeasibleError as error:
            none_fits = none_fits if at else error
            continue
        except LayoutError:  # of so few rows; that the whole batch does not fit is what is told
            if not at:
                raise
            break
        if at:
            whole = f"{request.batch} sequences at once do not fit"
            plan = _noted(plan, f"{whole}: a step adds up the gradients of {count} micro-batches")
        asked = job.layout is not None and job.layout.recompute is not None
        free = plan.decisions.recompute and not asked
        more = counts[at + 1 : at + 1 + _MORE] if free else []
        return _kept_instead(captures, job, plan, more)
    raise none_fits


def _kept_instead(captures: Captures, job: Job, plan: Plan, counts: Sequence[int]) -> Plan:
    """The plan of the first of these numbers of micro-batches that is faster than `plan`, which
    recomputes layers, without doing so; else `plan`."""
    for count in counts:
        tried = _of_micro_batches(job, count, plan.seconds)
        with suppress(PlanError):  # none is faster, fits, divides, or was found in the time
            found = planned(captures.graphs(tried), tried)
            fewer = plan.request.micro_batches
            note = f"a step adds up the gradients of {count} micro-batches: "
            note += "in one" if fewer == 1 else f"in {fewer}"
            note += f" it would recompute layers and take {format_seconds(plan.seconds)}"
            return _noted(found, note)
    return plan


def _noted(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))


def _of_micro_batches(job: Job, count: int, known_s: float = inf) -> Job:
    """The job with so many micro-batches a step; what is slower than a plan that is known is not
    looked for."""
    request = replace(job.request, micro_batches=count)
    tried = replace(job, request=request, builders=job.builders.for_others(), known_s=known_s)
    return tried.saying(f", {count} micro-batches")


def micro_batch_counts(request: Request) -> list[int]:
    """How many a step may have: 1, 2, 4, ..., where they divide the batch."""
    powers = [2**n for n in range(request.batch.bit_length())]
    trains = find_phase(request.phase).backward
    return [n for n in powers if request.batch % n == 0] if trains else [1]


def planned(graphs: tuple[Graph, ...], job: Job) -> Plan:
    """The plan of the graphs of a request."""
    stages = job.layout is not None and job.layout.pipeline > 1
    if stages and not find_phase(job.request.phase).backward:
        return Plan.of(make_served_pipeline(graphs, job))
    if len(graphs) == 1:
        return Plan.of(_with_names(make_plan(graphs[0], job), job.mesh))
    prefill, decode = graphs
    return Plan.of(_with_names(make_serving_plan(prefill, decode, job), job.mesh))


def _with_names(made: PlanData, asked: Mesh | None) -> PlanData:
    """The plan with the names that a user gave to axes, and a note where they say another use."""
    if asked is None or set(asked.names) <= set(AXES):
        return made
    uses = [name.rstrip("0123456789") for name in made.mesh.names]
    wrong = [
        f"{name} {'runs copies' if use == REPLICAS else f'is used as {use}'}"
        for name, use in zip(asked.names, uses, strict=True)
        if name.rstrip("0123456789") != use and name.rstrip("0123456789") in _USES
    ]
    here = ", ".join(wrong)
    note = f"--mesh gives names and sizes alone, and here {here}; --pin decides what is cut"
    decode = None if made.decode is None else replace(made.decode, mesh=asked)
    notes = (*made.notes, note) if wrong else made.notes
    return replace(made, mesh=asked, notes=notes, decode=decode)


def load_plan(path: str | Path) -> Plan:
    """A plan that `Plan.save` wrote.  Raises PlanError naming the field that is malformed."""
    return Plan.load(_path("path", path))


def _path(name: str, given: object) -> Path:
    """Raises TypeError for what names no file."""
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be the path of a plan, got {shown(given)}")
    return Path(given)


def verify(
    folder: str | Path, ranks: int | None = None, *, model: str | None = None
) -> Verification:
    """Run the module of the plan in `folder` on gloo ranks of this machine beside the original.

    The original is what the plan names, or `model` (`model.py`, `config.json`); a Python file that
    a plan from elsewhere names is run only if `model` says so.  `print` shows the result, `.ok`
    says whether every output, the loss and every gradient agree.  Raises PlanError where the plan
    cannot be run on `ranks` processes.
    """
    from .verify import verify as run

    if ranks is not None:
        whole("ranks", ranks, 1)
    return run(_path("folder", folder), ranks, model)


def rehearse(
    folder: str | Path, rank: int = 0, steps: int = 5, *, model: str | None = None
) -> Rehearsal:
    """Run rank `rank` of the plan in `folder` on this device alone, its peers played.

    `model` is a Python file that may be run: what a plan from elsewhere imports is imported from
    there alone.
    `print` shows seconds by layer and kind of kernel, and bytes at the peak, beside what was
    predicted.  Raises PlanError where the plan can't be run so.
    """
    from .rehearse import rehearse as run

    return run(_path("folder", folder), rank, steps, model)


__all__ = [
    "Plan", "load_plan", "micro_batch_counts", "plan", "plan_file", "plan_steps", "planned",
    "rehearse", "verify",
]  # fmt: skip
