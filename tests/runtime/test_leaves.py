"""Modules of torch's own in generated modules: their sizes are those of what this rank holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.runtime.module.leaves import LEAVES

X = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
WEIGHT = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
TABLE = torch.arange(10, dtype=torch.float64).reshape(5, 2)
IDS = torch.tensor([4, 0])


@pytest.mark.parametrize(
    "kind, sizes, options, parameters, x",
    [
        (nn.Linear, (4, 1), {}, {"weight": WEIGHT[None]}, X),
        (nn.RMSNorm, ((4,),), {"eps": 0.5}, {"weight": WEIGHT}, X),
        (nn.LayerNorm, ((4,),), {"eps": 0.5}, {"weight": WEIGHT, "bias": WEIGHT + 1}, X),
        (nn.Embedding, (5, 2), {}, {"weight": TABLE}, IDS),
        (nn.Embedding, (5, 2), {"padding_idx": 0}, {"weight": TABLE}, IDS),
    ],
    ids=["linear", "rms_norm", "layer_norm", "embedding", "padding"],
)
def test_as_torch_has_it(
    kind: type[nn.Module],
    sizes: tuple[Any, ...],
    options: dict[str, Any],
    parameters: dict[str, Tensor],
    x: Tensor,
) -> None:
    """A module with parameters registered later computes and prints as one made at once."""
    bias: dict[str, Any] = {"bias": False} if kind is nn.Linear else {}
    whole, ours = kind(*sizes, **options, **bias, dtype=torch.float64), LEAVES[kind](**options)
    for name, value in parameters.items():
        setattr(whole, name, nn.Parameter(value))
        ours.register_parameter(name, nn.Parameter(value))
    assert isinstance(ours, kind) and str(ours).removesuffix(")") in str(whole)
    for module in (ours, whole):
        module(x).square().sum().backward()
    assert torch.equal(ours(x), whole(x))
    for name in parameters:
        gradient, want = ours.get_parameter(name).grad, whole.get_parameter(name).grad
        assert gradient is not None and want is not None and torch.equal(gradient, want)
