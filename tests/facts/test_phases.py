"""Phases: what each declares, what is refused, and that a new one needs its declaration alone."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator

import pytest
import torch

import shardwright
from shardwright.facts.phases import PHASES, Phase, find_phase, register
from shardwright.planner.errors import PlanError
from shardwright.runtime import RankPool
from tests.endtoend.test_serving import model_of
from tests.sharded import import_source

SPECULATE = Phase("speculate", serves=True, needs_cache=True, tokens=4, context=32)
SCORE = Phase("score", tokens=16, run="scored batch")


def test_what_each_declares() -> None:
    rows = [
        (each.name, each.backward, each.tokens, each.context, each.answer, each.optimizer)
        for each in PHASES.values()
    ]
    assert rows == [
        ("train", True, 1024, 0, 0, "adamw"),
        ("prefill", False, 1024, 0, 0, "none"),
        ("decode", False, 1, 8192, 0, "none"),
        ("append", False, 1024, 8192, 0, "none"),
        ("serve", False, 1024, 0, 256, "none"),
    ]
    assert find_phase("serve").programs == ("prefill", "decode")
    assert find_phase("append").programs == ("append",)


@pytest.mark.parametrize(
    "refused, said",
    [
        (lambda: find_phase("decoding"), "unknown phase `decoding`; expected one of train, prefil"),
        (lambda: find_phase("train").check_context(8), "train has no cache.* decode and append"),
        (lambda: find_phase("prefill").check_context(8), "prefill begins with an empty cache"),
        (lambda: find_phase("decode").check_answer(8), "only phase serve has output tokens"),
        (lambda: register(Phase("train")), "there is a phase `train` already"),
        (lambda: Phase("tune", backward=True, serves=True), "no backward pass over a KV cache"),
        (lambda: Phase("tune", context=8), "only a phase that serves has a KV cache"),
    ],
)
def test_refusals(refused: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refused()


@contextlib.contextmanager
def registered(phase: Phase) -> Iterator[None]:
    register(phase)
    try:
        yield
    finally:
        del PHASES[phase.name]


def demonstrate(phase: Phase, source: str) -> str:
    printed = io.StringIO()
    with registered(phase), contextlib.redirect_stdout(printed):
        import_source(source).ShardedModel.demo(steps=1)
    return printed.getvalue()


@pytest.mark.parametrize(
    "phase, context, said, words",
    [
        (SPECULATE, 32, "ms per speculate of 2 x 4 tokens over 32 cached ones", "per speculate"),
        (SCORE, 0, "ms per step", "per scored batch"),
    ],
)
def test_a_new_phase_is_planned_reported_and_run(
    pool: Callable[[int], RankPool], phase: Phase, context: int, said: str, words: str
) -> None:
    inputs = {"input_ids": torch.zeros(2, phase.tokens, dtype=torch.long)}
    arguments = {"gpus": 2, "cluster": "cpu", "phase": phase.name}
    with pytest.raises(PlanError, match=f"unknown phase `{phase.name}`"):
        shardwright.plan(model_of("llama"), inputs, **arguments)
    with registered(phase):
        plan = shardwright.plan(model_of("llama"), inputs, **arguments)
        assert plan.request.context == context and not plan.training
        assert words in str(plan)
        source = plan.module_source()
    assert f'PHASE = "{phase.name}"' in source
    assert said in pool(2).run(demonstrate, phase, source)[0]
