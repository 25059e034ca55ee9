"""Checkpoints of pipelined runs: they load into any other plan, with stages and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardwright
from shardwright.runtime import RankPool, ShardedModule

from ..ir.models import TinyGPT
from ..sharded import import_source

Pool = Callable[[int], RankPool]
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}
NO_DECAY = {"blocks.0.*": {"weight_decay": 0.0}, "*norm*": {"lr": 0.01}}  # of one stage, and of all
ROWS = 8
BEFORE, AFTER = 2, 3  # steps until the checkpoint, and from there


def _model() -> TinyGPT:
    """Its embedding is tied to its head, in the first stage and the last."""
    torch.manual_seed(0)
    return TinyGPT(layers=4).double()


def _batch(step: int) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return {name: torch.randint(37, (ROWS, 8)) for name in ("ids", "labels")}


@cache
def _source(layout: str) -> str:
    plan = shardwright.plan(_model(), _batch(0), layout=layout, cluster="cpu", micro_batches=2)
    return plan.module_source()


def _losses(model: Any, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> list[float]:
    losses: list[float] = []
    for step in steps:
        rows = {name: model.data_shard.of(x) for name, x in _batch(step).items()}
        losses.append(float(model.step(**rows)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run(source: str, folder: Path, *, first: bool) -> tuple[list[float], dict[str, Tensor]]:
    """In one rank: train and save, or go on from what is saved."""
    kind: type[ShardedModule] = import_source(source).ShardedModel
    model = kind.from_state_dict(_model().state_dict()) if first else kind()
    optimizer = model.optimizer(groups=NO_DECAY, **OPTIONS)
    if first:
        losses = _losses(model, optimizer, range(BEFORE))
        model.save_checkpoint(folder, optimizer, step=BEFORE, extra="seen")
        model.wait_for_checkpoint()
        return losses, model.full_state_dict()
    resumed = model.load_checkpoint(folder, optimizer)
    assert (resumed.step, resumed.extra) == (BEFORE, "seen")
    return _losses(model, optimizer, range(BEFORE, BEFORE + AFTER)), model.full_state_dict()


@cache
def _alone() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and parameters of one process that trains the original, without a break."""
    model = _model()
    named = list(model.named_parameters())
    zeroth = [p for name, p in named if name.startswith("blocks.0.")]
    norms = [p for name, p in named if "norm" in name and not name.startswith("blocks.0.")]
    rest = [p for _, p in named if not any(p is other for other in (*zeroth, *norms))]
    groups = [{"params": rest}, {"params": zeroth, "weight_decay": 0.0}]
    groups.append({"params": norms, "lr": 0.01})
    optimizer = torch.optim.AdamW(groups, **OPTIONS)
    losses: list[float] = []
    for step in range(BEFORE + AFTER):
        loss = model(**_batch(step))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: x.detach() for name, x in model.state_dict().items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pp=2,fsdp=2", "ddp=2"),
        ("fsdp=2", "pp=2,vpp=2"),
        ("pp=2,vpp=2", "pp=4"),
        ("pp=4", "pp=2,zero1=2"),
    ],
)
@pytest.mark.some(2)
def test_a_run_goes_on_with_other_stages(
    before: str, after: str, pool: Pool, tmp_path: Path
) -> None:
    losses, state = _alone()
    sources = [(_source(layout), _ranks(layout)) for layout in (before, after)]
    (first, many), (then, few) = sources
    for got, _ in pool(many).run(_first, first, tmp_path):
        assert got == pytest.approx(losses[:BEFORE], rel=1e-10)
    for got, whole in pool(few).run(_then, then, tmp_path):
        assert got == pytest.approx(losses[BEFORE:], rel=1e-10)
        for name, x in state.items():
            torch.testing.assert_close(whole[name], x, rtol=1e-8, atol=1e-10)


def _first(source: str, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    return run(source, folder, first=True)


def _then(source: str, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    return run(source, folder, first=False)


def _ranks(layout: str) -> int:
    sizes = dict(part.split("=") for part in layout.split(","))
    return int(torch.tensor([int(n) for word, n in sizes.items() if word != "vpp"]).prod())


def test_a_checkpoint_of_another_model_is_refused(pool: Pool, tmp_path: Path) -> None:
    """Names that no stage has are told, and those of other stages are not."""
    pool(2).run(_first, _source("pp=2,vpp=2"), tmp_path)
    torch.manual_seed(0)
    inputs = _batch(0)
    other = shardwright.plan(
        TinyGPT(layers=2).double(), inputs, layout="pp=2", cluster="cpu", micro_batches=2
    )
    with pytest.raises(Exception, match=r"unexpected: model\.blocks\.2\.") as caught:
        pool(2).run(_then, other.module_source(), tmp_path)
    assert "missing" not in str(caught.value)
