"""What may be asked for in Python, and what is said of everything else, before any work."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.api import plan_file
from shardwright.asked import Asked
from shardwright.planner.errors import PlanError

INPUT = torch.zeros(4, 8, 16, device="meta")
NAN, INF = float("nan"), float("inf")


def model() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(16, 16))


def asked(**changed: Any) -> None:
    given = {"model": model(), "inputs": {"input": INPUT}, "gpus": 2, "cluster": "cpu"} | changed
    sw.plan(given.pop("model"), given.pop("inputs"), **given)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": None}, r"`model` must be an nn.Module, got None"),
        ({"model": "model.py"}, r"got 'model.py' \(str\); `plan` on the command line takes names"),
        ({"model": nn.Linear}, r"got the class Linear; build it: Linear\(\.\.\.\)"),
        ({"inputs": None}, r"a dict by name, or a tuple by position; got None"),
        ({"inputs": INPUT}, r"got a tensor of shape \(4, 8, 16\)"),
        ({"gpus": "8"}, r"`gpus` must be a whole number, got '8' \(str\)"),
        ({"gpus": [2]}, r"`gpus` must be a whole number"),
        ({"gpus": 2.0}, r"`gpus` must be a whole number, got 2.0 \(float\)"),
        ({"gpus": True}, r"`gpus` must be a whole number, got True"),
        ({"gpus": None}, r"`gpus` must be a whole number, got None"),
        ({"mesh": 2}, r"`mesh` must be text such as '2x4' or 'dp=2,tp=4', got 2"),
        ({"mesh": (2,)}, r"`mesh` must be text such as"),
        ({"pins": None}, r"`pins` must be a list of texts such as .*, got None"),
        ({"pins": "0.weight=S0"}, r"`pins` must be a list of texts"),
        ({"pins": [1]}, r"`pins` must be text such as"),
        ({"outputs": "0"}, r"`outputs` must be a list of texts such as 'loss', got '0'"),
        ({"outputs": [0]}, r"`outputs` must be text such as 'loss', got 0"),
        ({"cluster": None}, r"`cluster` must be text, got None"),
        ({"phase": 1}, r"`phase` must be text, got 1"),
        ({"context": "8"}, r"`context` must be a whole number, got '8'"),
        ({"output_tokens": 2.5}, r"`output_tokens` must be a whole number, got 2.5"),
        ({"expert_imbalance": "2"}, r"`expert_imbalance` must be a number, got '2'"),
        ({"memory_bytes": "80GB"}, r"`memory_bytes` must be a whole number, got '80GB'"),
        ({"time_limit_s": "1"}, r"`time_limit_s` must be a number, got '1'"),
        ({"optimizer": 1}, r"`optimizer` must be text, got 1"),
        ({"solver": None}, r"`solver` must be text, got None"),
        ({"progress": None}, r"`progress` must be a function, got None"),
    ],
)
def test_wrong_types(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        asked(**changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"optimizer": "lion"}, r"unknown optimizer `lion`; expected one of adamw, muon, sgd, no"),
        ({"layout": ""}, r"--layout : a word is missing\. There are ddp, dp"),
        ({"inputs": {}}, r"`inputs` is empty"),
        ({"inputs": [INPUT] * 2}, r"takes 1 positional arguments, the inputs are 2"),
        ({"inputs": {"input": "a"}}, r"`inputs` has no tensor"),
        ({"inputs": {0: INPUT}}, r"Sequential.forward takes no `0`; it takes `input`"),
        ({"inputs": {"input": {1}}}, r"input `input` is a set, not a tensor"),
        ({"inputs": {"input": torch.zeros(4, 16).to_sparse()}}, r"input `input` is a sparse_coo"),
        (
            {"inputs": {"input": torch.nested.nested_tensor([torch.zeros(2, 16)] * 4)}},
            r"input `input` is a nested tensor; plans cut dense ones",
        ),
        ({"inputs": {"input": INPUT[:0]}}, r"input `input` is empty, of shape \(0, 8, 16\)"),
        ({"inputs": {"input": INPUT[:, :0]}}, r"input `input` is empty, of shape \(4, 0, 16\)"),
        ({"gpus": 0}, r"gpus=0: expected 1 or more"),
        ({"gpus": 10**9}, r"gpus=1000000000: expected at most 1048576"),
        ({"mesh": "²"}, r"--mesh ²: expected sizes such as 2x4"),
        ({"mesh": "torch=2"}, r"`torch` is no name for an axis; take one as dp or tp"),
        ({"mesh": "float=2"}, r"`float` is no name for an axis"),
        ({"mesh": "T=2"}, r"`T` is no name for an axis"),
        ({"mesh": "3"}, r"--mesh 3 has 3 GPUs, --gpus says 2"),
        ({"mesh": "2", "pins": ["1.weight=S0"]}, r"no parameter or module has such a name"),
        ({"outputs": ["loss"]}, r"--outputs: the model returns no `loss`; it returns one tensor"),
        ({"outputs": ["a"], "phase": "prefill"}, r"--outputs is for training: phase prefill"),
        ({"cluster": "h101"}, r"unknown cluster `h101`; did you mean"),
        ({"phase": "learn"}, r"unknown phase `learn`; expected one of train"),
        ({"context": -1}, r"context=-1: expected 0 or more"),
        ({"output_tokens": 0}, r"output_tokens=0: expected 1 or more"),
        ({"expert_imbalance": NAN}, r"`expert_imbalance` must be finite, got nan"),
        ({"expert_imbalance": 0.5}, r"expert imbalance 0.5: the busiest rank has at least"),
        ({"memory_bytes": 0}, r"memory_bytes=0: expected 1 or more"),
        ({"memory_bytes": 10}, r"no plan fits 10 B per GPU"),
        ({"time_limit_s": INF}, r"`time_limit_s` must be finite, got inf"),
        ({"time_limit_s": 0}, r"the time limit must be above 0 s"),
        ({"optimizer": "lion"}, r"unknown optimizer `lion`; expected one of adamw"),
        ({"solver": "gurobi"}, r"unknown solver `gurobi`; expected one of highs"),
    ],
)
def test_wrong_values(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        asked(**changed)


def test_wrong_numbers_are_errors_of_the_plan() -> None:
    for changed in ({"gpus": 0}, {"context": -1}, {"expert_imbalance": NAN}):
        with pytest.raises(PlanError):
            asked(**changed)


def test_numbers_of_numpy_are_plain_ones_in_a_plan() -> None:
    given = {"gpus": np.int64(2), "memory_bytes": np.int64(10**9), "mesh": "2"}
    plan = sw.plan(model(), {"input": INPUT}, cluster="cpu", **given)
    assert json.loads(json.dumps(plan.to_json()))["request"]["gpus"] == 2


def test_the_command_line_asks_the_same() -> None:
    """Every option of one is an option of the other, and is checked in one place."""
    checked = set(inspect.signature(Asked).parameters)
    for function in (sw.plan, plan_file):
        options = inspect.signature(function).parameters
        # a module has its own dtype, and is captured every time
        assert checked - {"dtype", "cache"} <= set(options), function
        assert set(options) - checked <= {"model", "inputs", "target", "batch", "seq"}


@pytest.mark.parametrize(
    ("mesh", "names", "note"),
    [
        ("2", ("replicas",), ""),
        ("copies=2", ("copies",), ""),
        ("tp=2", ("tp",), "here tp runs copies; --pin decides what is cut"),
    ],
)
def test_names_of_axes(mesh: str, names: tuple[str, ...], note: str) -> None:
    """The user's own, or what they are used for; where the two contradict, a note."""
    odd = torch.zeros(3, 5, 16, device="meta")  # what two ranks do not divide
    plan = sw.plan(model(), {"input": odd}, gpus=2, cluster="cpu", mesh=mesh, pins=["0.*=R"])
    assert plan.mesh.names == names
    assert (note in "".join(plan.notes)) if note else not plan.notes


def test_float64_is_not_mixed() -> None:
    """A plan for GPUs says so, and stores and reduces what the model has."""
    wide = nn.Linear(16, 16, device="meta", dtype=torch.float64)
    inputs = {"input": torch.zeros(4, 8, 16, device="meta", dtype=torch.float64)}
    with pytest.raises(PlanError, match=r"--reduce-dtype bfloat16 is for mixed precision"):
        sw.plan(wide, inputs, gpus=2, reduce_dtype="bfloat16")
    plan = sw.plan(wide, inputs, gpus=2)
    assert plan.request.precision == plan.request.reduce_dtype == "own"
    assert any("nothing to mix" in note for note in plan.notes)
    assert "REDUCE" not in plan.module_source()
