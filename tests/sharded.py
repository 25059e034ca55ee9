"""Run a graph under any decisions on gloo ranks, and compare it with one process.

Correctness must never depend on the solver's choice, so tests draw decisions at random too.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.codegen.module import write_source
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.facts.spec import parse_spec
from shardwright.ir.graph import Graph, Node
from shardwright.ir.ops.caches import cache_spec
from shardwright.ir.reference.interpret import interpret
from shardwright.ir.reference.widen import (
    widened as widened,  # for the tests that import it from here
)
from shardwright.planner.plan import decide
from shardwright.planner.plan.plan import Request
from shardwright.planner.plan.program import Program
from shardwright.planner.plan.traffic import predicted_bytes, predicted_messages
from shardwright.planner.search.search import Clock, Job, Limit
from shardwright.planner.strategies.build import Builder, Built, Decisions
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction, Setting
from shardwright.runtime import RankPool, count_collectives

AXES = ("x", "y", "z")


def mesh_of(*sizes: int) -> Mesh:
    """A mesh with axes x, y, z."""
    return Mesh(tuple(zip(AXES, sizes, strict=False)))


def job_of(request: Request, mesh: Mesh, limit: Limit) -> Job:
    """To plan a request on one mesh, without ordinary plans beside it: they know no limit."""
    machine = load_cluster(request.cluster, request.gpus)
    clock = Clock()
    return Job(
        machine, request, mesh, limit, "highs", 60.0, clock, lambda step: None, baselines=False
    )


def builder_of(
    graph: Graph,
    mesh: Mesh,
    *,
    training: bool = True,
    recompute: bool = False,
    order: str = "contiguous",
    micro_batches: int = 1,
) -> Builder:
    """The problem builder on the gloo cluster, without a memory limit."""
    setting = Setting(training, "none", None, recompute, order, micro_batches=micro_batches)
    return Builder(graph, Network(mesh, load_cluster("cpu")), setting)


class Laid(Restriction):
    """Every cache lies in one layout, and no attention runs the algorithm `without`.

    `S2|S1`: caches with a window in the first layout, others in the second.
    """

    def __init__(self, spec: str, without: str = "") -> None:
        self.specs, self.without = [parse_spec(text) for text in spec.split("|")], without

    def spec_of(self, node: Node) -> tuple[int, ...]:
        """The layout of an attention's cache."""
        return self.specs[0 if node.arg("window") else -1]

    def allows(self, region: Region, strategy: Strategy) -> bool:
        pairs = zip(region.nodes, strategy.choices, strict=True)
        return all(
            cache_spec(node, choices) == self.spec_of(node) and self.without not in choices
            for node, choices in pairs
            if node.op == "shardwright.cached_attention"
        )


def random_decisions(builder: Builder, seed: int) -> Decisions:
    """Any strategy for every region, any storage for every parameter: mostly very bad ones."""
    return any_of(builder.build(Restriction()), random.Random(seed))


def any_of(built: Built, rng: random.Random) -> Decisions:
    """Any of the decisions that a problem offers."""
    builder = built.builder
    decisions = built.read([rng.randrange(node.costs.size) for node in built.nodes])
    homes = dict(decisions.homes)
    for weight, _ in decide.program_of(builder, decisions, {}).brought():
        if weight.is_astray:  # its uses were drawn apart from it
            homes.pop(weight.param.value.name, None)
    return replace(decisions, homes=homes)


def program_of(builder: Builder, decisions: Decisions) -> Program:
    """The program of one rank under `decisions`."""
    return decide.program_of(builder, decisions, {})


def source_of(builder: Builder, decisions: Decisions) -> str:
    """The generated module under `decisions`."""
    phase = "train" if builder.setting.training else "prefill"
    program = program_of(builder, decisions)
    return write_source(
        program, builder.network.mesh, summary="A test.", phase=phase, optimizer="none"
    )


def reference(
    graph: Graph, params: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs by path, and the gradient of every parameter, of one process.

    The gradient is that of the loss, or of a fixed random combination of all outputs.
    """
    leaves = {
        n: p.detach().clone().requires_grad_(p.is_floating_point() or p.is_complex())
        for n, p in params.items()
    }
    entries = {str(path): t for path, t in interpret(graph, leaves, inputs).items()}
    combine(entries).backward()
    return (
        {path: t.detach() for path, t in entries.items()},
        {name: leaf.grad for name, leaf in leaves.items()},
    )


@torch.no_grad()
def whole_outputs(model: Any, out: Any) -> Any:
    """What a model returned on all ranks, as one process would, without gradients."""
    return model.gather_outputs(out)


def flatten(outputs: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """(path, tensor) pairs of a nested structure of outputs."""
    if isinstance(outputs, Tensor):
        return [(path, outputs)]
    pairs = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    return [leaf for key, item in pairs for leaf in flatten(item, (*path, key))]


def combine(entries: Mapping[str, Tensor]) -> Tensor:
    """The loss if there is one, else a sum of all floating outputs with fixed weights."""
    scalars = [t for t in entries.values() if t.ndim == 0 and t.requires_grad]
    if scalars:
        return scalars[0]
    parts = [total(t * weights_like(t)) for t in entries.values() if t.requires_grad]
    return torch.stack(parts).sum()


def total(t: Tensor) -> Tensor:
    """The sum of all numbers; of complex ones that of both parts."""
    return (t.real + t.imag).sum() if t.is_complex() else t.sum()


def weights_like(t: Tensor) -> Tensor:
    """Fixed numbers between -1 and 1 of the shape of `t`; real ones, as a complex loss has none."""
    dtype = t.dtype.to_real() if t.is_complex() else t.dtype
    return torch.sin(torch.arange(t.numel(), dtype=dtype).reshape(t.shape) * 12.9898)


def run_module(
    source: str, params: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[
    dict[str, Tensor], dict[str, Tensor | None], dict[tuple[str, str, str], tuple[float, int]]
]:
    """In one rank: run a generated module; whole outputs, whole gradients, counted bytes and
    messages.

    Without training there is no backward pass and no gradient.
    """
    module = import_source(source)
    model = module.ShardedModel.from_state_dict(params)
    with count_collectives() as counter:
        if model.PHASE == "train":
            out = model(**model.shard_inputs(**inputs))
            entries = {str(path): t for path, t in flatten(out)}
            combined(model, entries).backward()
        else:
            with torch.no_grad():
                out = model.eval()(**model.shard_inputs(**inputs))
    counted = {
        (k.op, k.axis, str(k.phase)): (c.bytes, c.messages) for k, c in counter.counts.items()
    }
    whole = {str(path): t for path, t in flatten(whole_outputs(model, out))}
    return whole, model.full_gradients(), counted


def combined(model: Any, entries: dict[str, Tensor]) -> Tensor:
    """The loss, or this rank's part of `combine` of all outputs."""
    scalars = [t for t in entries.values() if t.ndim == 0 and t.requires_grad]
    if scalars:
        return scalars[0]
    specs = {str(o.path): o for o in model.OUTPUTS}
    parts: list[Tensor] = []
    for path, t in entries.items():
        if t.requires_grad:
            weights = weights_like(torch.empty(specs[path].shape, dtype=t.dtype))
            part = model.local_part(weights, specs[path].spec)
            own = t[tuple(slice(0, rows) for rows in part.shape)]  # without padding
            parts.append(total(own * part))
    return torch.stack(parts).sum()


def import_source(source: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("generated", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["generated"] = module
        spec.loader.exec_module(module)
    return module


def check(
    pool: RankPool,
    builder: Builder,
    decisions: Decisions,
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    expected: tuple[dict[str, Tensor], dict[str, Tensor | None]],
    *,
    tolerance: float,
    run: Callable[..., Any] = run_module,
) -> None:
    """Run on all ranks; results are as `reference` says, bytes and messages as predicted.

    `run` is `run_module`, or does more around it.  Errors are relative to the largest entry of the
    expected tensor.
    """
    source = source_of(builder, decisions)
    results = pool.run(run, source, dict(params), dict(inputs))
    program, mesh = program_of(builder, decisions), builder.network.mesh
    moved, messages = dict(predicted_bytes(program, mesh)), dict(predicted_messages(program, mesh))
    busiest: dict[tuple[str, str, str], float] = {}
    for rank, (outputs, gradients, counted) in enumerate(results):
        for path, want in expected[0].items():
            assert_close(outputs[path], want, tolerance, f"rank {rank} output {path}")
        for name, want in expected[1].items():
            if want is not None and name in gradients and builder.setting.training:
                got = gradients[name]
                assert got is not None, f"rank {rank}: no gradient for {name}"
                assert_close(got, want, tolerance, f"rank {rank} gradient of {name}")
        for key, (n_bytes, _) in counted.items():
            busiest[key] = max(busiest.get(key, 0.0), n_bytes)
        if not any("window" in choices for choices in decisions.choices.values()):
            same = {key: n for key, (n, _) in counted.items()} == pytest.approx(moved, rel=1e-12)
            assert same, f"rank {rank} moved {counted}, predicted {moved}"
            sent = {key: n for key, (_, n) in counted.items()}
            assert sent == messages, f"rank {rank}: messages {sent}, predicted {messages}"
    # The first and the last rank have a neighbour less to exchange a window with.
    assert busiest == pytest.approx(moved, rel=1e-12), f"moved {busiest}, predicted {moved}"


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Largest difference at most `tolerance` times the largest expected entry (at least 1e-3)."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not (want.is_floating_point() or want.is_complex()):
        assert torch.equal(got, want), what
        return
    scale = max(want.abs().max().item(), 1e-3) if want.numel() else 1.0
    error = (got - want).abs().max().item() / scale if want.numel() else 0.0
    assert error <= tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"
