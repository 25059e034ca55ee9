"""Axes, groups and random numbers of a mesh; the layout of slices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from shardwright.facts.blocks import Block, block, blocks, local_shape
from shardwright.facts.spec import parse_spec
from shardwright.runtime import Mesh, RankError, RankPool, dropout

Pool = Callable[[int], RankPool]


def describe() -> list[tuple[str, int, int]]:
    mesh = Mesh.create({"dp": 2, "tp": 2})
    axes = [mesh["dp"], mesh["tp"], mesh["dp", "tp"]]
    assert all(axis.group.size() == axis.size and axis.group.rank() == axis.rank for axis in axes)
    assert mesh["dp", "tp"] is axes[2]
    return [(axis.name, axis.size, axis.rank) for axis in axes]


def test_axes(pool: Pool) -> None:
    assert pool(4).run(describe) == [
        [("dp", 2, rank // 2), ("tp", 2, rank % 2), ("dp_tp", 4, rank)] for rank in range(4)
    ]


def create(axes: dict[str, int]) -> None:
    Mesh.create(axes)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"dp": 2, "tp": 4},
            r"this module was planned for 8 ranks \(dp=2 x tp=4\), but torchrun started 2: run"
            r" `torchrun --nproc-per-node 8 ...` or plan again with --gpus 2",
        ),
        ({}, "a mesh needs at least one axis"),
        ({"2x": 2}, r"mesh axis names must be identifiers, got \['2x'\]"),
        ({"dp": 0}, r"mesh axis sizes must be at least 1, got \{'dp': 0\}"),
    ],
)
def test_refusals(pool: Pool, axes: dict[str, int], message: str) -> None:
    with pytest.raises(RankError, match=message):
        pool(2).run(create, axes)


def test_without_torchrun_a_mesh_of_several_ranks_is_refused() -> None:
    with pytest.raises(RuntimeError, match="planned for 2 ranks .* torchrun started 1"):
        Mesh.create({"dp": 2})


def test_axes_are_named_in_mesh_order() -> None:
    mesh = Mesh.create({"dp": 1, "tp": 1})
    with pytest.raises(KeyError, match="in the order of mesh dp=1 x tp=1"):
        mesh["tp", "dp"]
    with pytest.raises(KeyError, match="mesh dp=1 x tp=1 has no axis pp"):
        mesh["pp"]
    with pytest.raises(ValueError, match="mesh dp=1 x tp=1 has no axis pp"):
        mesh.generator(("pp",))


def draw() -> tuple[float, float, float, list[bool]]:
    mesh = Mesh.create({"dp": 2, "tp": 2})
    mesh.manual_seed(5)
    numbers = [
        torch.rand((), generator=mesh.generator(axes)).item()
        for axes in ((), ("tp",), ("dp", "tp"))
    ]
    kept = dropout(torch.ones(1000), 0.25, generator=mesh.generator(("dp",)))
    assert sorted(set(kept.tolist())) == [0.0, pytest.approx(4 / 3)]
    return (*numbers, (kept > 0).tolist())  # pyright: ignore[reportReturnType]


def test_sharded_axes_draw_differently_and_replicated_ones_alike(pool: Pool) -> None:
    whole, over_tp, over_both, kept = zip(*pool(4).run(draw), strict=True)
    assert len(set(whole)) == 1
    assert over_tp[0] == over_tp[2] != over_tp[1] == over_tp[3]
    assert len(set(over_both)) == 4
    assert kept[0] == kept[1] != kept[2] == kept[3]
    assert 700 < sum(kept[0]) < 800


EXIT_SCRIPT = """
import torch, torch.distributed as dist
from shardwright.runtime import Mesh
mesh = Mesh.create({"dp": 1, "tp": 2})
axis = mesh["dp", "tp"]
x = torch.ones(4, requires_grad=True)
loss = axis.all_gather(x, 0).sum()  # kept, with its graph, until the interpreter ends
group = axis.group
"""
ENDINGS = {
    "nothing": "",
    "destroyed by hand": "dist.destroy_process_group()",
}


@pytest.mark.parametrize(
    "ending", ["nothing", pytest.param("destroyed by hand", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_nothing_aborts_at_exit(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(EXIT_SCRIPT + ENDINGS[ending], encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr and "warn" not in done.stderr.lower(), done.stderr


@pytest.mark.parametrize(
    ("size", "parts", "want"),
    [
        (8, [], Block(0, 8, 8)),
        (8, [(2, 1)], Block(4, 8, 4)),
        (7, [(2, 1)], Block(4, 7, 4)),
        (2, [(4, 3)], Block(2, 2, 1)),
        (10, [(2, 0), (4, 2)], Block(4, 5, 2)),
        (10, [(2, 1), (4, 3)], Block(10, 10, 2)),
    ],
)
def test_block(size: int, parts: list[tuple[int, int]], want: Block) -> None:
    assert block(size, parts) == want


@pytest.mark.parametrize("text", ["R,R", "S0,S0", "S1,S0", "S0,R", "V,P"])
def test_blocks_cover_every_element_equally_often(text: str) -> None:
    spec, sizes = parse_spec(text), (2, 3)
    for shape in ((6, 12), (5, 7), (1, 1)):
        seen = torch.zeros(shape)
        for coordinates in product(range(2), range(3)):
            rows = blocks(shape, spec, sizes, coordinates)
            assert tuple(part.rows for part in rows) == local_shape(shape, spec, sizes)
            seen[tuple(slice(part.start, part.stop) for part in rows)] += 1
        assert (seen == seen[0, 0]).all() and seen[0, 0] > 0  # every element equally often


@pytest.mark.parametrize("text", ["S", "Q", "S-1", "", "s0"])
def test_bad_specs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"`{text}` is not a sharding state"):
        parse_spec(f"R,{text}")


def count_open_files(meshes: int) -> int:
    for _ in range(meshes):
        Mesh.create({"dp": 2, "tp": 2})["dp", "tp"].all_reduce(torch.ones(3))
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts files in Linux's /proc")
def test_many_meshes_in_one_process_share_their_connections(pool: Pool) -> None:
    before, after = pool(4).run(count_open_files, 1), pool(4).run(count_open_files, 20)
    assert before == after
