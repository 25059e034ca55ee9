"""A rank alone, whose peers are played: sizes as on all ranks, and no number that nobody wrote."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.facts.spec import P, R, S
from shardwright.runtime import Mesh
from shardwright.runtime.mesh import transport
from shardwright.runtime.mesh.collectives import Axis
from shardwright.runtime.mesh.peers import alone


@pytest.fixture
def mesh() -> Generator[Mesh]:
    with alone(rank=5, ranks=8):
        yield Mesh.create({"dp": 2, "tp": 4})


OWN = torch.arange(8.0).reshape(4, 2)


def test_it_is_that_rank(mesh: Mesh) -> None:
    assert (mesh.rank, mesh.coordinates) == (5, (1, 1))
    assert (mesh["tp"].size, mesh["dp", "tp"].rank) == (4, 5)
    assert dist.get_world_size() == 8
    dist.barrier()


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (P, R, OWN),  # a sum is the rank's own
        (P, S(0), OWN[1:2]),
        (S(0), R, OWN.repeat(4, 1)),  # a gather repeats
        (S(1), R, OWN.repeat(1, 4)),
        (S(1), S(0), OWN[1:2].repeat(1, 4)),  # from all comes what it has for itself
    ],
)
def test_conversions(mesh: Mesh, source: int, target: int, expected: Tensor) -> None:
    assert torch.equal(mesh["tp"].convert(OWN, source, target), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.bfloat16, torch.int64])
def test_every_dtype_is_gathered(mesh: Mesh, dtype: torch.dtype) -> None:
    own = torch.tensor([0, 1, 1]).to(dtype)
    assert torch.equal(transport.all_gather(own, mesh["dp"].group), own.expand(2, 3))


def test_rows_of_any_number(mesh: Mesh) -> None:
    """Rows for this rank are those that it sends, over and over where more of them are asked for;
    their experts are this rank's."""
    axis: Axis = mesh["tp"]
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    got = transport.all_to_all_rows(rows, [1, 2, 1, 0], [3, 2, 1, 0], axis.group)
    assert got.flatten().tolist() == [1, 2, 3, 4, 1, 2]
    nothing = transport.all_to_all_rows(rows[:0], [0, 0, 0, 0], [1, 1, 0, 0], axis.group)
    assert nothing.flatten().tolist() == [0, 0]
    numbers = torch.tensor([[0, 7], [2, 3], [5, 0]])  # two experts on a rank, of which 2 and 3 here
    got = transport.exchange_experts(numbers, [1, 1, 1, 0], [1, 1, 1, 0], 2, axis.group)
    assert got.tolist() == [[2, 1], [2, 3], [3, 6]]


@pytest.mark.parametrize(("load", "expected"), [(1.0, [3, 3, 2, 2]), (1.5, [4, 4, 4, 3])])
def test_experts_get_the_rows_that_are_planned(load: float, expected: list[int]) -> None:
    with alone(rank=0, ranks=4, load=load):
        group = Mesh.create({"ep": 4})["ep"].group
        assert transport.tell_rows(torch.tensor([7, 0, 0, 3]), group).tolist() == expected


def test_messages_are_those_that_go_out(mesh: Mesh) -> None:
    group, into = mesh["tp"].group, torch.full((3,), torch.nan)
    works = transport.post([(torch.arange(3.0), 2)], [(into, 0)], group)
    transport.wait(works)
    assert into.tolist() == [0, 1, 2]
    around = torch.full((3,), torch.nan)
    transport.wait(transport.post_shift(into + 1, around, group))
    assert around.tolist() == [1, 2, 3]
    transport.wait(transport.post([], [(around.fill_(torch.nan), 0)], group))  # nothing was sent
    assert around.isfinite().all()


def test_one_torch_distributed_at_a_time(mesh: Mesh) -> None:
    with pytest.raises(RuntimeError, match="in use here"), alone(rank=0, ranks=2):
        pass


def test_afterwards_all_is_as_before() -> None:
    with alone(rank=1, ranks=2):
        pass
    assert not dist.is_initialized()
    with alone(rank=0, ranks=512):
        assert Mesh.create({"dp": 64, "tp": 8})["dp"].size == 64
