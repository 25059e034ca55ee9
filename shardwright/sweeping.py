"""Many plans of one model: over numbers of GPUs, clusters, sequences and batches.

One capture serves all points of equal sequences and batches; two processes share the points.  What
is compared are the best plans; the ordinary ones beside them are not priced.
"""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from types import MappingProxyType
from typing import Any

from .api import plan_steps
from .asked import Asked, silent
from .capturing import Captures
from .costmodel.machines.cluster import load_cluster
from .facts.given import whole
from .facts.mesh import MOST_RANKS
from .facts.phases import TRAIN, find_phase
from .facts.units import format_bytes, format_seconds
from .figures import Figures, Point, figures_of
from .ir.capture.errors import CaptureError
from .longest import fits_memory, longest
from .planner.errors import InfeasibleError, PlanError
from .planner.report.report import table
from .planner.search.search import Job
from .targets import Target, parse_target

_ALIKE = 0.01  # relative difference of rates that is none
_GAIN = 1.02  # of the rate, for which a batch twice as large is worth it
_NEAR = 0.1  # of tokens a step, which need not be a whole number of sequences
_FEW = 4  # points that are planned sooner than another process is started
_OPTIONS: dict[str, Any] = {  # of a plan, and what they are where nobody says
    "context": None,
    "output_tokens": None,
    "expert_imbalance": None,
    "memory_bytes": None,
    "optimizer": None,
    "solver": "highs",
    "time_limit_s": 60.0,
    "outputs": (),
    "dtype": None,
    "precision": None,
    "reduce_dtype": None,
    "micro_batches": None,
    "cache": True,
}
_WORDS = (  # options of the command line that a point's plan is made with, too
    "phase", "context", "output_tokens", "expert_imbalance", "dtype", "precision", "reduce_dtype",
    "micro_batches", "memory", "optimizer", "solver", "time_limit",
)  # fmt: skip
AUTO = "auto"  # a batch that is doubled while that gains


@dataclass(frozen=True, slots=True)
class Row:
    """A point and the figures of its best plan, None where there is none, and why; or why there is
    none of longer sequences, where memory is not what lacks."""

    point: Point
    figures: Figures | None
    why: str = ""


@dataclass(frozen=True)
class Asking:
    """What a sweep is over, and what holds for all of its points.

    `batches`: numbers of sequences, none: one per GPU, or `AUTO`.  `tokens_per_step` decides the
    batch by the sequence instead.  `prices` of a GPU hour are by cluster.  `options` are the
    further ones of `plan_file`.  `max_seq`: of each point the longest sequences that fit are
    planned, from the one of `seqs` on.
    """

    model: str
    gpus: tuple[int, ...]
    clusters: tuple[str, ...]
    seqs: tuple[int, ...]
    batches: tuple[int, ...] | str
    tokens_per_step: int | None
    prices: Mapping[str, float]
    options: Mapping[str, Any]
    max_seq: bool = False

    @property
    def phase(self) -> str:
        """What all points are planned for."""
        return self.options["phase"]

    def __post_init__(self) -> None:
        if isinstance(self.batches, str) and self.batches != AUTO:
            raise PlanError(f"batch `{self.batches}`: expected numbers, or `{AUTO}`")
        if not self.gpus or not self.clusters:
            raise PlanError("a sweep needs at least one number of GPUs and one cluster")
        unknown = set(self.prices) - set(self.clusters)
        if unknown:
            raise PlanError(
                f"--price {sorted(unknown)[0]}=...: no such cluster is asked for, only "
                f"{', '.join(self.clusters)}"
            )
        if self.tokens_per_step is not None and self.batches not in ((), AUTO):
            raise PlanError("--tokens-per-step decides the batch by --seq; leave out --batch")
        for seq in self.seqs if self.tokens_per_step is not None else ():
            for gpus in self.gpus:
                self._sequences(seq, gpus)
        if self.max_seq:
            self._check_max_seq()

    def _check_max_seq(self) -> None:
        """Raises PlanError for what is not asked together with the longest sequences."""
        phase = find_phase(self.phase)
        if phase.context or phase.tokens == 1:
            raise PlanError(
                f"--max-seq is about --seq, and what grows in phase {self.phase} is --context: "
                "--phase serve has both"
            )
        if len(self.seqs) > 1:
            raise PlanError("--max-seq tries longer and longer --seq: give the shortest alone")
        if self.tokens_per_step is not None or self.batches == AUTO:
            raise PlanError(
                "--max-seq is asked of a number of sequences: give --batch N, or nothing for one "
                "per GPU"
            )

    def tasks(self) -> list[Task]:
        """The points, in groups that share what is captured of the model."""
        found: list[Task] = []
        for seq in self.seqs:
            if self.tokens_per_step is not None:
                batches = {gpus: self._sequences(seq, gpus) for gpus in self.gpus}
                for batch in dict.fromkeys(batches.values()):
                    same = tuple(gpus for gpus in self.gpus if batches[gpus] == batch)
                    found.append(Task(seq, batch, same))
            elif isinstance(self.batches, tuple) and self.batches:
                found += [Task(seq, batch, self.gpus) for batch in self.batches]
            else:
                auto = self.batches == AUTO
                found += [Task(seq, gpus, (gpus,), auto) for gpus in self.gpus]
        return found

    def _sequences(self, seq: int, gpus: int) -> int:
        """The sequences of a step of `tokens_per_step`; where these are no whole number of them, as
        many for each GPU as come nearest.  Raises PlanError where none come near."""
        tokens = self.tokens_per_step or 0
        if tokens % seq == 0:
            return tokens // seq
        found = round(tokens / seq / gpus) * gpus
        if abs(found * seq - tokens) > _NEAR * tokens:
            raise PlanError(
                f"--tokens-per-step {tokens} is no whole number of sequences of {seq} tokens, nor "
                f"near to one for each of {gpus} GPUs; take a multiple of {seq}"
            )
        return found

    def points(self) -> int:
        """How many there are."""
        return len(self.clusters) * sum(len(task.gpus) for task in self.tasks())


@dataclass(frozen=True, slots=True)
class Task:
    """Points of one sequence and batch; `auto`: of that batch or more, whatever is best."""

    seq: int
    batch: int
    gpus: tuple[int, ...]
    auto: bool = False


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep, in the order that was asked for, and what they must reach."""

    asking: Asking
    rows: tuple[Row, ...]
    target: Target | None = None

    @property
    def found(self) -> list[Figures]:
        """The figures of all points that have a plan."""
        return [row.figures for row in self.rows if row.figures is not None]

    @property
    def priced(self) -> bool:
        """Is the price of a GPU hour known everywhere?"""
        return all(each.cost_per_hour is not None for each in self.found)

    def group(self, point: Point) -> int:
        """Tokens of a sequence as they were asked for: points of one group are compared."""
        return self.asking.seqs[0] if self.asking.max_seq else point.seq

    def front(self) -> list[Figures]:
        """Those that no other of the same group beats in both ways: answers per token and GPU where
        tokens are answered one by one, else tokens a second and cost (GPUs without prices); where
        the longest sequences are asked for, their tokens and cost.
        """
        return [
            one for one in self.found if not any(self._beats(other, one) for other in self.found)
        ]

    def axes(self, one: Figures) -> tuple[float, float]:
        """The two figures by which points are compared, the less the better."""
        if self.asking.max_seq:
            return self._expense(one)[0], -float(one.point.seq)
        if one.tpot_s is not None:
            return one.tpot_s, -one.tokens_per_s_per_gpu
        return self._expense(one)

    def _beats(self, other: Figures, one: Figures) -> bool:
        if self.group(other.point) != self.group(one.point):
            return False
        a, b = self.axes(other), self.axes(one)
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    def best(self, seq: int) -> Figures | None:
        """The one to take of a group, None where none meets the target.

        Without a target it is that of most tokens per money, per GPU without prices; with one the
        cheapest that meets it, of fewest GPUs without prices.  Of the longest sequences it is the
        longest, or the cheapest of these.
        """
        rows = [one for one in self.found if self.group(one.point) == seq]
        if self.asking.max_seq:
            return min(rows, key=lambda one: (-one.point.seq, self._expense(one)), default=None)
        if self.target is not None:
            rows = [one for one in rows if self.target.holds(one)]
            return min(rows, key=self._expense, default=None)
        if not rows:
            return None
        most = max(map(self._yield, rows))
        near = [one for one in rows if self._yield(one) >= most * (1 - _ALIKE)]
        return min(near, key=self._expense)

    def _expense(self, one: Figures) -> tuple[float, float]:
        spent = one.cost_per_hour if self.priced else one.point.gpus
        return spent or 0.0, -one.tokens_per_s

    def _yield(self, one: Figures) -> float:
        cost = one.cost_per_million
        return 1 / cost if self.priced and cost else one.tokens_per_s_per_gpu

    def command(self, one: Figures) -> str:
        """The command that writes the plan of a point."""
        point, options = one.point, self.asking.options
        words = ["plan", self.asking.model, "--gpus", point.gpus, "--cluster", point.cluster]
        words += ["--batch", point.batch, "--seq", point.seq]
        phase = find_phase(self.asking.phase)
        usual = {"phase": TRAIN.name, "optimizer": phase.optimizer, "solver": _OPTIONS["solver"]}
        usual["time_limit"] = _OPTIONS["time_limit_s"]
        given = {**options, "memory": options["memory_bytes"]}
        given["time_limit"] = options["time_limit_s"]
        for name in _WORDS:
            if given[name] is not None and given[name] != usual.get(name):
                words += [f"--{name.replace('_', '-')}", given[name]]
        for name in options["outputs"]:
            words += ["--outputs", name]
        return shlex.join(map(str, words))

    # -- in words ---------------------------------------------------------------------------------

    def __str__(self) -> str:
        parts = [self.answer(), self._table(), *self._whys()]
        bests = [best for seq in self.asking.seqs if (best := self.best(seq)) is not None]
        if bests:
            parts.append("\n".join(["Next", *(f"  {self.command(best)}" for best in bests)]))
        return "\n\n".join(parts)

    def answer(self) -> str:
        """One sentence for each length of sequences, and how many points there are."""
        lines = [self._sentence(seq) for seq in self.asking.seqs]
        lines.append(f"{len(self.found)} of {len(self.rows)} points have a plan that fits.")
        if not self.priced and len(self.asking.clusters) > 1:
            lines.append(
                "GPUs of all clusters count alike; --price NAME=COST (of a GPU hour) weighs them."
            )
        return "\n".join(lines)

    def _sentence(self, seq: int) -> str:
        rows = [one for one in self.found if self.group(one.point) == seq]
        if not rows:
            return f"Sequences of {seq} tokens: no point fits."
        best = self.best(seq)
        if best is None and self.target is not None:
            return f"Sequences of {seq} tokens: {self.target.missed(rows)}"
        assert best is not None
        if self.asking.max_seq:
            why = "none longer fit any point" if len(self.rows) > 1 else "none longer fit"
        elif self.target is not None:
            what = "the cheapest" if self.priced else "the fewest GPUs"
            why = f"{what} for {self.target}"
        else:
            why = f"most tokens per {'money' if self.priced else 'GPU'}"
        times = ", ".join(f"{name} {format_seconds(s)}" for name, s in times_of(best))
        longest = "The longest sequences, " if self.asking.max_seq else "Sequences of "
        return (
            f"{longest}{best.point.seq} tokens: {best.point.gpus} x {best.point.cluster}, batch "
            f"{best.point.batch}, {best.layout}: {times}, {best.tokens_per_s:,.0f} tokens/s "
            f"({best.tokens_per_s_per_gpu:,.0f} per GPU): {why}."
        )

    def cells(self) -> list[tuple[str, ...]]:
        """The table: its head, and a line for each row, all of one length."""
        front = self.front()
        bests = [self.best(seq) for seq in self.asking.seqs]
        training = find_phase(self.asking.phase).backward
        head = ["", "GPUs", "cluster", "batch", "tokens", "layout"]
        head += [name for name, _ in times_of(self.found[0])] if self.found else []
        head += ["tokens/s", "per GPU", "MFU", "exposed", "memory"]
        head += ["per million"] if self.priced and self.found else []
        lines = [head]
        for row in self.rows:
            one, point = row.figures, row.point
            mark = "" if one is None else "=>" if one in bests else "*" if one in front else ""
            batch = str(point.batch)
            if one is not None and one.micro_batches > 1:
                batch += f" in {one.micro_batches}"
            cells = [mark, str(point.gpus), point.cluster, batch, str(point.seq)]
            cells += ["none"] if one is None else _cells(one, training, self.priced)
            lines.append([*cells, *[""] * (len(head) - len(cells))])
        return [tuple(line) for line in lines]

    def _table(self) -> str:
        return f"{table(self.cells())}\n=> to take, * no other is better both ways ({self._ways()})"

    def _ways(self) -> str:
        if self.asking.max_seq:
            return f"tokens of a sequence and {'cost' if self.priced else 'GPUs'}"
        if any(one.tpot_s is not None for one in self.found):
            return "TPOT and tokens/s per GPU"
        return f"tokens/s and {'cost' if self.priced else 'GPUs'}, among equal sequences"

    def _whys(self) -> Iterator[str]:
        """Why points have no plan, or no longer sequences; each reason once."""
        whys = dict.fromkeys(row.why for row in self.rows if row.figures is None)
        if whys:
            yield "\n".join(["No plan", *(f"  {why}" for why in whys)])
        limits = dict.fromkeys(row.why for row in self.rows if row.figures is not None and row.why)
        if limits:
            yield "\n".join(["No longer sequences", *(f"  {why}" for why in limits)])

    # -- as data ----------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """One flat record per point, in SI units; None where a figure does not exist."""
        return [self._record(row) for row in self.rows]

    def _record(self, row: Row) -> dict[str, Any]:
        point, one = row.point, row.figures
        names = ("step_s", "ttft_s", "tpot_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu")
        names += ("exposed", "memory_bytes", "micro_batches", "recompute", "cost_per_hour")
        names += ("cost_per_million",)
        return {
            "gpus": point.gpus,
            "cluster": point.cluster,
            "batch": point.batch,
            "seq": point.seq,
            "layout": None if one is None else one.layout,
            **{name: None if one is None else getattr(one, name) for name in names},
            "front": one is not None and one in self.front(),
            "best": one is not None and one == self.best(self.group(point)),
            "why": row.why,
        }

    def to_json(self) -> dict[str, Any]:
        """What was asked for and the records, as plain JSON data."""
        asking = self.asking
        return {
            "schema": "shardwright.sweep/1",
            "model": asking.model,
            "phase": asking.phase,
            "target": None if self.target is None else str(self.target),
            "answer": self.answer().splitlines(),
            "points": self.records(),
        }

    def to_csv(self) -> str:
        """The records as a table with a head."""
        text = io.StringIO()
        records = self.records()
        writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()

    def to_pandas(self) -> Any:
        """The records as a DataFrame.  Raises ImportError where pandas is not installed."""
        import pandas  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]

        return pandas.DataFrame(self.records())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def times_of(one: Figures) -> list[tuple[str, float]]:
    """What a step or an answer takes, by name: seconds."""
    times = [("step", one.step_s), ("TTFT", one.ttft_s), ("TPOT", one.tpot_s)]
    known = [(name, s) for name, s in times if s is not None]
    return known or [("pass", one.point.batch * one.point.seq / one.tokens_per_s)]


def _cells(one: Figures, training: bool, priced: bool) -> list[str]:
    layout = one.layout + (", recomputed" if training and one.recompute else "")
    cells = [layout, *(format_seconds(s) for _, s in times_of(one))]
    cells += [f"{one.tokens_per_s:,.0f}", f"{one.tokens_per_s_per_gpu:,.0f}", f"{one.mfu:.0%}"]
    cells += ["" if one.exposed is None else f"{one.exposed:.0%}", format_bytes(one.memory_bytes)]
    cost = one.cost_per_million
    return [*cells, f"{cost:.3g}"] if priced and cost is not None else cells


# -- planning -------------------------------------------------------------------------------------

Told = Callable[[Row, int, int], None]
"""Called for each row as it is found, with how many there are by then, and of how many."""


def _nobody(row: Row, done: int, of: int) -> None:
    """Nobody is told."""


def sweep(
    model: str,
    *,
    gpus: Sequence[int],
    cluster: Sequence[str] = ("h100",),
    seq: Sequence[int] = (),
    batch: Sequence[int] | str = (),
    phase: str = TRAIN.name,
    tokens_per_step: int | None = None,
    target: str | None = None,
    max_seq: bool = False,
    prices: Mapping[str, float] = MappingProxyType({}),
    workers: int = 1,
    told: Told = _nobody,
    **options: Any,
) -> Sweep:
    """Plan a model, named as on the command line, at every point of these lists.

    `batch`: sequences over all GPUs, by default one per GPU; `"auto"`: one per GPU, doubled while
    that gives more tokens/s; or `tokens_per_step` of training say it, as near as whole sequences
    for each GPU come to them.  `max_seq`: of each point the
    longest sequences that fit without stages are planned, from `seq` on.  `target` is such as
    `"TTFT <= 500 ms, TPOT <= 30 ms"`, `prices` those of a GPU hour by cluster, `options` further
    ones of `shardwright.plan`.  `workers` processes share the points where there are more than a
    few; in a script of your own that needs `if __name__ == "__main__"`.  `told` is called with each
    row as it is found.

    Raises PlanError, or CaptureError, for what no point can be planned for.
    """
    goal = None if target is None else parse_target(target)
    given = {**_OPTIONS, **options, "phase": phase}
    if unknown := set(given) - set(_OPTIONS) - {"phase"}:
        raise TypeError(f"sweep has no option `{sorted(unknown)[0]}`; it has {', '.join(_OPTIONS)}")
    asking = Asking(
        model,
        tuple(whole("gpus", n, 1, MOST_RANKS) for n in gpus),
        tuple(cluster),
        tuple(seq) or (find_phase(phase).tokens,),
        batch if isinstance(batch, str) else tuple(batch),
        tokens_per_step,
        prices,
        given,
        max_seq,
    )
    if max_seq and target is not None:
        raise PlanError("--max-seq asks what fits, and no plan is tried for --target; give one")
    machines = [load_cluster(name, max(asking.gpus)) for name in asking.clusters]
    if goal is not None:
        known = (
            asking.prices.get(name) or machine.price_per_gpu_hour
            for name, machine in zip(asking.clusters, machines, strict=True)
        )
        goal.check(find_phase(phase), priced=all(known))
    rows = _found(asking, workers, told)
    whys = {row.why for row in rows}
    if all(row.figures is None for row in rows) and len(whys) == 1:
        raise PlanError(f"no point has a plan: {whys.pop()}")
    return Sweep(asking, rows, goal)


def _found(asking: Asking, workers: int, told: Told) -> tuple[Row, ...]:
    """The rows in the order that was asked for; `told` has each as it comes."""
    tasks, points = asking.tasks(), asking.points()
    several = workers > 1 and points > _FEW and len(tasks) > 1
    found: dict[Task, list[Row]] = {}
    done = 0
    for task, rows in _in_processes(asking, tasks, workers) if several else _here(asking, tasks):
        found.setdefault(task, []).extend(rows)
        for row in rows:
            done += 1
            told(row, done, points)
    return tuple(row for task in tasks for row in found[task])


def _here(asking: Asking, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Row]]]:
    for task in tasks:
        yield from ((task, [row]) for row in _rows(asking, task))


def _in_processes(
    asking: Asking, tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, list[Row]]]:
    """In new processes, which import nothing from the current folder by chance."""
    with (
        _safe_path(),
        ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn")) as pool,
    ):
        running = {pool.submit(_all_rows, asking, task): task for task in tasks}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _safe_path() -> Generator[None]:
    name = "PYTHONSAFEPATH"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _all_rows(asking: Asking, task: Task) -> list[Row]:
    return list(_rows(asking, task))


def _rows(asking: Asking, task: Task) -> Iterator[Row]:
    """The rows of a task, one for each number of GPUs and cluster."""
    known: dict[tuple[int, str], Captures] = {}
    for gpus in task.gpus:
        for cluster in asking.clusters:
            point = Point(gpus, cluster, task.seq, task.batch)
            if asking.max_seq:
                yield _longest_row(asking, point)
                continue
            row = _row(asking, point, known)
            while task.auto and row.figures is not None:
                point = replace(point, batch=2 * point.batch)
                more = _row(asking, point, known)
                if more.figures is None or not _gains(more.figures, row.figures):
                    break
                row = more
            yield row


def _gains(more: Figures, now: Figures) -> bool:
    """Is the larger batch worth it?  One that needs micro-batches has the rate of the smaller."""
    return more.tokens_per_s > _GAIN * now.tokens_per_s and more.micro_batches == 1


def _longest_row(asking: Asking, point: Point) -> Row:
    """The row of the longest sequences of a point; that of the point itself where they do not fit,
    which says why."""
    several = asking.options.get("micro_batches") is None

    def fits(seq: int) -> bool:
        job, captures = _job(asking, replace(point, seq=seq))
        return fits_memory(captures, job, several=several)

    try:
        found = longest(fits, point.seq)
    except (PlanError, CaptureError) as error:
        return Row(point, None, f"{point}: {str(error).splitlines()[0]}")
    row = _row(asking, replace(point, seq=found.seq or point.seq), {})
    return row if row.figures is None else replace(row, why=found.why)


def _job(asking: Asking, point: Point) -> tuple[Job, Captures]:
    """What is planned at a point, and of what.  Raises PlanError."""
    options = asking.options
    asked = Asked(
        **options, gpus=point.gpus, cluster=point.cluster, mesh=None, pins=(), progress=silent
    )
    job = replace(asked.job(asking.model, point.batch, point.seq), baselines=False)
    return job, Captures.of_target(job, options["outputs"], kept=asked.cache)


def _row(asking: Asking, point: Point, known: dict[tuple[int, str], Captures]) -> Row:
    """The row of a point; what is captured for it is `known` afterwards, by batch and formats."""
    try:
        job, captures = _job(asking, point)
        captures = known.setdefault((point.batch, job.request.formats), captures)
        plan = plan_steps(captures, job, several=asking.options.get("micro_batches") is None)
    except InfeasibleError as error:
        return Row(point, None, f"{point}: {str(error).splitlines()[0]}")
    except PlanError as error:
        return Row(point, None, str(error))
    price = asking.prices.get(point.cluster, job.cluster.price_per_gpu_hour)
    return Row(point, figures_of(point, plan, job.cluster.peak, price))


__all__ = ["AUTO", "Asking", "Row", "Sweep", "sweep", "times_of"]
