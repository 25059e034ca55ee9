"""Attention over latents or over the keys of all heads: both are planned, the better is kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import shardwright
from shardwright.ir.graph import Node
from shardwright.planner.errors import InfeasibleError

LATENT, HEADS = 512 + 64, 128 * (192 + 128)  # values per token and layer in DeepSeek-V3


@cache
def deepseek() -> Any:
    """Two dense layers with the attention of DeepSeek-V3."""
    import transformers as t

    config = t.DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=2, vocab_size=2048)
    with torch.device("meta"):
        return t.DeepseekV3ForCausalLM(config).bfloat16()


def planned(phase: str, batch: int, seq: int, **options: Any) -> Any:
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "position_ids": ids}
    return shardwright.plan(deepseek(), inputs, gpus=8, mesh="8", phase=phase, **options)


@cache
def decode() -> Any:
    return planned("decode", 64, 1, context=16384)


def attentions(plan: Any) -> list[Node]:
    return [node for node in plan.graph.nodes if node.op == "shardwright.cached_attention"]


def reads_latents(plan: Any) -> bool:
    """Whether all attention does; none may be of the other form."""
    (answer,) = {node.arg("v") is None for node in attentions(plan)}
    return answer


def test_decode_reads_latents() -> None:
    """Reading the cache takes most of the time of the other form."""
    plan = decode()
    assert reads_latents(plan)
    (note,) = (note for note in plan.notes if note.startswith("Attention"))
    assert note.startswith(
        f"Attention reads latents: the KV cache holds {LATENT} values per token and layer; with"
        f" keys and values of all heads {HEADS:,}: "
    )
    assert note in str(plan)


def test_bytes_of_the_cache_are_those_of_latents() -> None:
    """The plan's cache, of 8 GPUs that share a batch of 64."""
    plan = decode()
    (choices,) = {plan.decisions.choices[node.name] for node in attentions(plan)}
    ways = 1 if choices == ("g",) else 8
    layers, tokens, itemsize = 2, 64 * 16385, 2
    assert plan.memory.cache == pytest.approx(layers * tokens * LATENT * itemsize / ways, rel=0.01)


def test_prefill_reads_the_keys_of_all_heads() -> None:
    """Scores of many new tokens cost less with 192 and 128 numbers than with 576 and 512."""
    plan = planned("prefill", 8, 4096)
    assert not reads_latents(plan)
    assert any(f"{HEADS:,} values per token" in note for note in plan.notes)


def test_latents_where_nothing_else_fits() -> None:
    """Slower for many new tokens, but the long context then fits."""
    plan = planned("append", 8, 512, context=32768)
    assert not reads_latents(plan)
    tight = planned("append", 8, 512, context=32768, memory_bytes=int(0.9 * plan.memory.cache))
    assert reads_latents(tight) and tight.seconds > plan.seconds
    assert any(note.endswith(f"{HEADS:,}: does not fit") for note in tight.notes)
    with pytest.raises(InfeasibleError):
        planned("append", 8, 512, context=32768, memory_bytes=10**8)


def test_both_phases_of_serving_read_alike() -> None:
    plan = planned("serve", 64, 2048, output_tokens=256)
    assert reads_latents(plan) and reads_latents(plan.decode)
    assert any(note.startswith("Attention reads latents") for note in plan.notes)
    assert "Attention reads latents" in str(plan)
