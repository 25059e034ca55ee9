"""What a refusal for want of memory advises holds when it is followed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import shardwright
from shardwright.planner.errors import InfeasibleError
from tests.planner.test_report_data import Net


def plan(gpus: int, batch: int, memory_bytes: int) -> shardwright.Plan:
    with torch.device("meta"):
        model, x = Net(), torch.zeros(batch, 2, 64)
    asked: dict[str, Any] = {"gpus": gpus, "cluster": "cpu", "memory_bytes": memory_bytes}
    return shardwright.plan(model, {"x": x}, **asked)


@pytest.mark.parametrize(("gpus", "memory_bytes", "least", "advised"), [
    (2, 600_000, "at least 4 GPUs", 4), (3, 550_000, "at least 4 GPUs", 6),
])  # fmt: skip
@pytest.mark.some(1)
def test_as_many_gpus_as_advised_are_enough(
    gpus: int, memory_bytes: int, least: str, advised: int
) -> None:
    with pytest.raises(InfeasibleError, match=least) as caught:
        plan(gpus, 12, memory_bytes)
    found = re.search(r"\(--gpus (\d+) --batch (\d+)\)$", str(caught.value))
    assert found is not None and found.groups() == (str(advised), "12")
    made = plan(advised, 12, memory_bytes)
    assert made.memory.total <= memory_bytes
