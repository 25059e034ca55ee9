"""Models whose next forward pass would be another one than that which was captured."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardwright.ir.capture.capture import CaptureError, capture, capture_folded

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
    (counted, "`passes` "), (alternating, "`passes` "), (switched_late, "`passes` "),
    (with_the_last, "`last` "), (with_all_before, "`log` "), (noise_once, "`table` "),
    (of_a_part, r"`up\.scale` "),
])  # fmt: skip
def test_what_the_next_pass_reads_is_refused(run: Forward, names: str) -> None:
    said = (
        rf"Net changes {names}\(tests/ir/test_remembered.py:\d+\) in its forward pass, and the next"
        " one computes with what is left"
    )
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
    with pytest.raises(CaptureError, match=f"Net draws with {whose}.* while it runs"):
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


# -- state outside of modules

_count = 0
SEEN: list[float] = []
STATE = SimpleNamespace(step=0)
TABLES: dict[int, Tensor] = {}
TOTALS = np.zeros(1)
LAST: dict[str, Tensor] = {}
HERE, HELD = threading.local(), ContextVar[int]("HELD", default=0)
TURNS = itertools.count()


class Progress:
    """An object of the user's own, with a slot."""

    __slots__ = ("step",)

    def __init__(self) -> None:
        self.step = 0


class Counting(Net):
    """A class that counts the passes of all its objects."""

    calls = 0


def by_a_global(net: Net, x: Tensor) -> Tensor:
    global _count
    _count += 1
    return net.up(x) * _count


def by_a_function_of_a_global(net: Net, x: Tensor) -> Tensor:
    def scale() -> float:
        SEEN.append(0.5)
        return float(sum(SEEN))

    return net.up(x) * scale()


def by_a_global_object(net: Net, x: Tensor) -> Tensor:
    STATE.step += 1
    return net.up(x) if STATE.step < 10 else net.down(x)


def by_an_array(net: Net, x: Tensor) -> Tensor:
    TOTALS[0] += 1
    return net.up(x) * float(TOTALS[0])


def by_the_last_tensor(net: Net, x: Tensor) -> Tensor:
    y = net.up(x)
    before = LAST.get("y", y)
    LAST["y"] = y.detach()
    return y + before


def by_a_default(net: Net, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(1)
    return net.up(x) * len(seen)


def by_itself(net: Any, x: Tensor) -> Tensor:
    by_itself.calls = getattr(by_itself, "calls", 0) + 1  # pyright: ignore
    return net.up(x) * by_itself.calls  # pyright: ignore


def by_its_class(net: Any, x: Tensor) -> Tensor:
    type(net).calls += 1
    return net.up(x) * type(net).calls


def by_an_object(net: Any, x: Tensor) -> Tensor:
    net.table.step += 1
    return net.up(x) / net.table.step


def by_the_thread(net: Net, x: Tensor) -> Tensor:
    HERE.passes = getattr(HERE, "passes", 0) + 1
    return net.up(x) * HERE.passes


def by_the_context(net: Net, x: Tensor) -> Tensor:
    HELD.set(HELD.get() + 1)
    return net.up(x) * HELD.get()


def with_a_list(passes: list[int], net: Net, x: Tensor) -> Tensor:
    passes.append(1)
    return net.up(x) * len(passes)


def by_an_iterator(net: Net, x: Tensor) -> Tensor:
    return net.up(x) * next(TURNS)


def by_a_generator(net: Any, x: Tensor) -> Tensor:
    return net.up(x) * next(net.log)


def by_the_clock(net: Net, x: Tensor) -> Tensor:
    return net.up(x) * time.time()


def _closed() -> Forward:
    passes = 0

    def by_a_cell(net: Net, x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return net.up(x) * passes

    return by_a_cell


@functools.cache
def table(tokens: int) -> Tensor:
    return torch.arange(tokens, dtype=torch.float32)[:, None]


def only_logged(net: Net, x: Tensor) -> Tensor:
    global _count
    began = time.time()
    _count += 1
    y = net.up(x)
    LAST["mean"] = y.detach().mean()
    TABLES.setdefault(x.shape[1], torch.arange(x.shape[1], dtype=x.dtype)[:, None])
    STATE.step, SEEN[:] = 3, [time.time() - began]
    return y + TABLES[x.shape[1]] + LAST["mean"] + table(x.shape[1])


CHANGES, DRAWS = r"changes `{}` \(.*test_remembered.py:\d+\) in its", r"draws with `{}` \(.*:\d+\)"


@pytest.mark.parametrize(("run", "words"), [
    (by_a_global, CHANGES.format("_count")),
    (by_a_function_of_a_global, CHANGES.format("SEEN")),
    (by_a_global_object, CHANGES.format("STATE.step")),
    (by_an_array, CHANGES.format("TOTALS")),
    (by_the_last_tensor, CHANGES.format("LAST")),
    (by_a_default, CHANGES.format("seen of by_a_default")),
    (by_itself, CHANGES.format("by_itself.calls")),
    (by_its_class, CHANGES.format("Counting.calls")),
    (by_an_object, CHANGES.format("table.step")),
    (_closed(), CHANGES.format("passes")),
    (by_the_thread, CHANGES.format("HERE.passes")),
    (by_the_context, "changes `HELD.value` in its"),
    (functools.partial(with_a_list, []), "changes `args of run` in its"),
    (by_an_iterator, DRAWS.format("TURNS")),
    (by_a_generator, DRAWS.format("log")),
    (by_the_clock, "another answer each time"),
])  # fmt: skip
def test_state_outside_of_modules_is_refused(run: Forward, words: str) -> None:
    net: Any = Counting(run)
    net.table, net.log = Progress(), (n for n in range(9))
    with pytest.raises(CaptureError, match=words):
        capture(net, {"x": torch.zeros(2, 3, 4)}, training=True)
    assert (_count, SEEN, STATE.step, TOTALS[0], LAST, Counting.calls) == (0, [], 0, 0, {}, 0)
    assert net.table.step == 0 and not (by_a_default.__defaults__ or ([1],))[0]
    assert not vars(HERE) and not HELD.get() and getattr(run, "args", ([],)) == ([],)


def test_layers_that_count_together() -> None:
    """Of which only some are captured."""

    class Layer(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Layer.calls += 1
            return x * Layer.calls

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.raises(CaptureError, match=CHANGES.format("Layer.calls")):
        capture_folded(Deep(), {"x": torch.zeros(2, 3, 4)}, training=True)
    assert Layer.calls == 0


def test_state_outside_that_nothing_reads_is_not() -> None:
    capture(Net(only_logged), {"x": torch.zeros(2, 3, 4)}, training=True)
    assert (_count, SEEN, STATE.step, LAST) == (0, [], 0, {})
    assert type(table(3)) is Tensor  # and nothing without values is remembered
