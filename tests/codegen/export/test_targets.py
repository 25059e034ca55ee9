"""Plans in the words of other tools: literal ones, and as their own parsers read them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shardwright.api import Plan, plan_file
from shardwright.codegen.export.data import SCHEMA
from shardwright.exporting import TARGETS, export
from shardwright.facts.phases import find_phase
from shardwright.planner.errors import PlanError
from tests.targets.tools import parsed

EXAMPLES = Path(__file__).parents[3] / "examples"


@cache
def planned(model: str = "llama.py", **options: Any) -> Plan:
    asked: dict[str, Any] = {
        "gpus": None, "cluster": "cpu", "phase": "train", "batch": 16, "seq": 64, "dtype": None,
        "memory_bytes": None, "mesh": None, "pins": (), "optimizer": None, "solver": "highs",
        "time_limit_s": 60.0, **options,
    }  # fmt: skip
    asked["optimizer"] = asked["optimizer"] or find_phase(asked["phase"]).optimizer
    return plan_file(str(EXAMPLES / model), **asked)


def words(text: str) -> list[str]:
    """Without comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


MEGATRON = {
    "zero1=2,tp=2,sp": [
        "--tensor-model-parallel-size 2", "--sequence-parallel", "--context-parallel-size 1",
        "--pipeline-model-parallel-size 1", "--use-distributed-optimizer", "--micro-batch-size 8",
        "--global-batch-size 16", "--seq-length 64",
    ],
    "ddp=2,fsdp=2,recompute=full": [
        "--tensor-model-parallel-size 1", "--context-parallel-size 1",
        "--pipeline-model-parallel-size 1", "--use-megatron-fsdp",
        "--data-parallel-sharding-strategy optim_grads_params", "--use-distributed-optimizer",
        "--num-distributed-optimizer-instances 2", "--micro-batch-size 4",
        "--global-batch-size 16", "--seq-length 64", "--recompute-granularity full",
        "--recompute-method uniform", "--recompute-num-layers 1",
    ],
    "ulysses=4": [
        "--tensor-model-parallel-size 1", "--context-parallel-size 4", "--cp-comm-type a2a",
        "--pipeline-model-parallel-size 1", "--micro-batch-size 16", "--global-batch-size 16",
        "--seq-length 64",
    ],
    "pp=2,vpp=2,ddp=2": [
        "--tensor-model-parallel-size 1", "--context-parallel-size 1",
        "--pipeline-model-parallel-size 2", "--num-virtual-stages-per-pipeline-rank 2",
        "--micro-batch-size 1", "--global-batch-size 16", "--seq-length 64",
    ],
}  # fmt: skip


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", MEGATRON)
def test_megatron(layout: str) -> None:
    exported = export(
        planned(layout=layout, micro_batches=8 if "pp" in layout else None), "megatron"
    )
    assert words(exported.text) == MEGATRON[layout]
    assert exported.layout == layout
    assert exported.differences == ()


@pytest.mark.slow
@pytest.mark.parametrize("layout", MEGATRON)
def test_megatron_reads_its_flags(layout: str, tmp_path: Path) -> None:
    found = parsed("megatron", "\n".join(MEGATRON[layout]), tmp_path)
    for flag in MEGATRON[layout]:
        name, _, value = flag.removeprefix("--").replace("-", "_").partition(" ")
        text = str(found[name]).strip("[]'")
        assert text == (value or "True"), flag


def test_torchtitan(tmp_path: Path) -> None:
    plan = planned(layout="fsdp=2,tp=2,sp,recompute=full")
    found = parsed("torchtitan", export(plan, "torchtitan").text, tmp_path)
    parallel, training = found["parallelism"], found["training"]
    assert parallel["data_parallel_replicate_degree"] == 1
    assert parallel["data_parallel_shard_degree"] == 2
    assert parallel["tensor_parallel_degree"] == 2
    assert (training["local_batch_size"], training["global_batch_size"]) == (8, 16)
    assert (training["seq_len"], training["dtype"]) == (64, "float32")
    assert found["activation_checkpoint"]["mode"] == "full"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp=2,ddp=2", "fsdp=2,cp=2", "ddp=4"])
def test_torchtitan_reads_others(layout: str, tmp_path: Path) -> None:
    found = parsed("torchtitan", export(planned(layout=layout), "torchtitan").text, tmp_path)
    sizes = found["parallelism"]
    kept = {"ddp": "data_parallel_replicate", "fsdp": "data_parallel_shard"}
    kept |= {"cp": "context_parallel", "pp": "pipeline_parallel"}
    for word, size in (part.split("=") for part in layout.split(",")):
        assert sizes[f"{kept[word]}_degree"] == int(size)


SERVERS = {
    "vllm": [
        "--tensor-parallel-size 2", "--data-parallel-size 2", "--max-model-len 72",
        "--max-num-seqs 8",
    ],
    "sglang": [
        "--tp-size 2", "--dp-size 2", "--context-length 72", "--max-running-requests 8",
    ],
}  # fmt: skip


@pytest.mark.parametrize("server", SERVERS)
def test_servers(server: str) -> None:
    plan = planned(layout="ddp=2,tp=2", phase="serve", output_tokens=8)
    exported = export(plan, server)
    assert (words(exported.text), exported.layout) == (SERVERS[server], "ddp=2,tp=2")


@pytest.mark.slow
@pytest.mark.parametrize("server", SERVERS)
def test_servers_read_their_flags(server: str, tmp_path: Path) -> None:
    names = {"context_length": "context_length", "max_running_requests": "max_running_requests"}
    text = "\n".join([*SERVERS[server], "--dtype bfloat16"])
    text += "\n--enable-expert-parallel" if server == "vllm" else ""
    found = parsed(server, text, tmp_path)
    for flag in SERVERS[server]:
        name, value = flag.removeprefix("--").replace("-", "_").split(" ")
        assert found[names.get(name, name)] == int(value)
    assert found["dtype"] == "bfloat16"
    assert server != "vllm" or found["enable_expert_parallel"] is True


def test_what_a_tool_has_not_is_planned_as_its_nearest_and_told_with_its_price() -> None:
    plan = planned(layout="zero2=2,tp=2,sp", micro_batches=2)
    exported = export(plan, "dtensor")
    other = planned(layout="fsdp=2,tp=2", micro_batches=2)
    assert exported.layout == "fsdp=2,tp=2"
    assert exported.seconds == pytest.approx(other.seconds)
    assert f"{other.seconds / plan.seconds - 1:+.1%}" in exported.differences[0]
    assert "TP+SP over 2 GPUs becomes TP" in exported.differences
    assert "ZeRO-2 over 2 GPUs becomes FSDP" in exported.differences
    assert "#   ZeRO-2 over 2 GPUs becomes FSDP" in exported.text.splitlines()


@pytest.mark.slow
def test_what_differs_from_every_layout_is_named() -> None:
    pins = ("*.q_proj=x:batch", "*.k_proj=x:batch", "*.v_proj=x:batch", "*.o_proj=x:batch")
    plan = planned(gpus=2, mesh="2", pins=("*.mlp.*_proj.weight=S0", *pins))
    exported = export(plan, "megatron")
    assert exported.layout
    assert any("mlp" in each for each in exported.differences)


def test_json_is_the_plans_structure() -> None:
    plan = planned(layout="fsdp=2,tp=2")
    found = json.loads(export(plan, "json").text)
    assert found["schema"] == SCHEMA
    assert [axis["size"] for axis in found["mesh"]] == [2, 2]
    phase = found["phases"]["train"]
    assert phase["seconds"] == plan.seconds
    q = phase["parameters"]["layers.*.attention.q_proj.weight"]
    assert (q["stored"], q["shape"], q["layers"]) == ("S1,S0", [256, 256], 4)
    by_module = {op["module"]: op for op in phase["operators"]}
    assert by_module["layers.0.attention.q_proj"]["cuts"] == "dp: batch, tp: columns"
    assert by_module["layers.0.mlp.down_proj"]["results"] == ["S0,P"]


def test_refusals() -> None:
    plan = planned(layout="fsdp=2")
    with pytest.raises(PlanError, match="did you mean `megatron`"):
        export(plan, "megatrn")
    with pytest.raises(PlanError, match="vllm serves, and this plan is for phase train"):
        export(plan, "vllm")
    with pytest.raises(PlanError, match="dtensor has no CP"):
        export(planned(layout="cp=2"), "dtensor")
    with pytest.raises(PlanError, match="a pipeline is a program for each stage"):
        export(planned(layout="pp=2,ddp=2"), "sdy")
    assert plan.export("megatron").layout == "fsdp=2"
    assert set(TARGETS) == {
        "dtensor", "torchtitan", "megatron", "vllm", "sglang", "mlir", "sdy", "json",
    }  # fmt: skip
