"""A stack of small layers whose weights move, written by hand, and the same in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.runtime import Layer, Param, ShardedModule, Weight

WIDTH = 6
ROWS = (6, 12, 6, 24, 6, 6)  # of the layers' weights: each maps WIDTH numbers to WIDTH again
F64 = torch.float64


def layer(h: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return torch.tanh(h @ w.t()).unflatten(1, (-1, WIDTH)).sum(1) * scale


def start() -> Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH, dtype=F64).view(3, WIDTH)


def state() -> dict[str, Tensor]:
    """Full tensors by name."""
    generator = torch.Generator().manual_seed(0)
    found = {"head": torch.randn(WIDTH, WIDTH, dtype=F64, generator=generator)}
    for i, n in enumerate(ROWS):
        found[f"layers.{i}.w"] = torch.randn(n, WIDTH, dtype=F64, generator=generator) * 0.3
        found[f"layers.{i}.scale"] = torch.randn(WIDTH, dtype=F64, generator=generator)
    return found


def run_in_order(model: Any, h: Tensor) -> Tensor:
    for each in model.layers:
        h = each(h)
    return h


def stacked(
    mesh: dict[str, int],
    big: Weight,
    small: Weight,
    *,
    frozen: Sequence[int] = (),
    run: Callable[[Any, Tensor], Any] = run_in_order,
    seen: Callable[[int], None] = lambda index: None,
) -> ShardedModule:
    """The model: matrices are moved as `big` says, vectors as `small`; `seen` is told of each
    layer that runs."""

    class Block(Layer):
        WEIGHTS = {"w": big, "scale": small}

        def forward(self, h: Tensor) -> Tensor:
            seen(self.index)
            return layer(h, self.w, self.scale)

    class Model(ShardedModule):
        MESH = mesh
        LAYERS = {"layers": [Block] * len(ROWS)}
        PARAMETERS = {"head": Param((WIDTH, WIDTH), F64, big.stored)} | {
            f"layers.{i}.{name}": Param(shape, F64, weight.stored, trainable=i not in frozen)
            for i, n in enumerate(ROWS)
            for name, shape, weight in (("w", (n, WIDTH), big), ("scale", (WIDTH,), small))
        }
        WEIGHTS = {"head": Weight(big.stored, big.used, big.via, stages=(1, 1))}
        INPUTS = {}
        OUTPUTS = ()

        def forward(self, h: Tensor) -> Any:
            h = run(self, h)
            return torch.sin(h @ self.head) if isinstance(h, Tensor) else h

    model = Model.from_state_dict(state())
    for i, each in enumerate(model.layers):
        each.index = i
    return model


def expected(
    frozen: Sequence[int] = (), loss: Callable[[Tensor], Tensor] = lambda h: h.square().sum()
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss and all gradients of one process."""
    whole = {name: t.requires_grad_() for name, t in state().items()}
    for i in frozen:
        whole[f"layers.{i}.w"].requires_grad_(False)
        whole[f"layers.{i}.scale"].requires_grad_(False)
    h = start()
    for i in range(len(ROWS)):
        h = layer(h, whole[f"layers.{i}.w"], whole[f"layers.{i}.scale"])
    value = loss(torch.sin(h @ whole["head"]))
    value.backward()
    return value.detach(), {name: t.grad for name, t in whole.items()}
