"""Complex numbers: rotary tables as Meta writes them, spectral weights, complex inputs, Fourier."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import TensorType
from shardwright.ir.reference.widen import widened
from shardwright.planner.plan.store import plan_from_json, plan_to_json
from shardwright.runtime import RankPool
from tests.sharded import (
    assert_close,
    builder_of,
    check,
    combine,
    flatten,
    mesh_of,
    random_decisions,
    reference,
)

Pool = Callable[[int], RankPool]
BATCH, TOKENS, VOCABULARY, WIDTH, HEADS = 4, 8, 32, 32, 4


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of x (b, s, n, d) as complex numbers, each turned by `turns` (s, d / 2)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(3)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (HEADS, -1)) for w in (self.wq, self.wk, self.wv))
        q, k, v = (t.transpose(1, 2) for t in (rotated(q, turns), rotated(k, turns), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(out.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Llama(nn.Module):
    """`freqs_cis` is a complex buffer, in a state dict or not."""

    def __init__(self, *, persistent: bool = False) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        rates = 100.0 ** -torch.linspace(0, 1, WIDTH // HEADS // 2)
        angles = torch.outer(torch.arange(2 * TOKENS), rates)
        turns = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("freqs_cis", turns, persistent=persistent)

    def forward(self, tokens: Tensor) -> Tensor:
        x, turns = self.tok(tokens), self.get_buffer("freqs_cis")[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turns)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, 1).flatten())


class Spectral(nn.Module):
    """Complex parameters, products, conjugates, absolute values; a complex number of a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, WIDTH)
        self.filter = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) / WIDTH**0.5)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        z = (torch.complex(x, x.sin()) * self.filter) @ self.mix * (1 - 0.5j)
        y = z.real + z.imag * z.conj().imag + z.abs() + z.angle()
        return F.cross_entropy(self.head(y).flatten(0, 1), tokens.flatten())


class Fourier(nn.Module):
    """FNet's mixing: torch.fft runs replicated."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.up = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.tok(tokens))
        x = x + torch.fft.fft2(x, dim=(-2, -1)).real
        x = x + torch.fft.irfft(torch.fft.rfft(x, dim=1) * 2, n=x.shape[1], dim=1)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


class Signals(nn.Module):
    """Complex inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.up(tokens.real) - self.down(tokens.imag))
        return torch.complex(x, self.down(x)) * tokens


def wide(model: nn.Module) -> nn.Module:
    """Every number in 64 bits, complex ones as pairs (`nn.Module.double` leaves those)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return model


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, Signals):
        shape = (BATCH, TOKENS, WIDTH)
        return {"tokens": torch.randn(shape, generator=generator, dtype=torch.complex128)}
    return {"tokens": torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)}


KINDS: dict[str, Callable[[], nn.Module]] = {
    "buffer": Llama,
    "persistent buffer": lambda: Llama(persistent=True),
    "parameters": Spectral,
    "fourier": Fourier,
    "inputs": Signals,
}


@pytest.mark.parametrize("sizes", [(2,), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.some(4)
def test_three_layouts(pool: Pool, kind: str, sizes: tuple[int, ...]) -> None:
    """Outputs, all gradients and counted bytes under any decisions, and those of the model."""
    torch.manual_seed(0)
    model = wide(KINDS[kind]())
    inputs = inputs_of(model)
    graph = widened(capture(model, inputs, training=True))
    state = {name: t.detach() for name, t in model.state_dict().items()}
    want = reference(graph, state, inputs)
    outputs = dict(flatten(model(**inputs)))
    combine({str(path): t for path, t in outputs.items()}).backward()
    for name, parameter in model.named_parameters():
        gradient = want[1][name]
        assert gradient is not None and parameter.grad is not None
        assert_close(gradient, parameter.grad, 1e-9, name)
    builder = builder_of(graph, mesh_of(*sizes))
    for seed in range(3):
        decisions = random_decisions(builder, seed)
        check(pool(prod(sizes)), builder, decisions, state, inputs, want, tolerance=1e-9)


def test_bytes_and_prices() -> None:
    """Two real numbers each; a product is four of them."""
    assert TensorType((2, 3), torch.complex64).bytes == 2 * 3 * 8
    torch.manual_seed(0)
    model, meta = Spectral(), torch.device("meta")
    plan = shardwright.plan(
        model.to(meta), {"tokens": torch.zeros(8, 64, dtype=torch.int64, device=meta)}, gpus=2,
        precision="own",
    )  # fmt: skip
    read = plan_from_json(json.loads(json.dumps(plan_to_json(plan)))).graph
    assert (read.params, read.body) == (plan.graph.params, plan.graph.body)
    (product,) = (node for node in plan.graph.nodes if node.op == "aten.matmul.default")
    assert plan.work[product.name].forward_s > 0


def test_a_complex_table_in_the_module() -> None:
    """Its numbers are written as Python's, and read from the plan's file."""
    model = Llama()
    plan = shardwright.plan(model, inputs_of(model), gpus=2, cluster="cpu", mesh="2")
    assert "torch.complex64" in plan.module_source() and "(1+0j)" in plan.module_source()
    read = plan_from_json(json.loads(json.dumps(plan_to_json(plan)))).graph
    assert (read.params, read.body) == (plan.graph.params, plan.graph.body)
