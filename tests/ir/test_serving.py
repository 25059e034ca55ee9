"""From a forward pass to serving: positions for tokens that a model counts, chunks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import phase_graph
from shardwright.facts.mesh import Mesh
from shardwright.ir.capture.capture import capture, capture_folded
from shardwright.ir.graph import Graph, Node
from shardwright.ir.ops.registry import rule_of
from shardwright.ir.passes.serving import ServingError, serving_graph
from shardwright.ir.reference.interpret import Caches, interpret
from shardwright.ir.reference.shrink import Planned, shrink, state_of
from shardwright.loading import load_target
from shardwright.planner.errors import PlanError
from tests.examples.test_examples import EXAMPLES

from .models import VOCABULARY
from .test_moe import model_of

BATCH, TOKENS = 2, 9
Count = Callable[[int], Tensor]


class Counting(nn.Module):
    """A decoder whose tokens are scaled by what `count` makes of their number."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.count = count
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        b, t = input_ids.shape
        x = self.embed(input_ids) + position_ids[..., None]
        x = x * self.count(t).expand(b, t, 1)
        q, k, v = (y.view(b, t, 3, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(out.transpose(1, 2).reshape(b, t, 12))


def rows(t: int) -> Tensor:
    return torch.log1p(torch.arange(t).double()).view(1, t, 1) + 1.0


def rows_by_unsqueeze(t: int) -> Tensor:
    return torch.arange(0, t)[None].double().unsqueeze(-1) / 4 + 0.5


def columns(t: int) -> Tensor:
    return torch.arange(t).double()[:, None]


def pairs(t: int) -> Tensor:
    return (torch.arange(t)[:, None] - torch.arange(t)).double().sum(-1)[None, :, None]


def served(model: nn.Module, tokens: int) -> Graph:
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    return serving_graph(capture(model, inputs, training=False, serving=True), 0)


@pytest.mark.parametrize("count", [rows, rows_by_unsqueeze])
def test_counted_tokens_are_positions(count: Count) -> None:
    """Step by step, the second sequence a token behind, against whole sequences at once."""
    model = Counting(count)
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS).expand(BATCH, TOKENS)
    whole = model(ids, positions)
    caches: Caches = {}
    for given in ([[0, 1, 2, 3], [0, 1, 2, -1]], [[4, 5, 6], [3, 4, 5]], [[7], [6]]):
        at = torch.tensor(given)
        inputs = {"input_ids": ids.gather(1, at.clamp(min=0)), "position_ids": at}
        graph, state = served(model, at.shape[1]), model.state_dict()
        (out,) = interpret(graph, state, inputs, caches).values()
        want = whole[torch.arange(BATCH), at.max(1).values]
        torch.testing.assert_close(out[:, 0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [columns, pairs])
def test_other_counts_are_refused(count: Count) -> None:
    with pytest.raises(ServingError, match="test_serving.py.*counts its tokens itself"):
        served(Counting(count), 4)


@pytest.mark.parametrize("phase", ["decode", "append", "serve"])
def test_a_model_without_positions_is_refused(phase: str) -> None:
    loaded = load_target(str(EXAMPLES / "moe.py"), batch=2, seq=8, phase=phase, formats="float32")
    with pytest.raises(PlanError, match=r"MoETransformer\.forward has no keyword `position_ids`"):
        phase_graph(loaded, phase, 0)


def attentions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "shardwright.cached_attention"]


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.some(1)
def test_chunks_are_those_of_the_config(tokens: int) -> None:
    """However many tokens are captured; a window as long says what a cache may drop."""
    model: Any = model_of("llama4", "meta", attention_chunk_size=16)
    ids = torch.zeros(BATCH, tokens, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "position_ids": ids}
    graph = serving_graph(capture_folded(model, inputs, training=False, serving=True), 0)
    found = {(node.arg("chunk"), node.arg("window")) for node in attentions(graph)}
    assert found == {(16, 16), (0, 0)}


def test_chunks_are_shrunk_with_the_sequence() -> None:
    model: Any = model_of("llama4", "meta", attention_chunk_size=512)
    ids = torch.zeros(8, 1024, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "position_ids": ids}
    graph = serving_graph(capture_folded(model, inputs, training=False, serving=True), 4096)
    choices = {node.name: ("R",) for node in graph.nodes}
    small = shrink([Planned(graph, choices, [])], Mesh((("x", 4),)), Mesh((("x", 2),)))[0].graph
    for node in attentions(small):
        chunk, context = node.arg("chunk"), node.arg("context")
        assert isinstance(chunk, int) and isinstance(context, int)
        assert node.arg("window") == chunk < context + node.operands[0].type.shape[2]
    assert {bool(node.arg("chunk")) for node in attentions(small)} == {True, False}


def test_graphs_of_one_model_shrink_together() -> None:
    """Prompts and single tokens keep one batch, the same parameters and the same windows."""
    model: Any = model_of("llama4", "meta", attention_chunk_size=512)
    planned: list[Planned] = []
    for tokens, cut in ((1024, "i0"), (1, "o0")):
        ids = torch.zeros(12, tokens, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "position_ids": ids}
        graph = serving_graph(capture_folded(model, inputs, training=False, serving=True), 1024)
        choices = {
            node.name: (cut if cut in rule_of(node).choices() else "R",) for node in graph.nodes
        }
        planned.append(Planned(graph, choices, []))
    old, new = Mesh((("x", 4),)), Mesh((("x", 2),))
    first, second = (each.graph for each in shrink(planned, old, new))
    assert state_of(first) == state_of(second) != state_of(planned[0].graph)
    batch, tokens = first.inputs[0].value.type.shape
    assert second.inputs[0].value.type.shape == (batch, 1) and 1 < tokens < 1024 and batch < 12
    windows = [[node.arg("window") for node in attentions(graph)] for graph in (first, second)]
    assert windows[0] == windows[1] and 0 < max(windows[0]) < 512
    alone = shrink(planned[1:], old, new)[0].graph
    assert max(node.arg("window") for node in attentions(alone)) != max(windows[0])
