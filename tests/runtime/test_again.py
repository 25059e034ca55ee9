"""Weights that were moved are freed in forward and come back in backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.runtime import (
    Layer,
    Param,
    RankError,
    RankPool,
    ShardedModule,
    Weight,
    count_collectives,
)

Pool = Callable[[int], RankPool]
DEPTH, WIDTH = 4, 7  # 7 rows over 2 x 2 ranks: uneven on both axes
F64 = torch.float64


@dataclass(frozen=True)
class Report:
    alive: int  # moved weights still in memory when forward is done
    most_alive: int  # in backward, at a layer's end
    error: float  # largest of all gradients
    output_freed: bool
    calls: tuple[int, int, int]  # gathers in forward, gathers and reduce-scatters in backward


def use(kind: str, x: Tensor, w: Tensor) -> Tensor:
    """One layer; `w` (WIDTH, WIDTH) is used as autograd meets it in models."""
    if kind == "linear":
        return torch.tanh(torch.nn.functional.linear(x, w))
    if kind == "transposed view":
        return torch.tanh(x @ w.view(-1).view(WIDTH, WIDTH).t())
    if kind == "twice":
        return torch.tanh(x @ w) + torch.sin(x @ w.t())
    if kind == "twice in one":
        return torch.tanh(x @ (w @ w.t()))
    return torch.exp(0.1 * x * w[0]) * torch.rsqrt(1 + w[1:2] ** 2)  # rows, saved as outputs too


def module(kind: str, gathered: list[weakref.ref[torch.UntypedStorage]]) -> Any:
    class Block(Layer):
        WEIGHTS = {"w": Weight("S0,S0", "V,V", ("S0,V",))}

        def forward(self, x: Tensor) -> Tensor:
            gathered.append(weakref.ref(self.w.untyped_storage()))
            return use(kind, x, self.w)

    class Model(ShardedModule):
        MESH = {"dp": 2, "tp": 2}
        LAYERS = {"layers": [Block] * DEPTH}
        PARAMETERS = {f"layers.{i}.w": Param((WIDTH, WIDTH), F64, "S0,S0") for i in range(DEPTH)}
        INPUTS = {}
        OUTPUTS = ()

        def forward(self, h: Tensor, watch: Callable[[Tensor], None]) -> Tensor:
            for each in self.layers:
                h = each(h)
                h.register_hook(watch)
            return h

    return Model


def train(kind: str) -> Report:
    gc.disable()  # what is freed must be freed by counting references
    torch.manual_seed(0)
    full = {f"layers.{i}.w": torch.randn(WIDTH, WIDTH, dtype=F64) for i in range(DEPTH)}
    x = torch.randn(3, WIDTH, dtype=F64)
    gathered: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0

    def count() -> int:
        return sum(ref() is not None for ref in gathered)

    def watch(_: Tensor) -> None:
        nonlocal most
        most = max(most, count())

    model = module(kind, gathered).from_state_dict(full)
    with count_collectives() as counter:
        h = model(x, watch)
        alive = count()
        h.sum().backward()
    calls = [
        counter.calls(op, phase=phase)
        for op, phase in (
            ("all_gather", "forward"),
            ("all_gather", "backward"),
            ("reduce_scatter", "backward"),
        )
    ]
    wholes = {name: w.clone().requires_grad_() for name, w in full.items()}
    want = x
    for w in wholes.values():
        want = use(kind, want, w)
    (4 * want.sum()).backward()  # R -> V: the four ranks' gradients are added up
    error = 0.0
    for name, grad in model.full_gradients().items():
        error = max(error, (grad - wholes[name].grad).abs().max().item())
    output = weakref.ref(h.untyped_storage())
    del h
    gc.enable()
    return Report(alive, most, error, output() is None, (calls[0], calls[1], calls[2]))


KINDS = ["linear", "transposed view", "twice", "twice in one", "elementwise"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_freed_and_come_again(pool: Pool, kind: str) -> None:
    for report in pool(4).run(train, kind):
        assert report.alive == 0 and report.most_alive == 0
        assert report.error < 1e-12
        assert report.output_freed
        forward, again, scattered = report.calls
        assert forward == scattered == 2 * DEPTH
        # The first layer's weight is not needed where its input has no gradient.
        assert again == 2 * DEPTH - (2 if kind in ("linear", "transposed view", "twice") else 0)


def change_in_place() -> None:
    class Model(ShardedModule):
        MESH = {"x": 2}
        PARAMETERS = {"w": Param((4,), F64, "S0")}
        WEIGHTS = {"w": Weight("S0", "V")}
        INPUTS = {}
        OUTPUTS = ()

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.w
            z = y.pow(2).sum()
            y.add_(1)
            return z

    Model()(torch.ones(4, dtype=F64)).backward()


def test_a_saved_tensor_that_is_changed_in_place_is_refused(pool: Pool) -> None:
    message = r"of shape \(4,\) that backward needs was changed in place"
    with pytest.raises(RankError, match=message):
        pool(2).run(change_in_place)
