"""The command `plan`: reads the command line, calls `api`, prints, writes.

Results go to stdout, progress and errors to stderr.  Exit codes: 0 done, 1 no plan fits (or a
verification failed), 2 the command line or a file it names is wrong.  Nothing here imports torch
before the command line and the places to write to are known to be good.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias, Unpack

import typer

from . import __version__
from .compat.versions import untried, versions_in_use
from .facts.files import read_text
from .facts.phases import PHASES
from .folder import (
    MODULE_FILE,
    check_cluster_file,
    check_output,
    check_pages,
    check_problem_file,
    check_sweep_output,
    existing_plan,
    module_is_the_plans,
    write_folder,
    write_page,
    write_sweep,
)
from .options import (
    AsJsonOption,
    BatchesOption,
    BatchFactorOption,
    BatchOption,
    ClusterOption,
    ClustersOption,
    DumpOption,
    DumpProblemOption,
    FlipOption,
    FolderArgument,
    FullOption,
    GpuCountsOption,
    GpusOption,
    GpuSpeedOption,
    HtmlOption,
    InterNodeOption,
    LayoutFromOption,
    LayoutOption,
    LinkOption,
    MaxSeqOption,
    MemoryOption,
    MeshOption,
    ModelArgument,
    OpenOption,
    OtherClusterOption,
    OtherFolderArgument,
    OutOption,
    OutputLayout,
    OutputLayoutOption,
    PatternArgument,
    PinOption,
    Planning,
    PriceOption,
    ScheduleOption,
    SeqOption,
    SeqsOption,
    Solver,
    SolverOption,
    Stage,
    SweepOutOption,
    TargetOption,
    TokensPerStepOption,
    TraceOption,
    WhyNotOption,
    WriteOption,
    asked_of,
    takes_planning,
)
from .ranges import parse_count, parse_counts, parse_names, parse_price
from .terminal import print_everywhere, printable, say, say_report

if TYPE_CHECKING:
    from .api import Plan


_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "terminal_width": 100,  # the same text in every terminal, so that a golden file can hold it
}
_EPILOG = """\b
More commands (`plan COMMAND --help` explains each):
  plan show DIR      print a saved plan again
  plan verify DIR    run a plan's module on CPU processes and compare it with the original model
  plan rehearse DIR  run one rank alone, and compare time and memory with the plan
  plan calibrate     measure this machine, and write its cluster file
  plan explain DIR   why operators run as they do, or why the plan is not another layout
  plan what-if DIR   price a plan on another machine
  plan compare A B   which plan is faster, and where they differ
  plan solve FILE    solve a sharding problem in the IOPDDL format
  plan sweep MODEL   plan for many GPUs, clusters and sequences: which to take
  plan export DIR    print a plan in the words of another tool: Megatron's, vLLM's, ...
  plan launch DIR    print the script that starts a plan on many machines
  plan schema        print the JSON Schema of a plan.json

\b
Examples:
  plan examples/llama.py --gpus 2 --cluster cpu
  plan examples/configs/llama3-8b --gpus 64 --seq 8192 --batch 64
  plan sweep examples/configs/llama3-8b --gpus 8..64 --cluster h100,h200 --seq 8192
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


def _show_version(asked: bool) -> None:
    if asked:
        print(f"shardwright {__version__}")
        raise typer.Exit


_Version: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--version", callback=_show_version, is_eager=True, help="print the version and exit"
    ),
]


@app.command(epilog=_EPILOG)
@takes_planning
def plan(
    model: ModelArgument,
    gpus: GpusOption = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    cluster: ClusterOption = "h100",
    mesh: MeshOption = None,
    layout: LayoutOption = None,
    layout_from: LayoutFromOption = None,
    schedule: ScheduleOption = None,
    write: WriteOption = None,
    pin: PinOption = None,
    output_layout: OutputLayoutOption = OutputLayout.SHARDED,
    out: OutOption = Path("plan_out"),
    as_json: AsJsonOption = False,
    full: FullOption = False,
    dump: DumpOption = None,
    dump_problem: DumpProblemOption = None,
    html: HtmlOption = None,
    trace: TraceOption = None,
    version: _Version = False,
    **planning: Unpack[Planning],
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
        check_pages(html, trace)
        layouts = tuple(layout or ())
        _check_layouts(gpus, len(layouts) + (layout_from is not None), write)
        options: dict[str, Any] = {
            **asked_of(planning),
            "gpus": gpus,
            "batch": batch,
            "seq": seq,
            "cluster": cluster,
            "mesh": mesh,
            "schedule": schedule,
            "pins": tuple(pin or ()),
            "output_layout": output_layout.value,
        }
        with _Progress() as progress:
            progress("load PyTorch")
            if layout_from is not None:
                layouts = (*layouts, _read_layout(layout_from, options))
            batch = options.pop("batch")
            tokens = options.pop("seq") or PHASES[options["phase"]].tokens
            made = _made(model, layouts, write, batch, tokens, options, progress)
            if made is None:
                return
            progress("write the module")
            written = write_folder(made, out, dump_problem)
            written += _write_pages(made, html, trace)
        if note := untried(versions_in_use()):
            say(f"plan: {note}", file=sys.stderr)
        _report(made, out, written, as_json=as_json, full=full, dump=dump)


def _check_layouts(gpus: int | None, layouts: int, write: int | None) -> None:
    """Raises ValueError where neither GPUs nor layouts are given, or there is none to choose."""
    if gpus is None and not layouts:
        raise ValueError("how many GPUs? Give --gpus N, e.g. --gpus 8, or a --layout")
    if write is not None and layouts < 2:
        raise ValueError("--write chooses among several --layout; give at least two")


def _read_layout(given: str, options: dict[str, Any]) -> str:
    """The layout that another tool's flags say, told on stderr with what of them it is not; the
    options that they say are put in."""
    from .layout_from import layout_from

    read = layout_from(given, options["gpus"])
    options |= read.joined(options)
    lines = [f"plan: read as {read}", *(f"plan: not read: {each}" for each in read.unread)]
    say(*lines, file=sys.stderr)
    return read.layout


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


@tools.command("sweep")
@takes_planning
def sweep(
    model: ModelArgument,
    gpus: GpuCountsOption,
    cluster: ClustersOption = "h100",
    seq: SeqsOption = None,
    batch: BatchesOption = None,
    tokens_per_step: TokensPerStepOption = None,
    max_seq: MaxSeqOption = False,
    target: TargetOption = None,
    price: PriceOption = None,
    out: SweepOutOption = Path("sweep_out"),
    open_page: OpenOption = False,
    **planning: Unpack[Planning],
) -> None:
    """Plan MODEL for many GPUs, clusters, sequences and batches, and say which to take.

    The answer is a sentence, then a table of all points, best ones marked; files beside it hold the
    same as CSV, as JSON, and as a page with a plot. Exits with 1 where no point meets the target.
    """
    with _errors_as_exit_codes():
        check_sweep_output(out)
        points = {
            "gpus": parse_counts("--gpus", gpus),
            "cluster": parse_names("--cluster", cluster),
            "seq": parse_counts("--seq", seq) if seq else (),
            "batch": _batches(batch),
            "tokens_per_step": tokens_per_step
            and parse_count("--tokens-per-step", tokens_per_step),
            "max_seq": max_seq,
            "prices": dict(parse_price(text) for text in price or ()),
        }
        options: dict[str, Any] = {**asked_of(planning), **points, "target": target}
        with _Progress() as progress:
            progress("load PyTorch")
            from .page import page_of
            from .sweeping import Row
            from .sweeping import sweep as run_sweep

            def told(row: Row, done: int, of: int) -> None:
                progress(f"{row.point}", done / of)

            found = run_sweep(model, workers=os.cpu_count() or 1, told=told, **options)
        say_report(found)
        written = write_sweep(found, page_of(found), out)
        say("", "Written", *(f"  {path}" for path in written))
        if open_page:
            typer.launch(str(written[-1]))
    if not any(found.best(seq) for seq in found.asking.seqs):
        raise typer.Exit(1)


def _batches(text: str | None) -> tuple[int, ...] | str:
    if text is None or text.strip() == "auto":
        return "auto" if text else ()
    return parse_counts("--batch", text)


@tools.command("show")
def show(
    folder: FolderArgument,
    as_json: AsJsonOption = False,
    full: FullOption = False,
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
    html: HtmlOption = None,
    trace: TraceOption = None,
) -> None:
    """Print a saved plan again, e.g. `plan show plan_out`."""
    with _errors_as_exit_codes():
        path = existing_plan(folder)
        if html is not None or trace is not None:
            check_pages(html, trace)
            from .api import load_plan

            written = _write_pages(load_plan(path), html, trace)
            say(*(f"written {each}" for each in written))
            return
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


def _write_pages(made: Plan, html: Path | None, trace: Path | None) -> tuple[Path, ...]:
    """A plan as a page, and its step as a trace; the paths of what is written."""
    if html is not None:
        from .plan_page import page_of_plan

        write_page(html, page_of_plan(made))
    if trace is not None:
        from .plan_time import trace_text

        write_page(trace, trace_text(made))
    return tuple(path for path in (html, trace) if path is not None)


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


@tools.command("compare")
def compare(folder: FolderArgument, other: OtherFolderArgument, full: FullOption = False) -> None:
    """Say which of two plans is faster, and where time, bytes and memory differ."""
    with _errors_as_exit_codes():
        paths = existing_plan(folder), existing_plan(other)
        from .api import load_plan
        from .questions import compare as compared

        names = (str(folder), str(other))
        say_report(compared(load_plan(paths[0]), load_plan(paths[1]), names), full=full)


@tools.command("what-if")
def what_if(
    folder: FolderArgument,
    link: LinkOption = "1x",
    inter_node: InterNodeOption = "1x",
    gpu_speed: GpuSpeedOption = "1x",
    memory: MemoryOption = None,
    batch: BatchFactorOption = "1x",
    cluster: OtherClusterOption = None,
    full: FullOption = False,
) -> None:
    """Price a plan on another machine or batch, and say whether another plan would be better.

    The model is not captured again: `plan what-if plan_out --link 0.5x`.
    """
    with _errors_as_exit_codes():
        path = existing_plan(folder)
        with _Progress() as progress:
            from .api import load_plan
            from .questions import Change, parse_factor
            from .questions import what_if as answer

            change = Change(
                cluster,
                parse_factor("--link", link),
                parse_factor("--inter-node", inter_node),
                parse_factor("--gpu-speed", gpu_speed),
                memory,
                parse_factor("--batch", batch),
            )
            text = answer(load_plan(path), change, progress)
        say_report(text, full=full)


@tools.command("explain")
def explain(
    folder: FolderArgument,
    pattern: PatternArgument = None,
    why_not: WhyNotOption = None,
    flip: FlipOption = None,
    full: FullOption = False,
) -> None:
    """Say why a plan runs operators as it does, or why it is not another layout.

    For each operator in modules that match PATTERN: what each other way to cut it would cost, all
    else decided anew around it.
    """
    with _errors_as_exit_codes():
        path = existing_plan(folder)
        if pattern is None and not why_not:
            raise ValueError("explain what? Give a PATTERN, as in '*.q_proj', or --why-not tp=8")
        if flip is not None and pattern is None:
            raise ValueError("--flip is asked of an operator; give a PATTERN, as in '*.q_proj'")
        with _Progress() as progress:
            from .api import load_plan
            from .explaining import explain as explained
            from .questions import why_not as not_why

            plan = load_plan(path)
            texts = [not_why(plan, layout, progress) for layout in why_not or ()]
            if pattern is not None:
                words = None if flip is None else flip.value
                texts.append(explained(plan, pattern, flip=words, progress=progress))
        say_report("\n\n".join(texts), full=full)


@tools.command("verify")
def verify(
    folder: FolderArgument,
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


@tools.command("rehearse")
def rehearse(
    folder: FolderArgument,
    rank: Annotated[
        int, typer.Option(metavar="R", min=0, help="which rank of the plan to run, e.g. --rank 3")
    ] = 0,
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="steps to time, e.g. --steps 20")
    ] = 5,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            help="a Python file that may be run, e.g. --model model.py; to be given where the plan"
            " was written elsewhere, and its module takes functions from that file",
        ),
    ] = None,
) -> None:
    """Run one rank of a plan here, its peers played, e.g. `plan rehearse plan_out`.

    On this machine's GPU, or its CPU, whatever the number of GPUs the plan is for: prints time by
    layer and by kind of kernel, and memory at the peak, beside what was predicted, with a verdict
    each. Times of a CPU are judged only for a plan whose cluster file was measured on it; a model
    that is too large runs with fewer layers. Exits with 1 where a prediction does not hold.
    """
    with _errors_as_exit_codes():
        existing_plan(folder)
        with _Progress() as progress:
            progress("rehearse")
            from .api import rehearse as run_rehearsal

            rehearsal = run_rehearsal(folder, rank, steps, model=model)
        say(rehearsal)
    if not rehearsal.ok:
        raise typer.Exit(1)


@tools.command("calibrate")
def calibrate(
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="the cluster file to write, e.g. --out here.toml"),
    ],
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="one for each core",
            help="ranks to start on this machine, e.g. --ranks 4; all work at once",
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1, help="begin no round later, e.g. --time-limit 300"),
    ] = 120.0,
    spread: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0.01,
            help="refuse a machine whose rounds are farther apart, e.g. --spread 0.5",
        ),
    ] = 0.3,
) -> None:
    """Measure this machine and write its cluster file, e.g. `plan calibrate --out here.toml`.

    Products, attention, light operators and the optimizer as ranks on CPUs run them, and every
    collective between them; `plan MODEL --cluster here.toml` plans on that. Under torchrun also
    between machines: `torchrun --nnodes 2 ... --no-python plan calibrate --out here.toml`. Each
    figure says when it was measured, and its spread.
    """
    with _errors_as_exit_codes():
        check_cluster_file(out)
        with _Progress() as progress:
            progress("load PyTorch")
            from .calibrating import calibrate as measured

            text = measured(ranks, time_limit, spread, progress)
        if text is not None:
            out.write_text(text, encoding="utf-8")
            say("Written", f"  {out}", "Next", f"  plan MODEL --cluster {shlex.quote(str(out))}")


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
    solver: SolverOption = Solver.HIGHS,
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


@tools.command("launch")
def launch(
    folder: FolderArgument,
    nodes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="how many machines there are, e.g. --nodes 4; another number than planned"
            " is refused",
        ),
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="a script for sbatch, which has one task per machine")
    ] = False,
    torchrun: Annotated[
        bool, typer.Option("--torchrun", help="a script to run on each machine (the default)")
    ] = False,
    program: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            show_default=False,
            help="what every rank runs, e.g. --program 'examples/train.py DIR --resume'; else the"
            " module's demonstration",
        ),
    ] = "",
    time_limit: Annotated[
        str, typer.Option(metavar="TIME", help="e.g. --time-limit 2-00:00:00, two days")
    ] = "24:00:00",
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="how often all ranks start again after a failure, e.g. --max-restarts 10",
        ),
    ] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="write it there instead, e.g. --out launch.sh"
        ),
    ] = None,
) -> None:
    """Print the script that starts a plan on many machines, e.g. `plan launch plan_out --slurm`."""
    with _errors_as_exit_codes():
        if slurm and torchrun:
            raise ValueError("--slurm and --torchrun are two kinds of scripts; give one")
        path = existing_plan(folder)
        if out is not None and out.exists():
            raise ValueError(f"--out `{out}` is there already, and is not overwritten")
        from .api import load_plan

        words = shlex.split(program) or [str(folder / MODULE_FILE)]
        text = load_plan(path).launch_script(
            "slurm" if slurm else "torchrun", words, nodes=nodes, time_limit=time_limit,
            max_restarts=max_restarts,
        )  # fmt: skip
        if out is None:
            print(printable(text), end="")
        else:
            out.write_text(text, encoding="utf-8")


@tools.command("export")
def export(
    folder: FolderArgument,
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="dtensor: a file that cuts the original model with torch.distributed.tensor;"
            " torchtitan: TOML; megatron, vllm, sglang: flags; mlir: LLVM's dialect shard, sdy:"
            " Shardy's; json: the plan's structure; e.g. --to megatron",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="write it there instead, e.g. --out run.toml"
        ),
    ] = None,
) -> None:
    """Print a plan in the words of another tool, e.g. `plan export plan_out --to megatron`.

    Where the tool has not the plan's layout, the nearest that it has is planned and written; what
    differs is said, with its price.
    """
    with _errors_as_exit_codes():
        path = existing_plan(folder)
        if out is not None and out.exists():
            raise ValueError(f"--out `{out}` is there already, and is not overwritten")
        with _Progress() as progress:
            from .api import load_plan
            from .exporting import export as exported

            found = exported(load_plan(path), to, progress)
        if out is None:
            print(printable(found.text), end="")
        else:
            out.write_text(found.text, encoding="utf-8")
        if found.differences:
            lines = [f"plan: not as in the plan: {each}" for each in found.differences]
            say("", *lines, file=sys.stderr)


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
