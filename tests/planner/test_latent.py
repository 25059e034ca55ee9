"""Attention over latents or over the keys of all heads: both are planned, the better is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import shardwright
from shardwright.costmodel.compute import matmul_s
from shardwright.costmodel.machines.cluster import load_cluster
from shardwright.facts.mesh import Mesh
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Node
from shardwright.ir.ops.algorithms.part import Part
from shardwright.ir.ops.algorithms.quantities import buffers_of
from shardwright.ir.ops.attention import decompressing, values_in_keys
from shardwright.ir.ops.registry import local_of, operator_of, rule_of
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.latent import expanded
from shardwright.ir.reference.shrink import Planned, shrink, state_of
from shardwright.planner.errors import InfeasibleError
from shardwright.planner.plan.store import plan_from_json, plan_to_json
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.pricing import price
from tests.parts import seconds

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


@cache
def append() -> Any:
    return planned("append", 8, 2048, context=32768)


@cache
def tight_append() -> Any:
    """With less memory than the cache of the heads' keys and values takes."""
    return planned("append", 8, 2048, context=32768, memory_bytes=int(0.9 * append().memory.cache))


@cache
def training() -> Any:
    """One long sequence."""
    ids = torch.zeros(1, 65536, dtype=torch.long, device="meta")
    return shardwright.plan(deepseek(), {"input_ids": ids}, gpus=8, mesh="8", phase="train")


def attentions(plan: Any) -> list[Node]:
    return [node for node in plan.graph.nodes if operator_of(node).attends]


def form(plan: Any) -> str:
    """That of all attention."""
    (answer,) = {
        "plain" if not values_in_keys(node) else "expanded" if decompressing(node) else "absorbed"
        for node in attentions(plan)
    }
    return answer


def test_decode_reads_latents() -> None:
    """Reading the cache takes most of the time of the other form."""
    plan = decode()
    assert form(plan) == "absorbed"
    (note,) = (note for note in plan.notes if note.startswith("Attention"))
    assert note.startswith(
        f"Attention reads latents: the KV cache holds {LATENT} values per token and layer; instead,"
        f" keys and values of all heads ({HEADS:,} values): "
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
    assert form(plan) == "plain"
    assert any(f"{HEADS:,} values per token" in note for note in plan.notes)


@pytest.mark.slow
def test_latents_where_nothing_else_fits() -> None:
    """Slower for many new tokens, but the long context then fits."""
    plan = append()
    assert form(plan) == "plain"
    tight = tight_append()
    assert form(tight) == "expanded" and tight.seconds > plan.seconds
    assert any(note.endswith(f"({HEADS:,} values): does not fit") for note in tight.notes)
    with pytest.raises(InfeasibleError):
        planned("append", 8, 2048, context=32768, memory_bytes=10**8)


@pytest.mark.slow
def test_serving_makes_heads_for_the_prompt_alone() -> None:
    """A long prompt attends the heads' keys, single tokens the latents, in the same caches."""
    plan = planned("serve", 64, 2048, output_tokens=256)
    assert (form(plan), form(plan.decode)) == ("expanded", "absorbed")
    (note,) = (note for note in plan.notes if note.startswith("Attention"))
    assert note.startswith(
        "Attention reads keys and values made from latents in prefill and latents in decode: the KV"
        f" cache holds {LATENT} values per token and layer; instead, latents ({LATENT} values): "
    )
    assert f"; keys and values of all heads ({HEADS:,} values): " in note and note in str(plan)
    stored = json.dumps(plan_to_json(plan))
    assert json.dumps(plan_to_json(plan_from_json(json.loads(stored)))) == stored


@pytest.mark.slow
def test_training_keeps_latents() -> None:
    """Keys and values of a long sequence are made again rather than kept; there are two forms."""
    plan = training()
    assert form(plan) == "expanded"
    (note,) = (note for note in plan.notes if note.startswith("Attention"))
    assert note.startswith(
        "Attention reads keys and values made from latents: sent, and saved for backward, are"
        f" {LATENT} values per token and layer; instead, keys and values of all heads ({HEADS:,}"
        " values): "
    )
    assert note.count(";") == 1 and note in str(plan)
    stored = json.dumps(plan_to_json(plan))
    assert json.dumps(plan_to_json(plan_from_json(json.loads(stored)))) == stored


def test_a_ring_over_latents_sends_fewer_bytes() -> None:
    """Latents of 2 bytes forward and backward, and gradients of 4; less waiting for a slow link."""
    ids = torch.zeros(1, 65536, dtype=torch.long, device="meta")
    plain = fold(capture(deepseek(), {"input_ids": ids}, training=True))
    moved: list[float] = []
    waits: list[float] = []
    network = Network(Mesh((("cp", 8),)), load_cluster("rtx4090", 8))
    for graph in (plain, expanded(plain)):
        (node,) = (node for node in graph.nodes if node.op == "shardwright.attention")
        local = local_of(node, ("ring",), (8,), training=True, order="zigzag")
        traffic = operator_of(node).traffic(local)
        moved.append(sum(t.bytes * t.times for t in traffic))
        waits.append(price(node, ("ring",), network, training=True, order="zigzag").moving_s)
        assert ("ulysses" in rule_of(node).algorithms) == (graph is plain)
    assert moved == [7 * 8192 * numbers * (2 + 2 + 4) for numbers in (HEADS, LATENT)]
    assert waits[1] < waits[0] / 10


def test_seconds_of_making_heads() -> None:
    """A ring makes them in each hop that it attends: once forward, thrice in backward."""
    network = Network(Mesh((("cp", 4),)), load_cluster("h100", 4))
    sizes = dict(
        batch=1, heads=128, kv_heads=1, queries=4096, keys=4096, key_dim=192, value_dim=128,
        itemsize=2, causal=True, window=0, axis=0, ranks=4, query_ways=1, cached=False,
    )  # fmt: skip
    ring = Part(**sizes, algorithm="ring", zigzag=True, latent=(512, 64))
    plain = replace(ring, latent=None, kv_heads=128)
    forward, backward = (
        over - heads
        for over, heads in zip(
            *(
                seconds(local, "bfloat16", network, backward=True, moving=False)
                for local in (ring, plain)
            ),
            strict=True,
        )
    )
    product = matmul_s(4096, 128 * 256, 512, 1, "bfloat16", network.cluster)
    assert forward > 4 * product and backward == pytest.approx(3 * forward)
    assert buffers_of(ring) - buffers_of(plain) == (
        4096 * 128 * ((192 + 256) * 2 + (192 + 128) * 4) + 2 * 4096 * (LATENT - HEADS) * 2
    )


@pytest.mark.parametrize("made", [tight_append, decode, training])
@pytest.mark.some(1)
def test_plans_over_latents_shrink(made: Callable[[], Any]) -> None:
    """To sizes that `plan verify` runs: latents, heads and what they share fit together."""
    plan = made()
    decided = Planned(plan.graph, plan.decisions.choices, plan.decisions.specs.items())
    small = shrink([decided], plan.mesh, Mesh((("x", 2),)))[0].graph
    before, after = (
        sum(value.type.numel for value in state_of(graph).values()) for graph in (plan.graph, small)
    )
    assert after < before / 400
