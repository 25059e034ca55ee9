"""Many plans in one process are what separate processes give."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import shardwright
from tests.endtoend.families import build, inputs_of

REQUESTS = (("gpt", 2, "train"), ("llama", 4, "train"), ("gpt", 4, "prefill"))


def plan_text(name: str, gpus: int, phase: str) -> str:
    """A plan as JSON without the times that planning took, and its generated module."""
    model = build(name).float()
    plan = shardwright.plan(model, inputs_of(name), gpus=gpus, cluster="h100", phase=phase)
    data = plan.to_json()
    del data["search"]["seconds"]
    return json.dumps(data, sort_keys=True) + plan.module_source()


@pytest.mark.slow
def test_a_plan_does_not_depend_on_earlier_ones() -> None:
    together = [plan_text(*request) for request in (*REQUESTS, REQUESTS[0])]
    assert together[0] == together[-1]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as alone:
        separate = list(alone.map(plan_text, *zip(*REQUESTS[1:], strict=True)))
    assert together[1:-1] == separate
