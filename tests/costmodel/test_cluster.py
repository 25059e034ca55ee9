"""Cluster files: built-in ones load and cite sources; bad ones are refused by name."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.costmodel.compute import matmul_s
from shardwright.costmodel.machines.cluster import (
    BUILT_IN,
    ClusterError,
    built_in_text,
    load_cluster,
    shown_name,
)

MEASURED = 'base = "cpu"\n[[measured]]\nnodes = 1\n'
_NUMBER = re.compile(r"^\s*[\w.]+\s*=\s*[-+0-9.]")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_loads(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.gpus == cluster.gpus_per_node > 1
    assert cluster.peak("torch.bfloat16") == cluster.peak("bf16") > 0
    assert min(cluster.intra_node.bytes_per_s, cluster.inter_node.bytes_per_s) > 0
    assert load_cluster(name, gpus=64).gpus == 64
    assert hash(cluster) == hash(load_cluster(name))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_figure_has_a_source(name: str) -> None:
    figures = [line for line in built_in_text(name).splitlines() if _NUMBER.match(line)]
    assert figures
    for line in figures:
        comment = line.partition("#")[2].strip()
        assert len(comment) >= 6, f"{name}.toml: no source beside `{line}`"


@pytest.mark.parametrize(
    "name, bf16, memory_bandwidth, link, capacity",
    [  # datasheets: dense FLOP/s, bytes/s, bytes/s per direction, marketed bytes
        ("a100", 312e12, 2.039e12, 300e9, 80e9),
        ("h100", 989.4e12, 3.35e12, 450e9, 80e9),
        ("h200", 989.4e12, 4.8e12, 450e9, 141e9),
        ("h800", 989.4e12, 3.35e12, 200e9, 80e9),
        ("b200", 2250e12, 8e12, 900e9, 180e9),
        ("l40s", 362.05e12, 864e9, 32e9, 48e9),
        ("rtx4090", 165.2e12, 1008e9, 32e9, 24e9),
        ("mi300x", 1307.4e12, 5.3e12, 448e9, 192e9),
        ("h100-hbm2e", 989.4e12, 2.4e12, 450e9, 96e9),
        ("a100-40", 312e12, 1.555e12, 300e9, 40e9),
        ("h20", 148e12, 4e12, 450e9, 96e9),
        ("gb200-nvl72", 2500e12, 8e12, 900e9, 186e9),
        ("b300", 2250e12, 8e12, 900e9, 262e9),
        ("mi355x", 2516.6e12, 8e12, 537.6e9, 288e9),
        ("l4", 121e12, 300e9, 32e9, 24e9),
        ("a10g", 70e12, 600e9, 32e9, 24e9),
        ("rtx5090", 209.5e12, 1792e9, 64e9, 32e9),
    ],
)
def test_datasheet(
    name: str, bf16: float, memory_bandwidth: float, link: float, capacity: float
) -> None:
    cluster = load_cluster(name)
    assert cluster.peak("bfloat16") == bf16
    assert cluster.bandwidth_bytes_per_s == memory_bandwidth
    assert cluster.intra_node.bytes_per_s == link
    assert 0.9 * capacity < cluster.memory_bytes < capacity


@pytest.mark.parametrize(
    "given, hint", [("h1000", "did you mean `h100`?"), ("H100", "did you mean `h100`?")]
)
def test_unknown_name_suggests(given: str, hint: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(hint)) as caught:
        load_cluster(given)
    assert f"Built in: {', '.join(BUILT_IN)}." in str(caught.value)


def test_unknown_name_without_a_near_one() -> None:
    with pytest.raises(ClusterError, match="unknown cluster `zzzz`. Built in: a100"):
        load_cluster("zzzz")


def _file(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_user_file_over_a_base(tmp_path: Path) -> None:
    text = 'base = "h100"\nmemory_bytes = 70e9\n[inter_node]\nbytes_per_s = 25e9\n'
    cluster = load_cluster(_file(tmp_path, text), gpus=16)
    h100 = load_cluster("h100")
    assert (cluster.name, cluster.gpus, cluster.memory_bytes) == ("mine", 16, 70e9)
    assert cluster.inter_node.bytes_per_s == 25e9
    assert cluster.inter_node.hop_s == h100.inter_node.hop_s
    assert (cluster.intra_node, cluster.tiles) == (h100.intra_node, h100.tiles)


def test_figures_that_follow_a_links_speed(tmp_path: Path) -> None:
    """Half the speed halves what a switch adds and what groups get, unless the file says them."""
    h100, l40s = load_cluster("h100").intra_node, load_cluster("l40s").intra_node
    half = load_cluster(_file(tmp_path, 'base = "h100"\n[intra_node]\nbytes_per_s = 225e9\n'))
    assert half.intra_node.switch_reduce_bytes_per_s == h100.switch_reduce_bytes_per_s / 2
    assert half.inter_node == load_cluster("h100").inter_node
    said = 'base = "h100"\n[intra_node]\nbytes_per_s = 225e9\nswitch_reduce_bytes_per_s = 1e11\n'
    assert load_cluster(_file(tmp_path, said)).intra_node.switch_reduce_bytes_per_s == 1e11
    speed = l40s.bytes_per_s / 4
    slow = load_cluster(_file(tmp_path, f'base = "l40s"\n[intra_node]\nbytes_per_s = {speed}\n'))
    assert slow.intra_node.group_bytes_per_s == tuple(
        (gpus, rate / 4) for gpus, rate in l40s.group_bytes_per_s
    )
    copy = built_in_text("h100").replace("bytes_per_s = 450e9", "bytes_per_s = 225e9")
    with pytest.raises(ClusterError, match=r"\[intra_node\] switch_reduce_bytes_per_s: 2.9.* more"):
        load_cluster(_file(tmp_path, copy))


def test_docstring_example_loads(tmp_path: Path) -> None:
    import shardwright.costmodel.machines.cluster as module

    example = re.search(r"(?m)^    base = .*?(?=^\S)", module.__doc__ or "", re.S | re.M)
    assert example
    cluster = load_cluster(_file(tmp_path, re.sub(r"(?m)^    ", "", example.group())))
    assert cluster.inter_node.bytes_per_s == 25e9


@pytest.mark.parametrize("name", BUILT_IN)
def test_copy_of_a_built_in_file_is_a_user_file(name: str, tmp_path: Path) -> None:
    copy, original = load_cluster(_file(tmp_path, built_in_text(name))), load_cluster(name)
    assert copy.flops == original.flops and copy.intra_node == original.intra_node


@pytest.mark.parametrize(
    "text, said",
    [
        ('base = "h100"\n', None),
        ("memory_bytes = \n", "mine.toml` is not valid TOML"),
        ('base = "h10"\n', "mine.toml: base: unknown cluster `h10`; did you mean `h100`?"),
        ('base = "h100"\nmemory = 1\n', "memory: no such field; did you mean `memory_bytes`?"),
        ('base = "h100"\n[intra_node]\nhops_s = 1\n', "[intra_node] hops_s: no such field; did"),
        ('base = "h100"\n[flops]\nbf61 = 1\n', "[flops] bf61: no such field; did you mean `bf16`"),
        ('base = "h100"\n[kernels.gemm]\n', "[kernels] gemm: no such field"),
        ('base = "h100"\nmemory_bytes = "80GB"\n', "memory_bytes: expected bytes above 0, got '8"),
        ('base = "h100"\nmemory_bytes = true\n', "memory_bytes: expected bytes above 0, got True"),
        ('base = "h100"\nmemory_bytes = nan\n', "memory_bytes: expected bytes above 0, got nan"),
        (
            'base = "h100"\ngpus_per_node = 7.5\n',
            "gpus_per_node: expected a whole number, at least 1, got 7",
        ),
        (
            f"{MEASURED}ranks = 2.5\n",
            "[measured] ranks: expected a whole number, at least 1, got 2",
        ),
        (
            f"{MEASURED}ranks = 2\nall_gather = {{ 1024 = 1e-3 }}\n",
            "expected two sizes in bytes or more",
        ),
        (
            f"{MEASURED}ranks = 2\nall_gather = {{ 8 = 2e-3, 16 = 1e-3 }}\n",
            "[measured.all_gather]: more bytes take fewer seconds",
        ),
        (f"{MEASURED}all_gathers = {{}}\n", "[measured] all_gathers: no such field; did you mean"),
        ('base = "h100"\nflops = 3\n', "expected a table [flops], got 3"),
        (
            'base = "h100"\n[kernels.matmul]\nefficiency = 1.2\n',
            "[kernels.matmul] efficiency: expected a share of the datasheet's figure, above 0 and "
            "at most 1, got 1.2",
        ),
        (
            'base = "h100"\n[intra_node.group_bytes_per_s]\ntwo = 1e9\n',
            "[intra_node.group_bytes_per_s]: expected a table of GPUs taking part = bytes/s",
        ),
        ('device = "x"\n', "mine.toml: expected a table [kernels], got nothing; add it, or start"),
        (
            built_in_text("h100").replace("hop_s = 4e-6", "# "),
            "mine.toml: [inter_node] hop_s: missing; expected seconds, 0 or more.",
        ),
    ],
)
def test_bad_file_names_the_field(tmp_path: Path, text: str, said: str | None) -> None:
    path = _file(tmp_path, text)
    if said is None:  # the good case stands above the bad ones
        load_cluster(path)
        return
    with pytest.raises(ClusterError, match=re.escape(said)):
        load_cluster(path)


def test_missing_file_and_bad_count() -> None:
    with pytest.raises(ClusterError, match="cluster file: cannot read `nowhere/x.toml`"):
        load_cluster("nowhere/x.toml")
    with pytest.raises(ClusterError, match="gpus=0: a cluster has at least one GPU"):
        load_cluster("h100", gpus=0)


def test_dtype_without_a_rate_is_refused() -> None:
    with pytest.raises(ClusterError, match="a100 .* has no FLOP/s for dtype `fp8`; it has bf16"):
        load_cluster("a100").peak("fp8")


def test_import_is_light() -> None:
    code = (
        "import sys, shardwright.costmodel.collective, shardwright.costmodel.compute, "
        "shardwright.costmodel.memory; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("module", ["machines.cluster", "compute", "collective", "memory"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"shardwright.costmodel.{module}"))
    assert result.attempted and not result.failed


def test_a_price_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "h100"\nprice_per_gpu_hour = 2.5\n')
    assert load_cluster(path).price_per_gpu_hour == 2.5
    assert load_cluster("h100").price_per_gpu_hour == 0.0
    path.write_text('base = "h100"\ncompiled = false\nclock = 0.9\ncontention = 0\n')
    found = load_cluster(path)
    assert (found.compiled, found.clock, found.contention) == (False, 0.9, 0.0)
    path.write_text('base = "h100"\ncompiled = 1\n')
    with pytest.raises(ClusterError, match="compiled: expected true or false, got 1"):
        load_cluster(path)
    path.write_text('base = "h100"\ncontention = 2\n')
    with pytest.raises(ClusterError, match="contention: expected a share, from 0"):
        load_cluster(path)
    path.write_text('base = "h100"\nprice_per_gpu_hour = -1\n')
    with pytest.raises(ClusterError, match="price_per_gpu_hour: expected a price above 0, got -1"):
        load_cluster(path)


def test_how_steps_of_one_token_run(tmp_path: Path) -> None:
    """Captured: light kernels take 1 us; compiled: weights of one row come as fast as memory gives
    them; launched: the host's 10 and 31 us.  On the CPU nothing changes."""
    h100, path = load_cluster("h100"), tmp_path / "mine.toml"
    captured = h100.in_steps()
    assert (captured.memory.floor_s, captured.mixed.floor_s) == (1e-6, 1e-6)
    assert h100.compiled and not captured.compiled and captured.tiles == h100.tiles
    path.write_text('base = "h100"\nsteps = "compiled"\n')
    steps = load_cluster(path).in_steps()
    read = 2 * (4096 * 4096 + 2 * 4096) / (0.87 * 3.35e12)
    assert steps.compiled
    assert matmul_s(1, 4096, 4096, 1, "bf16", steps) == pytest.approx(1e-6 + read)
    assert matmul_s(2, 4096, 4096, 1, "bf16", steps) == matmul_s(2, 4096, 4096, 1, "bf16", h100)
    path.write_text('base = "h100"\nsteps = "launched"\nhost_light_s = 12e-6\n')
    launched = load_cluster(path).in_steps()
    assert (launched.memory.floor_s, launched.decode.floor_s) == (12e-6, 12e-6)
    assert launched.tiles is not None and launched.tiles.floor_s == 31e-6
    cpu = load_cluster("cpu")
    assert cpu.in_steps() == cpu
    path.write_text('base = "h100"\nsteps = "fast"\n')
    with pytest.raises(ClusterError, match="steps: expected captured, compiled, launched, got"):
        load_cluster(path)


def test_reports_call_a_file_by_its_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "h100"\ndevice = "H100 in the cellar"\n')
    assert shown_name("h100") == "h100"
    assert shown_name(str(path)) == "H100 in the cellar"
    path.unlink()
    assert shown_name(str(path)) == "mine"
