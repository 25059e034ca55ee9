"""What a user may hand to a module by mistake: one sentence, a TypeError or a ValueError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import shardwright as sw
from shardwright.facts import given
from shardwright.runtime import run_ranks
from shardwright.trusted import import_source
from tests.ir.models import huggingface_configs, huggingface_model

IDS = torch.zeros(2, 8, dtype=torch.int64)
HUGE = 10**15

# what is called -> the error
TRAINED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "large ids": (
        lambda m: m.shard_inputs(input_ids=IDS + 10**6, labels=IDS),
        "ValueError: `input_ids` holds 1000000; the model takes numbers below",
    ),
    "forward of None": (
        lambda m: m(input_ids=None, labels=IDS),
        "ValueError: input `input_ids` is None (NoneType); the plan has a tensor there",
    ),
    "forward of a list": (
        lambda m: m(input_ids=IDS.tolist(), labels=IDS),
        "ValueError: input `input_ids` is a container; the plan has one tensor or value there",
    ),
    "forward without labels": (
        lambda m: m(IDS),
        "ValueError: the module takes the inputs input_ids, labels; missing: lab",
    ),
    "parts of None": (
        lambda m: m.shard_inputs(input_ids=None, labels=IDS),
        "ValueError: input `input_ids` is None (NoneType); the plan has a tensor there",
    ),
    "state of None": (
        lambda m: type(m).from_state_dict(None),
        "TypeError: a state dict maps names to tensors, got None (NoneType)",
    ),
    "state with None": (
        lambda m: type(m).from_state_dict({"lm_head.weight": None}),
        "TypeError: `state dict: lm_head.weight` must be a tensor, got None (NoneType)",
    ),
}
SERVED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cache of text": (
        lambda m: m.new_cache("2", 8), "TypeError: `batch` must be a whole number, got '2' (str)",
    ),
    "half a token": (
        lambda m: m.new_cache(2, 2.5), "TypeError: `tokens` must be a whole number, got 2.5",
    ),
    "no sequences": (lambda m: m.new_cache(0, 8), "ValueError: batch=0: expected 1 or more"),
    "huge cache": (
        lambda m: m.new_cache(2, HUGE), f"ValueError: caches for 2 sequences of {HUGE} tokens, ",
    ),
    "list": (
        lambda m: m.prefill([[1, 2], [3, 4]]),
        "TypeError: `input_ids` must be a tensor, got [[1, 2], [3, 4]] (list)",
    ),
    "large id": (
        lambda m: m.prefill(IDS + 999), "ValueError: `input_ids` holds 999; the model takes",
    ),
    "text": (
        lambda m: m.generate("hello", 2), "TypeError: `input_ids` must be a tensor, got 'hello'",
    ),
    "empty batch": (
        lambda m: m.generate(IDS[:0], 2),
        "ValueError: input_ids must be integers (batch, tokens), one or more, got torch.int64 (0,",
    ),
    "two and a half": (
        lambda m: m.generate(IDS, 2.5),
        "TypeError: `max_new_tokens` must be a whole number, got 2.5 (float)",
    ),
    "decode text": (lambda m: m.decode("a"), "TypeError: `tokens` must be a tensor, got 'a' (str)"),
}  # fmt: skip


def said(path: Path, served: bool) -> dict[str, str]:
    """What each call raises, on a rank of its own."""
    model = import_source(path).ShardedModel()
    if served:
        model.new_cache(2, 16)
    found: dict[str, str] = {}
    for name, (call, _) in (SERVED if served else TRAINED).items():
        try:
            call(model)
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("served", [False, True])
def test_mistakes(tmp_path: Path, served: bool) -> None:
    model = huggingface_model("llama", huggingface_configs()["llama"], "meta")
    inputs = {"input_ids": IDS} if served else {"input_ids": IDS, "labels": IDS}
    phase = {"phase": "prefill"} if served else {}
    plan = sw.plan(model, inputs, gpus=1, cluster="cpu", **phase)
    plan.write_module(tmp_path / "model.py")
    (found,) = run_ranks(said, 1, tmp_path / "model.py", served)
    for name, (_, message) in (SERVED if served else TRAINED).items():
        assert found.get(name, "nothing").startswith(message), (name, found.get(name))
        assert "\n" not in found[name]


def test_broken_checkpoints(tmp_path: Path) -> None:
    from shardwright.runtime.module.checkpoint import Safetensors

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"xx" * 100)
    with pytest.raises(ValueError, match="not in the safetensors format") as caught:
        Safetensors(path)
    assert str(path) in str(caught.value) and isinstance(caught.value.__cause__, SafetensorError)


@pytest.mark.parametrize(
    ("value", "error"), [(3, None), (0, ValueError), (True, TypeError), ("3", TypeError)]
)
def test_whole_numbers(value: object, error: type[Exception] | None) -> None:
    if error is None:
        assert given.whole("n", value, 1) == value
        return
    with pytest.raises(error, match="n"):
        given.whole("n", value, 1)
