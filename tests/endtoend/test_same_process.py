"""Many plans in one process are what separate processes give."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import shardwright
from tests.endtoend.families import build, inputs_of

REQUESTS = (
    ("gpt", 2, "train"),
    ("llama", 4, "train"),
    ("gpt", 4, "prefill"),
    ("llama", 2, "train"),
)


def plan_text(name: str, gpus: int, phase: str) -> str:
    """A plan as JSON without the times that planning took, and its generated module."""
    model = build(name).float()
    plan = shardwright.plan(model, inputs_of(name), gpus=gpus, cluster="h100", phase=phase)
    data = plan.to_json()
    del data["search"]["seconds"]
    return json.dumps(data, sort_keys=True) + plan.module_source()


def test_the_order_of_plans_does_not_matter() -> None:
    forward = [plan_text(*request) for request in REQUESTS]
    backward = [plan_text(*request) for request in reversed(REQUESTS)]
    assert forward == backward[::-1]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as alone:
        assert forward == list(alone.map(plan_text, *zip(*REQUESTS, strict=True)))
