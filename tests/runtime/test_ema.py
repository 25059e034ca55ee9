"""A moving average of sharded parameters is torch's of the original's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shardwright.runtime import RankError, RankPool, ShardedModule
from tests.runtime.test_module import ShardedTied, batch, original
from tests.runtime.test_training import Alone, Shards

Pool = Callable[[int], RankPool]
DECAY, STEPS = 0.7, 4


def alone() -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Averages and parameters after some steps of one process, and the loss with averages."""
    model = original()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch())["loss"].backward()
        optimizer.step()
        averaged.update_parameters(model)
    loss = float(averaged(**batch())["loss"].detach())
    return averaged.module.state_dict(), model.state_dict(), loss


def run(
    kind: type[ShardedModule], folder: Path, steps: range
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    model: Any = kind.from_state_dict(original().state_dict())
    optimizer, ema = model.optimizer("sgd", lr=0.1), model.ema(DECAY)
    if steps.start:
        model.load_checkpoint(folder, optimizer, ema=ema)
    for _ in steps:
        optimizer.zero_grad()
        model(**model.shard_inputs(**batch())).loss.backward()
        optimizer.step()
        ema.update()
    with ema.applied(), torch.no_grad():
        averages = {name: x.clone() for name, x in model.full_state_dict().items()}
        loss = float(model(**model.shard_inputs(**batch())).loss)
    model.save_checkpoint(folder, optimizer, step=steps.stop, ema=ema)
    model.wait_for_checkpoint()
    return averages, model.full_state_dict(), loss


@pytest.mark.parametrize(("first", "then"), [
    (ShardedTied, Alone), pytest.param(Alone, Shards, marks=pytest.mark.slow),
])  # fmt: skip
def test_averages_of_a_run_that_goes_on(
    pool: Pool, tmp_path: Path, first: type[ShardedModule], then: type[ShardedModule]
) -> None:
    sizes = [1 if kind is Alone else 4 for kind in (first, then)]
    pool(sizes[0]).run(run, first, tmp_path, range(2))
    averages, state, loss = alone()
    assert not torch.equal(averages["embed.weight"], state["embed.weight"])
    for got in pool(sizes[1]).run(run, then, tmp_path, range(2, STEPS)):
        for found, want in zip(got[:2], (averages, state), strict=True):
            for name, x in want.items():
                torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-14)
        assert got[2] == pytest.approx(loss, rel=1e-12)


def test_averages_of_half_precision_are_float32() -> None:
    model = Alone.from_state_dict(original().state_dict()).bfloat16()
    ema = model.ema(0.75)
    start = {name: x.clone() for name, _, x in ema.kept}
    with torch.no_grad():
        for x in model.parameters():
            x += 1
    ema.update()
    for name, piece, average in ema.kept:
        assert average.dtype == torch.float32
        want = 0.75 * start[name] + 0.25 * piece.tensor.float()
        torch.testing.assert_close(average, want, rtol=1e-6, atol=1e-6)
    with ema.applied():
        assert all(torch.equal(p.tensor, x.bfloat16()) for _, p, x in ema.kept)


def without(folder: Path) -> None:
    model = ShardedTied.from_state_dict(original().state_dict())
    model.save_checkpoint(folder, step=1)
    model.wait_for_checkpoint()
    model.load_checkpoint(folder, ema=model.ema(DECAY))


def test_refusals(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decay is 0 to 1, as 0.999; got 1.5"):
        Alone().ema(1.5)
    with pytest.raises(RankError, match=r"missing: ema.embed.weight"):
        pool(4).run(without, tmp_path)
