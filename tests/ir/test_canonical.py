"""Each canonical pass on the smallest graph that shows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph, Node
from shardwright.ir.ops.attention import attention, attention_math
from shardwright.ir.reference.evaluate import describe_mask
from shardwright.ir.reference.interpret import interpret


class Call(nn.Module):
    """A module around a function of tensors and one parameter `w`."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(x, self.w) if y is None else self.function(x, self.w, y)


def captured(
    function: Callable[..., Any], x: Tensor, *shape: int, y: Tensor | None = None
) -> Graph:
    """The graph of `function(x, w[, y])`, checked against running it."""
    model = Call(function, *shape)
    inputs = {"x": x} if y is None else {"x": x, "y": y}
    graph = capture(model, inputs, training=True)
    (found,) = interpret(graph, dict(model.named_parameters()), inputs).values()
    torch.testing.assert_close(found, model(**inputs), rtol=0, atol=1e-12)
    return graph


def nodes(graph: Graph) -> list[Node]:
    return [node for node in graph.body if isinstance(node, Node)]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in nodes(graph)]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_a_tensor_written_part_by_part_is_its_parts() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = x.new_empty(3, 6)
        y[:, :4] = x
        y[:, 4:] = w
        return y.exp()

    graph = captured(forward, normal(3, 4), 3, 2)
    assert ops(graph) == ["aten.cat.default", "aten.exp.default"]


@pytest.mark.parametrize("start", [1, 3])
def test_a_tensor_written_with_a_gap_or_twice_keeps_the_rest(start: int) -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = x.new_ones(3, start + 4)
        y[:, :2] = w
        y[:, start:] = x
        y[1] = y[0] * 2
        return y.exp()

    graph = captured(forward, normal(3, 4), 3, 2)
    assert not [op for op in ops(graph) if "scatter" in op]
    kept = [node.output.type.shape for node in nodes(graph) if node.op == "aten.slice.Tensor"]
    assert kept.count((3, start)) == 1 and kept.count((1, start + 4)) == 2  # rows 0 and 2


def test_routing_keeps_tokens_apart() -> None:
    """A router on merged tokens: its choices, and a mask of groups, are made for (b, s)."""

    def forward(x: Tensor, w: Tensor) -> Tensor:
        scores = (x.view(6, 4) * w).sigmoid()
        groups = scores.view(6, 2, 2).topk(1, dim=-1)[0].sum(dim=-1)
        mask = torch.zeros_like(groups).scatter(1, groups.topk(1, dim=1)[1], 1.0)
        mask = mask.unsqueeze(-1).expand(-1, 2, 2).reshape(6, 4)
        chosen = scores.masked_fill(mask == 0, 0.0).topk(2, dim=1)[1]
        return scores.gather(1, chosen).view(2, 3, 2)

    graph = captured(forward, normal(2, 3, 4), 4)
    assert all(value.type.shape[:2] == (2, 3) for n in nodes(graph) for value in n.outputs)


def test_identities_vanish() -> None:
    graph = captured(
        lambda x, w: (x.view(3, 4).expand(3, 4)[:].contiguous().clone() + 0).to(x.dtype) * w,
        normal(3, 4),
        4,
    )
    assert ops(graph) == ["aten.mul.Tensor"]


def test_of_what_is_expanded_to_only_the_shape_counts() -> None:
    graph = captured(lambda x, w: x[:, :1].expand_as(w) * x, normal(3, 4), 3, 4)
    expand = next(node for node in graph.nodes if "expand" in node.op)
    assert (expand.op, expand.arg("size")) == ("aten.expand.default", (3, 4))
    assert [value.type.shape for value in expand.operands] == [(3, 1)]


def test_what_is_broadcast_together_is_expanded_alone() -> None:
    """Which of several tensors has the size of all is only named."""
    graph = captured(
        lambda x, w: torch.mul(*torch.broadcast_tensors(x[:, :1], w)), normal(3, 4), 3, 4
    )
    assert ops(graph)[-2:] == ["aten.expand.default", "aten.mul.Tensor"]
    graph = captured(lambda x, w: torch.nn.functional.mse_loss(x, w), normal(3, 4), 3, 4)
    assert len(graph.nodes) == 1


def test_an_empty_rest_vanishes() -> None:
    """As a rotary embedding of all of the head's width."""
    graph = captured(
        lambda x, w: torch.cat([x[..., :4] * w, x[..., 4:]], dim=-1).exp(), normal(3, 4), 4
    )
    assert ops(graph) == ["aten.mul.Tensor", "aten.exp.default"]
    graph = captured(
        lambda x, w: torch.cat([x[..., :3] * w, x[..., 3:]], dim=-1).exp(), normal(3, 4), 3
    )
    assert "aten.cat.default" in ops(graph)


def test_adding_zero_that_changes_the_dtype_stays() -> None:
    graph = captured(lambda x, w: (x + 0.0) * w, torch.arange(3), 3)
    assert len(ops(graph)) == 2


def test_reshapes_join_and_have_whole_shapes() -> None:
    graph = captured(lambda x, w: (x.view(4, -1) * w).view(2, 2, -1).flatten(1), normal(2, 6), 3)
    assert ops(graph) == ["aten.reshape.default", "aten.mul.Tensor", "aten.reshape.default"]
    assert [n.arg("shape") for n in nodes(graph) if "reshape" in n.op] == [(4, 3), (2, 6)]


def test_transposes_have_one_name_and_cancel() -> None:
    graph = captured(lambda x, w: x.t().T @ w.transpose(-2, -1), normal(3, 4), 5, 4)
    assert ops(graph) == ["aten.transpose.int", "aten.matmul.default"]
    assert (nodes(graph)[0].arg("dim0"), nodes(graph)[0].arg("dim1")) == (0, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_keeps_tokens_apart(reduction: str) -> None:
    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        logits = x @ w
        return F.cross_entropy(
            logits.reshape(-1, 7), labels.reshape(-1), reduction=reduction, label_smoothing=0.1
        )

    labels = torch.tensor([[1, 2, -100], [4, 5, 6]])
    (node,) = [n for n in nodes(captured(loss, normal(2, 3, 4), 4, 7, y=labels)) if "cross" in n.op]
    assert node.op == "shardwright.cross_entropy"
    assert [value.type.shape for value in node.operands] == [(2, 3, 7), (2, 3)]


def test_other_cross_entropies_stay() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    weighted = captured(
        lambda x, w, y: F.cross_entropy(x.view(6, 4), y.view(6) % 4, weight=w.detach().exp()),
        normal(2, 3, 4), 4, y=labels,
    )  # fmt: skip
    assert "aten.cross_entropy_loss.default" in ops(weighted)


def test_mm_on_merged_tokens_is_matmul() -> None:
    graph = captured(lambda x, w: torch.mm(x.view(6, 4), w).view(2, 3, 5), normal(2, 3, 4), 4, 5)
    assert ops(graph) == ["aten.matmul.default"]


def test_heads_and_tokens_merged_at_once() -> None:
    graph = captured(
        lambda x, w: torch.mm(x.reshape(6, 4), w).view(2, 3, 5), normal(2, 3, 2, 2), 4, 5
    )
    assert ops(graph) == ["aten.reshape.default", "aten.matmul.default"]
    assert nodes(graph)[0].arg("shape") == (2, 3, 4)


def test_one_token_is_not_merged_where_heads_are() -> None:
    graph = captured(
        lambda x, w: F.linear(x.transpose(1, 2).reshape(2, 1, 6), w), normal(2, 3, 1, 2), 5, 6
    )
    assert ops(graph) == ["aten.transpose.int", "aten.reshape.default", "aten.linear.default"]
    assert nodes(graph)[1].arg("shape") == (2, 1, 6)


def test_mixing_tokens_keeps_them_merged() -> None:
    graph = captured(lambda x, w: (x.view(6, 4) * w).cumsum(0), normal(2, 3, 4), 4)
    assert ops(graph)[-2:] == ["aten.reshape.default", "aten.cumsum.default"]


# ---- attention ---------------------------------------------------------------------------------


def attend(mask: Callable[[int], Tensor], causal: bool = False) -> Node:
    """The attention node of a model with that constant mask over 8 positions."""

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x * w, x, x, attn_mask=mask(8), is_causal=causal)

    (node,) = [n for n in nodes(captured(forward, normal(2, 2, 8, 4), 4)) if "attention" in n.op]
    return node


def band(size: int, window: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril().triu(1 - window)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda s: torch.ones(s, s, dtype=torch.bool), (False, 0)),
        (lambda s: band(s, s), (True, 0)),
        (lambda s: band(s, 3), (True, 3)),
        (lambda s: torch.zeros(s, s).double().masked_fill(~band(s, s), -math.inf), (True, 0)),
    ],
)
def test_constant_masks_become_numbers(mask: Callable[[int], Tensor], expected: object) -> None:
    node = attend(mask)
    assert node.arg("mask") is None
    assert (node.arg("causal"), node.arg("window")) == expected
    assert node.arg("scale") == 0.5


@pytest.mark.parametrize(
    "mask",
    [
        lambda s: band(s, s).flip(1) | torch.eye(s, dtype=torch.bool),
        lambda s: -(torch.arange(s)[:, None] - torch.arange(s)).abs().double(),
    ],
)
def test_other_constant_masks_stay(mask: Callable[[int], Tensor]) -> None:
    assert attend(mask).arg("mask") is not None


def test_describe_mask_refuses_rows_without_keys() -> None:
    mask = band(4, 4)
    mask[2] = False
    assert describe_mask(mask, 4, 4, False, 0) is None


@pytest.mark.parametrize("masked", ["none", "bool", "additive", "empty row"])
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 3), (False, 3)])
def test_attention_operator_against_sdpa(masked: str, causal: bool, window: int) -> None:
    q, k, v = normal(2, 4, 8, 4), normal(2, 2, 8, 4), normal(2, 2, 8, 6)
    seen = band(8, window or 8) if causal else torch.ones(8, 8, dtype=torch.bool)
    seen = seen if causal or not window else seen.triu(1 - window)
    mask = None
    if masked == "bool":
        mask = torch.rand(2, 1, 8, 8) > 0.3
        mask = mask | torch.eye(8, dtype=torch.bool)
    if masked == "additive":
        mask = normal(1, 4, 8, 8)
    if masked == "empty row":
        mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
        mask[1] = False
    whole = seen.expand(2, 4, 8, 8)
    if mask is not None and mask.dtype == torch.bool:
        whole = whole & mask
    added = torch.zeros(2, 4, 8, 8).double().masked_fill(~whole, -math.inf)
    added = added + mask if masked == "additive" and mask is not None else added
    tensors = [t.requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(q, k, v, added, scale=0.3, enable_gqa=True)
    expected = expected.nan_to_num(0.0)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors, materialize_grads=True)
    for function in (attention, attention_math):
        found = function(q, k, v, mask, 0.3, causal, window, 0.0, 0.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad((found * weight).sum(), tensors)
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b.nan_to_num(0.0), rtol=0, atol=1e-10)


def test_attention_operator_checks() -> None:
    q, k, v = (normal(1, 2, 4, 4).requires_grad_() for _ in range(3))
    torch.library.opcheck(attention, (q, k, v, None, 0.5, True, 2, 3.0, 0.0))
    with pytest.raises(ValueError, match="dropout_p=0.1"):
        attention(q, k, v, None, 0.5, True, 0, 0.0, 0.1)
