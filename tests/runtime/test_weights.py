"""A block's weights move together, ahead of use; values and gradients are those of one rank."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.compat.torch import backward_number
from shardwright.runtime import RankPool, Weight, count_collectives
from tests.runtime.stacked import ROWS, WIDTH, expected, layer, stacked, start, state

Pool = Callable[[int], RankPool]
N = len(ROWS)
FSDP, COPY = Weight("S0", "V"), Weight("R", "V")
Row = tuple[int, ...]


def train(
    mesh: dict[str, int], big: Weight, small: Weight, how: str = "", frozen: tuple[int, ...] = ()
) -> tuple[Tensor, dict[str, Tensor | None], dict[str, int]]:
    """Loss, whole gradients and number of collectives of a second step."""
    run = recomputed if how == "recompute" else in_order
    model = stacked(mesh, big, small, frozen=frozen, run=run)
    share = prod(n for n, s in zip(mesh.values(), big.used.split(","), strict=True) if s == "V")
    with torch.autograd.set_detect_anomaly(how == "anomaly"):
        for _ in range(2):
            model.zero_grad()
            with count_collectives() as counter:
                loss = model(start()).square().sum()
                (loss / share).backward(retain_graph=how == "twice")
            if how == "twice":
                model.zero_grad()
                (loss / share).backward()
    calls: dict[str, int] = {}
    for key, count in counter.counts.items():
        name = f"{key.op} {key.phase}"
        calls[name] = calls.get(name, 0) + count.calls
    return loss.detach(), model.full_gradients(), calls


def in_order(model: Any, h: Tensor) -> Tensor:
    for each in model.layers:
        h = each(h)
    return h


def recomputed(model: Any, h: Tensor) -> Tensor:
    for each in model.layers:
        h = model.recompute(each, h)
    return h


def check(
    results: list[tuple[Tensor, dict[str, Tensor | None], dict[str, int]]],
    frozen: tuple[int, ...] = (),
) -> None:
    loss, gradients = expected(frozen)
    for got, found, _ in results:
        torch.testing.assert_close(got, loss, rtol=1e-12, atol=1e-12)
        for name, want in gradients.items():
            if want is None:
                assert found[name] is None, name
            else:
                torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12, msg=name)


# Ranks, how matrices and vectors are stored and used, and the collectives of a step
WAYS: dict[str, tuple[dict[str, int], Weight, Weight, dict[str, int]]] = {
    "fsdp": (
        {"x": 2}, FSDP, FSDP,
        # the head, and each layer's both; the first layer's input needs no gradient
        {"all_gather forward": N + 1, "all_gather backward": N + 1,
         "reduce_scatter backward": N + 1},
    ),
    "fsdp along the other dim": (
        {"x": 3}, Weight("S1", "V"), FSDP,
        {"all_gather forward": N + 1, "all_gather backward": N + 1,
         "reduce_scatter backward": N + 1},
    ),
    "ddp": ({"x": 2}, COPY, COPY, {"all_reduce backward": N + 1}),
    "both": (
        {"x": 2}, FSDP, COPY,
        {"all_gather forward": N + 1, "all_gather backward": N, "reduce_scatter backward": N + 1,
         "all_reduce backward": N},
    ),
    "uneven": (
        {"x": 4}, FSDP, FSDP,
        {"all_gather forward": N + 1, "all_gather backward": N + 1,
         "reduce_scatter backward": N + 1},
    ),
    "sharded in copies": (
        {"dp": 2, "x": 2}, Weight("R,S0", "V,V", ("V,S0",)), Weight("R,R", "V,V"),
        # gradients of matrices are scattered and then added up over dp, of vectors over both
        {"all_gather forward": N + 1, "all_gather backward": N, "reduce_scatter backward": N + 1,
         "all_reduce backward": 2 * N + 1},
    ),
    "one after the other": (
        {"x": 2, "y": 2}, Weight("S0,S0", "V,V", ("S0,V",)), Weight("R,S0", "V,V", ("R,V",)),
        # over y both, over x the matrices alone; gradients of vectors are added up there.  The
        # first layer's matrix is not needed again, as the input has no gradient
        {"all_gather forward": 2 * N + 2, "all_gather backward": 2 * N + 1,
         "reduce_scatter backward": 2 * N + 2, "all_reduce backward": N},
    ),
    "both axes at once": (
        {"x": 2, "y": 2}, Weight("S0,S0", "V,V"), Weight("S0,R", "V,V", ("V,R",)),
        {"all_gather forward": 2 * N + 1, "all_gather backward": 2 * N,
         "reduce_scatter backward": 2 * N + 1, "all_reduce backward": N},
    ),
    "to another dim, and back to be gathered": (
        {"x": 2, "y": 2}, Weight("S0,S0", "V,V", ("S0,S1", "V,S1")), Weight("R,R", "V,V"),
        {"all_to_all forward": N + 1, "all_gather forward": 2 * N + 2,
         "all_to_all backward": 2 * N + 1, "all_gather backward": 2 * N,
         "reduce_scatter backward": 2 * N + 2, "all_reduce backward": N},
    ),
    "a gradient that is whole": (
        {"x": 2}, Weight("S0", "R"), COPY,
        {"all_gather forward": N + 1, "all_gather backward": N, "all_reduce backward": N},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_right_and_moves_what_it_must_together(pool: Pool, name: str) -> None:
    mesh, big, small, calls = WAYS[name]
    results = pool(prod(mesh.values())).run(train, mesh, big, small)
    if name != "a gradient that is whole":  # there vectors' copies are added up, matrices' not
        check(results)
    assert [counted for _, _, counted in results] == [calls] * len(results)


@pytest.mark.parametrize("how", ["anomaly", "twice", "recompute"])
@pytest.mark.parametrize("name", ["both", "one after the other"])
def test_anomaly_mode_a_second_backward_and_recomputation(pool: Pool, how: str, name: str) -> None:
    mesh, big, small, _ = WAYS[name]
    check(pool(prod(mesh.values())).run(train, mesh, big, small, how))


@pytest.mark.parametrize("how", ["", "recompute"])
def test_frozen_parameters(pool: Pool, how: str) -> None:
    check(pool(2).run(train, {"x": 2}, FSDP, COPY, how, (1, 4)), (1, 4))


def late(seed: int) -> list[tuple[float, list[tuple[str, str, int]]]]:
    """Loss and calls of three recomputed steps, in which each rank is late at times of its own and
    collects garbage when it likes: what is moved must depend on neither."""
    rng = random.Random(100 * seed + dist.get_rank())
    before = gc.get_threshold()
    gc.set_threshold(rng.choice([5, 50, 100_000]))

    def nap(_: object = None) -> None:
        time.sleep(rng.choice([0.0, 0.0, 0.004 * rng.random()]))

    def run(model: Any, h: Tensor) -> Tensor:
        for each in model.layers:
            h = model.recompute(each, h)
            h.register_hook(nap)
        return h

    mesh, big, small, _ = WAYS["one after the other"]
    model = stacked(mesh, big, small, run=run, seen=nap)
    found: list[tuple[float, list[tuple[str, str, int]]]] = []
    for _ in range(3):
        model.zero_grad()
        with count_collectives() as counter:
            loss = model(start()).square().sum()
            nap()
            (loss / 4).backward()
        calls = sorted((k.op, str(k.phase), c.calls) for k, c in counter.counts.items())
        found.append((loss.item(), calls))
    gc.set_threshold(*before)
    return found


@pytest.mark.slow
def test_recomputed_layers_on_ranks_that_are_late(pool: Pool) -> None:
    for seed in range(20):
        first, *others = pool(4).run(late, seed)
        assert all(each == first for each in others) and first[0][1] == first[2][1]


def follow(kind: str) -> tuple[list[Row], list[Row]]:
    """When each layer begins to run, gathers so far; when its backward begins, gathers and
    reduce-scatters of backward so far."""
    forward: list[Row] = []
    backward: list[Row] = []

    def calls(op: str, phase: Any) -> int:
        return counting.calls(op, phase=phase)

    def seen(index: int) -> None:
        if backward_number() < 0:
            forward.append((index, calls("all_gather", "forward")))

    def run(model: Any, h: Tensor) -> Tensor:
        for index, each in enumerate(model.layers):
            h = model.recompute(each, h) if kind == "recompute" else each(h)

            def watch(_: Tensor, index: int = index) -> None:
                again = "forward" if kind == "recompute" else "backward"
                gathers = calls("all_gather", again) - (N + 1 if kind == "recompute" else 0)
                backward.append((index, gathers, calls("reduce_scatter", "backward")))

            h.register_hook(watch)
        return h

    model = stacked({"x": 2}, FSDP, FSDP, run=run, seen=seen)
    with count_collectives() as counting:
        model(start()).square().sum().backward()
    return forward, backward


def test_the_next_unit_is_on_its_way(pool: Pool) -> None:
    for forward, backward in pool(2).run(follow, "kept"):
        # while a layer runs it and the next are there or coming, the head behind the last layer
        assert forward == [(i, i + 2) for i in range(N)]
        # the head and the last layer came before; each layer brings the one before it
        behind = [(N - 1 - k, min(k + 2, N + 1), k + 1) for k in range(N)]
        assert [(i, g) for i, g, _ in backward] == [(i, g) for i, g, _ in behind]
        # a unit's gradients leave when all of them are there
        assert [s for _, _, s in backward] == list(range(1, N + 1))


def test_recomputed_layers_come_in_reverse(pool: Pool) -> None:
    for _, backward in pool(2).run(follow, "recompute"):
        assert [(i, g) for i, g, _ in backward] == [
            (N - 1, 0), *((N - 1 - k, k + 1) for k in range(1, N))
        ]  # fmt: skip


def without_gradient() -> tuple[Tensor, int]:
    model = stacked({"x": 2}, FSDP, COPY)
    with torch.no_grad(), count_collectives() as counter:
        return model(start()).square().sum(), counter.calls("all_gather")


def test_without_gradient(pool: Pool) -> None:
    for loss, calls in pool(2).run(without_gradient):
        torch.testing.assert_close(loss, expected()[0], rtol=1e-12, atol=1e-12)
        assert calls == N + 1


def unreached() -> int:
    """Gathers in backward where half of the layers serve an output without loss."""

    def run(model: Any, h: Tensor) -> Any:
        a = b = h.requires_grad_()
        for i, each in enumerate(model.layers):
            if i % 2:
                a = each(a)
            else:
                b = each(b)
        return a, b

    model = stacked({"x": 2}, FSDP, COPY, run=run)
    with count_collectives() as counter:
        model(start())[0].sum().backward()
    return counter.calls("all_gather", phase="backward")


def test_backward_brings_what_a_gradient_reaches(pool: Pool) -> None:
    assert pool(2).run(unreached) == [N // 2] * 2


def second_derivative() -> Tensor:
    model: Any = stacked({"x": 2}, FSDP, COPY)
    w = model.layers[0].w
    loss = model(start()).square().sum() / 2
    (first,) = torch.autograd.grad(loss, w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    return model.mesh["x"].all_gather(second, 0)


def test_second_derivative(pool: Pool) -> None:
    whole = {name: t.requires_grad_() for name, t in state().items()}
    h = start()
    for i in range(N):
        h = layer(h, whole[f"layers.{i}.w"], whole[f"layers.{i}.scale"])
    loss = torch.sin(h @ whole["head"]).square().sum()
    (first,) = torch.autograd.grad(loss, whole["layers.0.w"], create_graph=True)
    (want,) = torch.autograd.grad(first.sum(), whole["layers.0.w"])
    for got in pool(2).run(second_derivative):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def failing(kind: str) -> str:
    """The message of an error in forward; what is there after it is what was there before."""

    def run(model: Any, h: Tensor) -> Any:
        for each in model.layers[: N // 2]:
            h = each(h)
        if kind == "raise":
            raise ValueError("the user's own")
        return (h,)

    model: Any = stacked({"x": 2}, FSDP, COPY, run=run)
    before = [tuple(p.shape) for p in model.parameters()]
    with pytest.raises((ValueError, RuntimeError)) as error:
        model(start())
    assert before == [tuple(model.get_parameter(n).shape) for n, _ in model.named_parameters()]
    assert model.mesh["x"].all_gather(model.head, 0).equal(state()["head"])
    return str(error.value)


def test_an_error_in_forward_leaves_nothing_under_way(pool: Pool) -> None:
    assert pool(2).run(failing, "raise") == ["the user's own"] * 2
    for message in pool(2).run(failing, "stop early"):
        assert "run every layer in order" in message


class Adapted(nn.Module):
    """What a user may wrap a weight in after planning."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(2, WIDTH))


def changed(kind: str) -> str:
    model: Any = stacked({"x": 1}, FSDP, COPY)
    if kind == "new":
        model.layers[1].lora_A = nn.Parameter(torch.zeros(2, WIDTH))
    elif kind == "swapped":
        model.layers[1] = Adapted()
    elif kind == "gone":
        del model.layers[1].scale
    with pytest.raises(ValueError, match="change the original model") as error:
        model(start())
    return str(error.value).partition(":\n  ")[2]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("new", "`layers.1.lora_A` is new"),
        ("swapped", "`layers.1.lora_A` is new\n  `layers.1` is a new Adapted"),
        ("gone", "`layers.1.scale` is gone"),
    ],
)
def test_changes_after_planning_are_refused_by_name(kind: str, message: str) -> None:
    assert changed(kind) == message


def compiled() -> tuple[Tensor, dict[str, Tensor | None], dict[str, int]]:
    model: Any = stacked({"x": 2}, FSDP, COPY)
    for each in model.layers:
        each.compile(backend="aot_eager", fullgraph=True)
    with count_collectives() as counter:
        loss = model(start()).square().sum()
        (loss / 2).backward()
    return loss.detach(), model.full_gradients(), {"again": counter.calls(phase="backward")}


@pytest.mark.slow
def test_layers_may_be_compiled(pool: Pool) -> None:
    check(pool(2).run(compiled))


def test_no_weight_comes_by_way_of_partial_sums() -> None:
    with pytest.raises(ValueError, match="by way of partial sums"):
        stacked({"x": 1}, Weight("R", "S0", ("P",)), COPY)
