"""The file for `torch.distributed.tensor` runs the user's own model on gloo ranks as one process
does: values and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from shardwright.api import Plan, plan_file
from shardwright.exporting import export
from shardwright.loading import import_model
from shardwright.runtime import RankPool

Pool = Callable[[int], RankPool]
EXAMPLES = Path(__file__).parents[3] / "examples"
BATCH, SEQ = 8, 16


def planned(model: str, layout: str, **options: Any) -> Plan:
    asked: dict[str, Any] = {
        "gpus": None, "cluster": "cpu", "phase": "train", "batch": BATCH, "seq": SEQ,
        "dtype": None, "memory_bytes": None, "mesh": None, "pins": (), "optimizer": "adamw",
        "solver": "highs", "time_limit_s": 60.0, "layout": layout, **options,
    }  # fmt: skip
    return plan_file(str(EXAMPLES / model), **asked)


def original(model: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same weights and inputs in every process."""
    module: ModuleType = import_model(EXAMPLES / model)
    torch.manual_seed(1)
    built = module.build_model().double()
    return built, module.example_inputs(BATCH, SEQ)


def throughout() -> Any:
    """`x.float()` in a model is float64, too, so that nothing is rounded to fewer digits."""
    return mock.patch.object(Tensor, "float", Tensor.double)


def run(model: str, source: str) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's loss, and all gradients whole."""
    with throughout():
        return run_in_float64(model, source)


def run_in_float64(model: str, source: str) -> tuple[Tensor, dict[str, Tensor]]:
    from torch.distributed.tensor import DTensor

    built, batch = original(model)
    made: dict[str, Any] = {}
    exec(compile(source, "exported.py", "exec"), made)
    mesh = made["make_mesh"]("cpu")
    made["parallelize"](built, mesh)
    out = built(**made["own_rows"](batch, mesh))
    out["loss"].backward()

    def whole(grad: Tensor) -> Tensor:
        return grad.full_tensor() if isinstance(grad, DTensor) else grad

    grads = {n: whole(p.grad) for n, p in built.named_parameters() if p.grad is not None}
    return out["loss"].detach(), grads


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama.py", "tp=2"),
        pytest.param("llama.py", "fsdp=2,recompute=full", marks=pytest.mark.slow),
        pytest.param("gpt.py", "ddp=2", marks=pytest.mark.slow),
        pytest.param("llama.py", "fsdp=2,tp=2", marks=pytest.mark.slow),
        pytest.param("llama.py", "ddp=2,tp=2,recompute=full", marks=pytest.mark.slow),
        pytest.param("llama.py", "ddp=2,fsdp=2", marks=pytest.mark.slow),
    ],
)
def test_it_runs_the_original_as_one_process_does(pool: Pool, model: str, layout: str) -> None:
    plan = planned(model, layout)
    exported = export(plan, "dtensor")
    assert exported.layout == layout
    alone, batch = original(model)
    with throughout():
        out = alone(**batch)
        out["loss"].backward()
    want = {name: p.grad for name, p in alone.named_parameters()}
    answers = pool(plan.request.gpus).run(run, model, exported.text, timeout_s=120.0)
    losses = torch.stack([loss for loss, _ in answers])
    torch.testing.assert_close(losses.mean(), out["loss"].detach(), rtol=1e-9, atol=1e-9)
    for _, grads in answers:
        assert grads.keys() == want.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-9, msg=name)
