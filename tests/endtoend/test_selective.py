"""Layers that keep the results of products and attention, and run again what is between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.compat.torch import TorchDispatchMode, storage_key
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph
from shardwright.planner.ilp.problem import evaluate
from shardwright.planner.ilp.solve import solve
from shardwright.planner.strategies.build import Builder
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.pricing import IN_PART
from shardwright.planner.strategies.roles import Roles
from shardwright.planner.strategies.setting import Setting
from shardwright.runtime import RankPool
from shardwright.runtime.live import LiveBytes
from tests.endtoend import test_moe
from tests.endtoend.families import example_module
from tests.endtoend.test_compiled import Cut, check, recording, run_compiled
from tests.endtoend.test_families import Algorithms, Parallel, builder, case, planned, run
from tests.endtoend.test_memory import SIZES, WITHIN, batch_of, graph, measured
from tests.ir.test_moe import operators
from tests.sharded import (
    assert_close,
    import_source,
    mesh_of,
    random_decisions,
    run_module,
    source_of,
)

Pool = Callable[[int], RankPool]
ALL = 99  # layers: as many as there are


@pytest.mark.parametrize(
    ("name", "role", "kept", "part"),
    [
        ("llama", "ddp", 0, ALL), ("llama", "fsdp", 1, ALL), ("llama", "tp", 0, 1),
        ("gpt2", "fsdp tp", 0, ALL), ("llama", "cp", 0, ALL), ("gemma3", "tp", 1, 2),
        ("encoder_decoder", "fsdp", 1, ALL), ("gemma2", "fsdp cp", 0, 1),
    ],
)  # fmt: skip
@pytest.mark.some(1)
def test_outputs_gradients_and_messages(
    pool: Pool, name: str, role: str, kept: int, part: int
) -> None:
    """As in one process; and messages are those that are counted, of what runs again too."""
    roles = role.split()
    made = builder(name, (2,) * len(roles)).recomputed(kept, part)
    run(pool, made, planned(made, Roles(roles, made.graph, made.network.mesh)), case(name))


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "encoder_decoder", "phi3", "bert"])
@pytest.mark.slow
def test_any_decisions(pool: Pool, name: str, seed: int | None) -> None:
    """Also sums over ranks of what is a summand on the first one alone, and padding."""
    made = builder(name, (2, 2)).recomputed(0, ALL)
    decided = planned(made, Parallel()) if seed is None else random_decisions(made, seed)
    run(pool, made, decided, case(name))


@pytest.mark.parametrize("algorithm", ["ring", "gather", "ulysses", "window"])
@pytest.mark.some(1)
def test_attention_over_shards_is_kept(pool: Pool, algorithm: str) -> None:
    made = builder("mistral", (2,)).recomputed(0, ALL)
    run(pool, made, planned(made, Algorithms(algorithm)), case("mistral"))


@pytest.mark.parametrize(("family", "way"), [("mixtral", "EP"), ("deepseek_v3", "EP x TP")])
@pytest.mark.some(1)
def test_experts_are_kept_in_part(pool: Pool, family: str, way: str) -> None:
    """The exchanges of their tokens do not run again, no more than their products."""
    of, ways = test_moe.case_of(family), test_moe.WAYS_TO_RUN[way]
    made, decisions = test_moe.planned(of, ways)
    again = replace(decisions, recompute=True, part_layers=ALL)
    exchanged: list[tuple[float, float]] = []
    for each in (decisions, again):
        results = pool(prod(ways.sizes)).run(
            run_module, source_of(made, each), of.params, of.inputs
        )
        for outputs, gradients, _ in results:
            for path, want in of.expected[0].items():
                assert_close(outputs[path], want, 1e-9, f"output {path}")
            for name, want in of.expected[1].items():
                if want is not None and name in gradients:
                    got = gradients[name]
                    assert got is not None
                    assert_close(got, want, 1e-9, f"gradient of {name}")
        moved = {key: n_bytes for key, (n_bytes, _) in results[0][2].items()}
        forward, back = (
            sum(n for (kind, _, phase), n in moved.items() if (kind, phase) == ("all_to_all", when))
            for when in ("forward", "backward")
        )
        exchanged.append((forward, back))
    (once, back), (twice, same) = exchanged
    assert once and (twice, same) == (once, back)


def routed(layers: int) -> Graph:
    """The example's mixture of experts, on enough tokens for routers to be nearly even."""
    example = example_module("moe")
    with torch.device("meta"):
        config = example.MoEConfig(vocab_size=64, layers=layers, width=32, expert_width=48)
        model = example.MoETransformer(config)
    return capture_folded(model, {name: torch.zeros(8, 64, dtype=torch.int64) for name in _ROWS},
                          training=True)  # fmt: skip


_ROWS = ("tokens", "labels")


def held(source: str) -> tuple[int, int]:
    """In one rank: bytes that are alive between forward and backward but not before; how often
    products of experts run in backward."""
    torch.manual_seed(0)
    rows = {name: torch.randint(64, (8, 64)) for name in _ROWS}
    model = import_source(source).ShardedModel()
    model.reset_parameters()
    local = model.shard_inputs(**rows)
    with LiveBytes([*model.parameters(), *model.buffers(), *local.values()]) as live:
        before = live.now
        loss = model(**local)["loss"]
        taken = live.now - before
    with Calls() as behind:
        loss.backward()
    return taken, behind.counts["shardwright.product_of_experts"]


@pytest.mark.parametrize("role", ["ddp+ep", pytest.param("ddp", marks=pytest.mark.slow)])
def test_what_layers_of_experts_keep(pool: Pool, role: str) -> None:
    """As much as is predicted of two layers more, what routers send on average; their products do
    not run again.  And a second run is priced without these."""
    mesh, kept, found = mesh_of(2), list[float](), list[float]()
    for layers in (2, 4):
        of = routed(layers)
        setting = Setting(True, "none", None, expert_imbalance=1.0)
        made = Builder(of, Network(mesh, load_cluster("h100")), setting).recomputed(0, ALL)
        built = made.build(Roles([role], of, mesh))
        assignment = solve(built.problem()).assignment
        assert assignment is not None
        decisions = built.read(assignment)
        for node in operators(of):
            work = made.work(node, decisions.choices[node.name])
            computing = work.forward_s - work.forward_moving_s
            assert 0 < work.again_s(IN_PART) < 0.9 * computing
            assert (work.forward_moving_s > 0) == ("ep" in role)
            assert work.again_moving_s(IN_PART) == pytest.approx(0.0, abs=1e-12)
        kept.append(max(built.memory_at(assignment, at)["kept"] for at in range(built.horizon)))
        results = pool(2).run(held, source_of(made, decisions))
        assert all(products == 0 for _, products in results)
        found.append(sum(taken for taken, _ in results) / 2)
    assert found[1] - found[0] == pytest.approx(kept[1] - kept[0], rel=WITHIN)


class Calls(TorchDispatchMode):
    """Counts calls of operators of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def counted(source: str, params: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
    """In one rank: how often each operator runs in forward and backward."""
    model = import_source(source).ShardedModel.from_state_dict(params)
    local = model.shard_inputs(**inputs)
    with Calls() as ahead:
        loss = model(**local)["loss"]
    with Calls() as behind:
        loss.backward()
    return ahead.counts, behind.counts


def test_what_runs_again(pool: Pool) -> None:
    """Of a Llama: norms, rotations and activations; and no product, and no attention."""
    of = case("llama")
    found: dict[str, list[tuple[int, int]]] = {}
    names = ("aten.mm", "aten._scaled_dot_product_flash_attention_for_cpu", "aten.silu")
    for mode, (part, any_) in {"kept": (0, False), "part": (ALL, True), "full": (0, True)}.items():
        made = builder("llama", (2,))
        made = made.recomputed(0, part) if any_ else made
        text = source_of(made, planned(made, Roles(["ddp"], made.graph, made.network.mesh)))
        ahead, behind = pool(2).run(counted, text, dict(of.params), dict(of.inputs))[0]
        found[mode] = [(ahead[name], behind[name]) for name in names]
    layers = len(builder("llama", (2,)).graph.loops[0].order)
    products = 7 * layers + 1
    assert found["kept"] == [(products, 2 * products), (layers, 0), (layers, 0)]
    assert found["part"] == [(products, 2 * products), (layers, 0), (layers, layers)]
    # the last product of a layer does not: it has kept what it takes by then
    again = 2 * products + 6 * layers
    assert found["full"] == [(products, again), (layers, layers), (layers, layers)]


def predicted(role: str, batch: int, kept: int, part: int, layers: int) -> tuple[str, float, float]:
    """The module of an ordinary plan of two GPUs, its peak, and the most that is kept at once."""
    of, mesh = graph(batch, layers=layers), mesh_of(2)
    made = Builder(of, Network(mesh, load_cluster("cpu")), Setting(True, "adamw", None))
    built = made.recomputed(kept, part).build(Roles([role], of, mesh))
    problem = built.problem()
    assignment = solve(problem).assignment
    assert assignment is not None
    most = max(built.memory_at(assignment, time)["kept"] for time in range(built.horizon))
    peak = evaluate(problem, assignment).peak_usage
    return source_of(made, built.read(assignment)), peak, most


@pytest.mark.parametrize(
    ("role", "kept", "part"),
    [
        pytest.param("ddp", 2, 2, marks=pytest.mark.slow),
        *(
            pytest.param(role, *layers, marks=pytest.mark.slow)
            for role in ("ddp", "fsdp", "tp")
            for layers in ((0, ALL), (3, 3), (0, 3))
        ),
    ],
)  # fmt: skip
def test_peak_memory(pool: Pool, role: str, kept: int, part: int) -> None:
    source, peak, _ = predicted(role, 16, kept, part, SIZES["layers"])
    for taken in pool(2).run(measured, source, 16):
        assert peak == pytest.approx(taken, rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "role", "kept"),
    [
        ("llama", "fsdp", 0), ("gpt2", "fsdp tp", 0), ("llama", "cp", 0), ("gemma2", "tp", 1),
        ("encoder_decoder", "ddp", 0),
    ],
)  # fmt: skip
@pytest.mark.some(1)
def test_compiled(pool: Pool, name: str, role: str, kept: int) -> None:
    """A class of layers is one graph, or two where some of its layers keep all."""
    of, roles = case(name), role.split()
    made = builder(name, (2,) * len(roles)).recomputed(kept, ALL)
    text = source_of(made, planned(made, Cut(roles, made.graph, made.network.mesh)))
    assert 'keep="products, attention"' in text
    results = pool(2 ** len(roles)).run(run_compiled, text, dict(of.params), dict(of.inputs), True)
    check(of, results)
    for _, _, graphs, classes in results:
        assert classes <= graphs <= classes * (1 + bool(kept))


def saved_compiled(source: str, batch: int) -> int:
    """Bytes that autograd keeps, parameters not among them, where layers are compiled by
    `aot_eager`."""
    torch.compiler.reset()
    model = import_source(source).ShardedModel()
    model.reset_parameters()
    model.compile_layers(recording([]))
    params = {storage_key(p.untyped_storage()) for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storages[storage_key(x.untyped_storage())] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**model.shard_inputs(**batch_of(batch)))
    return sum(each.nbytes() for key, each in storages.items() if key not in params)


@pytest.mark.parametrize("role", ["tp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_compiled_layers_keep_what_the_plan_says(pool: Pool, role: str) -> None:
    """What two layers more keep; a compiler may keep the operand of an operator or its result."""
    plans = [predicted(role, 16, 0, ALL, layers) for layers in (2, 4)]
    want = plans[1][2] - plans[0][2]
    found = [pool(2).run(saved_compiled, source, 16)[0] for source, _, _ in plans]
    assert found[1] - found[0] == pytest.approx(want, rel=WITHIN)
