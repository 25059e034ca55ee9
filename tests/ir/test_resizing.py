"""Graphs of other numbers of sequences are those that a capture gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.capturing import capture_graph
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


def test_one_sequence_does_not_tell_of_more() -> None:
    """Dims of one are told from no others, so that it has no extents."""
    graph = capture_graph(_loaded("gpt.py", 1), training=True)
    assert with_batch(graph, 8) is None
