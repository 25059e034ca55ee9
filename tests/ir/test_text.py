"""The text form of a graph, and its JSON form."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import capture
from shardwright.ir.graph import Graph
from shardwright.ir.graph.serialize import graph_from_json, graph_to_json
from shardwright.ir.graph.text import format_graph
from shardwright.ir.passes.fold import fold

from .models import TinyGPT, batch, huggingface_configs, huggingface_model


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.register_buffer("limit", torch.tensor([1.0, float("inf")]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        doubled = x * 2.0
        return doubled.clamp(max=self.limit[1])


TEXT = """\
graph Doubling
  input x: float32[2, 4]
  constant limit: float32[2]
  parameter layers.0.weight: float32[4, 4]
"""


def test_text_lists_everything_once() -> None:
    graph = capture(Doubling(), {"x": torch.zeros(2, 4)}, training=True)
    text = format_graph(graph)
    lines = text.splitlines()
    assert lines[:2] == TEXT.splitlines()[:2]
    assert "  parameter layers.0.weight: float32[4, 4]" in lines
    linear = next(line for line in lines if "aten.linear" in line)
    assert linear.startswith(
        "  linear: float32[2, 4] = aten.linear.default(input=x, weight=layers.0.weight, bias=None)"
        "  # test_text.py:"
    )
    doubled = next(line for line in lines if "aten.mul" in line)
    assert doubled.endswith(" doubled")
    assert lines[-1] == "  output (result) = clamp"
    assert format_graph(graph) == text


def test_text_of_a_loop() -> None:
    text = format_graph(fold(capture(TinyGPT(), batch(2, 12, "ids"), training=True)))
    assert "  loop blocks over blocks: 3 x, order 0 x3" in text
    assert "    block 0 Block(blocks_in: float32[2, 12, 32])" in text
    assert "parameter attention.q.weight: float32[32, 32]" in text


@pytest.fixture(scope="module")
def folded() -> Graph:
    model = huggingface_model("gemma3", huggingface_configs()["gemma3"])
    return fold(capture(model, batch(2, 12, "input_ids", "labels"), training=True))


def test_json_round_trip(folded: Graph) -> None:
    special = capture(Doubling(), {"x": torch.zeros(2, 4)}, training=True)
    for graph in (folded, special):
        text = json.dumps(graph_to_json(graph), allow_nan=False)
        assert graph_from_json(json.loads(text)) == graph


def first(data: Any, key: str) -> Any:
    """The first loop or node of the body."""
    return next(item for item in data["body"] if key in item)


Break = Callable[[Any], None]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("inputs"), r"`graph`: there is no field `inputs`"),
        (lambda d: d.update(name=3), r"graph\.name`: expected one line of text .* got 3"),
        (lambda d: d.update(body={}), r"graph\.body`: expected a list, got \{\}"),
        (
            lambda d: d["inputs"][0]["value"].update(dtype="load"),
            r"graph\.inputs\[0\]\.value\.dtype`: expected one of uint8, .*, got 'load'",
        ),
        (
            lambda d: d["inputs"][0]["value"].update(shape=[2, -1]),
            r"graph\.inputs\[0\]\.value\.shape\[1\]`: expected a whole number from 0",
        ),
        (lambda d: d["params"][0].update(kind="x"), r"graph\.params\[0\]\.kind`: expected one of"),
        (
            lambda d: d["outputs"][0].update(value="nowhere"),
            r"`nowhere` is read where nothing is called so",
        ),
        (
            lambda d: first(d, "op")["args"].__setitem__(0, ["self", {"code": "x"}]),
            r"graph\.body\[\d+\]\.args\[0\]\[1\]`: expected null or .* an object with `value`",
        ),
        (
            lambda d: first(d, "loop")["order"].append(7),
            r"the order of loop `model_layers` is not of its 2 blocks",
        ),
        (
            lambda d: first(d, "loop")["blocks"][0]["outputs"].clear(),
            r"a block of loop `model_layers` gives other values than it takes",
        ),
    ],
)
def test_malformed_json_is_explained(folded: Graph, damage: Break, message: str) -> None:
    data = copy.deepcopy(graph_to_json(folded))
    damage(data)
    with pytest.raises(ValueError, match=message):
        graph_from_json(data)
