"""`plan rehearse`: one rank of eight in this process, beside what was predicted of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from shardwright import rehearse
from shardwright.costmodel.machines.cluster import built_in_text

if TYPE_CHECKING:
    from .conftest import Ran, Run

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,
    "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256,
    "intermediate_size": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(run: Run, config: dict[str, Any], words: str) -> None:
    """A plan for eight ranks in the folder `out`."""
    Path("config.json").write_text(json.dumps(config))
    words = f"config.json --gpus 8 --batch 8 --seq 64 --out out {words}"
    ran = run(*words.split())
    assert ran.code == 0, ran.err


def rehearsed(ran: Ran) -> str:
    """What was said, whatever was found of memory; no number is NaN, and nothing stays behind."""
    assert ran.code in (0, 1) and "NaN" not in ran.out and not ran.err.count("rror"), ran
    assert not dist.is_initialized()
    return ran.out


CPU = "--cluster cpu --dtype float32"


def test_a_rank_of_eight(run: Run) -> None:
    planned(run, LLAMA, f"{CPU} --layout fsdp=4,tp=2,sp")
    said = rehearsed(run("rehearse", "out", "--rank", "5", "--steps", "2"))
    first, *_ = said.splitlines()
    assert first.startswith("Rank 5 of 8 (dp=4 x tp=2) of LlamaForCausalLM: a training step takes ")
    for row in ("LlamaDecoderLayer, backward", "optimizer", "attention", "memory at the peak"):
        assert re.search(rf"^ +{row} +\d", said, re.MULTILINE), said
    assert said.count("not judged") >= 5  # a CPU's time, by a cluster file from elsewhere
    assert re.search(r"^ +parameters and buffers .* ok$", said, re.MULTILINE)
    assert re.search(r"^ +states of the optimizer .* ok$", said, re.MULTILINE)


def test_a_time_is_judged_by_a_file_measured_here(run: Run) -> None:
    Path("here.toml").write_text(built_in_text("cpu"))
    planned(run, LLAMA, "--cluster here.toml --dtype float32 --layout fsdp=8,recompute=full")
    said = rehearsed(run("rehearse", "out", "--steps", "1"))
    (step,) = [line for line in said.splitlines() if "a run, without other ranks" in line]
    assert re.search(r"(ok|% longer than predicted|% shorter than predicted)$", step), step
    assert "Times are not judged" not in said


@pytest.mark.parametrize(
    ("here", "cluster", "judged"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", True),
        ("NVIDIA A100-SXM4-80GB", "a100", True),
        ("NVIDIA GeForce RTX 4090", "rtx4090", True),
        ("NVIDIA GeForce RTX 4090", "rtx5090", False),
        ("NVIDIA A100-SXM4-80GB", "h100", False),
    ],
)
def test_a_time_is_judged_on_the_gpu_that_was_planned_for(
    monkeypatch: pytest.MonkeyPatch, here: str, cluster: str, judged: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: here)
    why = rehearse.why_not_judged(cluster, torch.device("cuda"))
    assert (not why) == judged and (judged or f"this device is a {here}" in why)


def test_experts_get_rows_from_all(run: Run) -> None:
    planned(run, MIXTRAL, f"{CPU} --layout fsdp=1,ep=8")
    assert "MixtralDecoderLayer, forward" in rehearsed(run("rehearse", "out", "--steps", "1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--phase prefill --layout ddp=2,tp=4",
        "--phase decode --context 128 --layout tp=4,ddp=2",
        "--phase serve --output-tokens 8",
        "--layout fsdp=2,cp=4",
        "--layout fsdp=2,ulysses=4 --micro-batches 2",
        "--layout zero1=8 --precision mixed",
    ],
)
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_all_phases_and_layouts(run: Run, config: dict[str, Any], words: str) -> None:
    formats = "" if "mixed" in words else " --dtype float32"
    planned(run, config, f"--cluster cpu{formats} {words}")
    said = rehearsed(run("rehearse", "out", "--rank", "6", "--steps", "1"))
    assert said.count("Rank 6 of 8") == (2 if "serve" in words else 1)


@pytest.mark.slow
def test_a_model_that_is_too_large_has_fewer_layers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine, too; and none at all where even one layer does not fit."""
    planned(run, LLAMA | {"num_hidden_layers": 12}, "--cluster h100 --layout fsdp=2,tp=4")
    monkeypatch.setattr(rehearse, "_STEP_S", 0.0)
    said = rehearsed(run("rehearse", "out", "--steps", "1"))
    assert "All 12 layers take too much of this CPU: 1 of each kind were run" in said
    assert "Times are not judged" in said and "NVIDIA H100" in said
    monkeypatch.setattr(rehearse, "_ROOM", 0.0)
    ran = run("rehearse", "out")
    assert ran.code == 2 and "with one layer of each kind, and 0 B are free here" in ran.err


def test_what_is_refused(run: Run) -> None:
    planned(run, LLAMA, f"{CPU} --layout pp=2,ddp=4 --micro-batches 2")
    assert "a pipeline is not rehearsed yet" in run("rehearse", "out").err
    planned(run, LLAMA, f"{CPU} --layout ddp=8")
    ran = run("rehearse", "out", "--rank", "8")
    assert ran.code == 2 and "--rank 8: the plan has ranks 0 to 7" in ran.err
    with Path("out/sharded_model.py").open("a") as file:
        file.write("\n# changed\n")
    assert "# changed" in Path("out/sharded_model.py").read_text()
    assert rehearsed(run("rehearse", "out", "--steps", "1"))  # by the one who planned it here
