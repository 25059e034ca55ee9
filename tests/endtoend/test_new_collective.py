"""The collective that CONTRIBUTING.md adds: weighed, planned, written, run and counted."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardwright
from shardwright.costmodel.collective import wire_bytes
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.collectives import COLLECTIVES, register
from shardwright.facts.mesh import Mesh
from shardwright.planner.errors import PlanError
from shardwright.planner.plan.store import plan_from_json, plan_to_json
from shardwright.planner.plan.traffic import predicted_bytes, predicted_messages
from shardwright.planner.strategies.network import Network
from shardwright.runtime import Mesh as Ranks
from shardwright.runtime import RankPool, count_collectives
from shardwright.runtime.mesh import transport
from shardwright.runtime.mesh.transfers import TRANSFERS
from tests.guide import guide_example
from tests.sharded import assert_close, import_source

NAME = "hierarchical_all_reduce"
MESH = Mesh((("dp", 2), ("tp", 2)))
Counted = dict[tuple[str, str, str], tuple[float, int]]


def load(path: str) -> ModuleType:
    """The example as a module, its function where ranks look for it."""
    if "hierarchical" not in sys.modules:
        spec = importlib.util.spec_from_file_location("hierarchical", path)
        assert spec is not None and spec.loader is not None
        sys.modules["hierarchical"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["hierarchical"])
    module = sys.modules["hierarchical"]
    COLLECTIVES.setdefault(NAME, module.HierarchicalAllReduce())
    TRANSFERS[NAME] = module.hierarchical_all_reduce
    return module


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's code in a file, its collective known while these tests run."""
    path = tmp_path_factory.mktemp("example") / "hierarchical.py"
    path.write_text(guide_example("python", "class HierarchicalAllReduce"), encoding="utf-8")
    load(str(path))
    yield path
    forget()


def forget() -> None:
    COLLECTIVES.pop(NAME, None)
    TRANSFERS.pop(NAME, None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Links between nodes of two that are faster than those inside: the guide's other example."""
    path = tmp_path_factory.mktemp("cluster") / "pcie.toml"
    path.write_text(guide_example("toml", "base ="), encoding="utf-8")
    return str(path)


def test_what_it_takes(example: Path, cluster: str) -> None:
    """1.6 GB: n / 2 inside and back, n / 2 between nodes, against 3 n / 2 over the slow links."""
    network = Network(MESH, load_cluster(cluster, 4))
    assert wire_bytes(NAME, 1000.0, 2, 2) == 500 + 500 + 500
    seconds = {
        kind: network.seconds(kind, (0, 1), 1.6e9) for kind in ("all_reduce", NAME, "all_gather")
    }
    inside = 1.921e10  # bytes/s of two GPUs on PCIe
    between = network.cluster.inter_node.efficiency * 50e9
    assert seconds["all_reduce"] == pytest.approx(2.4e9 / inside, rel=0.05)
    assert seconds[NAME] == pytest.approx(1.6e9 / inside + 0.8e9 / between, rel=0.05)
    with pytest.raises(ValueError, match=f"there is a collective `{NAME}` already"):
        register(COLLECTIVES[NAME])


def move_on_rank(path: str, numel: int) -> tuple[Tensor, Tensor, Counted, float]:
    """All-reduced value and gradient, what was counted, and the bytes that arrived."""
    load(path)
    mesh = Ranks.create({"dp": 2, "tp": 2})
    x = torch.arange(numel, dtype=torch.float64).mul(mesh.rank + 1).requires_grad_()
    with count_collectives() as counter, Arrived() as arrived:
        y = mesh["dp", "tp"].by(NAME).all_reduce(x, backward="all_reduce")
        (y * (mesh.rank + 1)).sum().backward()
    assert x.grad is not None
    forget()
    return y.detach(), x.grad, counts(counter), arrived.n_bytes


def counts(counter: Any) -> Counted:
    return {tuple(key): (row.bytes, row.messages) for key, row in counter.counts.items()}


class Arrived:
    """Bytes that were received, as they were posted: what no declaration says."""

    def __enter__(self) -> Arrived:
        self.n_bytes, self._post = 0.0, transport.post

        def post(send: Any, receive: Any, *rest: Any) -> Any:
            self.n_bytes += sum(x.nbytes for x, _ in receive)
            return self._post(send, receive, *rest)

        transport.post = post
        return self

    def __exit__(self, *_: object) -> None:
        transport.post = self._post


@pytest.mark.parametrize("numel, padded", [(8, 8), (7, 8)])
def test_on_ranks(example: Path, pool: Callable[[int], RankPool], numel: int, padded: int) -> None:
    """Sums and their gradients, also where the tensor does not divide; every byte that arrives."""
    want = torch.arange(numel, dtype=torch.float64) * 10
    for y, grad, counted, arrived in pool(4).run(move_on_rank, str(example), numel):
        assert torch.equal(y, want) and torch.equal(grad, torch.full_like(want, 10))
        row = (1.5 * 8 * numel, 1 + 2 + 1)
        assert counted == {(NAME, "dp_tp", phase): row for phase in ("forward", "backward")}
        assert arrived == 2 * 1.5 * 8 * padded


class Small(nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 1024)
        self.up = nn.Linear(1024, 2048)
        self.down = nn.Linear(2048, 1024)
        self.head = nn.Linear(1024, 64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.down(torch.relu(self.up(x)))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def run_on_rank(
    path: str, source: str, state: dict[str, Tensor], inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor | None], Counted]:
    load(path)
    model = import_source(source).ShardedModel.from_state_dict(state)
    with count_collectives() as counter:
        loss = model(**model.shard_inputs(**inputs))
        loss.backward()
    forget()
    return loss.detach(), model.full_gradients(), counts(counter)


def test_a_model_is_planned_with_it(
    example: Path, cluster: str, pool: Callable[[int], RankPool]
) -> None:
    """Gradients of replicated weights go by it, together, and as counted."""
    torch.manual_seed(0)
    model = Small().double()
    ids = torch.randint(0, 64, (2, 4, 16))
    inputs = {"input_ids": ids[0], "labels": ids[1]}
    pins = ["*.weight=R,R", "up=S0,S0", "down=S0,S0"]  # replicated weights, a batch in four
    given: dict[str, Any] = {"gpus": 4, "mesh": "2x2", "cluster": cluster, "pins": pins}
    plan = shardwright.plan(model, inputs, **given)
    assert "hierarchical all-reduce" in str(plan)
    source = plan.module_source()
    assert f'by=("{NAME}",)' in source
    stored = json.loads(json.dumps(plan_to_json(plan)))
    assert plan_from_json(stored).paths == plan.paths
    program = plan.program
    moved, told = predicted_bytes(program, plan.mesh), predicted_messages(program, plan.mesh)
    want = {tuple(key): (moved[key], told[key]) for key in moved}
    assert want[NAME, "dp1_dp2", "backward"][0] > 0
    loss = model(**inputs)
    loss.backward()
    results = pool(4).run(run_on_rank, str(example), source, model.state_dict(), inputs)
    for got, gradients, counted in results:
        assert_close(got, loss.detach(), 1e-9, "loss")
        for name, parameter in model.named_parameters():
            gradient = gradients[name]
            assert gradient is not None and parameter.grad is not None
            assert_close(gradient, parameter.grad, 1e-9, name)
        assert counted == {key: pytest.approx(row) for key, row in want.items()}
    forget()
    try:
        without = shardwright.plan(model, inputs, **given)
        assert without.seconds > plan.seconds and "hierarchical" not in str(without)
        with pytest.raises(PlanError, match=f"expected one of all_gather, .* got '{NAME}'"):
            plan_from_json(stored)
    finally:
        load(str(example))
