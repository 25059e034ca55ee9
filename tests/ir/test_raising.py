"""Written-out formulas become operators, repeated and layer-independent nodes are computed once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.invariants import computed_once
from shardwright.ir.passes.raising import raised
from shardwright.ir.reference.interpret import interpret

Formula = Callable[..., Tensor]
X = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ANGLES = torch.linspace(0, 3, 20, dtype=torch.float64).view(1, 1, 5, 4)


class Calls(nn.Module):
    """`formula(x, weight, bias)`, or with cosines and sines in their place."""

    def __init__(self, formula: Formula, dtype: torch.dtype) -> None:
        super().__init__()
        self.formula = formula
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=dtype))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 8, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.bias)


def llama_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x32 = x.to(torch.float32)
    return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (normed * (1.0 + w.float())).type_as(x)


def bare_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)) + b


def layer_norm_of_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    spread = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(spread + 1e-5) * w + b


def tanh_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotary(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    angles = torch.cat((ANGLES, ANGLES), -1).to(x)
    return x * angles.cos() + rotate_half(x) * angles.sin()


def rotary_in_pairs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    angles = ANGLES.repeat_interleave(2, -1).to(x)
    return rotate_pairs(x) * angles.sin() + x * angles.cos()


def rotary_of_halves(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = ANGLES.to(x).cos(), ANGLES.to(x).sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotary_of_pairs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = ANGLES.to(x).cos(), ANGLES.to(x).sin()
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def rotary_apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = ANGLES.to(x).cos(), ANGLES.to(x).sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


RMS, LAYER, GELU, ROTARY = (
    "aten.rms_norm.default",
    "aten.layer_norm.default",
    "aten.gelu.default",
    "shardwright.rotary",
)


def graph_of(formula: Formula, dtype: torch.dtype = torch.float64) -> tuple[Calls, Graph]:
    model = Calls(formula, dtype)
    return model, fold(capture(model, {"x": X.to(dtype)}, training=True))


@pytest.mark.parametrize(
    ("formula", "op", "left"),
    [
        (llama_norm, RMS, 0),
        (gemma_norm, RMS, 4),  # casts of x, of the weight and of the result, and 1 + w
        (bare_norm, RMS, 0),
        (layer_norm, LAYER, 0),
        (layer_norm_of_variance, LAYER, 0),
        (tanh_gelu, GELU, 0),
        (rotary, ROTARY, 3),  # angles, cosines, sines
        (rotary_in_pairs, ROTARY, 3),
        (rotary_of_halves, ROTARY, 2),
        (rotary_of_pairs, ROTARY, 2),
        (rotary_apart, ROTARY, 2),
    ],
)
def test_formulas(formula: Formula, op: str, left: int) -> None:
    """Found in bfloat16, where casts stand; equal in value and gradients in float64."""
    _, half = graph_of(formula, torch.bfloat16)
    ops = Counter(node.op for node in computed_once(raised(half)).nodes)
    assert ops[op] == 1
    assert ops.total() == 1 + left or op == ROTARY

    model, graph = graph_of(formula)
    results: list[list[Tensor]] = []
    for each in (graph, raised(graph)):
        state = {
            name: p.detach().clone().requires_grad_() for name, p in model.state_dict().items()
        }
        x = X.clone().requires_grad_()
        (out,) = interpret(each, state, {"x": x}).values()
        out.square().sum().backward()
        grads = [t.grad for t in (x, *state.values()) if t.grad is not None]
        results.append([out.detach(), *grads])
    assert op in {node.op for node in raised(graph).nodes}
    bound = 1e-5 if formula in (llama_norm, gemma_norm) else 1e-12  # those go through float32
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def over_tokens(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6))


def cubed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))


def of_another(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6))


def unbiased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * w + b


def turned_back(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    angles = torch.cat((ANGLES, ANGLES), -1).to(x)
    return x * angles.cos() - rotate_half(x) * angles.sin()


def without_minus(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    angles = torch.cat((ANGLES, ANGLES), -1).to(x)
    return x * angles.cos() + torch.cat((x[..., 4:], x[..., :4]), -1) * angles.sin()


def another_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.05 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


@pytest.mark.parametrize(
    "formula",
    [over_tokens, cubed, of_another, unbiased, turned_back, without_minus, another_gelu],
)
def test_what_only_looks_like_one(formula: Formula) -> None:
    _, graph = graph_of(formula)
    assert not {RMS, LAYER, GELU, ROTARY} & {node.op for node in raised(graph).nodes}


class Layer(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), scale, dtype=torch.float64))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        turned = x * positions.cos().unsqueeze(-1) + positions.cos().unsqueeze(-1)
        return x + torch.tanh(turned * self.weight)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(1.0 + i) for i in range(4)])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return x * positions.cos().unsqueeze(-1)


def test_what_does_not_depend_on_the_layer_is_computed_once() -> None:
    model = Layers()
    positions = torch.arange(5, dtype=torch.float64)
    inputs = {"x": X[0, 0], "positions": positions}
    graph = fold(capture(model, inputs, training=True))
    once = computed_once(graph)
    ops = Counter(node.op for node in once.nodes)
    assert ops["aten.cos.default"] == ops["aten.unsqueeze.default"] == 1
    (loop,) = once.loops
    assert len(loop.invariants) == 1 and len(loop.blocks[0].inputs) == 2
    assert [node.op for node in loop.blocks[0].nodes] == [
        "aten.mul.Tensor", "aten.add.Tensor", "aten.mul.Tensor", "aten.tanh.default",
        "aten.add.Tensor",
    ]  # fmt: skip
    state = dict(model.state_dict())
    (a,), (b,) = (interpret(each, state, inputs).values() for each in (graph, once))
    assert torch.equal(a, b) and torch.equal(a, model(**inputs))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5) + nn.functional.dropout(x, 0.5)


def test_random_numbers_are_drawn_each_time() -> None:
    graph = fold(capture(Noise(), {"x": X.clone().requires_grad_()}, training=True))
    drawn = [node for node in computed_once(graph).nodes if "dropout" in node.op]
    assert len(drawn) == 2


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).to(torch.float64) + x * 2.0


def test_one_and_one_point_zero_are_not_the_same() -> None:
    inputs = {"x": torch.arange(4)}
    graph = fold(capture(Numbers(), inputs, training=False))
    (a,), (b,) = (interpret(each, {}, inputs).values() for each in (graph, computed_once(graph)))
    assert torch.equal(a, b) and a.dtype == b.dtype
