"""Graphs of other numbers of sequences are those that a capture gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.capturing import capture_graph
from shardwright.ir.reference.resizing import with_batch
from shardwright.loading import Loaded, load_target, with_rows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _loaded(target: str, batch: int) -> Loaded:
    path = str(EXAMPLES / target)
    return load_target(path, batch=batch, seq=64, phase="train", formats="float32")


@pytest.mark.parametrize("target", ["gpt.py", "moe.py", "llama.py", "configs/mixtral-8x7b"])
@pytest.mark.some(1)
def test_fewer_sequences_give_the_graph_of_a_capture(target: str) -> None:
    loaded = _loaded(target, 8)
    graph = capture_graph(loaded, training=True)
    for rows in (4, 1):
        assert with_batch(graph, rows) == capture_graph(with_rows(loaded, rows), training=True)


def test_more_sequences_need_a_capture() -> None:
    graph = capture_graph(_loaded("gpt.py", 4), training=True)
    assert with_batch(graph, 8) is None
