"""The command `plan`: reads the command line, calls `api`, prints, writes.

Results go to stdout, progress and errors to stderr.  Exit codes: 0 done, 1 no plan fits (or a
verification failed), 2 the command line or a file it names is wrong.  Nothing here imports torch
before the command line and the places to write to are known to be good.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias

import typer

from . import __version__
from .compat.versions import untried, versions_in_use
from .costmodel.machines.cluster import BUILT_IN
from .facts.files import read_text
from .facts.phases import PHASES, TRAIN
from .folder import (
    MODULE_FILE,
    PLAN_FILE,
    check_output,
    check_problem_file,
    existing_plan,
    module_is_the_plans,
    write_folder,
)
from .terminal import print_everywhere, printable, say, say_report

if TYPE_CHECKING:
    from .api import Plan


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


class Solver(StrEnum):
    """The back end that picks the strategies."""

    HIGHS = "highs"
    CP_SAT = "cp-sat"
    PYOMO = "pyomo"


_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "terminal_width": 100,  # the same text in every terminal, so that a golden file can hold it
}
_EPILOG = """\b
More commands (`plan COMMAND --help` explains each):
  plan show DIR      print a saved plan again
  plan verify DIR    run a plan's module on CPU processes and compare it with the original model
  plan solve FILE    solve a sharding problem in the IOPDDL format
  plan schema        print the JSON Schema of a plan.json

\b
Examples:
  plan examples/llama.py --gpus 2 --cluster cpu
  plan examples/configs/llama3-8b --gpus 64 --seq 8192 --batch 64
  plan examples/configs/llama3-8b --layout fsdp=64 --layout ddp=8,tp=8,sp --seq 8192
  plan model.py:build_large --gpus 8 --memory 40GB --pin '*.q_proj.weight=R,S0' --mesh dp=4,tp=2

Exit codes: 0 a plan was found, 1 no plan fits, 2 something is wrong with the command line or with
a file that it names."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_SETTINGS)
tools = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_SETTINGS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `plan ARGUMENTS` (default: this process's own) and exit.

    The first argument is a model or the name of a further command; `./show` plans a model that is
    called `show`.
    """
    if arguments is None:
        _run_process(sys.argv[1:])
    further = arguments and arguments[0] in {info.name for info in tools.registered_commands}
    typer.main.get_command(tools if further else app).main(list(arguments), prog_name="plan")


def _run_process(arguments: Sequence[str]) -> NoReturn:
    """Run the command line as this process: it cleans up when it is told to end, and does end."""
    for name in ("SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, _end)
    print_everywhere()
    try:
        main(arguments)
    except _Ended as told:
        raise SystemExit(told.code) from None
    except SystemExit as stop:
        others = [t for t in threading.enumerate() if t is not threading.main_thread()]
        if any(not thread.daemon for thread in others):  # a thread of the user's model file
            sys.stdout.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 0)
        raise
    raise SystemExit(0)


class _Ended(BaseException):
    """The system told this process to end: nobody's mistake, so nobody may catch it but we."""

    def __init__(self, code: int) -> None:
        self.code = code


def _end(number: int, _: object) -> NoReturn:
    raise _Ended(128 + number)


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


def _show_version(asked: bool) -> None:
    if asked:
        print(f"shardwright {__version__}")
        raise typer.Exit


# What options are, and say of themselves in the help.

_Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="a Python file that defines build_model() and example_inputs(batch, seq), "
        "`model.py:function` for another builder; or a Hugging Face config.json, or a folder "
        "with one",
    ),
]
_Gpus: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="by the layout",
        help="GPUs to use in all, e.g. --gpus 8",
    ),
]
_Phase: TypeAlias = Annotated[
    str,
    typer.Option(
        parser=_known_phase,
        metavar=f"<{'|'.join(PHASES)}>",
        help="what to plan for, e.g. --phase prefill",
    ),
]
_Batch: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="one per GPU",
        help="sequences in the batch, over all GPUs together, e.g. --batch 64",
    ),
]
_Seq: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="1024; 1 with --phase decode",
        help="tokens in a sequence, or new ones in inference, e.g. --seq 8192",
    ),
]
_Context: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        show_default="8192 with --phase decode or append",
        help="cached tokens before the new ones, e.g. --context 32768",
    ),
]
_OutputTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="256",
        help="tokens of an answer, with --phase serve, e.g. --output-tokens 1024",
    ),
]
_ExpertImbalance: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        show_default="that of a power-law router",
        help="load of the GPU with the busiest experts over the mean load, e.g. "
        "--expert-imbalance 1.5",
    ),
]
_Dtype: TypeAlias = Annotated[
    Dtype | None,
    typer.Option(
        show_default="own",
        help="number format in which parameters and buffers are stored, complex ones apart; own: "
        "as the model has them, each in its own, e.g. --dtype bfloat16",
    ),
]
_Precision: TypeAlias = Annotated[
    Precision | None,
    typer.Option(
        show_default="mixed for training on GPUs, unless --dtype is given; else own",
        help="what products run in; mixed: bfloat16, with trained parameters, their gradients and "
        "optimizer states in float32; own: what parameters are stored in, e.g. --precision own",
    ),
]
_ReduceDtype: TypeAlias = Annotated[
    ReduceDtype | None,
    typer.Option(
        show_default="float32 with mixed precision, else that of parameters",
        help="number format in which ranks add up gradients, e.g. --reduce-dtype bfloat16",
    ),
]
_MicroBatches: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default="1, or as few as fit",
        help="parts of the batch that a step computes one after another, adding up gradients, e.g. "
        "--micro-batches 4",
    ),
]
_Cluster: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE.toml",
        help=f"the machines: {', '.join(BUILT_IN)} (`cpu`: processes on this machine), or a file "
        "that describes yours, e.g. --cluster a100",
    ),
]
_Memory: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        parser=parse_bytes,
        show_default="the cluster's",
        help="memory that a plan may fill on each GPU, e.g. --memory 64GB (or 64GiB, 64e9)",
    ),
]
_Mesh: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        show_default="searched",
        help="the grid of GPUs, slowest links first, e.g. --mesh 2x4 or --mesh dp=2,tp=4",
    ),
]
_Layout: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORDS",
        show_default=False,
        help="an ordinary plan instead of the best one: ddp (or dp), fsdp, tp, cp, ulysses and ep, "
        "each with a number of GPUs, outermost first; sp: the GPUs of tp share the sequence "
        "between the blocks; recompute=none or full; e.g. --layout fsdp=32 or --layout "
        "ddp=4,tp=8,sp. Repeated: a table of all, beside the best plan",
    ),
]
_Write: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        show_default=False,
        help="with several layouts, the row of the table to write the module of, e.g. --write 1",
    ),
]
_Pin: TypeAlias = Annotated[
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
_Outputs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        show_default="all",
        help="what training returns, e.g. --outputs loss, without logits, which are then never "
        "there as a whole; may be repeated",
    ),
]
_OutputLayout: TypeAlias = Annotated[
    OutputLayout,
    typer.Option(
        help="whether each rank returns its part of what training returns, or all of it, e.g. "
        "--output-layout replicated for a loss outside of the module",
    ),
]
_Optimizer: TypeAlias = Annotated[
    Optimizer | None,
    typer.Option(
        show_default="adamw; none in inference",
        help="the optimizer whose states take memory, e.g. --optimizer sgd",
    ),
]
_Solver: TypeAlias = Annotated[
    Solver, typer.Option(help="the back end that searches, e.g. --solver cp-sat")
]
_TimeLimit: TypeAlias = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0.1,
        help="stop the search then, with the best plan so far, e.g. --time-limit 10",
    ),
]
_Out: TypeAlias = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help=f"folder for {PLAN_FILE} and {MODULE_FILE}; an earlier plan in it is replaced, "
        "anything else refused, e.g. --out plans/8b",
    ),
]
_AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="print the plan as JSON instead of the report")
]
_Full: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--full",
        help="print each row of a table on one line, however long, e.g. `--full | less -S`",
    ),
]
_DumpProblem: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="also write the problem that was solved, in the IOPDDL format, e.g. "
        "--dump-problem problem.json.gz",
    ),
]
_Dump: TypeAlias = Annotated[
    Stage | None,
    typer.Option(
        show_default=False,
        help="print what planning went through on the plan's mesh instead of the report: the ways "
        "to run each part, the integer program, or the choices taken, e.g. --dump strategies",
    ),
]
_Version: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="print the version and exit"
    ),
]
_Folder: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIR", help="what `plan --out DIR` wrote")
]


@app.command(epilog=_EPILOG)
def plan(
    model: _Model,
    gpus: _Gpus = None,
    phase: _Phase = TRAIN.name,
    batch: _Batch = None,
    seq: _Seq = None,
    context: _Context = None,
    output_tokens: _OutputTokens = None,
    expert_imbalance: _ExpertImbalance = None,
    dtype: _Dtype = None,
    precision: _Precision = None,
    reduce_dtype: _ReduceDtype = None,
    micro_batches: _MicroBatches = None,
    cluster: _Cluster = "h100",
    memory: _Memory = None,
    mesh: _Mesh = None,
    layout: _Layout = None,
    write: _Write = None,
    pin: _Pin = None,
    optimizer: _Optimizer = None,
    outputs: _Outputs = None,
    output_layout: _OutputLayout = OutputLayout.SHARDED,
    solver: _Solver = Solver.HIGHS,
    time_limit: _TimeLimit = 60.0,
    out: _Out = Path("plan_out"),
    as_json: _AsJson = False,
    full: _Full = False,
    dump: _Dump = None,
    dump_problem: _DumpProblem = None,
    version: _Version = False,
) -> None:
    """Plan how to cut MODEL over N GPUs, and write the PyTorch module that runs it so.

    No GPU is needed and no weights are allocated: the model is traced with its shapes only. The
    plan is the fastest under the cost model that fits into memory, and the report says why.
    """
    with _errors_as_exit_codes():
        check_output(out)
        if dump is not None and as_json:
            raise ValueError("--dump and --json both print to stdout; give one of them")
        if dump_problem is not None:
            check_problem_file(dump_problem)
        layouts = tuple(layout or ())
        if gpus is None and not layouts:
            raise ValueError("how many GPUs? Give --gpus N, e.g. --gpus 8, or a --layout")
        if write is not None and len(layouts) < 2:
            raise ValueError("--write chooses among several --layout; give at least two")
        options = {
            "gpus": gpus,
            "cluster": cluster,
            "phase": phase,
            "context": context,
            "output_tokens": output_tokens,
            "expert_imbalance": expert_imbalance,
            "memory_bytes": memory,
            "mesh": mesh,
            "pins": tuple(pin or ()),
            "optimizer": optimizer.value if optimizer else PHASES[phase].optimizer,
            "solver": solver.value,
            "time_limit_s": time_limit,
            "outputs": tuple(outputs or ()),
            "output_layout": output_layout.value,
            "dtype": dtype and dtype.value,
            "precision": precision and precision.value,
            "reduce_dtype": reduce_dtype and reduce_dtype.value,
            "micro_batches": micro_batches,
        }
        with _Progress() as progress:
            progress("load PyTorch")
            tokens = seq or PHASES[phase].tokens
            made = _made(model, layouts, write, batch, tokens, options, progress)
            if made is None:
                return
            progress("write the module")
            written = write_folder(made, out, dump_problem)
        if note := untried(versions_in_use()):
            say(f"plan: {note}", file=sys.stderr)
        _report(made, out, written, as_json=as_json, full=full, dump=dump)


def _made(
    model: str,
    layouts: tuple[str, ...],
    write: int | None,
    batch: int | None,
    seq: int,
    options: dict[str, Any],
    progress: _Progress,
) -> Plan | None:
    """The plan to write; with several layouts their table is printed, and there may be none."""
    if len(layouts) > 1:
        from .compared import compare_file

        compared = compare_file(
            model, layouts, batch=batch, seq=seq, options=options, progress=progress
        )
        say(compared)
        return None if write is None else compared.plan(write)
    from .api import plan_file

    layout = layouts[0] if layouts else None
    return plan_file(model, batch=batch, seq=seq, layout=layout, progress=progress, **options)


@tools.command("show")
def show(
    folder: _Folder,
    as_json: _AsJson = False,
    full: _Full = False,
    module: Annotated[
        bool, typer.Option("--module", help="print the generated module instead of the report")
    ] = False,
    ops: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            show_default=False,
            help="print all ways to run the operators of these modules instead, e.g. --ops "
            "'*.q_proj'; --pin takes them",
        ),
    ] = None,
) -> None:
    """Print a saved plan again, e.g. `plan show plan_out`."""
    with _errors_as_exit_codes():
        path = existing_plan(folder)
        if module:
            _print_module(folder / MODULE_FILE)
            return
        from .api import load_plan

        saved = load_plan(path)
        if ops is not None:
            say(saved.strategies_of(ops))
        elif as_json:
            say(json.dumps(saved.to_json(), indent=2))
        else:
            say_report(saved, full=full)
        if not module_is_the_plans(folder) and (folder / MODULE_FILE).exists():
            say(f"plan: {folder / MODULE_FILE} is not as it was written", file=sys.stderr)


def _print_module(path: Path) -> None:
    """The text of a generated module, highlighted in a terminal, plain in a pipe or a file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `plan MODEL --out {path.parent}` writes it")
    text = read_text(path)
    if not sys.stdout.isatty():
        print(printable(text), end="")
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(printable(text), "python", word_wrap=True))


@tools.command("verify")
def verify(
    folder: _Folder,
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="as few as keep the plan's structure",
            help="processes to start on this machine, e.g. --ranks 4",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default="what the plan names",
            help="the original to compare with, as in `plan MODEL`; to be given where the plan "
            "was written elsewhere and names a Python file, which is not run unasked",
        ),
    ] = None,
) -> None:
    """Run a plan's module beside the original model and compare, e.g. `plan verify plan_out`.

    Starts gloo processes on this machine's CPUs, gives both models the same random weights and
    inputs (sizes shrunk along dims where that keeps the plan's structure), and prints the largest
    error of outputs, loss and gradients; of a model with a KV cache the logits after each of a few
    steps. Exits with 1 where it exceeds the tolerance.
    """
    with _errors_as_exit_codes():
        existing_plan(folder)
        with _Progress() as progress:
            progress("run both models")
            from .api import verify as run_verification

            verification = run_verification(folder, ranks, model=model)
        say(verification)
    if not verification.ok:
        raise typer.Exit(1)


@tools.command("solve")
def solve(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="a problem: IOPDDL as .json or .json.gz")
    ],
    time_limit: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            help="stop the search then, with the best assignment so far, e.g. --time-limit 30",
        ),
    ] = 300.0,
    solver: _Solver = Solver.HIGHS,
) -> None:
    """Solve a sharding problem: cost, bound, status, assignment, e.g. `plan solve problem.json`."""
    with _errors_as_exit_codes():
        if not file.is_file():
            raise ValueError(f"there is no file `{file}`")
        with _Progress() as progress:
            progress("solve")
            from .planner.iopddl import solve_file

            solution = solve_file(file, time_limit, solver.value)
        say(solution)


@tools.command("schema")
def schema() -> None:
    """Print the JSON Schema of plan.json, e.g. `plan schema > plan.schema.json`."""
    from .planner.plan.schema import json_schema

    say(json.dumps(json_schema(), indent=1))


@contextmanager
def _errors_as_exit_codes() -> Generator[None, None, None]:
    """Print what users can act on as one sentence; any other exception is ours: a traceback."""
    from .planner.errors import InfeasibleError

    try:
        yield
    except BrokenPipeError:  # the reader of stdout left, as `head` does: not a user's mistake
        raise
    except InfeasibleError as error:
        say(f"plan: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        say(f"plan: error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _report(
    made: Plan,
    out: Path,
    written: tuple[Path, ...],
    *,
    as_json: bool,
    full: bool,
    dump: Stage | None,
) -> None:
    """The report, the files and the next commands; JSON or a dump have stdout for themselves."""
    if dump is not None:
        say(made.dump(dump.value))
    elif as_json:
        say(json.dumps(made.to_json(), indent=2))
    else:
        say_report(made, full=full)
    notes = [
        "Written",
        *(f"  {path}" for path in written),
        "Next",
        f"  {made.launch_command(str(out / MODULE_FILE))}",
        f"  plan verify {shlex.quote(str(out))}",
    ]
    say("", *notes, file=sys.stderr if as_json or dump else sys.stdout)


class _Progress:
    """What is being done, on stderr: a bar for what takes longer than a second.

    Called with the name of each step as it begins, and then, where the step knows, with the
    fraction of it that is done: `progress("solve"); progress("solve", 0.5)`.  Where stderr is not a
    terminal, each step is one plain line.
    """

    _QUIET_S = 1.0

    def __enter__(self) -> _Progress:
        from threading import Timer

        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._step: str | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._timer = Timer(self._QUIET_S, self._bar.start)
        self._timer.daemon = True
        if self._console.is_terminal:
            self._timer.start()
        return self

    def __call__(self, step: str, done: float | None = None) -> None:
        if step != self._step and not self._console.is_terminal:
            say(f"plan: {step}", file=sys.stderr)
        if step != self._step:
            self._step = step
            self._bar.reset(self._task, description=step, total=None)
        if done is not None:
            self._bar.update(self._task, total=1.0, completed=done)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()
        if self._bar.live.is_started:
            self._bar.stop()


if __name__ == "__main__":
    main()
