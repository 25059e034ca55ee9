"""`--layout-from`: other tools' flags become a layout, and what is written is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.exporting import export
from shardwright.layout_from import layout_from
from shardwright.planner.errors import PlanError
from tests.codegen.export.test_targets import planned

from .conftest import Run

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py")
PARALLEL = "--tensor-model-parallel-size 8 --sequence-parallel"


@pytest.mark.parametrize(
    ("given", "gpus", "layout", "options"),
    [
        # 64 GPUs: tp 8 x pp 4 leave two replicas; 80 layers by 4 ranks and 5 are 4 stages each
        (
            f"pretrain_gpt.py {PARALLEL} --pipeline-model-parallel-size 4 --num-layers 80"
            " --num-layers-per-virtual-pipeline-stage 5 --use-distributed-optimizer"
            " --micro-batch-size 1 --global-batch-size 512 --seq-length 8192 --bf16",
            64,
            "pp=4,vpp=4,zero1=2,tp=8,sp,recompute=none",
            {
                "phase": "train", "batch": 512, "micro_batches": 256, "seq": 8192,
                "precision": "mixed", "reduce_dtype": "float32",
            },
        ),
        (
            f"{PARALLEL} --context-parallel-size 2 --cp-comm-type a2a --use-megatron-fsdp"
            " --micro_batch_size=2 --recompute-granularity full --recompute-method uniform",
            64,
            "fsdp=4,ulysses=2,tp=8,sp,recompute=full",
            {"phase": "train", "batch": 8, "micro_batches": 1, "precision": "own"},
        ),
        (
            "--tensor-model-parallel-size 1 --expert-model-parallel-size 8 --micro-batch-size 1",
            16,
            "ddp=2,ep=8,recompute=none",
            {"phase": "train", "batch": 16, "micro_batches": 1, "precision": "own"},
        ),
        (
            "vllm serve some/model --tensor-parallel-size 8 -dp 2 --max-num-seqs 64 --dtype half",
            None,
            "ddp=2,tp=8",
            {"batch": 128, "dtype": "float16"},
        ),
        ("vllm serve some/moe -dp 8 --enable-expert-parallel", None, "ep=8", {}),
        ("python -m sglang.launch_server --tp 4 --dp-size 2", None, "ddp=2,tp=4", {}),
    ],
)  # fmt: skip
def test_flags(given: str, gpus: int | None, layout: str, options: dict[str, Any]) -> None:
    read = layout_from(given, gpus)
    assert (read.layout, read.options, read.unread) == (layout, options, ())


@pytest.mark.parametrize(
    ("given", "unread"),
    [
        (f"{PARALLEL} --fp8-format hybrid --lr 1e-4", ["--fp8-format hybrid"]),
        (
            f"{PARALLEL} --recompute-granularity selective",
            ["selective recomputation: there of attention, whose result is kept here"],
        ),
        (f"{PARALLEL} --cpu-offloading-num-layers 2", ["--cpu-offloading-num-layers 2"]),
        ("vllm serve x -tp 2 --quantization fp8 --port 80", ["--quantization fp8"]),
        (
            "vllm serve x -tp 2 --enable-expert-parallel",
            ["--enable-expert-parallel: experts over ranks of tensor parallelism"],
        ),
    ],
)
def test_what_changes_the_layout_and_is_not_read_is_named(given: str, unread: list[str]) -> None:
    assert list(layout_from(given, 16).unread) == unread


@pytest.mark.some(2)
@pytest.mark.parametrize("to", ["megatron", "torchtitan"])
@pytest.mark.parametrize("layout", ["fsdp=2,tp=2,sp,recompute=full", "pp=2,ddp=2", "ddp=4"])
def test_what_is_exported_is_read_again(to: str, layout: str, tmp_path: Path) -> None:
    plan = planned(layout=layout)
    file = tmp_path / ("run.toml" if to == "torchtitan" else "flags.txt")
    file.write_text(export(plan, to).text)
    read = layout_from(str(file), 4)
    assert read.layout.removesuffix(",recompute=none") == layout
    assert read.options["batch"] == plan.request.batch
    assert read.options["seq"] == plan.request.seq
    assert read.options["micro_batches"] == plan.request.micro_batches


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nofile", "there is no such file, and these are no flags"),
        ("--lr 3", "no flag is one of a tool that is known here"),
        ("--tensor-model-parallel-size x", "expected a whole number above 0"),
        ("--tensor-model-parallel-size 3", "--gpus 8 is no multiple of tensor 3"),
        ("--tensor-model-parallel-size 8 'x", "the flags cannot be read"),
        (f"{PARALLEL} --micro-batch-size 2 --global-batch-size 3", "is no multiple of"),
    ],
)
def test_refusals(given: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        layout_from(given, 8)
    with pytest.raises(PlanError, match="how many GPUs"):
        layout_from(PARALLEL)


@pytest.mark.slow
def test_the_command(run: Run, tmp_path: Path) -> None:
    given = "--tensor-model-parallel-size 2 --micro-batch-size 4 --seq-length 64 --fp16-lm-cross"
    command = (GPT, "--gpus", "2", "--cluster", "cpu", "--layout-from", given)
    ran = run(*command, "--out", str(tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert "as --layout tp=2,recompute=none has it" in " ".join(ran.out.split())
    assert "plan: read as Megatron-LM" in ran.err
    assert "plan: not read: --fp16-lm-cross" in ran.err
    ran = run(*command, "--batch", "8", "--out", str(tmp_path / "other"))
    assert ran.code == 2
    assert "--batch 8, and what --layout-from says is 4; they must agree" in ran.err
