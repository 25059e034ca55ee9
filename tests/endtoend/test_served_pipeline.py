"""Pipelines that serve: tokens and logits are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardwright
from examples import gpt, llama
from shardwright.runtime import RankPool, count_collectives

from ..sharded import import_source

PROMPTS, NEW = 5, 6
SLOW_LINKS = """
base = "cpu"
device = "two ranks in a node"
gpus_per_node = 2
[inter_node]
bytes_per_s = 1e6
hop_s = 1e-3
"""


def _llama() -> nn.Module:
    return llama.Llama(llama.LlamaConfig(64, 5, 32, 4, 2, 48))


def _gpt() -> nn.Module:
    return gpt.GPT(gpt.GPTConfig(64, 32, 4, 4, 32))


def _prompts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(64, (PROMPTS, 7)), torch.tensor([7, 3, 1, 5, 6])


@torch.no_grad()
def _alone(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """The likeliest tokens (b, new) behind each prompt, all computed anew for each."""
    rows: list[Tensor] = []
    for prompt, length in zip(ids, lengths.tolist(), strict=True):
        own = prompt[None, :length]
        for _ in range(NEW):
            at = torch.arange(own.shape[1])[None]
            out = model(own, position_ids=at)
            logits = out["logits"] if isinstance(out, dict) else out
            own = torch.cat([own, logits[:, -1].argmax(-1)[:, None]], 1)
        rows.append(own[0, length:])
    return torch.stack(rows)


def served_on_rank(
    source: str, state: dict[str, Tensor], ids: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, list[Tensor], float]:
    """In one rank: greedy tokens, sampled ones, logits of a conversation by hand, and the bytes
    that come from other stages for the prompts."""
    model: Any = import_source(source).ShardedModel.from_state_dict(state)
    greedy = model.generate(ids, NEW, lengths=lengths)[:, ids.shape[1] :]
    sampled = model.generate(ids, NEW, lengths=lengths, do_sample=True, seed=3, eos_token_id=7)
    model.new_cache(len(ids), 32)
    with count_collectives() as counter:
        logits = [model.prefill(ids, lengths)]
    logits.append(model.decode(greedy[:, 0]))
    model.truncate(lengths)  # what was fed by hand goes in once more, and more with it
    logits.append(model.append(greedy[:, :2]))
    model.free(1)
    places, again = model.admit(ids[1:2], lengths[1:2])
    assert places == [1]
    return greedy, sampled, [*logits, again], counter.bytes("send_recv", "pp")


@pytest.mark.parametrize(
    ("build", "layout", "ranks", "phase", "count"),
    [
        (_llama, "pp=2,tp=2", 4, "serve", None),
        (_gpt, "pp=2", 2, "serve", None),
        (_llama, "pp=4", 4, "prefill", 4),  # one sequence each, as planned
        (_gpt, "pp=2,ddp=2", 4, "decode", None),
        (_llama, "pp=2,cp=2", 4, "append", 1),
    ],
)
@pytest.mark.some(1)
def test_tokens_are_those_of_one_process(
    build: Callable[[], nn.Module],
    layout: str,
    ranks: int,
    phase: str,
    count: int | None,
    pool: Callable[[int], RankPool],
) -> None:
    torch.manual_seed(0)
    model = build().double()
    tokens = 1 if phase == "decode" else 8
    inputs = {
        "tokens": torch.zeros(4, tokens, dtype=torch.int64),
        "position_ids": torch.arange(tokens).repeat(4, 1),
    }
    asked: dict[str, Any] = {"cluster": "cpu", "phase": phase}
    asked |= {"output_tokens": NEW} if phase == "serve" else {}
    asked |= {"context": 16} if phase in ("decode", "append") else {}
    plan = shardwright.plan(model, inputs, layout=layout, micro_batches=count, **asked)
    single = shardwright.plan(model, inputs, gpus=1, **asked)
    for rank, received in enumerate(_same_tokens(model, plan, single, pool(ranks))):
        if layout == "pp=2,tp=2":  # 3 prompts of 7 tokens and 2 of 6, and logits back, in float64
            assert received == (5 * 64 * 8 if rank < 2 else (3 * 7 + 2 * 6) * 32 * 8)


def _same_tokens(
    model: nn.Module, plan: shardwright.Plan, single: shardwright.Plan, ranks: RankPool
) -> list[float]:
    """Check what ranks answer beside one process; the bytes that each has from other stages."""
    ids, lengths = _prompts()
    state = {n: x.detach() for n, x in model.state_dict().items()}
    want = _alone(model, ids, lengths)
    one = served_on_rank(single.module_source(), state, ids, lengths)
    assert torch.equal(one[0], want)
    results = ranks.run(served_on_rank, plan.module_source(), state, ids, lengths)
    for found in results:
        assert torch.equal(found[0], want)
        assert torch.equal(found[1], one[1])
        for got, wanted in zip(found[2], one[2], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    return [found[3] for found in results]


@pytest.mark.long
def test_stages_that_a_search_found_answer_as_one_process(
    tmp_path: Path, pool: Callable[[int], RankPool]
) -> None:
    """Two nodes of two ranks, slow links between them, and too little memory for a copy in each."""
    cluster = tmp_path / "slow.toml"
    cluster.write_text(SLOW_LINKS)
    torch.manual_seed(0)
    model = _llama().double()
    inputs = {
        "tokens": torch.zeros(4, 8, dtype=torch.int64),
        "position_ids": torch.arange(8).repeat(4, 1),
    }
    asked: dict[str, Any] = {"cluster": str(cluster), "phase": "serve", "output_tokens": NEW}
    plan = shardwright.plan(model, inputs, gpus=4, memory_bytes=200_000, **asked)
    assert plan.pipeline is not None and plan.pipeline.ranks == 2
    _same_tokens(model, plan, shardwright.plan(model, inputs, gpus=1, **asked), pool(4))
