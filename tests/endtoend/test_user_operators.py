"""Operators of a user's own file run with their own backward, and the module imports that file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardwright.facts.users import Import, import_user
from shardwright.ir.capture.capture import CaptureError, capture, capture_folded
from shardwright.ir.ops.users import imports_in
from shardwright.ir.reference.widen import widened
from shardwright.runtime import RankPool
from tests.sharded import builder_of, check, mesh_of, random_decisions, reference, source_of

Pool = Callable[[int], RankPool]
# Rounds with a straight-through estimate; neither gradient is that of the forward
MODEL = """
import torch
from torch import Tensor, nn

@torch.library.custom_op("user_test::round_to", mutates_args=())
def round_to(x: Tensor, step: float) -> Tensor:
    return (x / step).round() * step

round_to.register_fake(lambda x, *step: torch.empty_like(x))
round_to.register_autograd(lambda ctx, grad: (3 * grad, None))

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(round_to(self.up(x), 0.25))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A user's file with its model."""
    path = tmp_path / "rounding.py"
    path.write_text(MODEL)
    return path


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)])
@pytest.mark.some(1)
def test_gradients_are_the_operators_own(pool: Pool, file: Path, sizes: tuple[int, ...]) -> None:
    """Three layouts each, in values and gradients, against the user's own model in one process."""
    torch.manual_seed(0)
    model = import_user(str(file)).Net().double()
    inputs = {"x": torch.randn(4, 8, 8, dtype=torch.float64)}
    graph = widened(capture_folded(model, inputs, training=True))
    assert imports_in(graph) == (Import(str(file)),)
    params = {name: p.detach() for name, p in model.named_parameters()}
    want = reference(graph, params, inputs)
    own = model(**inputs)
    weights = torch.sin(torch.arange(own.numel(), dtype=own.dtype).reshape(own.shape) * 12.9898)
    (own * weights).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (grad := want[1][name]) is not None
        assert torch.allclose(p.grad, grad, rtol=1e-12)
    builder = builder_of(graph, mesh_of(*sizes))
    for seed in range(3):
        decisions = random_decisions(builder, seed)
        assert f'ops.import_user("{file}")' in source_of(builder, decisions).splitlines()
        ranks = pool(builder.network.mesh.ranks)
        check(ranks, builder, decisions, params, inputs, want, tolerance=1e-9)


class Calls(nn.Module):
    """A linear layer and an operator on its result."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.up, self.name = nn.Linear(8, 8), name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.user_test, self.name)(self.up(x))


def test_an_operator_of_a_script_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: there is no module to import."""
    space = {"__name__": "__main__"}
    exec(MODEL.replace("round_to", "of_main").replace("step: float", "step: float = 1.0"), space)
    monkeypatch.setitem(sys.modules, "__main__", sys)
    with pytest.raises(CaptureError, match=r"`user_test.of_main.default` is defined in `__main__`"):
        capture(Calls("of_main"), {"x": torch.randn(2, 8)}, training=True)


def test_an_operator_from_nowhere_is_refused() -> None:
    library = torch.library.Library("user_test", "FRAGMENT")
    library.define("bare(Tensor x) -> Tensor")
    library.impl("bare", torch.clone, "CompositeExplicitAutograd")
    with pytest.raises(CaptureError, match=r"`user_test.bare.default` is an operator that is not"):
        capture(Calls("bare"), {"x": torch.randn(2, 8)}, training=True)
