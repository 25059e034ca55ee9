"""Fused projections taken apart: which, into what, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph, Node, Param
from shardwright.ir.graph.serialize import graph_from_json, graph_to_json
from shardwright.ir.graph.text import format_graph, format_param
from shardwright.ir.passes.fold import fold
from shardwright.ir.passes.unfuse import unfuse
from shardwright.ir.reference.interpret import interpret
from shardwright.ir.reference.shrink import state_of
from shardwright.ir.reference.widen import widened
from tests.endtoend.families import build, inputs_of

F64 = torch.float64
WIDTH = 8


class Fused(nn.Module):
    """What `forward` methods below read: a layer with 24 columns, a weight, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 24, dtype=F64)
        self.weight = nn.Parameter(torch.randn(WIDTH, 24, dtype=F64))
        self.bias = nn.Parameter(torch.randn(24, dtype=F64))


class Split(Fused):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x).split(8, dim=-1)
        return q * k.sigmoid() + v.exp()


class Unequal(Fused):
    def forward(self, x: Tensor) -> Tensor:
        wide, narrow, rest = torch.split(x @ self.weight, [16, 4, 4], dim=2)
        return wide.sum(-1, keepdim=True) * narrow + rest


class Slices(Fused):
    def forward(self, x: Tensor) -> Tensor:
        both = F.linear(x, self.layer.weight)
        right = both[..., 8:]
        left = both[..., :8]
        return left.sum(-1, keepdim=True) + right


class Conv1d(Fused):
    """As transformers' Conv1D: addmm on merged tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(2, 3, 24)
        gate, up = y.chunk(2, dim=-1)
        return gate.tanh() * up


class Addmm(Fused):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.addmm(self.bias, x[0], self.weight, beta=0.5, alpha=2).chunk(2, dim=1)
        return a * b.exp()


class Unbound(Fused):
    """As timm's attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x).reshape(2, 3, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return (q * k.sigmoid()).exp() + v


class Selected(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).view(2, 3, 3, 8)
        return y[:, :, 0] * y[:, :, 2].exp() + y[:, :, 1]


class Heads(Fused):
    """Heads are counted, then taken: four of q, one of k, one of v."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x).view(2, 3, 6, 4).transpose(1, 2).split([4, 1, 1], dim=1)
        return q * k.exp() + v


class Nested(Fused):
    def forward(self, x: Tensor) -> Tensor:
        qk, v = self.layer(x).split([16, 8], dim=-1)
        q, k = qk.chunk(2, -1)
        return q * k.exp() + v


class Returned(Fused):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).chunk(3, -1)


APART = {
    Split: {"layer.weight_q": 8, "layer.weight_k": 8, "layer.weight_v": 8},
    Unequal: {"weight_wide": 16, "weight_narrow": 4, "weight_rest": 4},
    Slices: {"layer.weight_left": 8, "layer.weight_right": 16},
    Conv1d: {"weight_gate": 12, "weight_up": 12},
    Addmm: {"weight_a": 12, "weight_b": 12},
    Unbound: {"layer.weight_q": 8, "layer.weight_k": 8, "layer.weight_v": 8},
    Selected: {"layer.weight_0": 8, "layer.weight_1": 8, "layer.weight_2": 8},
    Heads: {"layer.weight_q": 16, "layer.weight_k": 4, "layer.weight_v": 4},
    Nested: {"layer.weight_qk_q": 8, "layer.weight_qk_k": 8, "layer.weight_v": 8},
    Returned: {"layer.weight_0": 8, "layer.weight_1": 8, "layer.weight_2": 8},
}


def input_of() -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=F64)


def outputs(graph: Graph, params: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    return list(interpret(graph, params, {"x": x}).values())


def parts(graph: Graph) -> dict[str, Param]:
    return {param.name: param for param in graph.params if param.part is not None}


@pytest.mark.parametrize("model_class", APART, ids=lambda f: f.__name__)
def test_taken_apart(model_class: type[Fused]) -> None:
    torch.manual_seed(0)
    model, x = model_class(), input_of()
    whole = capture(model, {"x": x}, training=True)
    graph = unfuse(whole)
    sizes = {n: p.value.type.numel // WIDTH for n, p in parts(graph).items() if "weight" in n}
    assert sizes == APART[model_class]
    ops = [node.op for node in graph.body if isinstance(node, Node)]
    products = [op for op in ops if op.split(".")[1] in ("linear", "matmul", "affine", "addmm")]
    assert len(products) == len(sizes)
    assert not {op.split(".")[1] for op in ops} & {"split", "split_with_sizes", "chunk", "slice"}
    assert not {op.split(".")[1] for op in ops} & {"unbind", "select"} or model_class is Addmm
    assert state_of(graph) == state_of(whole)

    names = dict(model.named_parameters())
    got, want = outputs(graph, names, x), model(x)
    want = list(want) if isinstance(want, tuple) else [want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad(
            sum((y * y).sum() for y in results), list(names.values()), allow_unused=True
        )
        for results in (got, want)
    ]
    for name, a, b in zip(names, *gradients, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert graph_from_json(graph_to_json(graph)) == graph
    assert unfuse(graph) is graph


def test_slices_of_the_original_cover_it_in_order() -> None:
    graph = unfuse(capture(Nested(), {"x": input_of()}, training=True))
    found = [(p.part.name, p.part.dim, p.part.start) for p in parts(graph).values() if p.part]
    assert found == [("layer.weight", 0, n) for n in (0, 8, 16)] + [
        ("layer.bias", 0, n) for n in (0, 8, 16)
    ]
    assert format_param(parts(graph)["layer.weight_qk_k"]) == (
        "parameter layer.weight_qk_k: float64[8, 8] = layer.weight[8:16]"
    )
    columns = unfuse(capture(Unequal(), {"x": input_of()}, training=True))
    assert format_param(parts(columns)["weight_rest"]).endswith("= weight[:, 20:24]")


# ---- what stays --------------------------------------------------------------------------------


class Twice(Fused):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x).chunk(2, -1)
        return a * b + self.layer.weight.sum()


class BiasTwice(Fused):
    def forward(self, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.layer.weight, self.bias).chunk(2, -1)
        return a * b + self.bias.sum()


class Interleaved(Fused):
    """As GPT-NeoX: heads first, in each its q, k and v."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x).view(2, 3, 2, 12).chunk(3, -1)
        return q * k + v


class Overlapping(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[..., :16] * y[..., 8:]


class Gap(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[..., :8] * y[..., 16:]


class EverySecond(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[..., ::2] * y[..., 1::2]


class AlsoWhole(Fused):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        a, b = y.chunk(2, -1)
        return a * b, y


class ChangedBefore(Fused):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x).relu().chunk(2, -1)
        return a * b


class Tokens(Fused):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.layer(x).unbind(1)
        return a * b + c


class SingleColumns(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.layer(x).unbind(-1)).cumsum(0)


class Computed(Fused):
    def forward(self, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.layer.weight * 2).chunk(2, -1)
        return a * b


STAYS = (
    Twice, BiasTwice, Interleaved, Overlapping, Gap, EverySecond, AlsoWhole, ChangedBefore,
    Tokens, SingleColumns, Computed,
)  # fmt: skip


@pytest.mark.parametrize("model_class", STAYS, ids=lambda f: f.__name__)
def test_left_alone(model_class: type[Fused]) -> None:
    graph = capture(model_class(), {"x": input_of()}, training=True)
    assert unfuse(graph) is graph


class TiedInUse(nn.Module):
    """The weight of a fused projection is also the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, WIDTH)
        self.layer = nn.Linear(WIDTH, 24, bias=False)
        self.layer.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        a, b = self.layer(self.table(ids)).chunk(2, -1)
        return a * b


def test_a_tied_weight_is_left_alone() -> None:
    graph = capture(TiedInUse(), {"ids": torch.ones(2, 3, dtype=torch.long)}, training=True)
    assert unfuse(graph) is graph


# ---- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "gpt2", "phi3"])
def test_folded_layers(name: str) -> None:
    """Taking apart before or after folding is the same, and computes what the original does."""
    model, inputs = build(name).double(), inputs_of(name)
    flat = capture(model, inputs, training=True)
    graph = unfuse(fold(flat))
    before = fold(unfuse(flat))
    assert graph.loops[0].order == before.loops[0].order
    block = graph.loops[0].blocks[0]
    assert sum(param.part is not None for param in block.params) == (6 if name != "phi3" else 5)
    kinds = [node.op for node in block.nodes]
    assert kinds == [node.op for node in before.loops[0].blocks[0].nodes]
    state = {n: t.detach() for n, t in model.state_dict().items()}
    for key, got in interpret(widened(graph), state, inputs).items():
        want = model(**inputs)[key[0]].double()
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)


def test_no_fused_projection_no_change() -> None:
    graph = fold(capture(build("gpt_neox"), inputs_of("gpt_neox"), training=True))
    assert unfuse(graph) is graph
    graph = fold(capture(build("llama"), inputs_of("llama"), training=True))
    assert unfuse(graph) is graph
    assert "weight_" not in format_graph(graph)
