"""What all tests share: golden files, the shared data folder, one thread, fixed random examples."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported, here and in every process a test starts: ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from shardwright.runtime import RankPool

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED_DATA = ROOT.parent / "shared" / "data"

torch.set_num_threads(1)
# What plans write is remembered here, in the processes that tests start, too, and not at home.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="shardwright-tests-")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="shardwright-tests-")

# The same examples in every run, so that a red build is red again on the next machine; no deadline,
# because the first example of a test pays for torch's lazy set-up.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--accept`."""
    parser.addoption(
        "--accept",
        action="store_true",
        help="rewrite the files in tests/golden with what the code gives now; read the diff after",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked `some(n)`, all but n are slow, if they are not yet."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        (kept,) = each[0].iter_markers("some")
        spread = {i * len(each) // kept.args[0] for i in range(kept.args[0])}
        for i, item in enumerate(each):
            if i not in spread:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("help.txt", text)`: `text` equals tests/golden/help.txt; `--accept` rewrites it."""
    accept = bool(request.config.getoption("--accept"))

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if accept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist; `pytest --accept` writes it")
        want = path.read_text(encoding="utf-8")
        if want != text:
            diff = "".join(
                difflib.unified_diff(
                    want.splitlines(keepends=True),
                    text.splitlines(keepends=True),
                    f"tests/golden/{name}",
                    "now",
                )
            )
            pytest.fail(f"differs from its golden file; `pytest --accept` rewrites it\n{diff}")

    return check


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of measured data and public problems beside the checkout; without it, skip."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data folder {SHARED_DATA}, which is not part of the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """`pool(3)` is a pool of three ranks, started once: starting processes is what takes long."""
    pools: dict[int, RankPool] = {}

    def of(ranks: int) -> RankPool:
        if ranks not in pools:
            pools[ranks] = RankPool(ranks)
        return pools[ranks]

    yield of
    for each in pools.values():
        each.close()
