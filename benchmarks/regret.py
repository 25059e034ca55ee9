"""Layouts as they are predicted from calibration alone, and as they run: is the right one chosen?

    python -m benchmarks.regret [--settings one-host fast slow] [--rounds 7] [--mixtures 10]

A small Llama on 4 gloo ranks of one thread each: on one host, and on two hosts of two ranks joined
by a cable of 2 Gbit/s (`fast`) and of 200 Mbit/s (`slow`; see `benchmarks.hosts`).  In each setting
the ranks measure themselves and their links (`costmodel.calibration`), and every layout is planned
on the cluster file that comes of it, as is the plan that the search chooses.  Mixtures are optima
of the same problem with costs that are changed at random.  All run in turns, in the same processes,
with an optimizer's step each; a round's time is that of its slowest rank, and lower quartiles of
rounds are compared: what else runs on the machine only ever adds time.  Plans that were chosen in
other settings run, too.

Spearman is the correlation of the orders of predicted and measured times; regret is how much longer
the chosen plan takes than the best of all that were measured.  How far the machine agrees with
itself is said beside both.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import shardwright
from benchmarks.hosts import Hosts, NoHostsError, run_ranks, two_hosts
from examples.llama import Llama, LlamaConfig
from shardwright.api import Plan
from shardwright.calibrating import measured_here
from shardwright.codegen.module import write_source
from shardwright.costmodel.calibration.here import cluster_text
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.ir.graph import Graph
from shardwright.planner.errors import PlanError
from shardwright.planner.ilp.problem import ShardingProblem
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.decide import decide, program_of
from shardwright.planner.search.again import Again
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.layout import Layout
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.regions import Recomputed
from shardwright.planner.strategies.setting import Restriction, Setting

RANKS, PER_HOST = 4, 2
CONFIG = LlamaConfig(vocab_size=2048, layers=2, width=256, heads=8, kv_heads=4, mlp_width=704)
BATCH, SEQ = 8, 64
OPTIMIZER = "adamw"
SETTINGS: dict[str, int | None] = {"one-host": None, "fast": 2000, "slow": 200}  # Mbit/s
LAYOUTS = (
    "ddp=4", "zero1=4", "zero2=4", "fsdp=4", "tp=4", "tp=4,sp", "ulysses=4", "cp=4",
    "ddp=2,tp=2", "ddp=2,tp=2,sp", "tp=2,ddp=2", "tp=2,sp,ddp=2", "fsdp=2,tp=2", "fsdp=2,tp=2,sp",
    "tp=2,fsdp=2", "ddp=2,fsdp=2", "fsdp=2,ddp=2", "zero2=2,tp=2,sp", "ddp=2,ulysses=2",
    "ddp=2,cp=2", "fsdp=2,cp=2", "fsdp=4,recompute=full",
)  # fmt: skip
CALIBRATION_S = 60.0
_SPREAD = 0.7  # of the logarithm by which costs of mixtures are changed


@dataclass(frozen=True)
class Candidate:
    """A way to run the model: its module, and the seconds of a step that it is said to take."""

    name: str
    source: str
    predicted: float


def main() -> None:
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mixtures", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="a folder to leave cluster files in")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and ranks are cleared away
    chosen: dict[str, Plan] = {}
    for name in args.settings:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            try:
                hosts = stack.enter_context(_hosts(SETTINGS[name]))
            except NoHostsError as error:
                print(f"{name}: skipped, {error}")
                continue
            place = Path(folder) if args.keep is None else args.keep / name
            place.mkdir(parents=True, exist_ok=True)
            found, plan = regret(place, hosts, args.rounds, args.mixtures, chosen)
            chosen[f"chosen where {name}"] = plan
            print(f"\n{name}\n{found}", flush=True)


def _hosts(megabits: int | None) -> contextlib.AbstractContextManager[Hosts | None]:
    return contextlib.nullcontext() if megabits is None else two_hosts(megabits)


@dataclass(frozen=True)
class Found:
    """What was predicted of candidates, the chosen one first, and the seconds of their rounds."""

    candidates: Sequence[Candidate]
    rounds: Sequence[Sequence[float]]

    @property
    def predicted(self) -> list[float]:
        """By candidate."""
        return [candidate.predicted for candidate in self.candidates]

    @property
    def measured(self) -> list[float]:
        """Lower quartiles, by candidate: what else runs on the machine only ever adds time."""
        return [float(np.quantile(rounds, 0.25)) for rounds in self.rounds]

    @property
    def medians(self) -> list[float]:
        """Medians, by candidate."""
        return [median(rounds) for rounds in self.rounds]

    @property
    def spearman(self) -> float:
        """The correlation of both orders."""
        return spearman(self.predicted, self.measured)

    @property
    def repeated(self) -> float:
        """The correlation of the orders of every other round and of those in between: no prediction
        can be expected to do better."""
        return spearman(*(half.measured for half in self.halves))

    @property
    def regret(self) -> float:
        """How much longer the chosen one takes than the best, as a share of the latter."""
        return self.measured[0] / min(self.measured) - 1

    @property
    def fair_regret(self) -> float:
        """The same, of the best of one half of the rounds as it is in the other: the least of many
        is less than it would be again."""
        shares: list[float] = []
        for one, other in (self.halves, self.halves[::-1]):
            best = int(np.argmin(one.measured))
            shares.append(other.measured[0] / other.measured[best])
        return sum(shares) / len(shares) - 1

    @property
    def halves(self) -> tuple[Found, Found]:
        """Every other round, and those in between."""
        one, other = ([r[n::2] for r in self.rounds] for n in (0, 1))
        return Found(self.candidates, one), Found(self.candidates, other)

    def __str__(self) -> str:
        rows = sorted(
            zip(self.candidates, self.measured, self.medians, strict=True), key=lambda row: row[1]
        )
        lines = [f"{'layout':<30}{'predicted':>12}{'measured':>12}{'ratio':>8}{'median':>12}"]
        for each, seconds, middle in rows:
            ms = f"{each.predicted * 1e3:9.1f} ms{seconds * 1e3:9.1f} ms"
            ratio = each.predicted / seconds
            lines.append(f"{each.name:<30}{ms}{ratio:8.2f}{middle * 1e3:9.1f} ms")
        ratios = [p / s for p, s in zip(self.predicted, self.measured, strict=True)]
        lines += [
            f"Spearman {self.spearman:.3f} (of every other round with those between "
            f"{self.repeated:.3f}; of medians {spearman(self.predicted, self.medians):.3f})",
            f"regret of the chosen plan {self.regret:.1%} (against the best of the other half of "
            f"the rounds {self.fair_regret:.1%})",
            f"predicted / measured {median(ratios):.2f} in the median, {min(ratios):.2f} to "
            f"{max(ratios):.2f}",
        ]
        return "\n".join(lines)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of ranks; equal ones share theirs.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    x, y = (_ranks(np.asarray(of)) for of in (a, b))
    return round(float(np.corrcoef(x, y)[0, 1]), 12)


def _ranks(x: np.ndarray) -> np.ndarray:
    return np.array([((x < each).sum() + (x <= each).sum()) / 2 for each in x])


def regret(
    folder: Path,
    hosts: Hosts | None,
    rounds: int,
    mixtures: int,
    others: Mapping[str, Plan] | None = None,
) -> tuple[Found, Plan]:
    """Measure the machine, plan on what was measured, and run all plans and `others`; what was
    found, and the plan that was chosen."""
    (folder / "per_node").write_text(str(RANKS if hosts is None else PER_HOST))
    run_ranks("benchmarks.regret:calibrate", folder, RANKS, hosts, timeout_s=300.0)
    cluster = str(folder / "here.toml")
    chosen = choose(cluster)
    candidates = [_chosen(chosen), *planned(chosen, cluster, mixtures)]
    for name, plan in (others or {}).items():
        again = Again(plan, load_cluster(cluster, RANKS)).same()
        candidates.append(Candidate(name, plan.module_source(), again.seconds))
    for number, each in enumerate(candidates):
        (folder / f"candidate_{number:02d}.py").write_text(each.source)
    (folder / "rounds").write_text(str(rounds))
    run_ranks("benchmarks.regret:measure", folder, RANKS, hosts, timeout_s=1200.0)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    slowest = [
        [max(of_round) for of_round in zip(*(rank[n] for rank in ranks), strict=True)]
        for n in range(len(candidates))
    ]
    return Found(candidates, slowest), chosen


def _chosen(plan: Plan) -> Candidate:
    return Candidate(f"chosen: {plan.mesh}", plan.module_source(), plan.seconds)


# --- what is planned -----------------------------------------------------------------------------


def choose(cluster: str) -> Plan:
    """The plan of the search."""
    with torch.device("meta"):
        model = Llama(CONFIG)
    rows = torch.zeros(BATCH, SEQ, dtype=torch.int64, device="meta")
    return shardwright.plan(
        model, {"tokens": rows, "labels": rows}, gpus=RANKS, cluster=cluster,
        optimizer=OPTIMIZER, precision="own", micro_batches=1,
    )  # fmt: skip


def planned(chosen: Plan, cluster: str, mixtures: int) -> Iterator[Candidate]:
    """All layouts that the model can have, then mixtures."""
    for text in LAYOUTS:
        layout = Layout.parse(text)
        again = layout.recomputed(chosen.graph) or Recomputed()
        setting = Setting(True, OPTIMIZER, None, again.any, kept_layers=again.kept)
        try:
            yield _candidate(text, chosen, cluster, layout.mesh, setting, layout.limit)
        except PlanError as error:
            print(f"{text}: {error}", file=sys.stderr)
    for seed in range(mixtures):
        mesh = Mesh((("x", 2), ("y", 2))) if seed % 3 else Mesh((("x", RANKS),))
        sizes = "x".join(map(str, mesh.sizes))
        yield _candidate(
            f"mixture {seed} on {sizes}", chosen, cluster, mesh, Setting(True, OPTIMIZER, None),
            lambda graph, mesh: Restriction(), seed,
        )  # fmt: skip


def _candidate(
    name: str,
    plan: Plan,
    cluster: str,
    mesh: Mesh,
    setting: Setting,
    limit: Callable[[Graph, Mesh], Restriction],
    seed: int | None = None,
) -> Candidate:
    """The optimum within a limit; with a `seed` that of costs which are changed at random."""
    builder = Builder(plan.graph, Network(mesh, load_cluster(cluster, RANKS)), setting)
    built = builder.build(limit(plan.graph, mesh))
    problem = built.problem()
    solution = solve(problem if seed is None else _changed(problem, seed))
    if solution.assignment is None:
        raise PlanError(f"no plan: {solution.status}")
    solved = decide(built, problem, solution.assignment, solution)
    source = write_source(
        program_of(builder, solved.decisions, {}), mesh, summary=f"{name}.", phase="train",
        optimizer=OPTIMIZER,
    )  # fmt: skip
    return Candidate(name, source, solved.seconds)


def _changed(problem: ShardingProblem, seed: int) -> ShardingProblem:
    rng = np.random.default_rng(seed)

    def changed(costs: np.ndarray) -> np.ndarray:
        return costs * np.exp(_SPREAD * rng.standard_normal(costs.shape))

    return replace(
        problem,
        nodes=tuple(replace(node, costs=changed(node.costs)) for node in problem.nodes),
        edges=tuple(replace(edge, costs=changed(edge.costs)) for edge in problem.edges),
    )


# --- in each rank --------------------------------------------------------------------------------


def calibrate(folder: Path) -> None:
    """Write a cluster file of what all ranks measure together."""
    per_node = int((folder / "per_node").read_text())
    found = measured_here(per_node, CALIBRATION_S)
    if dist.get_rank() == 0:
        (folder / "here.toml").write_text(cluster_text(found))


def measure(folder: Path) -> None:
    """Seconds of each candidate in each round, by turns."""
    rounds = int((folder / "rounds").read_text())
    torch.manual_seed(0)
    weights = Llama(CONFIG).state_dict()
    steps = [_step(path, weights) for path in sorted(folder.glob("candidate_*.py"))]
    found: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):  # the first is not counted
        for at, step in enumerate(steps):
            gc.collect()
            dist.barrier()
            start = time.perf_counter()
            step()
            if number:
                found[at].append(time.perf_counter() - start)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def _step(path: Path, weights: Mapping[str, torch.Tensor]) -> Any:
    module = _import(path)
    model = module.ShardedModel.from_state_dict(weights)
    tokens = torch.randint(
        CONFIG.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(0)
    )
    batch = {"tokens": tokens, "labels": torch.roll(tokens, -1, 1)}
    rows = {name: model.data_shard.of(x) for name, x in batch.items()}
    optimizer = model.optimizer(OPTIMIZER, lr=1e-4)

    def step() -> None:
        model.step(**rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
