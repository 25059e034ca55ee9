"""What would be silently wrong is refused before anything is planned, with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shardwright.capturing import phase_graph
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.capture.location import place
from shardwright.ir.ops.users import FUNCTION
from shardwright.ir.passes.serving import ServingError, serving_graph
from shardwright.loading import load_target


class Round(torch.autograd.Function):
    """A straight-through estimate."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


apply_round = Round.apply  # bound before any capture begins


class Net(nn.Module):
    """A linear layer, and a function of its result."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(8, 8), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(x)).sum()


@pytest.mark.parametrize("act", [lambda x: Round.apply(x), lambda x: apply_round(x)])
def test_own_backwards_are_kept_where_gradients_matter(act: Callable[[Tensor], Tensor]) -> None:
    inputs = {"x": torch.randn(2, 8)}
    for training in (True, False):
        graph = capture_folded(Net(act), inputs, training=training)
        assert [node.op == FUNCTION for node in graph.nodes] == [False, training, False]
    assert torch.equal(apply_round(torch.tensor([0.6])), torch.tensor([1.0]))  # as it was


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_captured_as_what_they_run(reentrant: bool) -> None:
    act = lambda x: checkpoint(torch.relu, x, use_reentrant=reentrant)  # noqa: E731
    graph = capture_folded(Net(act), {"x": torch.randn(2, 8)}, training=True)
    assert [node.op for node in graph.nodes] == [
        "aten.linear.default",
        "aten.relu.default",
        "aten.sum.default",
    ]
    assert all(node.output.differentiable for node in graph.nodes)
    x = torch.randn(2, 2, requires_grad=True)  # outside, checkpoints are as they were
    y: Any = checkpoint(torch.relu, x, use_reentrant=reentrant)
    assert ("Checkpoint" in type(y.grad_fn).__name__) is reentrant


class Mixing(nn.Module):
    """A decoder in which `mix` makes something of all tokens (b, t, h) besides."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.embed, self.qkv, self.head = nn.Embedding(16, 8), nn.Linear(8, 24), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        b, t = input_ids.shape
        x = self.embed(input_ids) + position_ids[..., None]
        q, k, v = (y.view(b, t, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.mix(x) + mixed.transpose(1, 2).reshape(b, t, 8))


def both_ways(x: Tensor) -> Tensor:
    """A convolution that looks ahead, too."""
    y = F.pad(x.transpose(1, 2), (1, 1))
    return F.conv1d(y, torch.ones(8, 1, 3), groups=8).transpose(1, 2)


def by_linear_attention(x: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2)).tril() @ x


def by_recurrence(x: Tensor) -> Tensor:
    """Backwards."""
    state, rows = torch.zeros_like(x[:, 0]), list[Tensor]()
    for t in reversed(range(x.shape[1])):
        state = 0.5 * state + x[:, t]
        rows.append(state)
    return torch.stack(rows[::-1], 1)


MIXING: list[Callable[[Tensor], Tensor]] = [
    both_ways,
    by_linear_attention,
    by_recurrence,
    lambda x: x.cumprod(1),
    lambda x: x.roll(1, 1),
    lambda x: x.flip(1),
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)),
    lambda x: torch.cat((x[:, :1], x[:, :-1]), 1),
]


@pytest.mark.parametrize("mix", MIXING)
def test_tokens_that_mix_outside_attention_are_not_served(mix: Callable[[Tensor], Tensor]) -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    graph = capture_folded(Mixing(mix), inputs, training=False, serving=True)
    with pytest.raises(ServingError, match=r"test_silently_wrong.py:\d+: `aten.* mixes the tokens"):
        serving_graph(graph, 0)


def test_each_token_by_itself_is_served() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    each = Mixing(lambda x: F.softmax(x.flatten(0, 1), -1).cumsum(-1).view(x.shape))
    inputs = {"input_ids": ids, "position_ids": ids}
    assert serving_graph(capture_folded(each, inputs, training=False, serving=True), 0).params


MODEL = """import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.register_buffer("turn", torch.full((4,), 0.5 + 2j), persistent=False)

    def forward(self, x):
        pairs = torch.view_as_complex(self.up(x.to(self.up.weight)).float().unflatten(-1, (4, 2)))
        return torch.view_as_real(pairs * self.turn)

def build_model():
    return Net()

def example_inputs(batch, seq):
    return {"x": torch.randn(batch, seq, 8)}
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_complex_constants_are_not_cast(dtype: str, tmp_path: Path) -> None:
    """A cast would lose their imaginary part."""
    (tmp_path / "model.py").write_text(MODEL)
    loaded = load_target(str(tmp_path / "model.py"), batch=2, seq=4, phase="train", formats=dtype)
    (turn,) = (p for p in phase_graph(loaded, "train", 0).params if p.kind == "constant")
    assert (turn.data, turn.value.type.dtype) == ((0.5 + 2j,) * 4, torch.complex64)


def test_places_are_told_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place(str(tmp_path / "models" / "gpt.py"), 12) == "models/gpt.py:12"
    assert place(f"{tmp_path}_other/gpt.py", 3) == f"{tmp_path}_other/gpt.py:3"
