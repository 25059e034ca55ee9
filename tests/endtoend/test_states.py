"""Layers with a state are served: short convolutions and what else remembers without attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.serving import serving_graph
from shardwright.ir.reference.widen import widened
from shardwright.runtime import RankPool
from tests.ir.models import VOCABULARY, huggingface_model
from tests.sharded import builder_of, import_source, mesh_of, random_decisions, source_of

Pool = Callable[[int], RankPool]
BATCH, PROMPT, NEW = 4, 13, 5
LENGTHS = [13, 9, 12, 1]


def config_of(name: str) -> Any:
    """A tiny model with a state in most of its layers."""
    import transformers as t

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    configs: dict[str, Callable[[], Any]] = {
        "lfm2": lambda: t.Lfm2Config(
            **common, num_hidden_layers=3, block_auto_adjust_ff_dim=False,
            layer_types=["conv", "full_attention", "conv"],
        ),
    }  # fmt: skip
    return configs[name]()


@cache
def model_of(name: str) -> Any:
    return huggingface_model(name, config_of(name)).eval()


@cache
def graph_of(name: str, tokens: int) -> Graph:
    """The served graph, its casts to float32 widened."""
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    return widened(
        serving_graph(fold(capture(model_of(name), inputs, training=False, serving=True)), 0)
    )


def prompts() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (BATCH, PROMPT), generator=generator)


@cache
def greedy(name: str) -> Tensor:
    """The new tokens (b, NEW) of transformers' own `generate`, sequence by sequence."""
    ids = prompts()
    answers = [
        model_of(name).generate(
            ids[row : row + 1, :length], max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=True,
        )[:, length:]
        for row, length in enumerate(LENGTHS)
    ]  # fmt: skip
    return torch.cat(answers)


def generate_on_rank(source: str, state: dict[str, Tensor], ids: Tensor) -> list[Tensor]:
    """Answers; again, after all sequences were freed; and once more, token by token."""
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    answers = [model.generate(ids, NEW, lengths=LENGTHS)[:, PROMPT:] for _ in range(2)]
    logits = model.prefill(ids[:, :1])
    for column in range(1, max(LENGTHS)):
        counts = (torch.tensor(LENGTHS) > column).long()
        new = model.append(ids[:, column : column + 1], counts)
        logits = torch.where(counts[:, None] > 0, new, logits)
    answers.append(logits.argmax(-1)[:, None])
    return answers


@pytest.mark.parametrize(("sizes", "seeds"), [((2,), (0, 1)), ((2, 2), (0, 1, 2))])
@pytest.mark.parametrize("name", ["lfm2"])
def test_generation_equals_transformers(
    pool: Pool, name: str, sizes: tuple[int, ...], seeds: tuple[int, ...]
) -> None:
    """Greedy, a batch of different lengths, under random decisions for eight tokens at a time."""
    want, state = greedy(name), model_of(name).state_dict()
    builder = builder_of(graph_of(name, 8), mesh_of(*sizes), training=False)
    layouts: set[str] = set()
    for seed in seeds:
        source = source_of(builder, random_decisions(builder, seed))
        layouts.update(re.findall(r'SequenceState\([^"]*spec="(.*?)"', source))
        for twice in pool(len(sizes) * 2).run(generate_on_rank, source, state, prompts()):
            assert torch.equal(twice[0], want) and torch.equal(twice[1], want), f"seed {seed}"
            assert torch.equal(twice[2], want[:, :1]), f"seed {seed}, token by token"
    assert any("S0" in spec for spec in layouts) and any("S1" in spec for spec in layouts), layouts
