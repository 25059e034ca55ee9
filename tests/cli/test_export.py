"""`plan export`: text to stdout or a file, what differs to stderr, refusals in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.api import plan_file
from shardwright.folder import write_folder

from .conftest import Run

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("export") / "plan"
    made = plan_file(
        str(EXAMPLES / "gpt.py"), gpus=None, cluster="cpu", phase="train", batch=4, seq=64,
        dtype=None, memory_bytes=None, mesh=None, pins=(), optimizer="adamw", solver="highs",
        time_limit_s=60.0, layout="zero1=2",
    )  # fmt: skip
    write_folder(made, out, None)
    return str(out)


def test_export(run: Run, folder: str, tmp_path: Path) -> None:
    ran = run("export", folder, "--to", "megatron")
    assert ran.code == 0
    assert "--use-distributed-optimizer\n" in ran.out
    assert "not as in the plan" not in ran.err
    file = tmp_path / "cut.py"
    ran = run("export", folder, "--to", "dtensor", "--out", str(file))
    assert (ran.code, ran.out) == (0, "")
    assert "plan: not as in the plan: ZeRO-1 over 2 GPUs becomes FSDP" in ran.err
    assert "def parallelize(" in file.read_text()
    ran = run("export", folder, "--to", "dtensor", "--out", str(file))
    assert ran.code == 2
    assert "is there already, and is not overwritten" in ran.err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("vlm", "did you mean `vllm`?"),
        ("sglang", "sglang serves, and this plan is for phase train"),
    ],
)
def test_refusals(run: Run, folder: str, target: str, message: str) -> None:
    ran = run("export", folder, "--to", target)
    assert ran.code == 2
    assert message in ran.err
