"""Losses are found together with the layer that makes the logits, and without wide copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Graph, Node
from shardwright.ir.passes.returned import returning
from shardwright.ir.reference.interpret import interpret

LINEAR, PLAIN, CAP = (
    "shardwright.linear_cross_entropy",
    "shardwright.cross_entropy",
    "shardwright.softcap",
)
Loss = Callable[["Head", Tensor, Tensor], Any]


class Head(nn.Module):
    """A head of 11 classes on 8 numbers, and a loss of what it makes."""

    def __init__(self, loss: Loss, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 11, dtype=dtype)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.loss(self, x, labels)


def of(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def plain(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(m.head(x), y)


def cast(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(m.head(x).float(), y, reduction="sum", label_smoothing=0.1)


def capped(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of((30.0 * torch.tanh(m.head(x) / 30.0)).float(), y)


def scaled(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(m.head(x).mul(0.125).float(), y)


def divided(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(torch.tanh(m.head(x) / 8.0 * 0.5) * 2.0, y)


def transposed(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(x @ m.head.weight.T, y)


def classes_second(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(x).transpose(1, 2), y)


def permuted(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m.head(x).float().permute(0, 2, 1), y, reduction="sum")


def of_rows_of_classes(m: Head, x: Tensor, y: Tensor) -> Tensor:
    logits = torch.einsum("vh,bsh->bvs", m.head.weight, x)
    return F.cross_entropy(logits, y)


def with_logits(m: Head, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = 30.0 * torch.tanh(m.head(x) / 30.0)
    return of(logits.float(), y), logits


def with_wide_logits(m: Head, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = m.head(x).float()
    return of(logits, y), logits


def twice(m: Head, x: Tensor, y: Tensor) -> Tensor:
    logits = m.head(x)
    return of(logits.float(), y) + logits.float().logsumexp(-1).square().mean()


def given() -> dict[str, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, :2] = -100
    return {"x": torch.randn(2, 5, 8, dtype=torch.float64), "labels": labels}


def graph_of(loss: Loss, dtype: torch.dtype) -> tuple[Head, Graph]:
    model, inputs = Head(loss, dtype), given()
    inputs["x"] = inputs["x"].to(dtype)
    return model, capture_folded(model, inputs, training=True)


def node_of(graph: Graph, op: str) -> Node:
    (node,) = [node for node in graph.nodes if node.op == op]
    return node


@pytest.mark.parametrize(
    "loss", [plain, cast, capped, scaled, divided, transposed, classes_second, permuted]
)
def test_the_layer_and_its_loss_are_one(loss: Loss) -> None:
    _, graph = graph_of(loss, torch.bfloat16)
    assert [node.op for node in graph.nodes] == [LINEAR]
    wide = loss in (cast, capped, scaled, permuted)
    assert node_of(graph, LINEAR).output.type.dtype == (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize(
    ("loss", "left"),
    [(with_logits, ["aten.linear.default", CAP, PLAIN]), (twice, ["aten.linear.default", PLAIN])],
)
def test_logits_that_are_read_stay_as_they_are(loss: Loss, left: list[str]) -> None:
    _, graph = graph_of(loss, torch.bfloat16)
    ops = [node.op for node in graph.nodes]
    assert ops[: len(left) - 1] == left[:-1] and PLAIN in ops
    found = node_of(graph, PLAIN)
    assert found.operands[0].type.dtype == torch.bfloat16 and found.arg("dtype") == torch.float32


def test_wide_logits_that_are_returned_are_there() -> None:
    _, graph = graph_of(with_wide_logits, torch.bfloat16)
    assert [out.value.type.dtype for out in graph.outputs] == [torch.float32] * 2


@pytest.mark.parametrize(
    "loss",
    [
        plain, cast, capped, scaled, divided, transposed, with_logits, with_wide_logits, twice,
        classes_second, permuted, of_rows_of_classes,
    ],
)  # fmt: skip
def test_values_and_gradients_stay(loss: Loss) -> None:
    """To 1e-5 where the model itself computes in float32."""
    model, graph = graph_of(loss, torch.float64)
    inputs = given()
    results: list[list[Tensor]] = []
    for run in (lambda x: model(x, inputs["labels"]), lambda x: _interpreted(model, graph, x)):
        model.zero_grad()
        x = inputs["x"].clone().requires_grad_()
        out = run(x)
        outputs = out if isinstance(out, tuple) else (out,)
        torch.stack([part.square().sum() for part in outputs]).sum().backward()
        grads = [t.grad for t in (x, *model.parameters()) if t.grad is not None]
        results.append([*(part.detach() for part in outputs), *grads])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


def _interpreted(model: Head, graph: Graph, x: Tensor) -> tuple[Tensor, ...]:
    state = dict(model.named_parameters())
    return tuple(interpret(graph, state, {"x": x, "labels": given()["labels"]}).values())


def away(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(torch.tanh(m.head(x) / 20.0) * 30.0, y)


def shifted(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(m.head(x) + 1.0, y)


def by_a_tensor(m: Head, x: Tensor, y: Tensor) -> Tensor:
    return of(m.head(x) * m.head.bias, y)


@pytest.mark.parametrize("loss", [away, shifted, by_a_tensor])
def test_what_is_no_scale_and_no_softcap(loss: Loss) -> None:
    _, graph = graph_of(loss, torch.bfloat16)
    assert not {LINEAR, CAP} & {node.op for node in graph.nodes}


def test_logits_that_are_not_asked_for_are_never_there() -> None:
    _, graph = graph_of(with_logits, torch.bfloat16)
    (out,) = returning(graph, ["0"]).outputs
    assert out.path == (0,)
    (node,) = returning(graph, ["0"]).nodes
    assert node.op == LINEAR and node.arg("softcap") == 30.0
    assert [n.op for n in returning(graph, ["1"]).nodes] == ["aten.linear.default", CAP]
    assert returning(graph, ["1", "0"]) == graph
    with pytest.raises(ValueError, match="the model returns no `loss`; it returns `0`, `1`"):
        returning(graph, ["loss"])
