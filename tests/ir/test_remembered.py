"""Models whose next forward pass would be another one than that which was captured."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import CaptureError, capture

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Attributes of all kinds, and a function that may change them."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.run = run
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.passes, self.most = 0, 0
        self.last: Any = None
        self.log: list[Tensor] = []
        self.table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def counted(net: Net, x: Tensor) -> Tensor:
    net.passes += 1
    return net.up(x) * min(1.0, net.passes / 10)


def alternating(net: Net, x: Tensor) -> Tensor:
    net.passes += 1
    return net.up(x) if net.passes % 2 else net.down(x)


def switched_late(net: Net, x: Tensor) -> Tensor:
    net.passes += 1
    return net.up(x) if net.passes < 1000 else net.down(x)


def with_the_last(net: Net, x: Tensor) -> Tensor:
    y = net.up(x)
    before, net.last = net.last, y.detach()
    return y if before is None else y + before


def with_all_before(net: Net, x: Tensor) -> Tensor:
    y = net.up(x)
    net.log.append(y.detach().mean())
    return y - torch.stack(net.log).mean()


def noise_once(net: Net, x: Tensor) -> Tensor:
    if net.table is None:
        net.table = torch.rand(x.shape)
    return net.up(x) + net.table


def of_a_part(net: Net, x: Tensor) -> Tensor:
    net.up.scale = getattr(net.up, "scale", 1.0) * 0.5  # pyright: ignore
    return net.up(x) * net.up.scale


def by_numpy(net: Net, x: Tensor) -> Tensor:
    return net.up(x) * float(np.random.rand())  # noqa: NPY002


def by_its_own(net: Any, x: Tensor) -> Tensor:
    return net.up(x) * net.log.random()


def by_its_own_of_numpy(net: Any, x: Tensor) -> Tensor:
    return net.up(x) * float(net.table.random())


def logged(net: Net, x: Tensor) -> Tensor:
    net.passes += 1
    net.last = net.up(x)
    net.log.append(net.last.detach().mean())
    return net.down(net.last)


def tables(net: Net, x: Tensor) -> Tensor:
    if x.shape[1] > net.most:
        net.most = x.shape[1]
        net.table = torch.arange(net.most, dtype=x.dtype)[:, None].cos()
    return net.up(x) * net.table[: x.shape[1]]


@pytest.mark.parametrize(("run", "names"), [
    (counted, "`passes`"), (alternating, "`passes`"), (switched_late, "`passes`"),
    (with_the_last, "`last`"), (with_all_before, "`log`"), (noise_once, "`table`"),
    (of_a_part, r"`up\.scale`"),
])  # fmt: skip
def test_what_the_next_pass_reads_is_refused(run: Forward, names: str) -> None:
    said = f"Net changes {names} in its forward pass, and the next one computes with what is left"
    net = Net(run)
    held = dict(vars(net))
    with pytest.raises(CaptureError, match=said):
        capture(net, {"x": torch.zeros(2, 3, 4)}, training=True)
    assert vars(net) == held and not hasattr(net.up, "scale")  # as it was


@pytest.mark.parametrize("run", [logged, tables])
@pytest.mark.filterwarnings("error")
def test_what_it_does_not_read_is_not(run: Forward) -> None:
    net = Net(run)
    capture(net, {"x": torch.zeros(2, 3, 4)}, training=True)
    assert net.last is None and net.table is None and net.passes == 0 and not net.log


@pytest.mark.parametrize(("run", "whose"), [
    (by_numpy, "numpy's `random`"), (by_its_own, "`log`"), (by_its_own_of_numpy, "`table`"),
])  # fmt: skip
def test_draws_that_no_graph_has_are_refused(run: Forward, whose: str) -> None:
    net: Any = Net(run)
    net.log, net.table = random.Random(0), np.random.default_rng(0)
    with pytest.raises(CaptureError, match=f"Net draws with {whose} while it runs"):
        capture(net, {"x": torch.zeros(2, 3, 4)}, training=True)


def test_hooks_that_the_first_pass_installs_stay() -> None:
    """As transformers does to record hidden states, and marks that it did."""

    def recorded(net: Any, x: Tensor) -> Tensor:
        if not getattr(net, "installed", False):
            net.up.register_forward_hook(lambda module, given, result: result * 2)
            net.installed = True
        return net.up(x)

    net: Any = Net(recorded)
    graphs = [capture(net, {"x": torch.zeros(2, 3, 4)}, training=True) for _ in range(3)]
    assert [node.op for node in graphs[0].nodes] == ["aten.linear.default", "aten.mul.Tensor"]
    assert graphs[0] == graphs[1] == graphs[2]
    assert net.installed
