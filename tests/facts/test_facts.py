"""The language that planner and runtime share, and that it needs no torch."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.facts.blocks import block, blocks, local_shape, zigzag_order
from shardwright.facts.moves import backward_primitive, primitive
from shardwright.facts.spec import P, R, S, V, parse_spec


@pytest.mark.parametrize("module", ["blocks", "moves", "schema", "spec"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"shardwright.facts.{module}"))
    assert result.attempted and not result.failed


def test_import_is_light() -> None:
    code = (
        "import sys, shardwright.facts.blocks, shardwright.facts.mesh, shardwright.facts.moves, "
        "shardwright.facts.spec; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("a", "b", "forward", "backward"),
    [
        (R, V, "nothing", "all_reduce"),  # gradients of data parallelism; Megatron's f
        (P, R, "all_reduce", "nothing"),  # Megatron's g
        (P, V, "all_reduce", "all_reduce"),
        (S(0), V, "all_gather", "reduce_scatter"),  # a parameter under FSDP
        (S(0), R, "all_gather", "slice"),
        (P, S(1), "reduce_scatter", "all_gather"),
        (R, S(0), "slice", "all_gather"),
        (V, S(0), "slice", "pad"),
        (R, P, "mask", "nothing"),
        (V, R, "nothing", "mask"),
        (S(0), P, "pad", "slice"),
        (S(1), S(2), "all_to_all", "all_to_all"),  # Ulysses
        (S(1), S(1), "nothing", "nothing"),
    ],
)
def test_moves(a: int, b: int, forward: str, backward: str) -> None:
    assert (primitive(a, b), backward_primitive(a, b)) == (forward, backward)


@given(st.integers(1, 40), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_blocks_of_a_dim_follow_one_another(size: int, ways: list[int]) -> None:
    at = 0
    for index in product(*map(range, ways)):
        own = block(size, list(zip(ways, index, strict=True)))
        assert own.start == at and own.rows == local_shape((size,), (0,) * len(ways), ways)[0]
        at = own.stop
    assert at == size


def test_blocks_of_a_spec() -> None:
    found = blocks((8, 10), parse_spec("S0,S1"), (2, 4), (1, 3))
    assert [(own.start, own.stop, own.rows) for own in found] == [(4, 8, 4), (9, 10, 3)]


@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 2), (2, 3)])
def test_zigzag_gives_every_rank_as_many_early_as_late_chunks(sizes: tuple[int, ...]) -> None:
    order = zigzag_order(sizes)
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert sorted(order) == list(range(len(order)))
    assert {a + b for a, b in pairs} == {len(order) - 1}
