"""What a layer keeps that keeps a part of what it makes, in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shardwright.compat.torch import TorchDispatchMode
from shardwright.runtime.live import LiveBytes
from shardwright.runtime.mesh.keeping import keeping, operators_of

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
N = 64


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Its two products, with a norm before and an activation between them."""
    return x + torch.tanh(torch.layer_norm(x, (N,)) @ up) @ down


def given() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, up, down = (torch.randn(N, N, dtype=torch.float64) for _ in range(3))
    return x.requires_grad_(), up.requires_grad_(), down.requires_grad_()


def kept(layer: Layer, *inputs: Tensor) -> Tensor:
    return checkpoint(
        layer, *inputs, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: keeping("products, attention"),
    )  # fmt: skip


def gradients(out: Tensor, inputs: tuple[Tensor, ...], *, retain: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(out.sum(), inputs, retain_graph=retain))


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_those_of_a_layer_that_keeps_all(passes: int) -> None:
    """Where backward comes a second time, all is made again."""
    inputs = given()
    want = gradients(mlp(*inputs), inputs)
    out = kept(mlp, *inputs)
    for n in range(passes):
        with Calls() as calls:
            found = gradients(out, inputs, retain=n + 1 < passes)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert calls.counts["aten.tanh"] == 1
        assert calls.counts["aten.mm"] == 4 + n  # of the layer's two the second has no more to give


def test_what_is_kept() -> None:
    """What the first product gives; not what the second does, which only the sum takes."""
    inputs = given()
    with LiveBytes(inputs) as live:
        out = kept(mlp, *inputs)
        assert live.now == (len(inputs) + 2) * N * N * 8  # with the result
        del out
        assert live.now == len(inputs) * N * N * 8


def test_what_is_changed_in_place_is_an_error() -> None:
    def layer(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.tanh((x @ up).mul_(2)) @ down

    inputs = given()
    out = kept(layer, *inputs)
    with pytest.raises(RuntimeError, match="was changed in place after a layer kept it"):
        gradients(out, inputs)


def test_names_of_what_is_kept() -> None:
    assert operators_of("products") < operators_of("products, attention")
    with pytest.raises(ValueError, match=r"keep='norms': `norms` is none of products, attention"):
        operators_of("norms")
