"""Inputs of any form: what the original takes, the module takes, with the same results."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.capturing import phase_graph
from shardwright.ir.capture.arguments import Arguments
from shardwright.ir.capture.capture import CaptureError, capture, capture_folded
from shardwright.ir.graph import Graph, Signature
from shardwright.ir.graph.serialize import graph_from_json, graph_to_json
from shardwright.loading import Loaded
from shardwright.planner.errors import PlanError
from shardwright.runtime import RankError, RankPool
from tests.sharded import (
    assert_close,
    builder_of,
    flatten,
    import_source,
    mesh_of,
    random_decisions,
    source_of,
    whole_outputs,
)

Pool = Callable[[int], RankPool]
F64 = torch.float64


@dataclass(frozen=True, slots=True)
class Batch:
    ids: Tensor
    images: list[Tensor]
    causal: bool = True


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8, dtype=F64)
        self.up, self.down = nn.Linear(8, 16, dtype=F64), nn.Linear(16, 8, dtype=F64)

    def run(self, ids: Tensor, *added: Tensor) -> Tensor:
        hidden = self.table(ids)
        for each in added:
            hidden = hidden + each
        return hidden + self.down(F.gelu(self.up(hidden)))


class Nested(Net):
    def forward(
        self,
        batch: dict[str, Any],
        scale: float = 1.0,
        mask: Tensor | None = None,
        *,
        kind: str = "sum",
    ) -> dict[str, Tensor]:
        out = self.run(batch.pop("ids"), *batch["images"])
        out = out if mask is None else out * mask[..., None]
        return {"out": out * scale if kind == "mean" else out}


class Fields(Net):
    def forward(self, batch: Batch, pair: Pair) -> Tensor:
        out = self.run(batch.ids, *batch.images, pair.first)
        return out.cumsum(1) + pair.second if batch.causal else out


class Positional(Net):
    def forward(self, ids: Tensor, /, *images: Tensor) -> Tensor:
        return self.run(ids, *images)


class Hiding(Net):
    """Argument names that its module needs for something else."""

    def forward(self, torch: dict[str, Tensor], x: bool, empty: list[Tensor]) -> Tensor:
        return self.run(torch["input-ids"], torch["input_ids"]) if x else torch["input_ids"]


IDS = torch.arange(32).reshape(4, 8) % 12
IMAGES = [torch.randn(4, 8, 8, dtype=F64) for _ in range(4)]
BATCH = {"ids": IDS, "images": (IMAGES[0], IMAGES[1])}
CASES: dict[str, tuple[type[Net], Any]] = {
    "nested": (Nested, {"batch": BATCH, "mask": None, "scale": 2.0, "kind": "mean"}),
    "mapping": (Nested, {"batch": UserDict(BATCH), "mask": (IDS % 2).double()}),
    "fields": (Fields, (Batch(IDS, IMAGES[:2]), Pair(IMAGES[2], IMAGES[3]))),
    "positional": (Positional, (IDS, IMAGES[0])),
    "hiding": (
        Hiding,
        {"empty": [], "torch": {"input-ids": IDS, "input_ids": IMAGES[0]}, "x": True},
    ),
}


def captured(name: str) -> tuple[Net, Any, Graph]:
    torch.manual_seed(0)
    kind, inputs = CASES[name]
    model = kind()
    graph = graph_from_json(
        json.loads(json.dumps(graph_to_json(capture(model, inputs, training=True))))
    )
    return model, inputs, graph


def apply(function: Callable[..., Any], inputs: Any) -> Any:
    return function(**inputs) if isinstance(inputs, dict) else function(*inputs)


def weighted(out: Any) -> Tensor:
    ((_, tensor),) = flatten(out)
    return (tensor**2).sum()


def outputs_and_gradients(
    source: str, state: dict[str, Tensor], inputs: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """In a rank: the output whole, and gradients of the sum of its squares."""
    model = import_source(source).ShardedModel.from_state_dict(state)
    out = model(**apply(model.shard_inputs, inputs))
    ((path, whole),) = flatten(whole_outputs(model, out))
    ((_, local),) = flatten(out)
    (output,) = model.OUTPUTS
    own = model.local_part(2 * whole, output.spec)
    local.backward(own)
    assert path == output.path
    return whole, model.full_gradients()


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_original(pool: Pool, name: str) -> None:
    model, inputs, graph = captured(name)
    out = apply(model, copied(inputs))
    weighted(out).backward()
    ((_, wanted),) = flatten(out)
    for ranks, sizes, seed in ((2, (2,), 0), (2, (2,), 1), (4, (2, 2), 2), (4, (4,), 3)):
        made = builder_of(graph, mesh_of(*sizes))
        source = source_of(made, random_decisions(made, seed))
        for whole, gradients in pool(ranks).run(
            outputs_and_gradients, source, model.state_dict(), inputs
        ):
            assert_close(whole, wanted.detach(), 1e-12, f"{name} {seed}")
            for parameter, tensor in model.named_parameters():
                found = gradients[parameter]
                assert found is not None and tensor.grad is not None
                assert_close(found, tensor.grad, 1e-12, f"{name} {seed} {parameter}")


def copied(inputs: Any) -> Any:
    """`forward` of `Nested` takes its batch apart."""
    if isinstance(inputs, dict) and "batch" in inputs:
        batch = inputs["batch"]
        return {**inputs, "batch": {"ids": batch["ids"], "images": batch["images"]}}
    return inputs


def test_the_graph_says_where_inputs_stand() -> None:
    graph = captured("nested")[2]
    assert [(item.name, item.path) for item in graph.inputs] == [
        ("batch_ids", ("batch", "ids")),
        ("batch_images_0", ("batch", "images", 0)),
        ("batch_images_1", ("batch", "images", 1)),
    ]
    fixed = ((("scale",), 2.0), (("mask",), None), (("kind",), "mean"))
    assert graph.signature == Signature(("batch", "scale", "mask", "kind"), 3, fixed)
    assert captured("positional")[2].signature is None
    names = [item.name for item in captured("hiding")[2].inputs]
    assert names == ["torch_input_ids", "torch_input_ids_1"]


def test_the_module_takes_what_the_original_takes() -> None:
    graph = captured("nested")[2]
    made = builder_of(graph, mesh_of(2))
    text = source_of(made, random_decisions(made, 0))
    for line in (
        "    def forward(self, batch: object, scale: object, mask: object, *, "
        "kind: object) -> object:",
        "        batch_ids, batch_images_0, batch_images_1 = self.unpack(\n"
        "            batch=batch, scale=scale, mask=mask, kind=kind\n        )",
        '    FIXED = {("scale",): 2.0, ("mask",): None, ("kind",): "mean"}',
        'path=("batch", "images", 1)),',
    ):
        assert line in text, text


def test_a_deep_model_is_recorded_from_few_layers() -> None:
    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input + F.gelu(super().forward(input))

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(8, 8) for _ in range(12))

        def forward(self, batch: dict[str, Tensor], scale: float) -> Tensor:
            x = batch["x"]
            for layer in self.layers:
                x = layer(x)
            return x * scale

    model = Deep()
    graph = capture_folded(model, ({"x": torch.randn(2, 8)}, 0.5), training=True)
    assert [len(loop.order) for loop in graph.loops] == [12]
    assert "forward" not in model.__dict__


REFUSED: tuple[tuple[str, Any, str], ...] = (
    (
        "nested",
        {"scale": 3.0},
        "input `scale` is 3.0 (float); the plan has 2.0 (float), which is fixed in its module",
    ),
    ("nested", {"scale": 2}, "input `scale` is 2 (int); the plan has 2.0 (float), which"),
    ("nested", {"kind": "sum"}, "input `kind` is 'sum' (str); the plan has 'mean' (str), which"),
    (
        "nested",
        {"mask": IDS},
        "`mask` is a tensor of shape (4, 8); the plan has None (NoneType), which",
    ),
    ("nested", {"batch": {"ids": IDS}}, "missing: batch['images'][0], batch['images'][1]"),
    ("nested", {"batch": {**BATCH, "more": IDS}}, "unknown: batch['more']"),
    (
        "nested",
        {"batch": {**BATCH, "ids": [[1, 2]]}},
        "`batch['ids']` is a container; the plan has",
    ),
    (
        "nested",
        {"batch": {**BATCH, "ids": None}},
        "`batch['ids']` is None (NoneType); the plan has a tensor",
    ),
    (
        "nested",
        {"batch": {**BATCH, "ids": IDS[:, :7]}},
        "input `batch['ids']` is torch.int64 (4, 7)",
    ),
    ("hiding", {"empty": [IDS]}, "input `empty` is a container; the plan has one tensor or value"),
    ("fields", (1, 2, 3), "3 inputs are given by position; forward takes batch, pair so"),
    ("positional", {"args": (IDS,), "ids": IDS}, "input `ids` is given by position and by name"),
)


def refusals(source: str, state: dict[str, Tensor], given: list[Any]) -> list[str]:
    """In a rank: what it says of each of these inputs."""
    model = import_source(source).ShardedModel.from_state_dict(state)
    found: list[str] = []
    for inputs in given:
        positional = isinstance(inputs, dict) and "args" in inputs
        args = inputs.pop("args") if positional else inputs if isinstance(inputs, tuple) else ()
        try:
            model.shard_inputs(*args, **(inputs if isinstance(inputs, dict) else {}))
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", ("nested", "hiding", "fields", "positional"))
def test_other_inputs_than_planned_are_refused(pool: Pool, name: str) -> None:
    model, planned, graph = captured(name)
    made = builder_of(graph, mesh_of(2))
    source = source_of(made, random_decisions(made, 0))
    rows = [(inputs, text) for case, inputs, text in REFUSED if case == name]
    given = [
        {**planned, **i} if isinstance(planned, dict) and isinstance(i, dict) else i
        for i, _ in rows
    ]
    for said in pool(2).run(refusals, source, model.state_dict(), given):
        assert len(said) == len(rows)
        for text, (_, wanted) in zip(said, rows, strict=True):
            assert wanted in text, text


class Fed(nn.Module):
    """What a model is given, as by a prompt that is learned outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale + self.down(torch.tanh(self.up(self.norm(x))))


def gradients_of_inputs(
    source: str, state: dict[str, Tensor], x: Tensor, gradient: Tensor
) -> list[Tensor]:
    """In a rank: the gradient that it got, and its part of the right one."""
    model = import_source(source).ShardedModel.from_state_dict(state)
    local = model.shard_inputs(x=x, scale=torch.ones(8, dtype=x.dtype))
    local["x"].requires_grad_()
    out = model(**local)
    (out * out.detach()).sum().backward()
    spec = model.INPUTS["x"].spec
    with pytest.raises(ValueError, match="input `scale` wants a gradient, and was planned without"):
        model(local["x"], local["scale"].requires_grad_())
    return [local["x"].grad, model.local_part(gradient, spec)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.some(2)
def test_gradients_of_inputs(pool: Pool, seed: int) -> None:
    """Of example inputs that have `requires_grad`, under any decisions; others are refused."""
    torch.manual_seed(seed)
    model = Fed().double()
    x = torch.randn(4, 8, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(8, dtype=torch.float64)
    graph = capture_folded(model, {"x": x, "scale": scale}, training=True)
    out = model(x, scale)
    (out * out.detach()).sum().backward()
    for sizes in ((2,), (2, 2)):
        made = builder_of(graph, mesh_of(*sizes))
        source = source_of(made, random_decisions(made, seed))
        given = (source, model.state_dict(), x.detach(), x.grad)
        for got, wanted in pool(prod(sizes)).run(gradients_of_inputs, *given):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def other_value(source: str, state: dict[str, Tensor], inputs: Any) -> None:
    """In a rank: `forward` with another number than planned, after inputs were cut."""
    model = import_source(source).ShardedModel.from_state_dict(state)
    model(**{**model.shard_inputs(**inputs), "scale": 3.0})


def test_forward_checks_values_too(pool: Pool) -> None:
    model, inputs, graph = captured("nested")
    made = builder_of(graph, mesh_of(2))
    source = source_of(made, random_decisions(made, 0))
    with pytest.raises(RankError, match=r"input `scale` is 3\.0 \(float\); the plan has 2\.0"):
        pool(2).run(other_value, source, model.state_dict(), inputs)


@pytest.mark.parametrize(
    ("name", "inputs", "said"),
    [
        (
            "nested",
            {"batch": {"ids": {1}}},
            "`batch['ids']` is a set, not a tensor; inputs may also",
        ),
        ("nested", {"batch": {None: IDS}}, "`batch[None]` stands under the key None"),
        ("nested", {"batch": BATCH, "kind": 'a"b'}, "`kind` is text that a plan can't hold"),
        ("nested", {"batch": BATCH, "more": 1}, "Nested.forward takes no `more`; it takes `batch`"),
        ("nested", {"scale": 1.0}, "Nested.forward needs `batch`"),
        ("nested", IDS, "the inputs are a Tensor; give forward's arguments as a dict by name"),
        ("fields", (1, 2, 3), "takes 2 positional arguments, the inputs are 3"),
    ],
)
def test_what_a_plan_cannot_hold_is_refused(name: str, inputs: Any, said: str) -> None:
    with pytest.raises(CaptureError) as error:
        Arguments.of(CASES[name][0](), inputs)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["batch"]},
        {"by_position": 9},
        {"fixed": [[["batch"], 1]]},
        {"fixed": [[["scale"], "a\nb"]]},
        {"fixed": [[["scale"], [1]]]},
        {"names": ["batch", "scale", "mask", "a b"]},
    ],
)
def test_a_graph_from_elsewhere_is_checked(change: dict[str, Any]) -> None:
    data = graph_to_json(captured("nested")[2])
    data["signature"] |= change
    with pytest.raises(ValueError):
        graph_from_json(data)


class Placed(Net):
    def forward(self, input_ids: Tensor, position_ids: Tensor, scale: float) -> Tensor:
        return self.run(input_ids) * scale + position_ids[..., None]


def test_serving_takes_tokens_and_positions_alone() -> None:
    inputs = {"input_ids": IDS, "position_ids": IDS, "scale": 2.0}
    with pytest.raises(PlanError, match="Placed is given `scale`; to be served, a model takes"):
        phase_graph(Loaded(Placed(), inputs, {}, None), "decode", 8)


class Scaled(Net):
    def forward(self, input_ids: Tensor, scale: float) -> Tensor:
        return self.run(input_ids) * scale


@pytest.mark.parametrize("tokens", [2, 5])
def test_without_a_cache_other_inputs_may_stay(tokens: int) -> None:
    inputs = {"input_ids": torch.zeros(2, tokens, dtype=torch.long), "scale": 2.0}
    loaded = Loaded(Scaled(), inputs, {}, None)
    assert [each.name for each in phase_graph(loaded, "prefill", 0).inputs] == ["input_ids"]
    with pytest.raises(PlanError, match="no keyword `position_ids`"):
        phase_graph(loaded, "decode", 8)
