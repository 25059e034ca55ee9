"""One training step of a generated module beside the same layout written by hand with torch.

    python -m benchmarks.running [--layout tp tp+sp fsdp] [--ranks 2 4] [--rounds 9]

Ours is the generated module of the plan whose roles are fixed (`planner.roles`); by hand is
`parallelize_module` (with `loss_parallel`) or `fully_shard` on the same model with the same weights
and inputs, on gloo ranks of one thread each, in float32.  A step is forward and backward, until
every rank has its whole gradient.

Time: both are in the same processes and take turns; a round's time is that of its slowest rank,
and medians of all rounds are compared.  So is the processor time of all ranks together, which says
more where other work shares the cores (waiting for a rank that the system has stopped is no
processor time).  Memory: each side in fresh processes of its own, the peak
of the resident set (VmHWM, reset just before the step) over what the process had before the model
was made, after a step of a tiny model of the same layout.  Blocks of 64 KiB and more are given back
to the system when they are freed, so that the resident set is what is alive.

The last columns compare our side's predicted memory with the bytes of all tensors that are alive at
the step's peak (`runtime.live`), which is less than the resident set by what is no tensor.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.memory import give_back_freed_blocks, peak_bytes, resident_bytes, start_peak
from shardwright.capturing import capture_graph
from shardwright.codegen.module import write_source
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.ir.graph import Graph
from shardwright.loading import Loaded
from shardwright.planner.ilp.problem import evaluate
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.decide import program_of
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Setting
from shardwright.runtime import RankPool
from shardwright.runtime.live import LiveBytes

Layout: TypeAlias = Literal["tp", "tp+sp", "fsdp"]
Side: TypeAlias = Literal["ours", "by hand"]
Step: TypeAlias = Callable[[], float]  # runs one step, returns the loss of the whole batch

SIDES: tuple[Side, ...] = ("ours", "by hand")
_EXAMPLE = Path(__file__).parents[1] / "examples" / "llama.py"


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of the model, and of the whole batch."""

    vocab_size: int
    layers: int
    width: int
    mlp_width: int
    batch: int
    seq: int


MIDDLE = Size(
    vocab_size=8192,
    layers=4,
    width=512,
    mlp_width=1408,
    batch=4,
    seq=256,
)
TINY = Size(vocab_size=128, layers=1, width=64, mlp_width=128, batch=4, seq=16)


@dataclass(frozen=True, slots=True)
class Case:
    """What a rank needs to run both sides; `sources` are the generated modules."""

    layout: Layout
    ranks: int
    sources: tuple[tuple[Size, str], ...]


def main() -> None:
    """Print one row per layout and number of ranks."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layout", nargs="+", choices=get_args(Layout), default=get_args(Layout))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    columns = "{:7} {:>5}" + " | {:>9} {:>9} {:>6}" * 4 + " | {:>9}"
    heads = [text for head in ("time", "cpu time", "peak", "tensors") for text in (head, "", "")]
    print(columns.format("", "", *heads, ""))
    names = (*("ours", "by hand", "ratio") * 3, "predicted", "measured", "ratio", "loss diff")
    print(columns.format("layout", "ranks", *names))
    for layout in args.layout:
        for ranks in args.ranks:
            row = compare(layout, ranks, args.rounds)
            print(
                columns.format(
                    layout,
                    ranks,
                    *_pair(row.seconds, 1e3, "ms"),
                    *_pair(row.cpu_seconds, 1e3, "ms"),
                    *_pair(row.peak, 1e-6, "MB"),
                    *_pair(row.tensors, 1e-6, "MB"),
                    f"{abs(row.losses[0] - row.losses[1]):.1e}",
                ),
                flush=True,
            )


def _pair(pair: tuple[float, float], scale: float, unit: str) -> tuple[str, str, str]:
    ours, theirs = pair
    return f"{ours * scale:.1f} {unit}", f"{theirs * scale:.1f} {unit}", f"{ours / theirs:.3f}"


@dataclass(frozen=True, slots=True)
class Row:
    """Ours and by hand: median seconds of a step, largest peak of a rank in bytes, loss.

    `tensors`: our peak of live tensors in bytes, predicted and measured.
    """

    seconds: tuple[float, float]
    cpu_seconds: tuple[float, float]
    peak: tuple[float, float]
    tensors: tuple[float, float]
    losses: tuple[float, float]


def compare(layout: Layout, ranks: int, rounds: int) -> Row:
    """Run both sides of one layout."""
    plans = {size: planned(layout, ranks, size) for size in (TINY, MIDDLE)}
    case = Case(layout, ranks, tuple((size, source) for size, (source, _) in plans.items()))
    with RankPool(ranks) as pool:
        timed = pool.run(measure_time, case, rounds, timeout_s=600.0)
        tensors = plans[MIDDLE][1], max(pool.run(measure_tensors, case, timeout_s=300.0))
    wall = [_median_round(max, [rank[side].seconds for rank in timed]) for side in (0, 1)]
    cpu = [_median_round(sum, [rank[side].cpu_seconds for rank in timed]) for side in (0, 1)]
    peaks: list[int] = []
    for side in SIDES:
        with RankPool(ranks) as pool:
            peaks.append(max(pool.run(measure_peak, case, side, timeout_s=300.0)))
    first, second = timed[0]
    losses = first.loss, second.loss
    return Row((wall[0], wall[1]), (cpu[0], cpu[1]), (peaks[0], peaks[1]), tensors, losses)


@dataclass(frozen=True, slots=True)
class Timed:
    """One rank's seconds per round, and the loss."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    loss: float


def _median_round(
    over_ranks: Callable[[tuple[float, ...]], float], ranks: Sequence[tuple[float, ...]]
) -> float:
    return median(over_ranks(times) for times in zip(*ranks, strict=True))


# --- in each rank --------------------------------------------------------------------------------


def measure_time(case: Case, rounds: int) -> tuple[Timed, Timed]:
    """Both sides by turns, after one step of each that is not counted."""
    steps = [make_step(case, side, MIDDLE) for side in SIDES]
    losses = [step() for step in steps]
    seconds: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for side in order:
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            steps[side]()
            seconds[side].append(time.perf_counter() - start)
            cpu[side].append(time.process_time() - cpu_start)
    first, second = (Timed(tuple(seconds[k]), tuple(cpu[k]), losses[k]) for k in (0, 1))
    return first, second


def measure_peak(case: Case, side: Side) -> int:
    """Bytes that the model and its second step add to this process at their peak."""
    give_back_freed_blocks()
    make_step(case, side, TINY)()
    before = resident_bytes()
    step = make_step(case, side, MIDDLE)
    step()
    resident_bytes()
    dist.barrier()
    start_peak()
    step()
    return peak_bytes() - before


def measure_tensors(case: Case) -> int:
    """Bytes of the tensors of our side that are alive at the peak of a step."""
    sharded, inputs = _our_model(case, *_weights_and_batch(MIDDLE), MIDDLE)
    with LiveBytes([*sharded.parameters(), *inputs.values()]) as live:
        sharded(**inputs)["loss"].backward()
    return live.peak


def make_step(case: Case, side: Side, size: Size) -> Step:
    """The step of one side, its model built and its inputs in place; same weights on both."""
    model, batch = _weights_and_batch(size)
    if side == "by hand":
        return _hand(case, model, batch)
    sharded, inputs = _our_model(case, model, batch, size)
    del model
    return _our_step(sharded, inputs)


def _weights_and_batch(size: Size) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return llama().Llama(config_of(size)), whole_batch(size)


def whole_batch(size: Size) -> dict[str, Tensor]:
    """The same tokens on every rank."""
    tokens = torch.randint(
        0, size.vocab_size, (size.batch, size.seq), generator=torch.Generator().manual_seed(0)
    )
    return {"tokens": tokens, "labels": torch.roll(tokens, -1, dims=1)}


def _our_model(
    case: Case, model: nn.Module, batch: dict[str, Tensor], size: Size
) -> tuple[Any, dict[str, Tensor]]:
    sharded = _import(dict(case.sources)[size]).ShardedModel.from_state_dict(model.state_dict())
    return sharded, sharded.shard_inputs(**batch)


def _our_step(sharded: Any, inputs: dict[str, Tensor]) -> Step:
    def step() -> float:
        out = sharded(**inputs)
        out["loss"].backward()
        sharded.zero_grad(set_to_none=True)
        return out["loss"].item()

    return step


def _hand(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Step:
    mesh = init_device_mesh("cpu", (case.ranks,), mesh_dim_names=("x",))
    if case.layout == "fsdp":
        return _fsdp_step(model, batch, mesh)
    return _tensor_parallel_step(model, batch, mesh, sequence=case.layout == "tp+sp")


def _fsdp_step(model: nn.Module, batch: dict[str, Tensor], mesh: DeviceMesh) -> Step:
    from torch.distributed.fsdp import fully_shard

    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ranks, rank = mesh.size(), mesh.get_local_rank()
    inputs = {name: x.chunk(ranks)[rank].contiguous() for name, x in batch.items()}

    def step() -> float:
        out = model(**inputs)
        out["loss"].backward()
        model.zero_grad(set_to_none=True)
        loss = out["loss"].detach() / ranks  # as ours, which returns the loss of the whole batch
        dist.all_reduce(loss)
        return loss.item()

    return step


def _tensor_parallel_step(
    model: nn.Module, batch: dict[str, Tensor], mesh: DeviceMesh, *, sequence: bool
) -> Step:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    stream = Shard(1) if sequence else Replicate()
    whole = Replicate()
    styles: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(stream, None), desired_input_layouts=(whole, None)
        ),
        "layers.*.mlp": PrepareModuleInput(input_layouts=stream, desired_input_layouts=whole),
        "head": ColwiseParallel(input_layouts=stream, use_local_output=False),
    }
    for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.gate_proj",
                 "mlp.up_proj"):  # fmt: skip
        styles[f"layers.*.{name}"] = ColwiseParallel()
    for name in ("attention.o_proj", "mlp.down_proj"):
        styles[f"layers.*.{name}"] = RowwiseParallel(output_layouts=stream)
    if sequence:
        for name in ("layers.*.attention_norm", "layers.*.mlp_norm", "norm"):
            styles[name] = SequenceParallel()
    parallelize_module(model, mesh, styles)

    def step() -> float:
        with loss_parallel():
            out = model(**batch)
            out["loss"].backward()
        _finish_gradients(model)
        model.zero_grad(set_to_none=True)
        return out["loss"].detach().full_tensor().item()

    return step


def _finish_gradients(model: nn.Module) -> None:
    """Add up the gradients that DTensor left as summands, as an optimizer would."""
    from torch.distributed.tensor import DTensor

    for parameter in model.parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor) and any(p.is_partial() for p in grad.placements):
            assert isinstance(parameter, DTensor)
            parameter.grad = grad.redistribute(placements=parameter.placements)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return iter(layers)


def _import(source: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sharded_model.py"
        path.write_text(source)
        return _import_file(path, f"sharded_model_{abs(hash(source))}")


def _import_file(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- the plan ------------------------------------------------------------------------------------


@cache
def llama() -> Any:
    """examples/llama.py as a module."""
    return _import_file(_EXAMPLE, "llama")


def config_of(size: Size) -> Any:
    """The example's configuration of that size."""
    return llama().LlamaConfig(
        vocab_size=size.vocab_size,
        layers=size.layers,
        width=size.width,
        heads=8,
        kv_heads=4,
        mlp_width=size.mlp_width,
    )


@cache
def _graph(size: Size) -> Graph:
    with torch.device("meta"):
        model = llama().Llama(config_of(size))
        inputs = {name: x.to("meta") for name, x in whole_batch(size).items()}
    labels = {name: ("b", "s") for name in inputs}
    return capture_graph(Loaded(model, inputs, labels, None), training=True)


def planned(layout: Layout, ranks: int, size: Size) -> tuple[str, float]:
    """Source of the generated module for a layout, and its predicted peak in bytes."""
    graph, mesh = _graph(size), Mesh((("x", ranks),))
    builder = Builder(graph, Network(mesh, load_cluster("cpu")), Setting(True, "none", None))
    built = builder.build(Roles([layout], graph, mesh))
    problem = built.problem()
    solution = solve(problem)
    if solution.assignment is None:
        raise RuntimeError(f"no plan for {layout} on {ranks} ranks: {solution.status}")
    program = program_of(builder, built.read(solution.assignment), {})
    source = write_source(
        program, mesh, summary=f"{layout} on {ranks}.", phase="train", optimizer="none"
    )
    return source, evaluate(problem, solution.assignment).peak_usage


if __name__ == "__main__":
    from benchmarks.running import main as run  # so that ranks find the functions by this name

    run()
