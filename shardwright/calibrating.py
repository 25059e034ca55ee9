"""Measures this machine's CPU ranks, and the links between them, as modules use both.

What is measured runs in all ranks at once, as in a step: operators by autograd, collectives by the
runtime's own transfers in all groups along an axis together.  A round runs everything once (what is
short, many times over), so that what else runs here meanwhile disturbs all figures alike.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from math import ceil
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .costmodel.calibration.here import (
    Attended,
    Figure,
    Found,
    Streamed,
    check_calm,
    cluster_text,
)
from .costmodel.compute import Kind
from .costmodel.memory import optimizer_step_bytes
from .facts.collectives import COLLECTIVES
from .runtime import Mesh, RankPool
from .runtime.mesh.transfers import TRANSFERS, Ranks
from .runtime.mesh.transport import post_shift, wait

MESSAGES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22)  # bytes that collectives are called with
_LOOP_S = 0.03  # what is shorter is run so long in each round
_LONG_S = 0.2  # larger messages are not sent where one takes longer
_MOST_LOOPS = 2000
_LEAST_ROUNDS = 3
_LATE, _START_S = 3.0, 120.0  # times the limit, and seconds, after which ranks are given up
_ROWS = 16  # of tensors that are cut along their columns
_PRODUCTS = (
    (64, 64, 64), (256, 256, 256), (512, 512, 512), (256, 1024, 256), (1024, 256, 256),
    (1024, 704, 256), (256, 64, 256), (1024, 1024, 1024),
)  # fmt: skip
_RATES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_STREAMS = (1 << 10, 1 << 14, 1 << 17, 1 << 19)  # numbers
_ATTENTION = ((2, 4, 64, 32), (2, 8, 128, 32), (1, 4, 512, 64))  # batch, heads, tokens, dim
_DECODE = ((1, 4, 512, 64), (4, 8, 1024, 64))

Key = TypeVar("Key")
Action = Callable[[], object]


class Told(Protocol):
    """Hears how far it is."""

    def __call__(self, step: str, done: float | None = None) -> None:
        """A step begins, or has come to `done`."""
        ...


@dataclass
class _Probes:
    """What is to be measured: one entry for each figure."""

    products: dict[tuple[int, int, int], Action] = field(default_factory=dict)
    rates: dict[str, tuple[int, Action]] = field(default_factory=dict)
    streams: dict[Kind, dict[Streamed, Action]] = field(default_factory=dict)
    attention: dict[Attended, Action] = field(default_factory=dict)
    groups: dict[tuple[int, int], dict[str, dict[int, Action]]] = field(default_factory=dict)
    beside: list[Action] = field(default_factory=list)


def calibrate(
    ranks: int | None, time_limit_s: float, most_spread: float, told: Told | None = None
) -> str | None:
    """The cluster file of this machine with so many ranks (default: one for each core), which are
    started here; or of the ranks that torchrun has started, to the first of which it is given, and
    None to the others.

    Raises ValueError where there are GPUs, or `ranks` under torchrun, BusyError where other work
    disturbs too much, TimeoutError where ranks are late.
    """
    if torch.cuda.is_available():
        raise ValueError(
            "this machine has a GPU, and ranks on CPUs are what is measured; those of GPUs are in"
            " the built-in clusters, or hide it: CUDA_VISIBLE_DEVICES='' plan calibrate ..."
        )
    if "LOCAL_WORLD_SIZE" not in os.environ:
        found = measured_alone(ranks or os.cpu_count() or 1, time_limit_s, told)
        check_calm(found, most_spread)
        return cluster_text(found)
    if ranks is not None:
        raise ValueError(
            "--ranks is for this machine alone; torchrun has started its ranks already"
        )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        hears = told if dist.get_rank() == 0 else None
        found = measured_here(int(os.environ["LOCAL_WORLD_SIZE"]), time_limit_s, hears)
        check_calm(found, most_spread)
        return cluster_text(found) if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def measured_alone(ranks: int, time_limit_s: float, told: Told | None = None) -> Found:
    """What so many ranks of this machine measure, which are started here."""
    late = _LATE * time_limit_s + _START_S
    with RankPool(ranks) as pool, _told_of_time(told, f"measure {ranks} ranks", time_limit_s):
        return pool.run(_in_a_rank, ranks, time_limit_s, timeout_s=late)[0]


@contextmanager
def _told_of_time(told: Told | None, step: str, limit_s: float) -> Generator[None]:
    """Within, `told` hears every second how much of the time has passed."""
    ended, begin = Event(), time.monotonic()

    def tell(hears: Told) -> None:
        hears(step)
        while not ended.wait(1.0):
            hears(step, min((time.monotonic() - begin) / limit_s, 1.0))

    thread = Thread(target=tell, args=(told,), daemon=True)
    if told is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if told is not None:
            thread.join()


def _in_a_rank(ranks: int, time_limit_s: float) -> Found:
    torch.set_num_threads(1)
    return measured_here(ranks, time_limit_s)


def measured_here(per_node: int, time_limit_s: float, told: Told | None = None) -> Found:
    """What the ranks of torch.distributed measure now; the same on all of them."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if per_node < 1 or ranks % per_node:
        raise ValueError(f"{ranks} ranks, {per_node} on each machine: expected as many on each")
    probes = _Probes()
    _add_computing(probes)
    probes.groups = _collectives(ranks, per_node, time_limit_s, told)
    if probes.groups:
        _add_both(probes, ranks)
    actions = list(_leaves(probes))
    rounds = iter(_rounds(actions, time_limit_s, told).T.tolist())

    def figures(of: Any) -> Any:
        """The same, figures in the place of what was run."""
        if isinstance(of, Mapping):
            return {key: figures(each) for key, each in of.items()}  # pyright: ignore[reportUnknownVariableType]
        return Figure.of(next(rounds))

    products, rates = (
        figures(probes.products),
        figures({k: a for k, (_, a) in probes.rates.items()}),
    )
    streams, attention, groups = map(figures, (probes.streams, probes.attention, probes.groups))
    three = [figures(action) for action in probes.beside]
    return Found(
        ranks, per_node, _memory_bytes(), _machine(), datetime.now().strftime("%Y-%m-%d %H:%M"),
        products, {k: (n, rates[k]) for k, (n, _) in probes.rates.items()}, streams, attention,
        groups, (three[0], three[1], three[2]) if three else None,
    )  # fmt: skip


def _leaves(probes: _Probes) -> Iterator[Action]:
    """All that is run, in the order in which figures are read."""

    def inside(of: Any) -> Iterator[Action]:
        if isinstance(of, Mapping):
            for each in of.values():  # pyright: ignore[reportUnknownVariableType]
                yield from inside(each)
        else:
            yield of

    yield from probes.products.values()
    yield from (action for _, action in probes.rates.values())
    yield from inside(probes.streams)
    yield from probes.attention.values()
    yield from inside(probes.groups)
    yield from probes.beside


# --- rounds --------------------------------------------------------------------------------------


def _rounds(actions: Sequence[Action], limit_s: float, told: Told | None) -> Any:
    """Seconds (rounds, actions) of one run each, of the slowest rank."""
    begin = time.monotonic()
    loops = [_loops(action) for action in actions]
    found: list[list[float]] = []
    while True:
        found.append([_seconds(a, n) for a, n in zip(actions, loops, strict=True)])
        passed = _slowest(time.monotonic() - begin)
        if told is not None:
            told("measure", min(passed / limit_s, 1.0))
        if len(found) >= _LEAST_ROUNDS and passed * (1 + 1 / len(found)) > limit_s:
            break
    every = torch.tensor(found, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(every, dist.ReduceOp.MAX)
    return every.numpy()


def _loops(action: Action) -> int:
    """How often an action is run for one figure; the same on all ranks."""
    action()
    return max(1, min(_MOST_LOOPS, ceil(_LOOP_S / _slowest(_seconds(action, 1)))))


def _seconds(action: Action, times: int) -> float:
    _together()
    start = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - start) / times


def _slowest(seconds: float) -> float:
    """The most of all ranks."""
    if not dist.is_initialized():
        return seconds
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


# --- computing -----------------------------------------------------------------------------------


def _add_computing(probes: _Probes) -> None:
    probes.products = {shape: _product(*shape) for shape in _PRODUCTS}
    for name, dtype in _RATES.items():
        size = 256 if dtype.itemsize == 2 else 512  # 16 bits are emulated on most CPUs
        square = torch.ones(size, size, dtype=dtype)
        probes.rates[name] = size, _run(torch.mm, square, square)
    probes.streams = {
        "memory": dict(map(_light, _STREAMS)),
        "mixed": dict(map(_norm, _STREAMS)),
        "optimizer": dict(map(_optimizer, _STREAMS[2:])),
    }
    for batch, heads, tokens, dim in _ATTENTION:
        forward, backward = _attention(batch, heads, tokens, dim)
        probes.attention[Attended(batch, heads, tokens, tokens, dim)] = forward
        probes.attention[Attended(batch, heads, tokens, tokens, dim, backward=True)] = backward
    for batch, heads, keys, dim in _DECODE:
        one, cache = torch.randn(batch, heads, 1, dim), torch.randn(2, batch, heads, keys, dim)
        probes.attention[Attended(batch, heads, 1, keys, dim)] = _run(
            F.scaled_dot_product_attention, one, *cache.unbind()
        )


def _run(fn: Callable[..., object], *args: Tensor) -> Action:
    def action() -> object:
        with torch.no_grad():
            return fn(*args)

    return action


def _product(m: int, n: int, k: int) -> Action:
    """A linear layer, forward and backward: three products of as many FLOPs."""
    x, w = torch.randn(m, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
    return _back_and_forth(lambda: F.linear(x, w), torch.randn(m, n), (x, w))


def _light(numbers: int) -> tuple[Streamed, Action]:
    """`silu(x) * y`: the kinds of light operators of a layer, read and written as they are priced.

    The product moves 3 tensors forward and 5 backward, SiLU 2 and 3.
    """
    x, y = torch.randn(2, numbers).unbind()
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    grad = torch.randn(numbers)
    action = _back_and_forth(lambda: F.silu(x) * y, grad, (x, y))
    return Streamed(13.0 * 4 * numbers, 4), action


def _norm(numbers: int) -> tuple[Streamed, Action]:
    """An RMS norm of rows of 256: 2 tensors forward, 5 backward."""
    rows = max(numbers // 256, 1)
    x = torch.randn(rows, 256, requires_grad=True)
    weight = torch.ones(256, requires_grad=True)
    grad = torch.randn(rows, 256)
    action = _back_and_forth(lambda: F.rms_norm(x, (256,), weight, 1e-5), grad, (x, weight))
    return Streamed(7.0 * 4 * rows * 256, 2), action


def _optimizer(numbers: int) -> tuple[Streamed, Action]:
    """AdamW's step, as modules make it on CPUs."""
    weight = torch.zeros(numbers // 256, 256, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    moved = optimizer_step_bytes(weight.numel(), 4, "adamw")
    return Streamed(float(moved), 1), torch.optim.AdamW([weight], lr=1e-4).step


def _attention(batch: int, heads: int, tokens: int, dim: int) -> tuple[Action, Action]:
    """Causal attention forward, and backward alone."""
    q, k, v = (torch.randn(batch, heads, tokens, dim, requires_grad=True) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    grad = torch.randn_like(out)

    def backward() -> object:
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), backward


def _back_and_forth(
    forward: Callable[[], Tensor], grad: Tensor, leaves: Sequence[Tensor]
) -> Action:
    return lambda: torch.autograd.grad(forward(), leaves, grad)


# --- links ---------------------------------------------------------------------------------------


def _shapes(ranks: int, per_node: int) -> dict[tuple[int, int], tuple[int, int, str]]:
    """By (ranks, nodes) of a group, a mesh (outer, inner) that has such groups along an axis."""
    found: dict[tuple[int, int], tuple[int, int, str]] = {}
    for inner in (n for n in range(1, ranks + 1) if ranks % n == 0):
        outer = ranks // inner
        for name, size, stride in (("inner", inner, 1), ("outer", outer, inner)):
            if size > 1:
                nodes = {place * stride // per_node for place in range(size)}
                found.setdefault((size, len(nodes)), (outer, inner, name))
    return found


def _collectives(
    ranks: int, per_node: int, limit_s: float, told: Told | None
) -> dict[tuple[int, int], dict[str, dict[int, Action]]]:
    """Every collective in every kind of group, with messages as large as the link is fast for."""
    found: dict[tuple[int, int], dict[str, dict[int, Action]]] = {}
    for shape, (outer, inner, name) in _shapes(ranks, per_node).items():
        if told is not None:
            told(f"try messages between {shape[0]} ranks{' of several machines' * (shape[1] > 1)}")
        axis = Mesh.create({"outer": outer, "inner": inner}, "cpu")[name]
        found[shape] = {kind: _messages(kind, axis) for kind in _kinds(axis.size)}
    return found


def _kinds(size: int) -> list[str]:
    """Collectives that are not made of others, which have the prices of those."""
    return [
        k for k, each in COLLECTIVES.items() if each.suits((size,)) and not each.stages((size,))
    ]


def _messages(kind: str, axis: Ranks) -> dict[int, Action]:
    found: dict[int, Action] = {}
    for size in MESSAGES:
        action = found[size] = _transfer(kind, size, axis)
        if _slowest(_seconds(action, 1)) > _LONG_S and len(found) > 1:
            break
    return found


def _transfer(kind: str, size: int, axis: Ranks) -> Action:
    """A collective that is called with a tensor of `size` bytes, as its declaration says which.

    With the copies around it that modules make, of what is cut along an inner dim and of weights
    that are packed: blocks of a tensor (rows, columns) are made rows of a buffer, and back.
    """
    numbers, ways = size // 4, axis.size
    if kind == "send_recv":
        x, into = torch.zeros(2, numbers).unbind()
        return lambda: wait(post_shift(x, into, axis.group))
    start, does = TRANSFERS[kind], COLLECTIVES[kind].does
    if does == "all_reduce":
        whole = torch.zeros(numbers)
        return lambda: start(whole, axis, None).finish()
    columns = max(numbers // ways // _ROWS, 1)
    part, whole = torch.zeros(_ROWS, columns), torch.zeros(_ROWS, ways * columns)

    def split() -> Tensor:
        return whole.unflatten(1, (ways, columns)).movedim(1, 0).contiguous()

    def joined(blocks: Tensor) -> Tensor:
        return blocks.movedim(0, 1).flatten(1)

    runs: dict[str | None, Action] = {
        "all_gather": lambda: joined(start(part, axis, None).finish()),
        "reduce_scatter": lambda: start(split(), axis, None).finish(),
        "all_to_all": lambda: joined(start(split(), axis, None).finish()),
    }
    return runs[does]


def _add_both(probes: _Probes, ranks: int) -> None:
    """Computing, a gather between all ranks, and both at once, each about as long as the other."""
    axis = Mesh.create({"all": ranks}, "cpu")["all"]
    row = probes.groups[max(probes.groups)]["all_gather"]
    numbers = max(row) // 4 // ranks
    x, square = torch.zeros(numbers), torch.ones(256, 256)
    gather = row[max(row)]
    gather()
    moving = _slowest(_seconds(gather, 1))
    computing = _slowest(_seconds(lambda: torch.mm(square, square), 20))
    times = max(1, ceil(moving / computing))

    def compute() -> None:
        for _ in range(times):
            torch.mm(square, square)

    def both() -> None:
        transfer = TRANSFERS["all_gather"](x, axis, None)
        compute()
        transfer.finish()

    probes.beside = [compute, gather, both]


# --- this machine --------------------------------------------------------------------------------


def _memory_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


__all__ = ["calibrate", "measured_alone", "measured_here"]
