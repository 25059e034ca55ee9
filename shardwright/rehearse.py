"""One rank of a plan for any number of GPUs on the one device at hand, beside what was predicted.

The other ranks are played (`runtime/mesh/peers.py`), so that buffers and products are as large as
on all of them, and nothing is waited for.  What is compared is computing and memory: communication
takes other ranks.  A model that is too large for this device is run with fewer layers, and the plan
priced for as many.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .codegen.write import module_source
from .costmodel.machines.cluster import BUILT_IN, Cluster, load_cluster
from .facts.units import format_bytes, format_seconds
from .folder import MODULE_FILE, PLAN_FILE
from .ir.graph import Graph
from .planner.errors import PlanError
from .planner.plan.passes import OUTSIDE, Kind, Passes, experts_load, passes_of
from .planner.plan.plan import Memory, PlanData
from .planner.plan.store import read_plan
from .planner.report.report import table
from .planner.search.again import Again
from .planner.strategies.prices import network_for
from .runtime.measured import ATTENTION, BACKWARD, FORWARD, LIGHT, OPTIMIZER, PRODUCTS, Measured
from .runtime.measured import measure as measured_here
from .runtime.mesh.peers import alone
from .trusted import import_source, import_users, module_in
from .written import wrote

_STEP, _LINE = 0.10, 0.25  # of the predicted time: of a whole step, of a part of it
_SMALL = 0.03  # of a step: parts of it that are not judged by themselves
_MEMORY, _CPU_BYTES, _GPU_BYTES = 0.05, 1e6, 100e6  # of the predicted peak, or so many bytes
_ROOM = 0.8  # of the memory that is free here
_STEP_S = 20.0  # of a step on a CPU, as the built-in cluster has its time
_OK, _NOT_JUDGED = "ok", "not judged"
_PEAK = "memory at the peak"


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was predicted and measured, as they are printed, and what is said of it."""

    what: str
    predicted: str
    measured: str
    verdict: str = ""

    @property
    def ok(self) -> bool:
        """Is it as predicted, as far as that is judged?"""
        return self.verdict in ("", _OK, _NOT_JUDGED)


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One phase: its sentence, and its lines."""

    sentence: str
    lines: tuple[Line, ...]
    finite: bool
    predicted_bytes: float
    measured_bytes: int

    @property
    def peak(self) -> Line:
        """The line of memory at the peak."""
        return next(line for line in self.lines if line.what == _PEAK)

    @property
    def ok(self) -> bool:
        """Is all as predicted, as far as that is judged?"""
        return self.finite and all(line.ok for line in self.lines)

    def __str__(self) -> str:
        rows = [("", "predicted", "measured", "verdict")]
        rows += [(line.what, line.predicted, line.measured, line.verdict) for line in self.lines]
        wrong = [] if self.finite else ["Numbers that came out are infinite or NaN."]
        return "\n".join([self.sentence, *wrong, table(rows)])


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What `plan rehearse` found, phase by phase."""

    phases: tuple[Rehearsed, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Is all as predicted, as far as that is judged?"""
        return all(phase.ok for phase in self.phases)

    def __str__(self) -> str:
        notes = "\n".join(["Notes", *(f"  {note}" for note in self.notes)])
        return "\n\n".join([*map(str, self.phases), notes])


def rehearse(folder: Path, rank: int = 0, steps: int = 5, model: str | None = None) -> Rehearsal:
    """Run rank `rank` of the plan in `folder` here, and hold it against the plan.

    `model` is a file that may be imported for a plan from elsewhere.
    Raises PlanError for what can't be run here.
    """
    plan = read_plan(folder)
    _check(plan, rank, steps)
    text, _ = module_in(folder, plan)
    import_users(plan, model, wrote(folder / PLAN_FILE))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, layers = _that_fits(plan, device)
    notes = list(_notes(plan, layers, device))
    with _file_of(folder, text if layers is None else module_source(small)) as path:
        found = _measured(path, small, rank, steps, device)
    judged = why_not_judged(plan.request.cluster, device)
    notes += [judged] if judged else []
    phases = tuple(
        _compared(each, run, rank, device, judged=not judged)
        for each, run in zip(small.phases, found, strict=True)
    )
    return Rehearsal(phases, tuple(notes))


def _check(plan: PlanData, rank: int, steps: int) -> None:
    if plan.pipeline is not None:
        raise PlanError(
            "a pipeline is not rehearsed yet: what its stages get comes from other ranks; rehearse "
            "a plan of its layout without pp"
        )
    if not 0 <= rank < plan.mesh.ranks:
        raise PlanError(f"--rank {rank}: the plan has ranks 0 to {plan.mesh.ranks - 1}")
    if steps < 1:
        raise PlanError(f"--steps {steps}: at least one is needed")


def _measured(
    path: Path, plan: PlanData, rank: int, steps: int, device: torch.device
) -> list[Measured]:
    """What the module in `path` takes, on as many threads as the plan's CPU ranks have."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and _on_cpu(load_cluster(plan.request.cluster)):
        torch.set_num_threads(1)
    try:
        with alone(rank, plan.mesh.ranks, load=experts_load(plan)):
            return measured_here(import_source(path).ShardedModel, steps, device)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _file_of(folder: Path, text: str) -> Generator[Path]:
    """A file with the module's text: its own, or one for the time being."""
    own = folder / MODULE_FILE
    if own.is_file() and own.read_text(encoding="utf-8") == text:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="shardwright-rehearse-") as place:
        path = Path(place) / MODULE_FILE
        path.write_text(text, encoding="utf-8")
        yield path


# --- what fits ------------------------------------------------------------------------------------


def _that_fits(plan: PlanData, device: torch.device) -> tuple[PlanData, int | None]:
    """The plan with as many layers of each kind as this device has room and time for, and how many
    those are at most; None: all."""
    room = _free_bytes(device) * _ROOM

    def fits(each: PlanData) -> bool:
        return all(
            p.memory.total < room and _seconds_here(p, device) < _STEP_S for p in each.phases
        )

    if fits(plan):
        return plan, None
    most = max((_of_a_kind(loop.order) for loop in plan.graph.loops), default=1)
    least = _with_layers(plan, 1) if most > 1 else plan
    if max(p.memory.total for p in least.phases) > room:
        raise PlanError(
            f"{plan.graph.name} takes {format_bytes(max(p.memory.total for p in least.phases))} of "
            f"a rank with one layer of each kind, and {format_bytes(room)} are free here; rehearse "
            "it on a device with more memory, or a plan for more GPUs"
        )
    low, high = 1, most  # it runs with `low` layers, and not with `high`
    found = least
    while high - low > 1:
        middle = (low + high) // 2
        tried = _with_layers(plan, middle)
        low, high, found = (middle, high, tried) if fits(tried) else (low, middle, found)
    return found, low


def _of_a_kind(order: tuple[int, ...]) -> int:
    return max(order.count(kind) for kind in set(order))


def _with_layers(plan: PlanData, most: int) -> PlanData:
    """The plan with at most so many layers of each kind in each loop, priced anew."""
    decode, graph = plan.decode, _shortened(plan.graph, most)
    shortest = min((len(loop.order) for loop in graph.loops), default=1)
    layers = plan.decisions.recomputed.in_fewer(shortest)
    small = replace(
        plan,
        graph=graph,
        decisions=replace(plan.decisions, kept_layers=layers.kept, part_layers=layers.part),
        decode=decode and replace(decode, graph=_shortened(decode.graph, most)),
    )
    return Again(small, load_cluster(plan.request.cluster, plan.request.gpus)).same()


def _shortened(graph: Graph, most: int) -> Graph:
    body = list(graph.body)
    for at, item in enumerate(body):
        if item in graph.loops:
            order: list[int] = []
            for kind in item.order:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
                order += [kind] if order.count(kind) < most else []
            body[at] = replace(item, order=tuple(order))  # pyright: ignore[reportCallIssue]
    return replace(graph, body=tuple(body))


def _seconds_here(plan: PlanData, device: torch.device) -> float:
    """A step's computing on a CPU, about; 0 on a GPU, where any is fast enough."""
    if device.type == "cuda":
        return 0.0
    cpu = load_cluster("cpu", plan.request.gpus)
    own = replace(plan, decode=None, recached=())
    return passes_of(Again(own, cpu).same(), network_for(plan.graph, plan.mesh, cpu)).seconds


def _free_bytes(device: torch.device) -> float:
    """Memory that is free here."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2


# --- what is said ---------------------------------------------------------------------------------


def _on_cpu(cluster: Cluster) -> bool:
    """Is it one of CPUs?"""
    return cluster.device.startswith("CPU")


def why_not_judged(cluster: str, device: torch.device) -> str:
    """Why times are not judged here; "" where they are."""
    planned = load_cluster(cluster)
    if device.type == "cuda":
        here = torch.cuda.get_device_name(device)
        if _models(here) & _models(planned.device):
            return ""
        return f"Times are not judged: this device is a {here}, the plan is for {planned.device}."
    if _on_cpu(planned) and cluster not in BUILT_IN:
        return ""
    measured = "`plan calibrate --out here.toml`"
    return (
        "Times are not judged: a CPU's are held against a plan whose cluster file was measured on "
        f"it, and this one is for {planned.device}; {measured}, then plan with --cluster here.toml."
    )


def _models(device: str) -> set[str]:
    """What says which GPU it is: `H100`, `4090`."""
    words = re.findall(r"\b(?:[A-Z]+\d+[A-Z]*|\d{4})\b", device)
    return {word for word in words if not word.startswith(("SXM", "HBM", "NVL"))}


def _notes(plan: PlanData, layers: int | None, device: torch.device) -> Iterator[str]:
    yield (
        f"The other {plan.mesh.ranks - 1} ranks are played: gathers repeat what this rank has, "
        "sums are its own; communication is in no time here."
    )
    if layers is not None:
        whole = " + ".join(str(len(loop.order)) for loop in plan.graph.loops)
        yield (
            f"All {whole} layers take too much of this {device.type.upper()}: {layers} of each kind"
            " were run, and predictions are those for as many."
        )
    if device.type == "cpu" and not _on_cpu(load_cluster(plan.request.cluster)):
        yield "Memory is that of tensors alive; kernels of a GPU may have other workspaces."


def _compared(
    plan: PlanData, run: Measured, rank: int, device: torch.device, *, judged: bool
) -> Rehearsed:
    cluster = load_cluster(plan.request.cluster, plan.request.gpus)
    passes = passes_of(plan, network_for(plan.graph, plan.mesh, cluster))
    computed = run.step_s - run.played_s
    lines = [
        _time("a run, without other ranks", passes.seconds, computed, _STEP, judged=judged),
        *_parts(passes, run, _classes(plan, run), judged=judged),
        *_bytes(plan.memory, run, device),
    ]
    here, said = format_seconds(computed), format_seconds(passes.seconds)
    sentence = (
        f"Rank {rank} of {plan.mesh.ranks} ({plan.mesh}) of {plan.graph.name}: "
        f"{_article(run.phase)} takes {here} here, {said} predicted of {cluster.device}, and "
        f"{format_bytes(run.peak_bytes)} at its peak, {format_bytes(plan.memory.total)} predicted."
    )
    return Rehearsed(sentence, tuple(lines), run.finite, plan.memory.total, run.peak_bytes)


def _article(phase: str) -> str:
    return "a training step" if phase == "train" else f"a run of {phase}"


def _classes(plan: PlanData, run: Measured) -> dict[Kind, str]:
    """The class of the module that runs each kind of layer."""
    return {
        (loop.path, kind): run.layers[loop.path][loop.order.index(kind)]
        for loop in plan.graph.loops
        for kind in range(len(loop.blocks))
    }


def _parts(
    passes: Passes, run: Measured, classes: Mapping[Kind, str], *, judged: bool
) -> Iterator[Line]:
    """By layer and pass, then by kind."""
    whole, some = passes.seconds, sum(run.passes.values())
    rows: list[tuple[str, float, float]] = []
    for name in dict.fromkeys(classes.values()):
        kinds = [kind for kind, of in classes.items() if of == name]
        for words, by_kind in ((FORWARD, passes.forward), (BACKWARD, passes.backward)):
            predicted = sum(by_kind.get(kind, 0.0) for kind in kinds)
            rows.append((f"  {name}, {words}", predicted, run.passes.get((name, words), 0.0)))
    outside = passes.forward[OUTSIDE] + passes.backward[OUTSIDE] + passes.casts_s
    measured = run.passes.get(("", FORWARD), 0.0) + run.passes.get(("", BACKWARD), 0.0)
    rows.append(("  outside of layers, casts of weights", outside, measured))
    rows.append(("  optimizer", passes.optimizer_s, run.passes.get(("", OPTIMIZER), 0.0)))
    rows.append((f"  {PRODUCTS}", passes.products_s, run.kinds[PRODUCTS]))
    rows.append((f"  {ATTENTION}", passes.attention_s, run.kinds[ATTENTION]))
    rows.append((f"  {LIGHT}", passes.light_s, run.kinds[LIGHT]))
    for what, predicted, measured in rows:
        if not predicted and not measured:
            continue
        small = max(predicted, measured) < _SMALL * max(whole, some)
        yield _time(what, predicted, measured, _LINE, judged=judged and not small)
    host = max(run.step_s - run.played_s - some, 0.0)
    yield Line("  the host, between kernels", "", format_seconds(host))
    yield Line("  played ranks, not counted", "", format_seconds(run.played_s))


def _bytes(memory: Memory, run: Measured, device: torch.device) -> Iterator[Line]:
    least = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    rest = run.peak_bytes - run.state_bytes - run.optimizer_bytes - run.cache_bytes
    working = memory.gradients + memory.activations + memory.transient
    yield _size(_PEAK, memory.total, run.peak_bytes, least)
    rows = [
        ("  parameters and buffers", memory.parameters, run.state_bytes),
        ("  states of the optimizer", memory.optimizer, run.optimizer_bytes),
        ("  KV caches", memory.cache, run.cache_bytes),
        ("  gradients, activations, what runs", working, rest),
    ]
    for what, predicted, measured in rows:
        if predicted or measured:
            yield _size(what, predicted, measured, least)


def _time(what: str, predicted: float, measured: float, within: float, *, judged: bool) -> Line:
    verdict = _OK
    if not judged:
        verdict = _NOT_JUDGED
    elif abs(measured - predicted) > within * predicted:
        verdict = _off(measured, predicted, "longer", "shorter")
    return Line(what, format_seconds(predicted), format_seconds(measured), verdict)


def _size(what: str, predicted: float, measured: float, least: float) -> Line:
    verdict = _OK
    if abs(measured - predicted) > max(_MEMORY * predicted, least):
        verdict = _off(measured, predicted, "more", "less")
    return Line(what, format_bytes(predicted), format_bytes(measured), verdict)


def _off(measured: float, predicted: float, over: str, under: str) -> str:
    if not predicted:
        return f"not predicted, {over} than nothing"
    share = measured / predicted - 1
    return f"{abs(share):.0%} {over if share > 0 else under} than predicted"


__all__ = ["Line", "Rehearsal", "Rehearsed", "rehearse"]
