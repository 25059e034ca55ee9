"""Graphs of other numbers of sequences are those that a capture gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardwright.capturing import capture_graph, phase_graph
from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.graph import Extent, Graph
from shardwright.ir.reference.resizing import with_batch
from shardwright.loading import Loaded, load_target

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _loaded(target: str, batch: int) -> Loaded:
    path = str(EXAMPLES / target)
    return load_target(path, batch=batch, seq=64, phase="train", formats="float32")


@pytest.mark.parametrize("target", ["gpt.py", "moe.py", "llama.py", "configs/mixtral-8x7b"])
@pytest.mark.some(1)
def test_other_numbers_of_sequences_give_the_graph_of_a_capture(target: str) -> None:
    graph = capture_graph(_loaded(target, 4), training=True)
    for rows in (8, 1):
        assert with_batch(graph, rows) == capture_graph(_loaded(target, rows), training=True)


@pytest.mark.parametrize("target", ["llama.py", "configs/gemma2-9b"])
@pytest.mark.parametrize(("phase", "context"), [("prefill", 0), ("append", 40)])
@pytest.mark.some(1)
def test_so_are_those_over_caches(target: str, phase: str, context: int) -> None:
    graph = phase_graph(_loaded(target, 4), phase, context)
    assert with_batch(graph, 2) == phase_graph(_loaded(target, 2), phase, context)


class _Last(nn.Module):
    """Of each sequence the last tokens but one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, -3:-1])


def test_what_counts_from_the_end_still_does() -> None:
    """The module takes sequences of any length."""

    def graph(rows: int) -> Graph:
        found = capture_folded(_Last(), {"x": torch.zeros(rows, 8, 4)}, training=True)
        inputs = (replace(found.inputs[0], labels=("b", "s", "")),)
        return replace(found, inputs=inputs)

    known = graph(4)
    extents = (Extent(), Extent(), None)
    resized = with_batch(replace(known, inputs=(replace(known.inputs[0], extents=extents),)), 2)
    assert resized is not None and resized.nodes == graph(2).nodes


def test_one_sequence_does_not_tell_of_more() -> None:
    """Dims of one are told from no others, so that it has no extents."""
    graph = capture_graph(_loaded("gpt.py", 1), training=True)
    assert with_batch(graph, 8) is None
