"""Load balancing of experts is that of the whole batch, however ranks share it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.planner.strategies.roles import Roles
from shardwright.runtime import RankPool
from tests.ir.models import batch
from tests.sharded import (
    any_of,
    assert_close,
    builder_of,
    check,
    mesh_of,
    run_module,
    source_of,
)

Pool = Callable[[int], RankPool]


def inputs() -> dict[str, Tensor]:
    rows = batch(4, 8, "input_ids")["input_ids"]
    labels = rows.clone()
    labels[:2, :5] = -100
    return {"input_ids": rows, "labels": labels}


@cache
def model() -> Any:
    import transformers as t

    config = t.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=32, output_router_logits=True, router_aux_loss_coef=0.5,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    made = t.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager"
    )
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


@cache
def graph() -> Graph:
    found = fold(capture(model(), inputs(), training=True))
    return replace(found, inputs=tuple(replace(i, labels=("b", "s")) for i in found.inputs))


@cache
def expected() -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    model().config._experts_implementation = "eager"
    out = model()(**inputs())
    assert out.aux_loss > 0.1  # of a loss that has half of it
    out.loss.backward()
    gradients = {name: p.grad for name, p in model().named_parameters()}
    assert gradients["model.layers.0.mlp.gate.weight"] is not None
    return {"('loss',)": out.loss.detach(), "('aux_loss',)": out.aux_loss.detach()}, gradients


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp+sp", "cp", "fsdp+ep"])
def test_load_balancing(pool: Pool, layout: str) -> None:
    mesh = mesh_of(2)
    builder = builder_of(graph(), mesh)
    decisions = any_of(builder.build(Roles([layout], graph(), mesh)), random.Random(0))
    state = model().state_dict()
    if not layout.endswith("ep"):
        check(pool(2), builder, decisions, state, inputs(), expected(), tolerance=3e-6)
        return
    # what experts are sent depends on the router, and is predicted for one that is balanced
    source = source_of(builder, decisions)
    for outputs, gradients, _ in pool(2).run(run_module, source, state, inputs()):
        for path, want in expected()[0].items():
            assert_close(outputs[path], want, 3e-6, path)
        for name, want in expected()[1].items():
            got = gradients[name]
            assert got is not None and want is not None
            assert_close(got, want, 3e-6, name)
