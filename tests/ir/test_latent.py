"""Attention over latents: its forms give the model's own logits, from a smaller cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.facts.spec import R, S, V
from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph, Node
from shardwright.ir.graph.rewrite import with_args
from shardwright.ir.graph.text import format_graph
from shardwright.ir.ops.attention import attention
from shardwright.ir.ops.order import token_dims
from shardwright.ir.ops.registry import rule_of, saved_values
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.latent import absorbed, expanded
from shardwright.ir.passes.serving import serving_graph
from shardwright.ir.reference.interpret import Caches, interpret
from shardwright.ir.reference.widen import widened

from .models import VOCABULARY
from .test_moe import model_of

Form = Callable[[Graph], Graph]
BATCH, TOKENS = 2, 10
RANK, ROPE = 16, 8  # numbers of the latent and of the rotated part in `test_moe.config_of`


@cache
def deepseek() -> Any:
    return model_of("deepseek_v3").eval()


@cache
def served(model: nn.Module, tokens: int, *, folded: bool) -> Graph:
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids}
    graph = capture(model, inputs, training=False, serving=True)
    return widened(serving_graph(fold(graph) if folded else graph, 0))


def attentions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "shardwright.cached_attention"]


def plain(graph: Graph) -> Graph:
    return graph


def steps(model: nn.Module, ids: Tensor, widths: list[int], *forms: Form) -> tuple[Any, Caches]:
    """Logits (b, v) after each chunk of tokens, and the caches in the end.

    The first form is that of many tokens, the last one that of a single one.
    """
    caches: Caches = {}
    found: list[Tensor] = []
    at = 0
    for width in widths:
        graph = served(model, width, folded=True)
        graph = forms[-1 if width == 1 else 0](graph)
        positions = torch.arange(at, at + width).expand(BATCH, width)
        inputs = {"input_ids": ids[:, at : at + width], "position_ids": positions}
        outputs = interpret(graph, model.state_dict(), inputs, caches)
        found.append(next(iter(outputs.values()))[:, 0])
        at += width
    return found, caches


@pytest.mark.parametrize("forms", [(absorbed,), (expanded,), (expanded, absorbed)])
@pytest.mark.some(1)
def test_logits_equal_the_models_step_by_step(forms: tuple[Form, ...]) -> None:
    """Prefill, append and decode over latents, against the model on the whole sequence."""
    model = deepseek()
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    widths = [6, 2, 1, 1]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        got, caches = steps(model, ids, widths, *forms)
        _, whole_heads = steps(model, ids, widths, plain)
    ends = torch.tensor(widths).cumsum(0) - 1
    for logits, end in zip(got, ends.tolist(), strict=True):
        # the model's own norms and rotations are in float32
        torch.testing.assert_close(logits, whole[:, end], rtol=0, atol=2e-5)
    assert {tokens.k.shape for tokens in caches.values()} == {(BATCH, 1, TOKENS, RANK + ROPE)}
    assert {tokens.k.shape[1] for tokens in whole_heads.values()} == {4}


@pytest.mark.parametrize("forms", [(absorbed,), (expanded,), (expanded, absorbed)])
def test_forms_are_equal_to_rounding(forms: tuple[Form, ...]) -> None:
    model = deepseek()
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, caches = steps(model, ids, [5, 2, 1, 1, 1], *forms)
        want, _ = steps(model, ids, [5, 2, 1, 1, 1], plain)
        _, absorbed_caches = steps(model, ids, [5, 2, 1, 1, 1], absorbed)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for path, tokens in absorbed_caches.items():
        torch.testing.assert_close(caches[path].k, tokens.k, rtol=0, atol=1e-12)


@pytest.mark.parametrize("folded", [True, False])
def test_nothing_of_the_heads_keys_is_left(folded: bool) -> None:
    """Every layer attends one latent head, and no linear reads a latent any more."""
    before = served(deepseek(), 4, folded=folded)
    graph = absorbed(before)
    nodes = attentions(graph)
    assert len(nodes) == len(attentions(before)) == (2 if folded else 4)
    for node in nodes:
        q, k = node.operands[:2]
        assert q.type.shape == (BATCH, 4, 4, RANK + ROPE) and k.type.shape[1] == 1
        assert node.arg("v") is None and node.arg("value_dim") == RANK
    assert "kv_b_proj.weight" in format_graph(graph)  # still the original parameter
    assert not any(n.op == "aten.expand.default" and "self_attn" in n.loc.module
                   for n in graph.nodes)  # fmt: skip
    linears = [n for n in graph.nodes if n.op == "aten.linear.default"]
    assert len(linears) == len([n for n in before.nodes if n.op == "aten.linear.default"]) - len(
        nodes
    )
    assert absorbed(graph) is graph and expanded(graph) is graph


@pytest.mark.parametrize("folded", [True, False])
def test_the_expanded_form_caches_latents(folded: bool) -> None:
    """Every layer stores one latent head, and attends with its own queries and result."""
    before = served(deepseek(), 4, folded=folded)
    graph = expanded(before)
    nodes = attentions(graph)
    assert len(nodes) == len(attentions(before)) == (2 if folded else 4)
    for node, old in zip(nodes, attentions(before), strict=True):
        q, k, up = node.operands[0], node.operands[1], node.operands[-1]
        assert q == old.operands[0] and node.outputs == old.outputs
        assert k.type.shape == (BATCH, 1, 4, RANK + ROPE) and node.arg("v") is None
        assert node.arg("value_dim") == RANK and node.arg("up") == up
    assert not any(n.op == "aten.expand.default" and "self_attn" in n.loc.module
                   for n in graph.nodes)  # fmt: skip
    assert absorbed(graph) is graph and expanded(graph) is graph


class Latents(nn.Module):
    """Attention over latents; `change` makes it one that the pass does not know, or the other way
    round: values before keys in the weight, queries that no cat makes, and sinks."""

    def __init__(self, change: str, masked: bool = False) -> None:
        super().__init__()
        self.change, self.masked = change, masked
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.down = nn.Linear(12, 5, bias=False)
        self.up = nn.Linear(5, 3 * (4 + 6), bias=change == "bias")
        self.rope, self.query = nn.Linear(12, 2), nn.Linear(12, 3 * 6)
        self.head = nn.Linear(18, VOCABULARY, bias=False)
        self.sinks = nn.Parameter(torch.randn(3)) if change == "sinks" else None
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * (1 + position_ids[..., None])
        b, t = input_ids.shape
        q = self.query(x).view(b, t, 3, 6).transpose(1, 2)
        pairs = self.up(self.down(x)).view(b, t, 3, 10).transpose(1, 2)
        v, k = pairs.split([6, 4], -1)
        rope = self.rope(x)[:, None].expand(b, 3, t, 2)
        if self.change == "scaled":
            k = k * 2
        if self.change == "rope of heads":
            rope = q[..., :2] * 1.0
        k = torch.cat([k, rope], -1)
        if self.change == "values":
            v = v + 1
        if self.masked:
            mask = (position_ids[:, None, :, None] >= position_ids[:, None, None]).expand(
                b, 1, t, t
            )
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        elif self.sinks is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = attention(q, k, v, None, 6**-0.5, True, 0, 0.0, 0.0, self.sinks, 0)
        return self.head(out.transpose(1, 2).reshape(b, t, 18))


@pytest.mark.parametrize("change", ["bias", "scaled", "rope of heads", "values"])
def test_other_attention_stays(change: str) -> None:
    graph = served(Latents(change), 4, folded=False)
    assert attentions(graph) and absorbed(graph) is graph and expanded(graph) is graph


@pytest.mark.parametrize("form", [absorbed, expanded])
@pytest.mark.parametrize("change", ["", "sinks"])
def test_values_first_and_queries_in_one(change: str, form: Form) -> None:
    """The parts in the other order; the scale stays that of the heads, given or not, and so do
    sinks."""
    torch.manual_seed(0)
    model = Latents(change)
    before = served(model, TOKENS, folded=False)
    body = [with_args(n, scale=None) if n in attentions(before) else n for n in before.body]  # type: ignore[arg-type]
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS))
    inputs = {"input_ids": ids, "position_ids": torch.arange(TOKENS).expand(BATCH, TOKENS)}
    want = model(**inputs)[:, -1]
    for graph in (form(before), form(replace(before, body=tuple(body)))):
        assert all(node.arg("value_dim") == 5 for node in attentions(graph))
        assert all((node.arg("sinks") is None) == (change == "") for node in attentions(graph))
        got = next(iter(interpret(graph, model.state_dict(), inputs).values()))[:, 0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# --- training ------------------------------------------------------------------------------------


def trained(
    change: str, masked: bool = False, tokens: int = TOKENS
) -> tuple[Latents, Graph, dict[str, Tensor]]:
    """A model, its training graph, and inputs."""
    torch.manual_seed(0)
    model = Latents(change, masked)
    ids = torch.randint(3, VOCABULARY, (BATCH, tokens))
    inputs = {"input_ids": ids, "position_ids": torch.arange(tokens).expand(BATCH, tokens)}
    return model, fold(capture(model, inputs, training=True)), inputs


@pytest.mark.parametrize("change", ["", "sinks"])
def test_training_over_latents(change: str) -> None:
    """Outputs and the gradients of all weights are those of the model; nothing is absorbed."""
    model, before, inputs = trained(change)
    graph = expanded(before)
    (node,) = (n for n in graph.nodes if n.op == "shardwright.attention")
    assert node.operands[1].type.shape == (BATCH, 1, TOKENS, 5 + 2) and node.arg("v") is None
    assert set(rule_of(node).algorithms) == {"ring", "gather"}
    assert node.arg("up") in saved_values(node) and node.operands[1] in saved_values(node)
    assert all(value.differentiable for value in node.operands)
    assert absorbed(before) is before and expanded(graph) is graph
    leaves = {name: x.detach().clone().requires_grad_() for name, x in model.named_parameters()}
    (got,) = interpret(graph, leaves, inputs).values()
    want = model(**inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    wants = torch.autograd.grad((want * weights).sum(), list(model.parameters()))
    gots = torch.autograd.grad((got * weights).sum(), list(leaves.values()))
    for one, other in zip(gots, wants, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_every_cut_of_training_over_latents() -> None:
    """Latents and `up` are whole where queries, batch or heads cut others: gradients partial."""
    _, graph, _ = trained("")
    (node,) = (n for n in expanded(graph).nodes if n.op == "shardwright.attention")
    choices = {name: operands for name, (operands, _) in rule_of(node).choices().items()}
    assert choices == {
        "R": (R, R, R), "b": (S(0), S(0), V), "g": (S(1), V, S(0)), "q": (S(2), V, V),
        "ring": (S(2), S(2), V), "gather": (S(2), S(2), V),
    }  # fmt: skip


def test_latents_stand_in_the_order_of_the_tokens() -> None:
    """And what makes heads of them does not."""
    _, graph, _ = trained("")
    graph = expanded(graph)
    (node,) = (n for n in graph.nodes if n.op == "shardwright.attention")
    ordered = token_dims(graph)
    assert [ordered.get(value.name) for value in node.operands] == [{2}, {2}, None]


def test_training_with_a_mask_stays() -> None:
    _, graph, _ = trained("", masked=True)
    assert any(n.op == "shardwright.attention" for n in graph.nodes) and expanded(graph) is graph


def test_frozen_weights_get_no_gradient() -> None:
    model = Latents("")
    model.up.requires_grad_(False)
    inputs = {name: torch.zeros(BATCH, TOKENS).long() for name in ("input_ids", "position_ids")}
    graph = expanded(fold(capture(model, inputs, training=True)))
    (node,) = (n for n in graph.nodes if n.op == "shardwright.attention")
    assert [value.differentiable for value in node.operands] == [True, True, False]
