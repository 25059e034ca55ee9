"""Adapters of low rank beside frozen weights: what trains has gradients and states, and no more.

`peft`'s layers are written out here, under its names.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardwright as sw
from shardwright.facts.spec import format_spec
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.planner.strategies.params import all_params
from shardwright.planner.strategies.roles import Roles
from shardwright.runtime import RankPool
from tests.ir.models import batch, huggingface_configs, huggingface_model
from tests.sharded import any_of, builder_of, check, mesh_of

Pool = Callable[[int], RankPool]
RANK = 3  # no number of GPUs divides it
ADAPTED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class Lora(nn.Module):
    """`peft.tuners.lora.Linear`: base(x) + B(A(x)) * scaling."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        like: Any = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, RANK, **like)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, base.out_features, **like)})
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A["default"](x)
        return self.base_layer(x) + self.lora_B["default"](low) * self.scaling


def adapted(made: nn.Module) -> nn.Module:
    """With adapters beside the weights of `ADAPTED`, which alone are trained with embeddings.

    So backward reaches every weight of the first layer, as it reaches those of all others.
    """
    made.requires_grad_(False)
    made.get_submodule("model.embed_tokens").requires_grad_(True)
    for name, module in list(made.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if leaf in ADAPTED and isinstance(module, nn.Linear):
            setattr(made.get_submodule(owner), leaf, Lora(module))
    return made


def inputs() -> dict[str, Tensor]:
    rows = batch(4, 8, "input_ids")["input_ids"]
    return {"input_ids": rows, "labels": rows}


@cache
def model() -> nn.Module:
    return adapted(huggingface_model("llama", huggingface_configs()["llama"]))


@cache
def graph() -> Graph:
    return fold(capture(model(), inputs(), training=True))


@cache
def expected() -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    made: Any = model()
    loss = made(**inputs()).loss
    loss.backward()
    return {"('loss',)": loss.detach()}, {name: p.grad for name, p in made.named_parameters()}


def reported(pool: RankPool, layout: str) -> dict[str, str]:
    """Run it beside one process; the specs of weights of the first layers by their last names."""
    mesh = mesh_of(2)
    builder = builder_of(graph(), mesh)
    decisions = any_of(builder.build(Roles([layout], graph(), mesh)), random.Random(0))
    state = model().state_dict()
    check(pool, builder, decisions, state, inputs(), expected(), tolerance=3e-6)
    return {
        ref.name.partition("*.")[2].removesuffix(".weight").removesuffix(".default"): format_spec(
            decisions.specs[ref.param.value.name]
        )
        for ref in all_params(graph())
    }


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero1"])
def test_data_parallel(pool: Pool, layout: str) -> None:
    trained = [name for name, gradient in expected()[1].items() if gradient is not None]
    assert sum("lora_" in name for name in trained) == len(trained) - 1 == 3 * 2 * len(ADAPTED)
    assert reported(pool(2), layout)


@pytest.mark.parametrize("layout", ["tp", "tp+sp"])
def test_adapters_are_cut_with_their_layer(pool: Pool, layout: str) -> None:
    found = reported(pool(2), layout)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):  # by columns
        assert found[f"{name}.base_layer"] == found[f"{name}.lora_B"] == "S0"
        assert found[f"{name}.lora_A"] == "R"
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # by rows
        assert found[f"{name}.base_layer"] == found[f"{name}.lora_A"] == "S1"
        assert found[f"{name}.lora_B"] == "R"


@pytest.mark.parametrize("precision", ["own", "mixed"])
def test_frozen_weights_have_no_gradients_and_states(precision: str) -> None:
    """On ranks that hold all of them: of float32 parameters 16 bytes where they are trained."""
    config = huggingface_configs()["llama"]
    with torch.device("meta"):
        made = adapted(huggingface_model("llama", config, "meta")).float()
    sizes = [(p.numel(), p.requires_grad) for p in made.parameters()]
    plan = sw.plan(
        made, {n: x.to("meta") for n, x in inputs().items()}, cluster="h100", layout="ddp=4",
        precision=precision,
    )  # fmt: skip
    frozen = sum(n for n, trained in sizes if not trained)
    trained = sum(n for n, trained in sizes if trained)
    stored = frozen * (2 if precision == "mixed" else 4) + 4 * trained
    assert stored <= plan.memory.parameters <= stored + 16  # and the frequencies of rotations
    assert plan.memory.optimizer == 8 * trained and 0 < plan.memory.gradients <= 4 * trained
