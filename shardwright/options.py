"""The options of the commands, and what they say of themselves in the help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict, TypeVar, get_type_hints

import typer

from .costmodel.machines.cluster import BUILT_IN
from .facts.phases import PHASES, TRAIN
from .facts.schedules import SCHEDULES
from .folder import MODULE_FILE, PLAN_FILE


class Precision(StrEnum):
    """In which products run."""

    MIXED = "mixed"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    OWN = "own"


class ReduceDtype(StrEnum):
    """Number format of gradients between ranks."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Dtype(StrEnum):
    """Number format of the parameters."""

    OWN = "own"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


class Optimizer(StrEnum):
    """Whose states take memory beside parameters and gradients."""

    ADAMW = "adamw"
    SGD = "sgd"
    MUON = "muon"
    NONE = "none"


class OutputLayout(StrEnum):
    """What each rank returns of the outputs."""

    SHARDED = "sharded"
    REPLICATED = "replicated"


class Stage(StrEnum):
    """What planning goes through, one made of the other."""

    STRATEGIES = "strategies"
    PROBLEM = "problem"
    PLAN = "plan"


class Flip(StrEnum):
    """What may be faster or slower."""

    LINK = "link"
    INTER_NODE = "inter-node"
    GPU = "gpu"


class Solver(StrEnum):
    """The back end that picks the strategies."""

    HIGHS = "highs"
    CP_SAT = "cp-sat"
    PYOMO = "pyomo"


def parse_bytes(text: str) -> int:
    """Bytes in `80GB` (10^9), `80GiB` (2^30) or a plain number of bytes as `64e9`.

    >>> parse_bytes("80GB"), parse_bytes("1.5 KiB"), parse_bytes("64e9")
    (80000000000, 1536, 64000000000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*(?:([kmgt]?)(i?)b)?", text.strip(), re.I)
    if match is None:
        raise typer.BadParameter(f"`{text}` is not a size; expected one like 80GB, 80GiB or 64e9")
    number, prefix, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " kmgt".index((prefix or " ").lower())
    if not 1 <= size < 2**63:
        raise typer.BadParameter(f"`{text}` is not the memory of a GPU; expected one like 80GB")
    return int(size)


def _known_phase(text: str) -> str:
    if text not in PHASES:
        raise typer.BadParameter(f"`{text}` is not one of {', '.join(map(repr, PHASES))}")
    return text


# What options are, and say of themselves in the help.

ModelArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="a Python file that defines build_model() and example_inputs(batch, seq), "
        "`model.py:function` for another builder; or a Hugging Face config.json, or a folder "
        "with one",
    ),
]
GpusOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="by the layout",
        help="GPUs to use in all, e.g. --gpus 8",
    ),
]
PhaseOption: TypeAlias = Annotated[
    str,
    typer.Option(
        parser=_known_phase,
        metavar=f"<{'|'.join(PHASES)}>",
        help="what to plan for, e.g. --phase prefill",
    ),
]
BatchOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="one per GPU",
        help="sequences in the batch, over all GPUs together, e.g. --batch 64",
    ),
]
SeqOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="1024; 1 with --phase decode",
        help="tokens in a sequence, or new ones in inference, e.g. --seq 8192",
    ),
]
ContextOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        show_default="8192 with --phase decode or append",
        help="cached tokens before the new ones, e.g. --context 32768",
    ),
]
OutputTokensOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="256",
        help="tokens of an answer, with --phase serve, e.g. --output-tokens 1024",
    ),
]
ExpertImbalanceOption: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        show_default="that of a power-law router",
        help="load of the GPU with the busiest experts over the mean load, e.g. "
        "--expert-imbalance 1.5",
    ),
]
DtypeOption: TypeAlias = Annotated[
    Dtype | None,
    typer.Option(
        show_default="own",
        help="number format in which parameters and buffers are stored, complex ones apart; own: "
        "as the model has them, each in its own, e.g. --dtype bfloat16",
    ),
]
PrecisionOption: TypeAlias = Annotated[
    Precision | None,
    typer.Option(
        show_default="mixed for training on GPUs, unless --dtype is given; else own",
        help="what products run in; mixed: bfloat16, with trained parameters, their gradients and "
        "optimizer states in float32; own: what parameters are stored in, e.g. --precision own",
    ),
]
ReduceDtypeOption: TypeAlias = Annotated[
    ReduceDtype | None,
    typer.Option(
        show_default="float32 with mixed precision, else that of parameters",
        help="number format in which ranks add up gradients, e.g. --reduce-dtype bfloat16",
    ),
]
MicroBatchesOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="1, or as few as fit",
        help="parts of the batch that a step computes one after another, adding up gradients, e.g. "
        "--micro-batches 4",
    ),
]
ScheduleOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(SCHEDULES[:3]),
        show_default="the fastest",
        help="the schedule of a pipeline, e.g. --schedule interleaved; without --layout the plan "
        "is then a pipeline",
    ),
]
ClusterOption: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE.toml",
        help=f"the machines: {', '.join(BUILT_IN)} (`cpu`: processes on this machine), or a file "
        "that describes yours, e.g. --cluster a100",
    ),
]
MemoryOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        parser=parse_bytes,
        show_default="the cluster's",
        help="memory that a plan may fill on each GPU, e.g. --memory 64GB (or 64GiB, 64e9)",
    ),
]
MeshOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        show_default="searched",
        help="the grid of GPUs, slowest links first, e.g. --mesh 2x4 or --mesh dp=2,tp=4",
    ),
]
LayoutOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORDS",
        show_default=False,
        help="an ordinary plan instead of the best one: ddp (or dp), fsdp, tp, cp, ulysses and ep, "
        "each with a number of GPUs, outermost first; sp: the GPUs of tp share the sequence "
        "between the blocks; pp: ranks of a pipeline, vpp: stages of each; recompute=none, "
        "selective (layers keep the results of products and attention), full, or so many first "
        "layers; e.g. --layout fsdp=32 or --layout pp=2,ddp=4,tp=8,sp. Repeated: a table of all, "
        "beside the best plan",
    ),
]
LayoutFromOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|'FLAGS'",
        show_default=False,
        help="the layout, batch and number formats that another tool is run with: flags of "
        "Megatron, vLLM or SGLang, or torchtitan's TOML, e.g. --layout-from megatron.sh",
    ),
]
WriteOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        show_default=False,
        help="with several layouts, the row of the table to write the module of, e.g. --write 1",
    ),
]
PinOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=SPEC",
        show_default=False,
        help="a decision of your own, kept and priced: a glob of tensor names and a state per "
        "mesh axis (R replicated, S0, S1, ... sharded along that dim), e.g. "
        "--pin '*.q_proj.weight=R,S0'; or what an axis cuts in operators (`plan show --help` "
        "says how to list it), e.g. --pin '*.q_proj=tp:out'; may be repeated",
    ),
]
OutputsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        show_default="all",
        help="what training returns, e.g. --outputs loss, without logits, which are then never "
        "there as a whole; may be repeated",
    ),
]
OutputLayoutOption: TypeAlias = Annotated[
    OutputLayout,
    typer.Option(
        help="whether each rank returns its part of what training returns, or all of it, e.g. "
        "--output-layout replicated for a loss outside of the module",
    ),
]
OptimizerOption: TypeAlias = Annotated[
    Optimizer | None,
    typer.Option(
        show_default="adamw; none in inference",
        help="the optimizer whose states take memory, e.g. --optimizer muon",
    ),
]
SolverOption: TypeAlias = Annotated[
    Solver, typer.Option(help="the back end that searches, e.g. --solver cp-sat")
]
TimeLimitOption: TypeAlias = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0.1,
        help="stop the search then, with the best plan so far, e.g. --time-limit 10",
    ),
]
NoCacheOption: TypeAlias = Annotated[
    bool,
    typer.Option("--no-cache", help="capture a configuration anew, e.g. after a patch: --no-cache"),
]
OutOption: TypeAlias = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help=f"folder for {PLAN_FILE} and {MODULE_FILE}; an earlier plan in it is replaced, "
        "anything else refused, e.g. --out plans/8b",
    ),
]
AsJsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="print the plan as JSON instead of the report")
]
FullOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--full",
        help="print each row of a table on one line, however long, e.g. `--full | less -S`",
    ),
]
DumpProblemOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="also write the problem that was solved, in the IOPDDL format, e.g. "
        "--dump-problem problem.json.gz",
    ),
]
DumpOption: TypeAlias = Annotated[
    Stage | None,
    typer.Option(
        show_default=False,
        help="print what planning went through on the plan's mesh instead of the report: the ways "
        "to run each part, the integer program, or the choices taken, e.g. --dump strategies",
    ),
]


HtmlOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        show_default=False,
        help="write it as one page that needs nothing else: mesh, memory and both streams over"
        " time, layers, parameters, ordinary plans, e.g. --html plan.html",
    ),
]
TraceOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        show_default=False,
        help="write the predicted step as a trace for Perfetto or chrome://tracing,"
        " e.g. --trace step.json",
    ),
]


class Planning(TypedDict):
    """What commands that plan have in common: how a model is run, and how a plan is looked for."""

    phase: PhaseOption
    context: ContextOption
    output_tokens: OutputTokensOption
    expert_imbalance: ExpertImbalanceOption
    dtype: DtypeOption
    precision: PrecisionOption
    reduce_dtype: ReduceDtypeOption
    micro_batches: MicroBatchesOption
    memory: MemoryOption
    optimizer: OptimizerOption
    outputs: OutputsOption
    solver: SolverOption
    time_limit: TimeLimitOption
    no_cache: NoCacheOption


_DEFAULTS: dict[str, Any] = {
    "phase": TRAIN.name,
    "solver": Solver.HIGHS,
    "time_limit": 60.0,
    "no_cache": False,
}
_Command = TypeVar("_Command", bound=Callable[..., None])


def takes_planning(command: _Command) -> _Command:
    """The command, which has `**planning`, with the options of `Planning` before its `--out`."""
    own, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    shared = get_type_hints(Planning, include_extras=True)
    named, kind = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
    found: list[inspect.Parameter] = []
    for name, each in own.parameters.items():
        if name == "out":  # what a plan is comes before what is written of it
            found += [
                named(option, kind, default=_DEFAULTS.get(option), annotation=annotation)
                for option, annotation in shared.items()
            ]
        if each.kind != inspect.Parameter.VAR_KEYWORD:
            found.append(each.replace(kind=kind, annotation=hints[name]))
    command.__signature__ = own.replace(parameters=found)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def asked_of(planning: Planning) -> dict[str, Any]:
    """The options as `api.plan_file` has them."""
    optimizer, phase = planning["optimizer"], planning["phase"]
    return {
        "phase": phase,
        "context": planning["context"],
        "output_tokens": planning["output_tokens"],
        "expert_imbalance": planning["expert_imbalance"],
        "memory_bytes": planning["memory"],
        "optimizer": optimizer.value if optimizer else PHASES[phase].optimizer,
        "solver": planning["solver"].value,
        "time_limit_s": planning["time_limit"],
        "outputs": tuple(planning["outputs"] or ()),
        "dtype": _text(planning["dtype"]),
        "precision": _text(planning["precision"]),
        "reduce_dtype": _text(planning["reduce_dtype"]),
        "micro_batches": planning["micro_batches"],
        "cache": not planning["no_cache"],
    }


def _text(choice: StrEnum | None) -> str | None:
    return None if choice is None else choice.value


GpuCountsOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--gpus",
        metavar="LIST",
        show_default=False,
        help="numbers of GPUs, or ranges that double, e.g. --gpus 8,16,24 or --gpus 8..128",
    ),
]
ClustersOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--cluster",
        metavar="LIST",
        help="clusters by name or file, as `plan --help` lists them, e.g. --cluster h100,h200",
    ),
]
SeqsOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--seq",
        metavar="LIST",
        show_default="1024; 1 with --phase decode",
        help="tokens in a sequence, each with a recommendation of its own, e.g. --seq 8192..131072",
    ),
]
BatchesOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="LIST|auto",
        show_default="one per GPU",
        help="sequences in the batch, over all GPUs together; auto: one per GPU, doubled while "
        "that gives more tokens/s, e.g. --batch 64,128",
    ),
]
TokensPerStepOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        show_default=False,
        help="tokens of a training step instead of --batch, e.g. --tokens-per-step 4M",
    ),
]
MaxSeqOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--max-seq",
        help="find the longest sequences that fit, from --seq on (to a sixteenth), without stages, "
        "e.g. --gpus 8..64 --max-seq",
    ),
]
TargetOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="CONDITIONS",
        show_default=False,
        help="what a plan must reach; the cheapest that does is recommended: step, TTFT, TPOT, "
        "memory, cost (each <=), tokens/s, tokens/s/GPU, MFU (>=), e.g. --target 'TTFT <= 500 ms, "
        "TPOT <= 30 ms'",
    ),
]
PriceOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CLUSTER=COST",
        show_default=False,
        help="what a GPU hour costs, e.g. --price h100=2.5; may be repeated",
    ),
]
SweepOutOption: TypeAlias = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="folder for sweep.csv, sweep.json and sweep.html, e.g. --out sweeps/8b",
    ),
]
OpenOption: TypeAlias = Annotated[
    bool, typer.Option("--open", help="open the page in a browser afterwards")
]
OtherFolderArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="OTHER", help="the folder of the plan to compare with")
]
PatternArgument: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[PATTERN]",
        show_default=False,
        help="a glob of names of modules, as in '*.q_proj'",
    ),
]
WhyNotOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYOUT",
        show_default=False,
        help="an ordinary layout to set beside the plan, e.g. --why-not tp=8; may be repeated",
    ),
]
FlipOption: TypeAlias = Annotated[
    Flip | None,
    typer.Option(
        show_default=False,
        help="find the speed of links, of links between nodes, or of GPUs from which another way "
        "wins, e.g. --flip link",
    ),
]
LinkOption: TypeAlias = Annotated[
    str,
    typer.Option(metavar="X", help="all links so many times as fast, e.g. --link 0.5x"),
]
InterNodeOption: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="X", help="links between nodes so many times as fast, e.g. --inter-node 0.25x"
    ),
]
GpuSpeedOption: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="X",
        help="FLOP/s and memory bandwidth of GPUs so many times as high, e.g. --gpu-speed 1.5x",
    ),
]
BatchFactorOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--batch", metavar="X", help="so many times as many sequences a step, e.g. --batch 2x"
    ),
]
OtherClusterOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME|FILE.toml",
        show_default=False,
        help="another cluster, with its memory, e.g. --cluster h200",
    ),
]
FolderArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIR", help="what `plan --out DIR` wrote")
]
