"""Bytes of training state, by hand."""

from __future__ import annotations

import pytest

from shardwright.costmodel.memory import optimizer_step_bytes, parameter_state_bytes


@pytest.mark.parametrize(
    "optimizer, learns, want",
    [  # 1000 elements of 2 bytes: (parameter, gradient, optimizer)
        ("adamw", True, (2000, 2000, 4000)),
        ("sgd", True, (2000, 2000, 0)),
        ("none", True, (2000, 2000, 0)),
        ("adamw", False, (2000, 0, 0)),
    ],
)
def test_state(optimizer: str, learns: bool, want: tuple[int, int, int]) -> None:
    state = parameter_state_bytes(1000, 2, optimizer, learns)
    assert (state.parameter, state.gradient, state.optimizer) == want
    assert state.total == sum(want)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_state_is_what_torch_keeps(optimizer: str) -> None:
    import torch

    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    step = kinds[optimizer]([weight], lr=0.1)
    weight.sum().backward()
    step.step()
    kept = [v for v in step.state[weight].values() if torch.is_tensor(v) and v.ndim > 0]
    assert weight.grad is not None
    state = parameter_state_bytes(1000, 2, optimizer)
    assert state.optimizer == sum(tensor.nbytes for tensor in kept)
    assert state.gradient == weight.grad.nbytes


@pytest.mark.parametrize("optimizer, want", [("adamw", 14000), ("sgd", 6000), ("none", 0)])
def test_step_traffic(optimizer: str, want: int) -> None:
    assert optimizer_step_bytes(1000, 2, optimizer) == want


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match="unknown optimizer `lion`; expected one of adamw, muon, sgd"
    ):
        parameter_state_bytes(1, 2, "lion")
    with pytest.raises(ValueError, match="impossible size"):
        parameter_state_bytes(-1, 2)
