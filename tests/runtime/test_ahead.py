"""Parameters are on their way before they are used; values and gradients are those of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shardwright.runtime import Gather, Mesh, RankPool, count_collectives, regathering
from shardwright.runtime.gathering.ahead import gathering_ahead
from shardwright.runtime.mesh.collectives import Axis

Pool = Callable[[int], RankPool]
WIDTH = 6
ROWS = (6, 12, 6, 24, 6, 6)  # of the weights: each maps WIDTH numbers to WIDTH again


@dataclass(frozen=True)
class Result:
    loss: Tensor
    gradients: tuple[Tensor, ...]
    started_early: int  # gathers that were under way when their use came
    gathers: tuple[int, int]  # calls in forward and backward
    most_ahead: int  # bytes under way in forward, after each use


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) * 0.3 for n in ROWS]


def layer(h: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(h @ w.t()).unflatten(1, (-1, WIDTH)).sum(1)


def start() -> Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH, dtype=torch.float64).view(3, WIDTH)


def expected(frozen: Iterable[int] = (), order: Iterable[int] = range(len(ROWS))) -> list[Tensor]:
    """The loss, then the gradients of all weights that are trained."""
    whole = [w.requires_grad_(i not in frozen) for i, w in enumerate(weights())]
    h = start()
    for i in order:
        h = layer(h, whole[i])
    loss = h.square().sum()
    loss.backward()
    return [loss.detach(), *(w.grad for w in whole if w.grad is not None)]


def train(
    named: tuple[int, ...], used: tuple[int, ...], frozen: tuple[int, ...] = (), how: str = ""
) -> list[Result]:
    """Steps over the weights in the order `used`, the order `named` being known before."""
    mesh = Mesh.create({"x": torch.distributed.get_world_size()})
    x = mesh["x"]
    shards = [x.shard(w, 0).requires_grad_(i not in frozen) for i, w in enumerate(weights())]
    early, most = 0, 0

    def use(i: int) -> Tensor:
        nonlocal early, most
        assert mesh.ahead is not None
        ready = mesh.ahead._ready  # pyright: ignore[reportPrivateUsage]
        early += (id(shards[i]), "x", 0) in ready
        whole = x.gather_parameter(shards[i], 0)
        most = max(most, sum(e.gathering.nbytes for e in ready.values()))
        return whole

    results: list[Result] = []
    for _ in range(2):
        early, most = 0, 0
        for shard in shards:
            shard.grad = None
        with (
            count_collectives() as counter,
            torch.autograd.set_detect_anomaly(how == "anomaly"),
        ):
            names = [Gather(x, shards[i], 0) for i in named]
            with regathering(mesh), gathering_ahead(mesh, names):
                h = start()
                for i in used:
                    h = layer(h, use(i))
                loss = h.square().sum()
            (loss / x.size).backward(retain_graph=how == "twice")
            if how == "twice":
                for shard in shards:
                    shard.grad = None
                (loss / x.size).backward()
        gradients = [x.all_gather(s.grad, 0) for s in shards if s.grad is not None]
        calls = [counter.calls("all_gather", phase=p) for p in ("forward", "backward")]
        results.append(Result(loss.detach(), tuple(gradients), early, (calls[0], calls[1]), most))
    return results


def check(results: list[list[Result]], want: list[Tensor]) -> None:
    for steps in results:
        for result in steps:
            got = [result.loss, *result.gradients]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for a, b in zip(steps[0].gradients, steps[1].gradients, strict=True):
            assert torch.equal(a, b)  # every step gives the same bits


EVERY = tuple(range(len(ROWS)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_but_the_first_are_on_their_way(pool: Pool, ranks: int) -> None:
    results = pool(ranks).run(train, EVERY, EVERY)
    check(results, expected())
    row = WIDTH * 8
    for first, _ in results:
        assert first.started_early == len(ROWS) - 1
        # The first weight's product needs no weight in backward, for its input has no gradient.
        assert first.gathers == (len(ROWS), len(ROWS) - 1)
        assert first.most_ahead <= 2 * max(ROWS) * row  # the one just used, and one beyond


@pytest.mark.parametrize("how", ["anomaly", "twice"])
def test_anomaly_mode_and_a_second_backward(pool: Pool, how: str) -> None:
    check(pool(2).run(train, EVERY, EVERY, (), how), expected())


@pytest.mark.parametrize(
    ("named", "used"),
    [
        ((), EVERY),  # nothing is known
        ((0, 2, 4), EVERY),  # some are not
        (EVERY, (0, 1, 3, 2, 5, 4)),  # two change places, as arguments of one statement may
        (EVERY, (0, 1, 2)),  # the rest never comes
        ((0, 1, 0, 1, 2), (0, 1, 0, 1, 2)),  # used twice
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_any_order_is_right(pool: Pool, named: tuple[int, ...], used: tuple[int, ...]) -> None:
    check(pool(2).run(train, named, used), expected(order=used))


def test_frozen_parameters(pool: Pool) -> None:
    check(pool(2).run(train, EVERY, EVERY, (1, 4)), expected(frozen=(1, 4)))


def without_gradient() -> tuple[Tensor, int]:
    mesh = Mesh.create({"x": 2})
    x = mesh["x"]
    shards = [x.shard(w, 0).requires_grad_() for w in weights()]
    with torch.no_grad(), gathering_ahead(mesh, [Gather(x, s, 0) for s in shards]):
        h = start()
        for shard in shards:
            h = layer(h, x.gather_parameter(shard, 0))
    return h.square().sum(), 0


def test_without_gradient(pool: Pool) -> None:
    for loss, _ in pool(2).run(without_gradient):
        torch.testing.assert_close(loss, expected()[0], rtol=1e-12, atol=1e-12)


def unreached() -> int:
    """Gathers in backward where half of the parameters serve an output without loss."""
    mesh = Mesh.create({"x": 2})
    x = mesh["x"]
    shards = [x.shard(w, 0).requires_grad_() for w in weights()]
    with regathering(mesh), gathering_ahead(mesh, [Gather(x, s, 0) for s in shards]):
        a = b = start().requires_grad_()
        for i, shard in enumerate(shards):
            if i % 2:
                a = layer(a, x.gather_parameter(shard, 0))
            else:
                b = layer(b, x.gather_parameter(shard, 0))
    with count_collectives() as counter:
        a.sum().backward()
    return counter.calls("all_gather", phase="backward")


def test_backward_gathers_what_a_gradient_reaches(pool: Pool) -> None:
    assert pool(2).run(unreached) == [len(ROWS) // 2] * 2


def second_derivative() -> Tensor:
    mesh = Mesh.create({"x": 2})
    x = mesh["x"]
    shard = x.shard(weights()[0], 0).requires_grad_()
    with gathering_ahead(mesh, [Gather(x, shard, 0)]):
        loss = layer(start(), x.gather_parameter(shard, 0)).square().sum() / 2
    (first,) = torch.autograd.grad(loss, shard, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), shard)
    return x.all_gather(second, 0)


def test_second_derivative(pool: Pool) -> None:
    w = weights()[0].requires_grad_()
    (first,) = torch.autograd.grad(layer(start(), w).square().sum(), w, create_graph=True)
    (want,) = torch.autograd.grad(first.sum(), w)
    for got in pool(2).run(second_derivative):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def failing() -> str:
    mesh = Mesh.create({"x": 2})
    x: Axis = mesh["x"]
    shards = [x.shard(w, 0).requires_grad_() for w in weights()]
    try:
        with gathering_ahead(mesh, [Gather(x, s, 0) for s in shards]):
            x.gather_parameter(shards[0], 0)
            raise ValueError("the user's own")
    except ValueError as error:
        assert mesh.ahead is None
        whole = x.gather_parameter(shards[1], 0)
        assert torch.equal(whole.detach(), weights()[1])
        return str(error)


def test_an_error_in_forward_leaves_nothing_under_way(pool: Pool) -> None:
    assert pool(2).run(failing) == ["the user's own"] * 2
