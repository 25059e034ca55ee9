"""Layers with a state are served: short convolutions, recurrences of transformers and of users."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.facts.spec import parse_spec
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.ops.caches import cache_spec, keeps_tokens
from shardwright.ir.ops.registry import operator_of
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.serving import serving_graph, with_own_positions
from shardwright.ir.reference.widen import widened
from shardwright.planner.strategies.regions import Region, Strategy
from shardwright.planner.strategies.setting import Restriction
from shardwright.runtime import RankPool
from tests.ir.models import VOCABULARY, huggingface_model
from tests.sharded import builder_of, import_source, mesh_of, source_of

Pool = Callable[[int], RankPool]
BATCH, PROMPT, NEW = 4, 13, 5
LENGTHS = [13, 9, 12, 1]


def config_of(name: str) -> Any:
    """A tiny model with a state in most of its layers."""
    import transformers

    t: Any = transformers
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
        "qwen3_next": lambda: t.Qwen3NextConfig(
            **common, num_hidden_layers=3, head_dim=8, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
        "mamba2": lambda: t.Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16,
            state_size=8, n_groups=2, chunk_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "mamba": lambda: t.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "falcon_h1": lambda: t.FalconH1Config(
            **common, num_hidden_layers=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
            mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4,
        ),
        "recurrent_gemma": lambda: t.RecurrentGemmaConfig(
            **common | {"num_key_value_heads": 1}, num_hidden_layers=3, head_dim=8, lru_width=32,
            attention_window_size=6,
        ),
    }  # fmt: skip
    return configs[name]()


class Memory(nn.Module):
    """A recurrence of a user's own, from a state that is learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.start = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.sigmoid(self.gate(x)), self.value(x)
        state, rows = self.start.expand(len(x), -1), list[Tensor]()
        for t in range(x.shape[1]):
            rows.append(state * value[:, t])
            state = gate[:, t] * state + value[:, t]
        return torch.stack(rows, 1)


class Remembering(nn.Module):
    """A model of a user's own, which takes no positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.layers = nn.ModuleList([Memory(16) for _ in range(2)])
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)

    def generate(self, ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Greedy, the whole sequence for each token."""
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        return ids


@cache
def model_of(name: str) -> Any:
    if name == "own":
        return Remembering()
    config = config_of(name)
    config._experts_implementation = "eager"  # others know no float64
    return huggingface_model(name, config).eval()


@cache
def graph_of(name: str, tokens: int) -> Graph:
    """The served graph, its casts to float32 widened."""
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    if "position_ids" not in inspect.signature(model_of(name).forward).parameters:
        del inputs["position_ids"]
    flat = capture(model_of(name), inputs, training=False, serving=True)
    graph = flat if "position_ids" in inputs else with_own_positions(flat)
    assert graph is not None
    return widened(serving_graph(fold(graph), 0))


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
    """Answers; again, after all sequences were freed; the first tokens, token by token; the first
    of one sequence, which is freed alone after no other could be shortened."""
    model = import_source(source).ShardedModel.from_state_dict(state).eval()
    answers = [model.generate(ids, NEW, lengths=LENGTHS)[:, PROMPT:] for _ in range(2)]
    logits = model.prefill(ids[:, :1])
    for column in range(1, max(LENGTHS)):
        counts = (torch.tensor(LENGTHS) > column).long()
        new = model.append(ids[:, column : column + 1], counts)
        logits = torch.where(counts[:, None] > 0, new, logits)
    answers.append(logits.argmax(-1)[:, None])
    try:
        model.truncate([1] * BATCH)
    except ValueError:  # on every rank
        model.truncate([0, *LENGTHS[1:]])  # the first sequence is freed, and another one begins
        logits = model.append(ids, [LENGTHS[0], *[0] * (BATCH - 1)])
        answers.append(logits[:1].argmax(-1))
    return answers


class Lying(Restriction):
    """All states lie as `spec` says."""

    def __init__(self, spec: str) -> None:
        self.spec = parse_spec(spec)

    def allows(self, region: Region, strategy: Strategy) -> bool:
        pairs = zip(region.nodes, strategy.choices, strict=True)
        kept = [(node, choices) for node, choices in pairs if operator_of(node).remembers]
        return all(keeps_tokens(node) or cache_spec(node, c) == self.spec for node, c in kept)


def source_with(graph: Graph, sizes: tuple[int, ...], spec: str) -> str:
    """A module whose states lie so, and all else at random."""
    builder, rng = builder_of(graph, mesh_of(*sizes), training=False), random.Random(spec)
    built = builder.build(Lying(spec))
    decisions = built.read([rng.randrange(node.costs.size) for node in built.nodes])
    source = source_of(builder, decisions)
    assert set(re.findall(r'SequenceState\([^"]*spec="(.*?)"', source)) == {spec}
    return source


QUICK = [("lfm2", "S0,S1"), ("mamba2", "S0,S1"), ("recurrent_gemma", "S1,S0"), ("own", "S0,S1")]
SLOW = [
    *((name, spec) for name in ("mamba", "falcon_h1") for spec in ("S0,S1", "S0", "S1")),
    *(("qwen3_next", spec) for spec in ("S1,S0", "S0", "S1")),
    *((name, spec) for name, _ in QUICK for spec in ("S0", "S1", "R,S1", "S0,S0")),
]


@pytest.mark.parametrize(
    ("name", "spec"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
@pytest.mark.some(1)
def test_generation_equals_transformers(pool: Pool, name: str, spec: str) -> None:
    """Greedy, a batch of different lengths, in runs of eight tokens; all but states at random."""
    sizes = (2,) * len(spec.split(","))
    source = source_with(graph_of(name, 8), sizes, spec)
    want, state = greedy(name), model_of(name).state_dict()
    for first, again, stepwise, alone in pool(prod(sizes)).run(
        generate_on_rank, source, state, prompts()
    ):
        assert torch.equal(first, want) and torch.equal(again, want)
        assert torch.equal(stepwise, want[:, :1]) and torch.equal(alone, want[0, :1])
