"""Loops that users write: optimizers, clipping and states that are wrong for parts are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardwright.runtime import RankError, RankPool, ShardedModule, Weight
from shardwright.runtime.training.elementwise import not_elementwise
from tests.runtime.test_module import ShardedTied, batch, original
from tests.runtime.test_training import Alone, Shards

Pool = Callable[[int], RankPool]


class AllCut(Shards):
    """No rank holds a copy of what another has."""

    PARAMETERS = {
        name: param if param.kind != "parameter" or name == "unused" else type(param)(
            param.shape, param.dtype, "S0,S0" if name != "embed.weight" else param.spec,
            aliases=param.aliases,
        )
        for name, param in Shards.PARAMETERS.items()
    }  # fmt: skip
    WEIGHTS = Shards.WEIGHTS | {"layers.0.bias": Weight("S0,S0", "V,R", via=("S0,R",))}


class Whole(ShardedTied):
    """All parameters on every rank."""

    PARAMETERS = {
        name: type(param)(
            param.shape, param.dtype, "R,R", param.kind, param.aliases, param.data
        )
        for name, param in ShardedTied.PARAMETERS.items()
    }  # fmt: skip
    WEIGHTS = {
        "embed.weight": Weight("R,R", "V,S0", via=("V,R",)),
        "layers.0.weight": Weight("R,R", "V,R"),
        "layers.0.bias": Weight("R,R", "V,R"),
    }


def loop(kind: type[ShardedModule], what: str, steps: int = 4) -> list[float]:
    model = kind.from_state_dict(original().state_dict())
    rank = model.mesh.rank
    optimizer = _made(what, model)
    other = torch.optim.LBFGS([torch.nn.Parameter(torch.ones(3))])  # over no parameter of the model
    losses: list[float] = []
    for step in range(steps):
        loss = model(**model.shard_inputs(**batch())).loss
        (loss * 3).backward()
        other.step(lambda: 0.0)
        match what:
            case "torch's clip":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            case "clip":
                model.clip_grad_norm_(0.01)
            case "clip by value":
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
            case "own data" if rank == 1:
                model.layers[0].bias.grad.mul_(1.001)  # pyright: ignore
            case "own weight" if rank == 2 and step == 1:
                with torch.no_grad():
                    model.layers[0].bias.add_(0.01)
            case "own buffer" if rank % 2 == 1 and step == 0:
                model.shift.add_(0.01)  # pyright: ignore
            case "skips" if rank == 1 and step == 1:
                continue
            case _:
                pass
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if what == "late":
        with torch.no_grad():
            model.layers[0].bias.add_(0.01 * rank)
        model.save_checkpoint("never", step=1)
    return losses


def _made(what: str, model: ShardedModule) -> torch.optim.Optimizer:
    match what:
        case "fused":
            return torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        case "foreach":
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=True)
        case "adafactor":
            return torch.optim.Adafactor(model.parameters(), lr=0.0)
        case "muon":
            return Orthogonal(model.parameters())
        case "states":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            like = [torch.nn.Parameter(torch.ones(2 * p.shape[0], *p.shape[1:])) for p in
                    model.parameters()]  # fmt: skip
            earlier = torch.optim.AdamW(like)
            for p in like:
                p.grad = torch.ones_like(p)
            earlier.step()
            optimizer.load_state_dict(earlier.state_dict())
            return optimizer
        case _:
            return torch.optim.AdamW(model.parameters(), lr=0.05)


class Orthogonal(torch.optim.Optimizer):
    """As Muon: steps along the nearest orthogonal matrix.  Its states have the parameters' shapes,
    and its class is no name that anyone knows."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    u, _, v = torch.linalg.svd(p.grad.reshape(len(p), -1), full_matrices=False)
                    p.sub_(group["lr"] * (u @ v).reshape(p.shape))


@pytest.mark.parametrize(("kind", "what", "message"), [
    (ShardedTied, "torch's clip", r"gradients that ranks hold copies of .*bias.*model.cli"),
    (AllCut, "torch's clip", r"multiplied their gradients by different numbers.*model\.clip_grad"),
    (ShardedTied, "own data", r"gradients that ranks hold copies of differ.*: layers\.0\.bias\."),
    (ShardedTied, "own weight", r"parameters and buffers that ranks .*: layers\.0\.bias\."),
    (ShardedTied, "late", r"parameters and buffers that ranks .*: layers\.0\.bias\."),
    (Whole, "own buffer", r"parameters and buffers that ranks hold copies of .*: shift\."),
    (ShardedTied, "skips", "some ranks step their optimizer and others do not"),
    (ShardedTied, "adafactor", r"Adafactor can't step `unused`.*model\.optimizer\(\)"),
    (ShardedTied, "muon", r"Orthogonal can't step `unused`, of which each rank holds a part"),
    (ShardedTied, "states", r"keeps `exp_avg` of shape \(4,\) for unused.*model\.load_checkpoint"),
])  # fmt: skip
def test_loops_that_drift_are_stopped(
    pool: Pool, kind: type[ShardedModule], what: str, message: str
) -> None:
    with pytest.raises(RankError, match=message):
        pool(4).run(loop, kind, what)


@pytest.mark.parametrize(("kind", "what"), [
    (ShardedTied, "clip"), (AllCut, "clip"), (ShardedTied, "clip by value"), (AllCut, "fused"),
    (ShardedTied, "foreach"), (Whole, "adafactor"), (Whole, "muon"), (Whole, "torch's clip"),
])  # fmt: skip
def test_loops_that_are_right_go_on(pool: Pool, kind: type[ShardedModule], what: str) -> None:
    """With the losses of one process."""
    (alone,) = pool(1).run(loop, Alone, what)
    for losses in pool(4).run(loop, kind, what):
        assert losses == pytest.approx(alone, rel=1e-7), what


def one(kind: type[torch.optim.Optimizer], **options: Any) -> str:
    p = torch.nn.Parameter(torch.ones(4, 4))
    return not_elementwise(kind([p], **options))


def test_which_optimizers_are_elementwise() -> None:
    names = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "NAdam", "RAdam", "RMSprop", "Adamax")
    for name in (*names, "ASGD", "Rprop"):
        assert not one(getattr(torch.optim, name), lr=0.0), name
    assert not one(torch.optim.AdamW, lr=torch.tensor(0.1), amsgrad=True)
    for name in ("Adafactor", "LBFGS", "Muon"):
        if hasattr(torch.optim, name):
            assert one(getattr(torch.optim, name), lr=0.1), name
    assert one(Orthogonal)
