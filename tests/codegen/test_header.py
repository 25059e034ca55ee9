"""The header of a generated module says who holds what, in a picture and in sentences."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwright.codegen.header import layout_sentences, mesh_picture
from shardwright.facts.mesh import Mesh
from shardwright.facts.spec import R
from tests.codegen.test_format import example
from tests.sharded import builder_of, mesh_of, program_of, random_decisions

PICTURES = {
    (("tp", 1),): "",
    (("tp", 2),): """
   tp=0  tp=1
      0     1""",
    (("dp", 2), ("tp", 4)): """
       tp=0  tp=1  tp=2  tp=3
dp=0      0     1     2     3
dp=1      4     5     6     7""",
    (("pp", 2), ("dp", 2), ("tp", 2)): """
            tp=0  tp=1
pp=0 dp=0      0     1
pp=0 dp=1      2     3
pp=1 dp=0      4     5
pp=1 dp=1      6     7""",
    (("dp", 12), ("tp", 2)): """
        tp=0  tp=1
dp=0       0     1
dp=1       2     3
dp=2       4     5
dp=3       6     7
dp=4       8     9
dp=5      10    11
..
dp=11     22    23""",
}


@pytest.mark.parametrize("axes, picture", PICTURES.items())
def test_pictures(axes: tuple[tuple[str, int], ...], picture: str) -> None:
    assert "".join(f"\n{line}" for line in mesh_picture(Mesh(axes))) == picture


@pytest.mark.parametrize(
    "strategies, sentences",
    [
        ({}, ["x and y each cut nothing."]),
        (
            {"attention": ("b", "n"), "linear": ("i0", "o")},
            [
                "x cuts nothing.",
                "y cuts attention by heads and matrix products by columns (q_proj, k_proj, v_proj, "
                "o_proj,",
                "gate_proj, up_proj, down_proj). Around the layers it cuts head by columns.",
            ],
        ),
        (
            {"attention": ("ring", "R")},
            ["x cuts attention by sequence (ring of K/V).", "y cuts nothing."],
        ),
    ],
)
def test_sentences(strategies: dict[str, tuple[str, str]], sentences: list[str]) -> None:
    """Of a program whose nodes have the choices that are given, and run whole otherwise."""
    graph = example("llama")
    builder = builder_of(graph, mesh_of(2, 2), training=False)
    choices = {
        node.name: next((c for name, c in strategies.items() if name in node.op), ("R", "R"))
        for node in graph.nodes
    }
    decisions = random_decisions(builder, 0)
    specs = {name: (R, R) for name in decisions.specs}
    outputs = {name: (R, R) for name in decisions.outputs}
    decisions = replace(decisions, choices=choices, specs=specs, outputs=outputs)
    assert layout_sentences([program_of(builder, decisions)], mesh_of(2, 2)) == sentences
