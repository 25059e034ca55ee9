"""Shrinking: small graphs that are cut as the large ones were, and still run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwright.capturing import capture_graph
from shardwright.facts.mesh import Mesh
from shardwright.ir.graph import Graph, Loop, Node
from shardwright.ir.ops.registry import rule_of
from shardwright.ir.passes.unfuse import unfuse
from shardwright.ir.reference.interpret import interpret
from shardwright.ir.reference.shrink import Planned, shrink, state_of
from shardwright.loading import load_target
from tests.sharded import builder_of, random_decisions

ROOT = Path(__file__).resolve().parents[2]


def graph_of(target: str, batch: int, seq: int) -> Graph:
    """A captured example."""
    path = str(ROOT / "examples" / target)
    loaded = load_target(path, batch=batch, seq=seq, phase="train", formats="float32")
    return capture_graph(loaded, training=True)


def nodes_of(graph: Graph) -> list[Node]:
    """Every node, those of loops once."""
    out: list[Node] = []
    for item in graph.body:
        out += [n for b in item.blocks for n in b.nodes] if isinstance(item, Loop) else [item]
    return out


CASES = [
    ("configs/bert-base", 256),
    ("configs/gemma2-9b", 8192),
    ("configs/gpt2", 256),
    ("configs/llama3-8b", 2048),
    ("configs/mistral-7b", 8192),
    ("configs/qwen3-8b", 2048),
    ("encoder_decoder.py", 64),
    ("moe.py", 64),
]
# of fused projections: the parts of one tensor lie one after another in the small one, too
IN_PARTS = [("configs/gpt2", 256), ("gpt.py", 64)]


LONG = ("configs/bert-base", "configs/gemma2-9b", "encoder_decoder.py")


@pytest.mark.parametrize(
    "target, seq, parts",
    [
        *(pytest.param(*c, False, marks=[pytest.mark.slow] * (c[0] in LONG)) for c in CASES),
        *((*c, True) for c in IN_PARTS),
    ],
)
@pytest.mark.some(1)
def test_any_decisions_fit_the_small_graph(target: str, seq: int, parts: bool) -> None:
    graph = graph_of(target, 16, seq)
    if parts:
        assert graph != (graph := unfuse(graph))
    old, new = Mesh((("x", 4), ("y", 4))), Mesh((("x", 2), ("y", 2)))
    decisions = random_decisions(builder_of(graph, old), seed=0)
    specs = [*decisions.specs.items(), *decisions.outputs.items()]

    planned = Planned(graph, decisions.choices, specs)
    small = shrink([planned], old, new)[0].graph  # checks shapes and rules

    assert sum(value.type.numel for value in state_of(small).values()) < 1e7
    for loop, before in zip(small.loops, graph.loops, strict=True):
        assert set(loop.order) == set(before.order)
        assert all(loop.order.count(kind) <= 2 for kind in loop.order)
    state = {
        name: torch.ones(value.type.shape, dtype=value.type.dtype)
        for name, value in state_of(small).items()
    }
    inputs = {
        item.name: torch.ones(item.value.type.shape, dtype=item.value.type.dtype)
        for item in small.inputs
    }
    interpret(small, state, inputs)


def test_tokens_only() -> None:
    graph = graph_of("llama.py", 16, 256)
    mesh = Mesh((("x", 4),))
    choices = {
        node.name: ("i0",) if "i0" in rule_of(node).choices() else ("R",)
        for node in nodes_of(graph)
    }
    planned = Planned(graph, choices, [])
    (shrunk,) = shrink([planned], mesh, Mesh((("x", 2),)), tokens_only=True)
    assert [what for what, _, _ in shrunk.changes] == ["batch", "sequence"]
    assert state_of(shrunk.graph) == state_of(graph)


@pytest.mark.slow
def test_what_was_uneven_stays_so() -> None:
    graph = graph_of("configs/gpt2", 16, 256)
    mesh, table = Mesh((("x", 8),)), graph.params[0]
    assert table.value.type.shape[0] == 50257
    node = next(n for n in graph.body if not isinstance(n, Loop) and table.value in n.operands)
    choices = {node.name: ("R",) for node in nodes_of(graph)}
    choices[node.name] = ("v",)
    specs = [(table.value.name, (0,))]
    small = shrink([Planned(graph, choices, specs)], mesh, Mesh((("x", 2),)))[0].graph
    assert small.params[0].value.type.shape[0] % 2


def test_a_mesh_that_does_not_divide_is_refused() -> None:
    graph = graph_of("gpt.py", 4, 16)
    with pytest.raises(ValueError, match="mesh x=3 does not divide mesh x=4"):
        shrink([Planned(graph, {}, [])], Mesh((("x", 4),)), Mesh((("x", 3),)))
