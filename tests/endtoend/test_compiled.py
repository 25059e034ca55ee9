"""Layers that run compiled: one graph for each class of layers, the same outputs and gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import permutations, product
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.facts.spec import P, R, State, V
from shardwright.ir.ops.registry import local_of, operator_of
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.roles import Roles
from shardwright.runtime import Mesh, RankPool
from shardwright.runtime.mesh.layout import pad_tail
from tests.endtoend import test_moe
from tests.endtoend.families import Case, case
from tests.endtoend.test_families import builder, planned
from tests.endtoend.test_serving import PROMPT, decided, model_of, prompts
from tests.sharded import (
    assert_close,
    combined,
    flatten,
    import_source,
    source_of,
    weights_like,
    whole_outputs,
)

Pool = Callable[[int], RankPool]


def recording(graphs: list[Any]) -> Callable[[Any, Any], Any]:
    """The backend `aot_eager`, which adds the graphs that it gets."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, examples)

    return backend


def run_with_experts(
    source: str, params: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[Any, list[str]]:
    """In one rank: as `run_compiled`, and why layers are cut into several graphs."""
    from torch._dynamo.utils import counters

    counters.clear()
    return run_compiled(source, params, inputs, True), list(counters["graph_break"])


def run_compiled(
    source: str, params: Mapping[str, Tensor], inputs: Mapping[str, Tensor], fullgraph: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor | None], int, int]:
    """In one rank: whole outputs and gradients of a second step, graphs, and classes of layers."""
    torch.compiler.reset()
    graphs: list[Any] = []
    model = import_source(source).ShardedModel.from_state_dict(params)
    model.compile_layers(recording(graphs), fullgraph=fullgraph)
    out: Any = None
    for _ in range(2):
        model.zero_grad()
        out = model(**model.shard_inputs(**inputs))
        combined(model, {str(path): t for path, t in flatten(out)}).backward()
    whole = {str(path): t for path, t in flatten(whole_outputs(model, out))}
    classes = {layer for layers in model.LAYERS.values() for layer in layers}
    return whole, model.full_gradients(), len(graphs), len(classes)


class Cut(Roles):
    """Roles under which no matrix product or attention is done whole by every rank."""

    def allows(self, region: Region, strategy: Strategy) -> bool:
        whole = any(
            {"R", "V"} & set(choices)
            for node, choices in zip(region.nodes, strategy.choices, strict=True)
            if operator_of(node).flops(local_of(node))
        )
        return not whole and super().allows(region, strategy)


@cache
def source(name: str, *roles: str) -> str:
    made = builder(name, (2,) * len(roles))
    return source_of(made, planned(made, Cut(roles, made.graph, made.network.mesh)))


def check(of: Case | test_moe.Case, results: list[Any]) -> None:
    for outputs, gradients, _, _ in results:
        for path, want in of.expected[0].items():
            assert_close(outputs[path], want, 1e-9, f"output {path}")
        for name, want in of.expected[1].items():
            if want is not None:
                got = gradients[name]
                assert got is not None
                assert_close(got, want, 1e-9, f"gradient of {name}")


QUICK = {
    ("llama", "fsdp"), ("llama", "cp"), ("gpt2", "fsdp tp"), ("encoder_decoder", "ddp"),
    ("gemma2", "tp"),
}  # fmt: skip
EVERY = product(
    ("llama", "gpt2", "gemma2", "encoder_decoder"),
    ("ddp", "fsdp", "tp", "cp", "fsdp tp", "fsdp cp"),
)


@pytest.mark.parametrize(
    ("name", "role"),
    [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in EVERY],
)
@pytest.mark.some(2)
def test_each_class_of_layers_is_one_graph(pool: Pool, name: str, role: str) -> None:
    of, roles = case(name), role.split()
    text = source(name, *roles)
    inside = text.partition("class ShardedModel")[0]
    assert "tp" not in roles or re.search(r"\.(all_|reduce_|to_)\w+\(", inside)
    ranks = pool(2 ** len(roles))
    results = ranks.run(run_compiled, text, dict(of.params), dict(of.inputs), True)
    check(of, results)
    for _, _, graphs, classes in results:
        assert graphs == classes


@pytest.mark.parametrize(
    ("name", "role", "kept"),
    [
        ("llama", "fsdp", 1), ("gpt2", "fsdp tp", 0), ("llama", "cp", 0), ("gemma2", "tp", 1),
        ("encoder_decoder", "ddp", 1),
    ],
)  # fmt: skip
@pytest.mark.some(1)
def test_layers_that_are_recomputed(pool: Pool, name: str, role: str, kept: int) -> None:
    """All, or all but the last `kept`, run forward again in backward, compiled."""
    of, roles = case(name), role.split()
    made = builder(name, (2,) * len(roles)).recomputed(kept)
    text = source_of(made, planned(made, Cut(roles, made.graph, made.network.mesh)))
    assert "self.recompute(layer" in text
    ranks = pool(2 ** len(roles))
    results = ranks.run(run_compiled, text, dict(of.params), dict(of.inputs), True)
    check(of, results)
    for _, _, graphs, classes in results:
        assert graphs == classes


@pytest.mark.parametrize(
    ("family", "way"),
    [("mixtral", "EP"), pytest.param("deepseek_v3", "EP x TP", marks=pytest.mark.slow)],
)
def test_layers_are_cut_at_the_routing_of_experts_alone(pool: Pool, family: str, way: str) -> None:
    of, ways = test_moe.case_of(family), test_moe.WAYS_TO_RUN[way]
    text = source_of(*test_moe.planned(of, ways))
    results = pool(prod(ways.sizes)).run(run_with_experts, text, dict(of.params), dict(of.inputs))
    check(of, [result for result, _ in results])
    for (_, _, graphs, classes), reasons in results:
        assert classes < graphs
        assert reasons and all("the routing of experts" in reason for reason in reasons)


def serve_compiled(
    source: str, state: Mapping[str, Tensor], ids: Tensor, lengths: list[int]
) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
    """In one rank: compiled and other logits of prefills of `lengths`, an append after the last
    and a decode; graphs of prefills and append; classes of layers."""
    torch.compiler.reset()
    graphs: list[Any] = []
    logits: list[list[Tensor]] = []
    for backend in (None, recording(graphs)):
        model = import_source(source).ShardedModel.from_state_dict(state).eval()
        if backend is not None:
            model.compile_layers(backend)
        model.new_cache(len(ids), int(ids.shape[1]))
        some = [model.prefill(ids[:, :length]) for length in lengths]
        some.append(model.append(ids[:, lengths[-1] : lengths[-1] + 2]))
        made = len(graphs)
        logits.append([*some, model.decode(ids[:, 0])])
    classes = {layer for layers in model.LAYERS.values() for layer in layers}
    return list(zip(*logits, strict=True)), made, len(classes)


@pytest.mark.parametrize(("name", "way"), [("mistral", "ring"), ("mistral", "tree")])
def test_serving_compiles_anew_twice_at_most(pool: Pool, name: str, way: str) -> None:
    """Once for any batch and length; all layers of a class take their own caches."""
    made, decisions = decided(name, PROMPT // 2, (2,), way)
    state = model_of(name).state_dict()
    arguments = source_of(made, decisions), state, prompts()[0], [4, 8, 6, 2, 7, 5]
    for pairs, graphs, classes in pool(2).run(serve_compiled, *arguments):
        for want, got in pairs:
            assert_close(got, want, 1e-12, "logits")
        assert graphs <= 3 * classes


def converted(a: State, b: State) -> None:
    """In one rank: a compiled conversion gives the value and the gradient of one that is not."""
    torch.compiler.reset()
    axis = Mesh.create({"x": dist.get_world_size()})["x"]
    rows = axis.block(7)
    shape = [rows.rows if a == 0 else 7, rows.rows if a == 1 else 7]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(axis.rank), dtype=torch.float64)
    if a in (0, 1):  # behind the last true row there are zeros
        x = x.narrow(a, 0, rows.stop - rows.start)
        x = pad_tail(x, a, rows.rows)

    def convert(x: Tensor) -> Tensor:
        return axis.convert(x.sin(), a, b, 7 if a >= 0 else None)

    got: list[tuple[Tensor, Tensor]] = []
    for run in (convert, torch.compile(convert, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * weights_like(y)).sum().backward()
        assert leaf.grad is not None
        got.append((y.detach(), leaf.grad))
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=0)


@pytest.mark.parametrize(("a", "b"), list(permutations((R, P, V, 0, 1), 2)))
@pytest.mark.some(8)
def test_compiled_conversions(pool: Pool, a: State, b: State) -> None:
    pool(3).run(converted, a, b)
