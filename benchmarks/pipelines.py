"""One step of a pipelined module beside torch's own `Schedule1F1B`, and its bubbles beside those
that the schedule has when it is played through.

    python -m benchmarks.pipelines [--ranks 2 4] [--micro-batches 8] [--rounds 9]

Both sides have the same model, cut between the same layers, with the same weights and rows, on gloo
ranks of one thread each, in float32, by 1F1B; by hand the stages are plain modules in
`PipelineStage`s.  They are in the same processes and take turns, as in `benchmarks.running`.

Bubbles: our step is run with stages that sleep besides, 0.1 s in a forward and 0.2 s in a backward,
so that it makes little difference how many cores there are.  Measured is the part of the time, from
the first action to the end of the last, in which ranks run none; predicted what
`costmodel.timeline` says of the same schedule with the seconds that the actions took.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import shardwright
from examples.llama import Llama, LlamaConfig, rotary_angles
from shardwright.costmodel.timeline import StageTimes, played
from shardwright.facts.schedules import schedule
from shardwright.runtime import RankPool
from shardwright.runtime.pipeline.stages import RunningStage

CONFIG = LlamaConfig(vocab_size=4096, layers=8, width=256, heads=8, kv_heads=4, mlp_width=704)
ROWS, SEQ = 2, 128  # of a micro-batch
SLEEPS = {"F": 0.1, "B": 0.2}  # seconds


@dataclass(frozen=True, slots=True)
class Case:
    """What both sides run: our module, and the layers of each stage."""

    source: str
    layers: tuple[int, ...]
    micro_batches: int


def main() -> None:
    """Print one row per number of ranks."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    columns = "{:>5}" + " | {:>9} {:>9} {:>6}" * 2 + " | {:>9} {:>9} | {:>9}"
    print(columns.format("", "time", "", "", "cpu time", "", "", "bubble", "", ""))
    names = ("ours", "torch", "ratio") * 2
    print(columns.format("ranks", *names, "predicted", "measured", "loss diff"))
    for ranks in args.ranks:
        case = planned(ranks, args.micro_batches)
        with RankPool(ranks) as pool:
            timed = pool.run(measure_time, case, args.rounds, timeout_s=600.0)
            spans = pool.run(measure_spans, case, timeout_s=300.0)
        cells: list[str] = []
        for over, kind in ((max, "seconds"), (sum, "cpu_seconds")):
            ours, theirs = (_median_round(over, [rank[s][kind] for rank in timed]) for s in (0, 1))
            cells += [f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms", f"{ours / theirs:.3f}"]
        said, seen = bubbles(case, spans)
        losses = [rank[side]["loss"] for rank in timed[-1:] for side in (0, 1)]
        shares = f"{said:.1%}", f"{seen:.1%}"
        print(columns.format(ranks, *cells, *shares, f"{abs(losses[0] - losses[1]):.1e}"))


def _median_round(over_ranks: Callable[..., float], ranks: Sequence[Sequence[float]]) -> float:
    return median(over_ranks(times) for times in zip(*ranks, strict=True))


def planned(ranks: int, count: int) -> Case:
    """Our module, and how it is cut."""
    with torch.device("meta"):
        model = Llama(CONFIG)
    inputs = {
        name: torch.zeros(ROWS * count, SEQ, dtype=torch.int64, device="meta")
        for name in ("tokens", "labels")
    }
    plan = shardwright.plan(
        model, inputs, layout=f"pp={ranks}", cluster="cpu", micro_batches=count, precision="own",
    )  # fmt: skip
    assert plan.pipeline is not None
    layers = tuple(stage.layers for stage in plan.pipeline.stages)
    return Case(plan.module_source(), layers, count)


def bubbles(case: Case, spans: Sequence[Sequence[tuple[str, float, float]]]) -> tuple[float, float]:
    """The share of waiting, predicted and measured, of the actions of each rank in a step."""
    ranks = len(spans)
    times: list[StageTimes] = []
    for own in spans:
        of = {kind: mean(end - start for k, start, end in own if k == kind) for kind in "FB"}
        times.append(StageTimes(of["F"], of["B"]))
    table = schedule("1f1b", ranks, 1, case.micro_batches)
    begin = min(start for own in spans for _, start, _ in own)
    end = max(end for own in spans for _, _, end in own)
    busy = sum(end - start for own in spans for _, start, end in own)
    return played(table, times).bubble_share, 1 - busy / (ranks * (end - begin))


# --- in each rank --------------------------------------------------------------------------------


class HandStage(nn.Module):
    """Layers of the model from `first` to `last`, with what stands before or behind them."""

    def __init__(self, model: Llama, first: int, last: int) -> None:
        super().__init__()
        self.embedding = model.embedding if first == 0 else None
        self.layers = model.layers[first:last]
        self.ends = nn.Sequential(model.norm, model.head) if last == CONFIG.layers else None

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(SEQ)
        angles = rotary_angles(positions, CONFIG.width // CONFIG.heads, CONFIG.rope_theta)
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x, angles)
        return x if self.ends is None else self.ends(x)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def _setting(case: Case) -> tuple[Llama, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    shape = (ROWS * case.micro_batches, SEQ)
    names = ("tokens", "labels")
    return model, {name: torch.randint(CONFIG.vocab_size, shape) for name in names}


def _ours(case: Case, model: Llama, rows: Mapping[str, Tensor]) -> Callable[[], float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipelined.py"
        path.write_text(case.source)
        spec = importlib.util.spec_from_file_location("pipelined", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["pipelined"] = module
        spec.loader.exec_module(module)
    ours: Any = module.ShardedModel.from_state_dict(model.state_dict())
    own = ours.shard_rows_of(**rows)

    def step() -> float:
        loss = ours.step(**own)
        ours.zero_grad(set_to_none=True)
        return float(loss)

    return step


def _by_hand(case: Case, model: Llama, rows: Mapping[str, Tensor]) -> Callable[[], float]:
    rank, ranks = dist.get_rank(), len(case.layers)
    first = sum(case.layers[:rank])
    stage = HandStage(model, first, first + case.layers[rank])
    here = PipelineStage(stage, rank, ranks, torch.device("cpu"))
    run = Schedule1F1B(here, case.micro_batches, loss_fn=_loss)

    def step() -> float:
        losses: list[Tensor] = []
        if rank == 0:
            run.step(rows["tokens"], return_outputs=False)
        elif rank == ranks - 1:
            run.step(target=rows["labels"], losses=losses, return_outputs=False)
        else:
            run.step(return_outputs=False)
        stage.zero_grad(set_to_none=True)
        return float(torch.stack(losses).detach().mean()) if losses else 0.0

    return step


def measure_time(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Both sides by turns, after one step of each that is not counted."""
    torch.set_num_threads(1)
    model, rows = _setting(case)
    steps = [_ours(case, model, rows), _by_hand(case, model, rows)]
    found: list[dict[str, Any]] = [
        {"loss": step(), "seconds": [], "cpu_seconds": []} for step in steps
    ]
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            steps[side]()
            found[side]["seconds"].append(time.perf_counter() - start)
            found[side]["cpu_seconds"].append(time.process_time() - cpu_start)
    return found


def measure_spans(case: Case) -> list[tuple[str, float, float]]:
    """Kind, begin and end of each action of this rank in a step whose actions sleep besides."""
    torch.set_num_threads(1)
    model, rows = _setting(case)
    step = _ours(case, model, rows)
    step()
    dist.barrier()
    with _slowly() as spans:
        step()
    return spans


@contextmanager
def _slowly() -> Generator[list[tuple[str, float, float]]]:
    """Within, stages sleep in every action; what they ran when."""
    spans: list[tuple[str, float, float]] = []

    def slow(kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def action(*args: Any) -> Any:
            start = time.monotonic()  # which all processes of a machine share
            out = run(*args)
            time.sleep(SLEEPS[kind])
            spans.append((kind, start, time.monotonic()))
            return out

        return action

    forward, backward = RunningStage.forward, RunningStage.backward
    with (
        patch.object(RunningStage, "forward", slow("F", forward)),
        patch.object(RunningStage, "backward", slow("B", backward)),
    ):
        yield spans


if __name__ == "__main__":
    main()
