"""Documents packed into rows, told apart by positions that restart: none attends another.

The reference is transformers' own model with the block-diagonal mask given as a tensor; it computes
rotations and the loss in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.planner.strategies.roles import Roles
from shardwright.runtime import RankPool
from tests.ir.models import batch, huggingface_configs, huggingface_model
from tests.sharded import any_of, builder_of, check, mesh_of

Pool = Callable[[int], RankPool]
DOCUMENTS = ((5, 1, 10), (16,), (7, 9), (1, 1, 14))  # tokens of each, by row
LENGTH = 16


def inputs() -> dict[str, Tensor]:
    rows = batch(len(DOCUMENTS), LENGTH, "input_ids")["input_ids"]
    labels = rows.clone()
    labels[1, :4] = -100
    places = [torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS]
    return {"input_ids": rows, "labels": labels, "position_ids": torch.stack(places)}


def blocks() -> Tensor:
    """(b, 1, s, s): which tokens attend which, 0 or the lowest number."""
    numbers = torch.stack([
        torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCUMENTS
    ])  # fmt: skip
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    seen = same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(
        ~seen, torch.finfo(torch.float64).min
    )


@cache
def model() -> Any:
    return huggingface_model("llama", huggingface_configs()["llama"])


@cache
def graph() -> Graph:
    found = fold(capture(model(), inputs(), training=True))
    return replace(found, inputs=tuple(replace(i, labels=("b", "s")) for i in found.inputs))


@cache
def expected() -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """The loss, and all gradients, of one process."""
    import transformers as t

    made: Any = t.AutoModelForCausalLM.from_config(
        model().config, dtype=torch.float64, attn_implementation="sdpa"
    )
    made.load_state_dict(model().state_dict())
    loss = made(**inputs(), attention_mask=blocks()).loss
    loss.backward()
    gradients = {name: p.grad for name, p in made.named_parameters()}
    return {"('loss',)": loss.detach()}, gradients


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        ("ddp", "contiguous"), ("tp+sp", "contiguous"), ("ulysses", "contiguous"),
        ("cp", "contiguous"), ("cp", "zigzag"),
    ],
)  # fmt: skip
def test_no_document_attends_another(pool: Pool, layout: str, order: str) -> None:
    mesh = mesh_of(2)
    builder = builder_of(graph(), mesh, order=order)
    decisions = any_of(builder.build(Roles([layout], graph(), mesh)), random.Random(0))
    state = model().state_dict()
    check(pool(2), builder, decisions, state, inputs(), expected(), tolerance=3e-6)


def test_the_mask_is_seen() -> None:
    """Else the test above could not fail."""
    plain = model()(**{name: x for name, x in inputs().items() if name != "position_ids"}).loss
    assert abs(plain - expected()[0]["('loss',)"]) > 1e-3
