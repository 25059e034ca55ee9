"""Weights that move together are as those of one process, and messages are as predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.facts import together
from shardwright.facts.spec import Spec, parse_spec
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph, Param
from shardwright.ir.passes.fold import fold
from shardwright.ir.reference.widen import widened
from shardwright.planner.ilp.solve import solve
from shardwright.planner.plan.traffic import predicted_messages
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool
from shardwright.runtime.gathering import chains
from tests.sharded import builder_of, check, mesh_of, program_of, reference, run_module

Pool = Callable[[int], RankPool]
WIDTH, WORDS = 8, 16


class Block(nn.Module):
    """Weights that will be stored in four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Blocks between a table and a head that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Stored(Restriction):
    """Parameters are stored as said, by the ends of their names; the batch is cut over the
    first axis."""

    def __init__(self, specs: Mapping[str, str]) -> None:
        self.specs = {name: parse_spec(text) for name, text in specs.items()}

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        return spec == next(s for end, s in self.specs.items() if name.endswith(end))

    def allows(self, region: Region, strategy: Strategy) -> bool:
        made = zip(region.values, strategy.produces, strict=True)
        return all(spec[0] == 0 for value, spec in made if value.type.shape)


@cache
def model() -> tuple[Graph, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    made = Stack().double()
    ids = torch.randint(0, WORDS, (8, 4))
    inputs = {"ids": ids, "labels": ids.flip(1)}
    graph = widened(fold(capture(made, inputs, training=True)))
    return graph, dict(made.state_dict()), inputs


# By number of ranks: the mesh, and how each weight is stored
WAYS = {
    2: ((2,), {"norm.weight": "R", "up.weight": "S0", "gate.weight": "S1", "gate.bias": "S0",
               "down.weight": "S0", "table.weight": "S0"}),
    4: ((2, 2), {"norm.weight": "R,R", "up.weight": "S0,R", "gate.weight": "S0,S0",
                 "gate.bias": "R,R", "down.weight": "S1,S0", "table.weight": "S0,S1"}),
}  # fmt: skip


class Bounded:
    """In one rank: `run_module` with messages of at most `limit` bytes."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, *args: Any) -> Any:
        usual = together.GROUP_BYTES
        try:
            self._set(self.limit)
            return run_module(*args)
        finally:
            self._set(usual)

    def _set(self, limit: float) -> None:
        together.GROUP_BYTES = limit
        chains._members.cache_clear()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_several_specs_in_one_block(
    pool: Pool, ranks: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, params, inputs = model()
    sizes, specs = WAYS[ranks]
    builder = builder_of(graph, mesh_of(*sizes), recompute=recompute)
    built = builder.build(Stored(specs))
    assignment = solve(built.problem()).assignment
    assert assignment is not None
    decisions = built.read(assignment)
    program, expected = program_of(builder, decisions), reference(graph, params, inputs)
    calls: list[int] = []
    for limit in (together.GROUP_BYTES, 2100.0, 1.0):
        monkeypatch.setattr(together, "GROUP_BYTES", limit)
        calls.append(sum(predicted_messages(program, builder.network.mesh).values()))
        check(
            pool(ranks), builder, decisions, params, inputs, expected,
            tolerance=1e-9, run=Bounded(limit),
        )  # fmt: skip
    assert calls[0] < calls[1] < calls[2]
