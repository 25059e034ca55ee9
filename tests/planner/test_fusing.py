"""What light operators move: chains of compiled layers by hand, and kernels one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import capture_graph
from shardwright.ir.graph import Graph
from shardwright.ir.ops.registry import local_of
from shardwright.loading import Loaded
from shardwright.planner.strategies.fusing import shares
from shardwright.planner.strategies.regions import scopes

TOKENS, WIDTH = 1024, 64
UNIT = TOKENS * WIDTH * 4  # bytes of x


class Block(nn.Module):
    """A residual layer with a gate, both as wide as x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def stack() -> Graph:
    with torch.device("meta"):
        x = torch.zeros(1, TOKENS, WIDTH)
        return capture_graph(Loaded(Stack(), {"x": x}, {"x": ("b", "s", "")}, None), training=True)


def moved(stack: Graph, *, compiled: bool, training: bool = True) -> dict[str, tuple[float, float]]:
    """By op of a layer: units of x that are moved forward and backward."""
    found: dict[str, tuple[float, float]] = {}
    (layer,) = (scope for scope in scopes(stack) if scope.loop is not None)
    table = shares(stack, compiled=compiled, training=training)
    for node in layer.nodes:
        if share := table.get(node.name):
            ahead, behind = share.bytes(local_of(node, training=training))
            found[node.op.split(".")[1]] = (round(ahead / UNIT, 1), round(behind / UNIT, 1))
    return found


def test_a_compiled_layer(stack: Graph) -> None:
    """silu and mul are one kernel: gate and up are read and the product is written; in backward its
    gradient and both are read, and two gradients are written.  The norm is one: x and its result;
    backward reads the gradient and x, twice, for the sum over tokens, and writes one gradient.  A
    sum passes gradients on, and what the norm reads too has two that are added up."""
    assert moved(stack, compiled=True) == {
        "rms_norm": (2.0, 5.0),
        "silu": (1.0, 2.0),
        "mul": (2.0, 3.0),
        "add": (3.0, 3.0),
    }


def test_one_by_one(stack: Graph) -> None:
    """Each reads its operands and writes its result; derivatives read what autograd keeps."""
    assert moved(stack, compiled=False) == {
        "rms_norm": (2.0, 5.0),
        "silu": (2.0, 3.0),
        "mul": (3.0, 5.0),
        "add": (3.0, 3.0),
    }


def test_without_gradients_nothing_runs_backward(stack: Graph) -> None:
    assert {behind for _, behind in moved(stack, compiled=True, training=False).values()} == {0.0}


def test_a_chain_has_one_kernel(stack: Graph) -> None:
    table = shares(stack, compiled=True, training=True)
    (layer,) = (scope for scope in scopes(stack) if scope.loop is not None)
    first = [node.op for node in layer.nodes if node.name in table and table[node.name].first]
    assert first == ["aten.rms_norm.default", "aten.silu.default", "aten.add.Tensor"]
    assert all(share.first for share in shares(stack, compiled=False, training=True).values())
