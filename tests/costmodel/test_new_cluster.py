"""The cluster of CONTRIBUTING.md: a user's file, and one more built-in, are one file each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.costmodel.machines import cluster
from tests.guide import guide_example

TEXT = guide_example("toml", "base =")
ROOT = Path(cluster.__file__).resolve().parents[2]
LOOK = """
from shardwright.cli import main
from shardwright.costmodel.machines import cluster
assert cluster.load_cluster("pcie", gpus=4).inter_node.bytes_per_s == 50e9
try:
    cluster.load_cluster("pci")
except cluster.ClusterError as error:
    assert "did you mean `pcie`?" in str(error) and "mi355x, pcie, rtx4090" in str(error)
main(["--help"])
"""


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "pcie.toml"
    path.write_text(TEXT)
    found = cluster.load_cluster(path, gpus=4)
    assert (found.name, found.gpus_per_node, found.inter_node.bytes_per_s) == ("pcie", 2, 50e9)
    assert found.intra_node == cluster.load_cluster("l40s").intra_node


def test_a_built_in_one(tmp_path: Path) -> None:
    """A package of which one folder has one file more: the name is known everywhere."""
    package = tmp_path / "shardwright"
    shutil.copytree(ROOT / "shardwright", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "costmodel" / "machines" / "clusters" / "pcie.toml").write_text(TEXT)
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pcie" in done.stdout


@pytest.mark.parametrize("place", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_no_page_lists_them(place: str) -> None:
    """The folder is the list."""
    text = (ROOT / place).read_text(encoding="utf-8")
    assert not [name for name in cluster.BUILT_IN if f"{name}, " in text and f", {name}" in text]
