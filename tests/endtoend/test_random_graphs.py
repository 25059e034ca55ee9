"""Random small models under random decisions on random meshes give right results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture
from shardwright.ir.passes.fold import fold
from shardwright.ir.reference.widen import widened
from shardwright.runtime import RankPool
from tests.sharded import builder_of, check, mesh_of, random_decisions, reference

Pool = Callable[[int], RankPool]
MESHES = ((2,), (3,), (4,), (2, 2), (4, 2), (2, 2, 2))
SIZES = (2, 3, 4, 6, 8)
ROWS = 7  # of lookup tables: divides by nothing


class Genes:
    """Choices drawn one after another from a list of numbers; 0 when it is used up."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._left = list(reversed(numbers))

    def below(self, n: int) -> int:
        return self._left.pop() % n if self._left else 0


class RandomModel(nn.Module):
    """`steps` ops, each on results of earlier ones; parameters are made on the first call."""

    def __init__(self, numbers: Sequence[int], steps: int) -> None:
        super().__init__()
        self.numbers, self.steps = numbers, steps
        self.weights = nn.ParameterList()
        self._made = False

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        genes, self._used = Genes(self.numbers), 0
        made = [x, F.embedding(ids, self.weight(ROWS, SIZES[genes.below(len(SIZES))]))]
        for _ in range(self.steps):
            step = STEPS[genes.below(len(STEPS))]
            made.append(step(self, made[-1 - genes.below(len(made))], made, genes))
        outputs = made[-1], made[-1 - genes.below(len(made))] * self.weight(1)
        self._made = True
        return outputs

    def weight(self, *shape: int) -> Tensor:
        if not self._made:
            self.weights.append(nn.Parameter(torch.randn(*shape) / 2))
        self._used += 1
        return self.weights[self._used - 1]


Step = Callable[[RandomModel, Tensor, list[Tensor], Genes], Tensor]


def linear(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    width = SIZES[genes.below(len(SIZES))]
    bias = model.weight(width) if genes.below(2) else None
    return F.linear(x, model.weight(width, x.shape[-1]), bias)


def add(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    same = [y for y in made if y.shape == x.shape and y.is_floating_point()]
    other = same[genes.below(len(same))] if genes.below(3) else model.weight(x.shape[-1])
    return x - other if genes.below(3) == 2 else x + other


def multiply(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    same = [y for y in made if y.shape == x.shape]
    other = same[genes.below(len(same))] if genes.below(3) else model.weight(x.shape[-1])
    return torch.tanh(x) * other


def norm(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    shape = (x.shape[-1],)
    if genes.below(2):
        return F.rms_norm(x, shape, model.weight(*shape), eps=1e-3)
    return F.layer_norm(x, shape, model.weight(*shape), model.weight(*shape), eps=1e-3)


def pointwise(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    return (torch.sigmoid, F.gelu, torch.neg, F.silu, torch.cos)[genes.below(5)](x)


def softmax(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    return torch.softmax(x, dim=genes.below(x.ndim))


def transpose(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    return x.transpose(genes.below(x.ndim), genes.below(x.ndim))


def merge(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    if x.ndim < 3:
        return x.unsqueeze(genes.below(x.ndim + 1))
    at = genes.below(x.ndim - 1)
    return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])


def split(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    at = genes.below(x.ndim)
    inner = (2, 3)[genes.below(2)]
    if x.shape[at] % inner or x.ndim > 4:
        return x * 2
    return x.unflatten(at, (x.shape[at] // inner, inner))


def chunk(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    at = genes.below(x.ndim)
    if x.shape[at] % 2:
        return torch.cat((x, x), dim=at)
    left, right = x.chunk(2, dim=at)
    return torch.cat((-right, left), dim=at)


def reduction(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    if x.ndim < 2:
        return x + 1
    dim, keep = genes.below(x.ndim), bool(genes.below(2))
    reduce = (torch.sum, torch.mean, torch.amax)[genes.below(3)]
    return reduce(x, dim=dim, keepdim=keep)


def product(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    if x.ndim < 2:
        return x * 3
    return torch.matmul(x, x.transpose(-1, -2)) / 4


def attention(model: RandomModel, x: Tensor, made: list[Tensor], genes: Genes) -> Tensor:
    if x.ndim != 3:
        return linear(model, x, made, genes)
    heads, kv_heads, width = ((2, 1), (4, 2), (4, 4))[genes.below(3)] + (2,)
    (b, s, h), causal = x.shape, bool(genes.below(2))
    q = F.linear(x, model.weight(heads * width, h)).view(b, s, heads, width).transpose(1, 2)
    k = F.linear(x, model.weight(kv_heads * width, h)).view(b, s, kv_heads, width).transpose(1, 2)
    v = F.linear(x, model.weight(kv_heads * width, h)).view(b, s, kv_heads, width).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return y.transpose(1, 2).reshape(b, s, heads * width)


STEPS: tuple[Step, ...] = (
    linear, add, multiply, norm, pointwise, softmax, transpose, merge, split, chunk, reduction,
    product, attention, linear, add,
)  # fmt: skip


@pytest.mark.long
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(
    numbers=st.lists(st.integers(0, 2**16), min_size=20, max_size=60),
    steps=st.integers(1, 8),
    sizes=st.sampled_from(MESHES),
    seed=st.integers(0, 2**16),
)
def test_random_models(
    pool: Pool, numbers: list[int], steps: int, sizes: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    model = RandomModel(numbers, steps)
    shape = [SIZES[n % len(SIZES)] for n in numbers[:3]]
    inputs = {"x": torch.randn(*shape), "ids": torch.randint(0, ROWS, (shape[0], shape[1]))}
    model(**inputs)
    graph = widened(fold(capture(model, inputs, training=True)))
    params = {name: t.detach().double() for name, t in model.state_dict().items()}
    inputs["x"] = inputs["x"].double()
    expected = reference(graph, params, inputs)
    made = builder_of(graph, mesh_of(*sizes))
    ranks = pool(made.network.mesh.ranks)
    for again in range(2):
        decisions = random_decisions(made, seed + again)
        check(ranks, made, decisions, params, inputs, expected, tolerance=1e-9)
