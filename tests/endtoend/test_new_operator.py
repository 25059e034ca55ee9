"""The operator that CONTRIBUTING.md adds: planned, run and verified on 2 and 4 ranks."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardwright
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph, Node
from shardwright.ir.ops.registry import OPS, register, rule_of
from shardwright.ir.reference.widen import widened
from shardwright.planner.strategies.build import Builder, Decisions
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool, ops
from tests.guide import guide_example
from tests.sharded import any_of, builder_of, check, mesh_of, reference, run_module

Pool = Callable[[int], RankPool]
NAME = "pooling.token_softmax.default"
BATCH, TOKENS, WIDTH = 4, 10, 8  # 4 ranks share 10 tokens as 3, 3, 3 and 1


def load(path: str) -> ModuleType:
    """The example as a module; its function for ranks is found where generated modules look."""
    if "token_softmax" not in sys.modules:
        spec = importlib.util.spec_from_file_location("token_softmax", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["token_softmax"] = module
        spec.loader.exec_module(module)
    module = sys.modules["token_softmax"]
    vars(ops)["token_softmax"] = module.sharded_token_softmax
    return module


def run_with_example(path: str, *args: Any) -> Any:
    """In one rank: `run_module` where the example is installed."""
    load(path)
    return run_module(*args)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's code in a file, its operator declared while these tests run."""
    path = tmp_path_factory.mktemp("example") / "token_softmax.py"
    path.write_text(guide_example("python", "class TokenSoftmax"), encoding="utf-8")
    for name, operator in load(str(path)).FAMILY.items():
        register(name, operator)
    yield path
    del OPS[NAME]
    del vars(ops)["token_softmax"]


class Pooling(nn.Module):
    """Classifies a sequence by those of its tokens that it attends to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.score = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        weights = torch.ops.pooling.token_softmax(self.score(x))
        logits = self.head((weights * x).sum(1))
        return nn.functional.cross_entropy(logits, labels)


class Ways(Restriction):
    """The new operator is cut in one way; everything else as it comes."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """Is the operator cut so, if it is in this region?"""
        pairs = zip(region.nodes, strategy.choices, strict=True)
        return all(choices == self.choices for node, choices in pairs if node.op == NAME)


def decide(builder: Builder, choices: tuple[str, ...], seed: int) -> Decisions:
    """Any strategy for every other region."""
    rng = random.Random(seed)
    built = builder.build(Ways(choices))
    return any_of(built, rng)


def operator_in(graph: Graph) -> Node:
    (node,) = (node for node in graph.nodes if node.op == NAME)
    return node


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, 32, (BATCH, TOKENS), generator=generator),
        "labels": torch.randint(0, 6, (BATCH,), generator=generator),
    }


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)])
def test_it_runs_in_every_way(
    example: Path, inputs: dict[str, Tensor], pool: Pool, sizes: tuple[int, ...]
) -> None:
    """Values, gradients and counted bytes, with 10 tokens on 2 and on 4 ranks."""
    torch.manual_seed(0)
    model = Pooling().double()
    graph = widened(capture(model, inputs, training=True))
    params = {name: p.detach() for name, p in model.named_parameters()}
    mesh, node = mesh_of(*sizes), operator_in(graph)
    builder = builder_of(graph, mesh)
    want = reference(graph, params, inputs)
    rule = rule_of(node)
    every = product(rule.choices(), repeat=len(sizes))
    ways = [choices for choices in every if rule.ways(choices, sizes) is not None]
    assert any("s" in choices for choices in ways)
    for seed, choices in enumerate(ways):
        decisions = decide(builder, choices, seed)
        run = partial(run_with_example, str(example))
        ranks = pool(mesh.ranks)
        check(ranks, builder, decisions, params, inputs, want, tolerance=1e-9, run=run)


@pytest.mark.parametrize("gpus", [2, 4])
def test_it_is_planned_and_named_in_the_report(example: Path, gpus: int) -> None:
    """One long sequence is shared by its tokens."""
    ids = torch.zeros(1, 1 << 16, dtype=torch.int64, device="meta")
    labels = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        model = Pooling()
    inputs = {"input_ids": ids, "labels": labels}
    plan = shardwright.plan(model, inputs, gpus=gpus, mesh=f"{gpus}", precision="own")
    node = operator_in(plan.graph)
    assert plan.decisions.choices[node.name] == ("s",)
    assert "tokens, sums all-reduced" in str(plan)
    work = plan.work[node.name]
    assert 0 < work.forward_moving_s < work.forward_s and 0 < work.backward_moving_s
