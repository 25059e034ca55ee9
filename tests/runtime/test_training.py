"""Optimizers, clipping and checkpoints of a run, beside one process that trains the original."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.runtime import Param, RankError, RankPool, ShardedModule, Weight
from tests.runtime.test_module import Replicated, ShardedTied, batch, original

Pool = Callable[[int], RankPool]
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}
NO_DECAY = {"*bias": {"weight_decay": 0.0, "lr": 0.01}}
MOST = 0.1  # norm of all gradients, which are larger


class Alone(ShardedTied):
    """The same on one rank."""

    MESH = {"dp": 1, "tp": 1}


class Shards(ShardedTied):
    """The same with parameters stored otherwise."""

    PARAMETERS = ShardedTied.PARAMETERS | {
        "layers.0.bias": Param((6,), torch.float64, "S0,S0"),
        "unused": Param((3,), torch.float64, "R,R"),
    }
    WEIGHTS = ShardedTied.WEIGHTS | {
        "layers.0.bias": Weight("S0,S0", "V,R", via=("S0,R",)),
    }


def alone(steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """(losses, norms, parameters) of one process."""
    model = original()
    bias = [model.layers[0].bias]
    rest = [p for p in model.parameters() if p is not bias[0]]
    groups = [{"params": rest}, {"params": bias, **NO_DECAY["*bias"]}]
    optimizer = torch.optim.AdamW(groups, **OPTIONS)
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(steps):
        loss = model(**batch())["loss"]
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


def steps_of(model: ShardedModule, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Any, Any]:
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(steps):
        loss = model(**model.shard_inputs(**batch())).loss
        loss.backward()
        norms.append(float(model.clip_grad_norm_(MOST)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def run(
    kind: type[ShardedModule], folder: Path | None, before: int, after: int
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train `before` steps from the start and save, or go on from what is saved, `after` steps."""
    model = kind.from_state_dict(original().state_dict()) if before else kind()
    optimizer = model.optimizer(groups=NO_DECAY, **OPTIONS)
    losses, norms = steps_of(model, optimizer, before)
    if folder is not None and before:
        model.save_checkpoint(folder, optimizer, step=before, extra={"seen": [before, "rows"]})
        model.wait_for_checkpoint()
    elif folder is not None:
        resumed = model.load_checkpoint(folder, optimizer)
        assert (resumed.step, resumed.extra) == (3, {"seen": [3, "rows"]})
        losses, norms = steps_of(model, optimizer, after)
    return losses, norms, model.full_state_dict()


def test_steps_and_norms_equal_those_of_one_process(pool: Pool) -> None:
    losses, norms, state = alone(4)
    for got_losses, got_norms, got in pool(4).run(run, ShardedTied, None, 4, 0):
        assert got_losses == pytest.approx(losses, rel=1e-12)
        assert got_norms == pytest.approx(norms, rel=1e-12) and min(norms) > MOST
        for name, x in state.items():
            torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("first", "then"), [
    (ShardedTied, Alone), (Alone, ShardedTied), (ShardedTied, Shards),
])  # fmt: skip
def test_a_run_goes_on_under_another_plan(
    pool: Pool, tmp_path: Path, first: type[ShardedModule], then: type[ShardedModule]
) -> None:
    losses, norms, state = alone(6)
    sizes = [1 if kind is Alone else 4 for kind in (first, then)]
    pool(sizes[0]).run(run, first, tmp_path, 3, 0)
    for got_losses, got_norms, got in pool(sizes[1]).run(run, then, tmp_path, 0, 3):
        assert got_losses == pytest.approx(losses[3:], rel=1e-12)
        assert got_norms == pytest.approx(norms[3:], rel=1e-12)
        for name, x in state.items():
            torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-12)


def test_every_number_is_written_once(pool: Pool, tmp_path: Path) -> None:
    pool(4).run(run, ShardedTied, tmp_path, 3, 0)
    (folder,) = tmp_path.iterdir()
    from torch.distributed.checkpoint import FileSystemReader

    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    numbers = 0
    for name, item in saved.items():
        if name != "run":
            numbers += sum(chunk.sizes.numel() for chunk in item.chunks)  # pyright: ignore
    state = {id(x): x.numel() for x in original().state_dict(keep_vars=True).values()}
    trained = sum(p.numel() for n, p in original().named_parameters() if n != "unused")
    assert numbers == sum(state.values()) + 2 * trained


def save_often(folder: Path) -> list[str]:
    model = ShardedTied.from_state_dict(original().state_dict())
    for step in (1, 2, 3):
        model.save_checkpoint(folder, step=step)
    model.wait_for_checkpoint()
    return sorted(path.name for path in folder.iterdir())


def test_the_last_complete_ones_stay(pool: Pool, tmp_path: Path) -> None:
    torn = tmp_path / "step-00000009"  # of a run that was killed while it wrote
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"")
    for rank, names in enumerate(pool(4).run(save_often, tmp_path)):
        assert names == ["step-00000002", "step-00000003"] or rank
    with pytest.raises(RankError, match="has a checkpoint of step 3, and this is step 1"):
        pool(4).run(save_often, tmp_path)


KILLED = """
import sys
from pathlib import Path
from tests.runtime.test_training import Alone, original

model = Alone.from_state_dict(original().state_dict())
try:
    step = model.load_checkpoint(sys.argv[1]).step
except FileNotFoundError:
    step = 0
print(step, flush=True)
while True:
    step += 1
    model.save_checkpoint(sys.argv[1], step=step, extra=list(range(200000)))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    reached = 0
    for number in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            step = int(process.stdout.readline())
            time.sleep(random.Random(number).uniform(0.05, 0.8))
        finally:
            process.kill()
            process.wait(60)
        assert step >= reached, "a complete checkpoint was lost"
        reached = step
    assert reached > 10


def resume(kind: type[ShardedModule], folder: Path, with_optimizer: bool = False) -> int:
    model = kind()
    optimizer = model.optimizer(**OPTIONS) if with_optimizer else None
    return model.load_checkpoint(folder, optimizer).step


class Wider(Replicated):
    PARAMETERS = {n: p for n, p in Replicated.PARAMETERS.items() if n != "shift"} | {
        "layers.0.bias": Param((7,), torch.float64, "R"),
        "more": Param((2,), torch.float64, "R"),
    }


def test_other_models_and_groups_are_refused(pool: Pool, tmp_path: Path) -> None:
    pool(1).run(run, Alone, tmp_path, 3, 0)
    with pytest.raises(RankError) as caught:
        pool(1).run(resume, Wider, tmp_path)
    for line in (
        "(3 problems)", "missing: model.more", "unexpected: model.shift",
        "wrong shape: model.layers.0.bias is (6,), the plan has (7,)",
    ):  # fmt: skip
        assert line in str(caught.value)
    with pytest.raises(RankError, match="other groups of parameters"):
        pool(1).run(resume, Replicated, tmp_path, True)
    assert pool(1).run(resume, Replicated, tmp_path) == [3]
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(RankError, match="has no complete checkpoint of a run"):
        pool(1).run(resume, Replicated, tmp_path)


def wrong(what: str) -> None:
    model = ShardedTied.from_state_dict(original().state_dict())
    model(**model.shard_inputs(**batch())).loss.backward()
    match what:
        case "pattern":
            model.optimizer(lr=1.0, groups={"*.norm": {"lr": 0.0}})
        case "nan":
            grad = model.layers[0].bias.grad
            assert grad is not None
            grad[-1] = torch.nan
            model.clip_grad_norm_(1.0, error_if_nonfinite=True)
        case _:
            optimizer = torch.optim.Adafactor(model.parameters())
            optimizer.step()
            model.save_checkpoint("never", optimizer, step=1)


@pytest.mark.parametrize(("what", "message"), [
    ("pattern", r"no trained parameter matches \*\.norm; names are embed.weight"),
    ("nan", "the norm of all gradients is nan"),
    ("rows", "Adafactor can.t step `unused`, of which each rank holds a part"),
])  # fmt: skip
def test_what_can_not_be_is_said(pool: Pool, what: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        pool(4).run(wrong, what)
