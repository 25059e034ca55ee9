"""A plan's layout is recognised: what `--layout` gives is named by the same words."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shardwright.api import Plan, plan_file
from shardwright.facts.spec import R
from shardwright.planner.plan.named import name_of_plan
from shardwright.planner.strategies.layout import Layout, words_of_roles
from shardwright.planner.strategies.params import all_params

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS = [
    ("llama.py", words)
    for words in (
        "ddp=2", "fsdp=4", "tp=2", "tp=4,sp", "fsdp=2,tp=2,sp", "ddp=2,fsdp=2", "zero1=4",
        "zero2=4", "cp=2", "fsdp=2,cp=2", "ulysses=2", "fsdp=2,recompute=full",
        "ddp=2,recompute=selective", "fsdp=1,cp=4",
        "pp=2,ddp=2",
    )
] + [("moe.py", "ep=4"), ("moe.py", "fsdp=2,ep=2")]  # fmt: skip


@cache
def planned(model: str, layout: str | None, **options: Any) -> Plan:
    return plan_file(
        str(EXAMPLES / model), cluster="cpu", phase="train", batch=8, seq=64, dtype=None,
        memory_bytes=None, optimizer="adamw", solver="highs", time_limit_s=60.0, layout=layout,
        **{"gpus": None, "mesh": None, "pins": (), **options},
    )  # fmt: skip


@pytest.mark.some(3)
@pytest.mark.parametrize(("model", "words"), LAYOUTS)
def test_a_layout_is_known_again(model: str, words: str) -> None:
    micro_batches = 2 if "zero" in words else None
    named = name_of_plan(planned(model, words, micro_batches=micro_batches))
    assert named.words == words
    assert named.differences == ()


def test_what_differs_is_named() -> None:
    """All is FSDP but a product of the MLP, which is cut by rows, and a norm's weight."""
    plan = planned("llama.py", "fsdp=2")
    (product,) = [n for n in plan.graph.nodes if n.loc.module == "layers.0.mlp.down_proj"]
    (weight,) = [
        ref.param.value.name
        for ref in all_params(plan.graph)
        if ref.name == "layers.*.mlp_norm.weight"
    ]
    decided = plan.decisions
    other = replace(
        decided,
        choices={**decided.choices, product.name: ("k",)},
        specs={**decided.specs, weight: (R,)},
    )
    named = name_of_plan(replace(plan, decisions=other))
    assert named.words == "fsdp=2"
    assert [str(each) for each in named.differences] == [
        "layers.*.mlp.down_proj: runs dp: rows",
        "layers.*.mlp_norm.weight: is stored R",
    ]


def test_words_are_the_inverse_of_reading_them() -> None:
    for words in ("fsdp=8", "ddp=2,fsdp=4", "fsdp=2,tp=4,sp", "fsdp=1,cp=4", "fsdp=2,ulysses=4"):
        layout = Layout.parse(words)
        axes = list(zip(layout.roles, layout.mesh.sizes, strict=True))
        assert words_of_roles(axes, str(layout.recompute or "")) == words
