"""A model's own `torch.autocast` regions: the same casts in the graph, and on ranks."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import CaptureError, capture
from shardwright.ir.reference.interpret import interpret
from shardwright.runtime import RankPool
from tests.sharded import builder_of, check, mesh_of, random_decisions

Pool = Callable[[int], RankPool]
BATCH, TOKENS, WIDTH = 4, 8, 32
BF16, F32 = torch.bfloat16, torch.float32


def region(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=BF16, enabled=enabled)


class Layer(nn.Module):
    """Products in bfloat16, scores in float32, one weight used twice in the region."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down, self.mix = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with region():
            h = self.mix(self.mix(self.norm(x)))
            with region(enabled=False):
                scores = (x @ x.transpose(1, 2) / 9).softmax(-1)
            y = torch.einsum("bij,bjd->bid", scores, h)
            y = torch.cat([y, torch.softmax(self.down(F.silu(self.up(h))), -1)], -1)
        return x + sum(y.chunk(2, -1))


class Net(nn.Module):
    """The loss is computed inside of a region, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        with region():
            return {"loss": (self.head(x) - F.one_hot(tokens, 50)).square().mean(), "last": x}


def example() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net(), {"tokens": torch.randint(0, 50, (BATCH, TOKENS))}


def expected(
    model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients of the model itself."""
    out = model(**inputs)
    out["loss"].backward()
    outputs = {f"('{name}',)": t.detach() for name, t in out.items()}
    return outputs, {name: p.grad for name, p in model.named_parameters()}


def test_the_graph_is_the_model_bit_by_bit() -> None:
    model, inputs = example()
    want = expected(model, inputs)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    found = interpret(capture(model, inputs, training=True), leaves, inputs)
    found[("loss",)].backward()
    for path, t in found.items():
        assert t.dtype == want[0][str(path)].dtype and torch.equal(t, want[0][str(path)]), path
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, want[1][name]), name


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)], ids=str)
def test_on_ranks(pool: Pool, sizes: tuple[int, ...]) -> None:
    """Equal to rounding in bfloat16; `plan verify` compares in float64 (tests/cli)."""
    model, inputs = example()
    params = {name: p.detach() for name, p in model.named_parameters()}
    graph, want = capture(model, inputs, training=True), expected(model, inputs)
    builder = builder_of(graph, mesh_of(*sizes))
    for seed in range(3):
        decisions = random_decisions(builder, seed)
        check(pool(prod(sizes)), builder, decisions, params, inputs, want, tolerance=3e-2)


class Calls(nn.Module):
    """One function of x (4, 6) in float32, w (6, 6) in float32 and h (4, 6) in bfloat16."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(6, 6)), function

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(BF16)
        with region():
            return self.function(x, self.w, h)


@pytest.mark.parametrize(
    ("function", "operands", "result"),
    [
        (lambda x, w, h: F.linear(x, w), [BF16, BF16], BF16),
        (lambda x, w, h: F.linear(h, w), [BF16, BF16], BF16),
        (lambda x, w, h: torch.einsum("ij,kj->ik", h, w), [BF16, BF16], BF16),
        (lambda x, w, h: h.softmax(-1), [BF16], BF16),
        (lambda x, w, h: F.layer_norm(x, (6,)), [F32], F32),
        (lambda x, w, h: F.mse_loss(h, x), [F32, F32], F32),
        (lambda x, w, h: torch.cat([h, x]), [F32, F32], F32),
        (lambda x, w, h: x * h, [F32, BF16], F32),
        (lambda x, w, h: x.double() @ w.double(), [torch.float64, torch.float64], torch.float64),
    ],
)
def test_operands_are_cast_as_autocast_does(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    operands: list[torch.dtype],
    result: torch.dtype,
) -> None:
    graph = capture(Calls(function), {"x": torch.randn(4, 6)}, training=True)
    last = graph.nodes[-1]
    assert [value.type.dtype for value in last.operands] == operands
    assert last.output.type.dtype == result


def test_a_loss_that_autocast_casts_inside_runs_in_no_narrower_format() -> None:
    """torch takes the logarithms of the softmax in bfloat16, and casts those."""
    labels = torch.tensor([0, 5, 1, 2])
    model = Calls(lambda x, w, h: F.cross_entropy(h, labels))
    inputs = {"x": torch.randn(4, 6)}
    graph = capture(model, inputs, training=True)
    (found,) = interpret(graph, dict(model.named_parameters()), inputs).values()
    assert torch.equal(found, F.cross_entropy(inputs["x"].to(BF16).float(), labels))
    assert (model(**inputs) - found).abs() < 1e-2


class Around(Calls):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=BF16):
            return F.linear(x, self.w)


class Decorated(Calls):
    @torch.autocast("cuda", dtype=BF16)  # pyright: ignore[reportUntypedFunctionDecorator]
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class TurningOff(Calls):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return F.linear(x, self.w)


def test_decorators_for_another_device_are_refused_and_turning_off_is_not() -> None:
    inputs = {"x": torch.randn(4, 6)}
    for training in (True, False):
        with pytest.raises(CaptureError, match=r"autocast\.py:\d+: .*alone.*in `forward`"):
            capture(Decorated(F.linear), inputs, training=training)
    (linear,) = capture(TurningOff(F.linear), inputs, training=True).nodes
    assert linear.output.type.dtype == torch.float32


def test_what_cannot_be_kept_is_refused_by_name() -> None:
    inputs = {"x": torch.randn(4, 6)}
    with pytest.raises(CaptureError, match=r"autocast\.py:\d+: .* for 'cuda' alone"):
        capture(Around(F.linear), inputs, training=True)
    with region(), pytest.raises(CaptureError, match="is on around the planning"):
        capture(Calls(lambda x, w, h: x), inputs, training=True)
    assert torch.autocast("cuda", enabled=False) is not None  # torch's own class again


def test_products_of_unlike_formats_are_refused() -> None:
    """torch refuses them as they run, but not where a model is captured."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 6, dtype=BF16)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    with pytest.raises(
        CaptureError, match=r"Linear multiplies bfloat16 by float32.*--precision own"
    ):
        capture(Mixed(), {"x": torch.randn(4, 6)}, training=True)
