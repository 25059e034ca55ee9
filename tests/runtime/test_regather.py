"""Gathered parameters are freed in forward and come back in backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.runtime import Mesh, RankError, RankPool, count_collectives, regathering

Pool = Callable[[int], RankPool]
LAYERS, WIDTH = 4, 7  # 7 rows over 2 x 2 ranks: uneven on both axes


@dataclass(frozen=True)
class Report:
    alive: int  # gathered parameters still in memory when forward is done
    most_alive_in_backward: int
    error: float  # largest of all gradients
    output_freed: bool
    calls: tuple[int, int, int]  # gathers in forward, gathers and reduce-scatters in backward


def use(kind: str, x: Tensor, w: Tensor) -> Tensor:
    """One layer; `w` (WIDTH, WIDTH) is used as autograd meets it in models."""
    if kind == "linear":
        return torch.tanh(F.linear(x, w))
    if kind == "transposed view":
        return torch.tanh(x @ w.view(-1).view(WIDTH, WIDTH).t())
    if kind == "twice":
        return torch.tanh(x @ w) + torch.sin(x @ w.t())
    return torch.exp(0.1 * x * w[0]) * torch.rsqrt(1 + w[1:2] ** 2)  # rows, saved as outputs too


def train(kind: str) -> Report:
    gc.disable()  # what is freed must be freed by counting references
    mesh = Mesh.create({"dp": 2, "tp": 2})
    dp, tp = mesh.axes
    torch.manual_seed(0)
    full = [torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    shards = [tp.shard(dp.shard(w, 0), 0).requires_grad_() for w in full]
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    gathered: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0

    def count() -> int:
        return sum(ref() is not None for ref in gathered)

    def watch(_: Tensor) -> None:
        nonlocal most
        most = max(most, count())

    h = x
    with count_collectives() as counter:
        with regathering(mesh):
            for shard in shards:
                half = tp.gather_parameter(shard, 0, -(-WIDTH // 2))
                whole = dp.gather_parameter(half, 0, WIDTH)
                gathered += [weakref.ref(w.untyped_storage()) for w in (half, whole)]
                h = use(kind, h, whole)
                h.register_hook(watch)
                del half, whole
            alive = count()
        h.sum().backward()
    calls = [
        counter.calls(op, phase=phase)
        for op, phase in (
            ("all_gather", "forward"),
            ("all_gather", "backward"),
            ("reduce_scatter", "backward"),
        )
    ]
    wholes = [w.clone().requires_grad_() for w in full]
    want = x
    for w in wholes:
        want = use(kind, want, w)
    (4 * want.sum()).backward()  # R -> V: the four ranks' gradients are added up
    error = 0.0
    for shard, w in zip(shards, wholes, strict=True):
        assert shard.grad is not None and w.grad is not None
        grad = dp.all_gather(tp.all_gather(shard.grad, 0, -(-WIDTH // 2)), 0, WIDTH)
        error = max(error, (grad - w.grad).abs().max().item())
    output = weakref.ref(h.untyped_storage())
    del h
    gc.enable()
    return Report(alive, most, error, output() is None, (calls[0], calls[1], calls[2]))


@pytest.mark.parametrize("kind", ["linear", "transposed view", "twice", "elementwise"])
def test_parameters_are_freed_and_gathered_again(pool: Pool, kind: str) -> None:
    for report in pool(4).run(train, kind):
        assert report.alive == 0 and report.most_alive_in_backward == 0
        assert report.error < 1e-12
        assert report.output_freed
        forward, again, scattered = report.calls
        assert forward == scattered == 2 * LAYERS
        # The first layer's weight is not needed where its input has no gradient.
        assert 2 * (LAYERS - 1) <= again <= 6 * LAYERS


def peak() -> tuple[int, int]:
    """(bytes saved for backward with regathering, without) of 4 gathered 256 x 256 weights."""
    mesh = Mesh.create({"tp": 2})
    tp = mesh["tp"]
    shards = [torch.randn(128, 256, requires_grad=True) for _ in range(4)]

    def saved() -> int:
        seen: set[int] = set()
        total = 0

        def note(x: Tensor) -> Tensor:
            nonlocal total
            storage = x.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes() >= 256 * 256 * 4:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
            return x

        h = torch.ones(2, 256)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            if nested:
                with regathering(mesh):
                    for shard in shards:
                        h = h @ tp.gather_parameter(shard, 0)
            else:
                for shard in shards:
                    h = h @ tp.gather_parameter(shard, 0)
        h.sum().backward()
        return total

    nested = True
    with_it = saved()
    nested = False
    return with_it, saved()


def test_nothing_of_a_parameters_size_is_saved(pool: Pool) -> None:
    for with_it, without in pool(2).run(peak):
        assert with_it == 0 and without >= 3 * 256 * 256 * 4


def change_in_place() -> None:
    mesh = Mesh.create({"tp": 2})
    x = torch.ones(3, requires_grad=True)
    with regathering(mesh):
        y = x * 2
        z = y.pow(2).sum()
        y.add_(1)
    z.backward()


def test_a_saved_tensor_that_is_changed_in_place_is_refused(pool: Pool) -> None:
    message = r"of shape \(3,\) that backward needs was changed in place"
    with pytest.raises(RankError, match=message):
        pool(2).run(change_in_place)


def share() -> tuple[int, int]:
    """Gathers in backward when one node saves the same parameter twice; entries left after."""
    mesh = Mesh.create({"tp": 2})
    tp = mesh["tp"]
    shard = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    with regathering(mesh):
        memory = mesh.parameter_memory
        assert memory is not None
        w = tp.gather_parameter(shard, 0)
        y = w @ w.t()
        del w
        left = len(memory.recipes)
    with count_collectives() as counter:
        y.sum().backward()
    return counter.calls("all_gather", phase="backward"), left


def test_uses_in_one_node_share_one_gather(pool: Pool) -> None:
    assert pool(2).run(share) == [(1, 0)] * 2
