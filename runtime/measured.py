"""What one rank of a module takes: seconds by pass, layer and kind of kernel, bytes at the peak.

Seconds of a step are those of the clock.  Where they go is read from one more step under torch's
profiler: on a GPU the seconds of kernels, on the CPU those that operators are busy themselves.  A
kernel belongs to the layer in whose forward it runs, or whose forward made the node of autograd
that runs it.  Bytes on the CPU are those of tensors alive (`live.py`), on CUDA the allocator's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..facts.phases import DECODE, Phase, find_phase
from .live import LiveBytes
from .mesh.peers import PLAYED
from .module.demo import demonstrated_step, make_optimizer, phase_step
from .module.layers import Layer
from .module.module import ShardedModule
from .serving.program import Program

PRODUCTS, ATTENTION, LIGHT = "matrix products", "attention", "light kernels"
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
_LAYER, _BACKWARD, _OPTIMIZER = "layer:", "autograd::engine::evaluate_function:", "Optimizer."
_KINDS = (  # words in names of operators, the first that is found
    (ATTENTION, ("flash_attention", "efficient_attention", "cudnn_attention", "fused_attention",
                 "dot_product_attention", "flex_attention", "paged")),
    (PRODUCTS, ("::mm", "::bmm", "addmm", "addbmm", "baddbmm", "_grouped_mm", "::mv", "addmv",
                "linear")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run of a phase, or a step, takes here.

    `step_s` is the median by the clock, of which `played_s` are spent in place of other ranks;
    `passes` has the seconds of kernels by layer's class ("": outside of layers) and pass, `kinds`
    by kind.  `layers` are the classes of repeated layers, by their path.  `finite`: is what came
    out numbers?  `state_bytes` are those of parameters and buffers, `optimizer_bytes` of its
    states, `cache_bytes` of caches, and `peak_bytes` of all.
    """

    phase: str
    steps: int
    step_s: float
    played_s: float
    passes: dict[tuple[str, str], float]
    kinds: dict[str, float]
    layers: dict[str, tuple[str, ...]]
    finite: bool
    peak_bytes: int
    state_bytes: int
    optimizer_bytes: int
    cache_bytes: int


def measure(
    kind: type[ShardedModule], steps: int, device: torch.device | None = None
) -> list[Measured]:
    """What each phase of a module takes on this rank, with random numbers; the first step warms up.

    The ranks of its mesh must be there, or played (`mesh/peers.py`).
    """
    with _memory(device) as memory:
        model = kind(device=device)
        _fill(model)
        state = memory.now()
        if not kind.CACHES:
            return [_measure_step(model, memory, state, steps)]
        planned = {find_phase(kind.PHASE): model.programs()[kind.PHASE]}
        if kind.DECODE is not None:
            planned[DECODE] = model.programs()[DECODE.name]
        return [_measure_phase(model, *each, memory, state, steps) for each in planned.items()]


def _fill(model: nn.Module) -> None:
    """Random weights under which numbers stay as large as they are, whatever the ranks' parts."""
    for x in model.parameters():
        if x.ndim > 1:
            nn.init.normal_(x, std=x.shape[-1] ** -0.5)
        elif x.is_floating_point():
            nn.init.ones_(x)


def _measure_step(model: ShardedModule, memory: _Memory, state: int, steps: int) -> Measured:
    trains = find_phase(model.PHASE).backward
    optimizer = make_optimizer(model.OPTIMIZER, model) if trains else None
    program = model.programs()[model.PHASE]
    step = demonstrated_step(
        model, program, model.mesh, optimizer, model.step, model.MICRO_BATCHES, trains=trains
    )
    step()  # makes the states of the optimizer
    states = _bytes_of(x for s in optimizer.state.values() for x in s.values()) if optimizer else 0
    held = state, states, 0
    return _timed(model, model.PHASE, step, lambda: None, memory, steps, held)


def _measure_phase(
    model: ShardedModule,
    phase: Phase,
    program: Program,
    memory: _Memory,
    state: int,
    steps: int,
) -> Measured:
    batch, tokens = program.tokens.shape
    before = memory.now()
    model.new_cache(batch, tokens + program.context)
    cache = memory.now() - before
    step, prepare = phase_step(model.serving, phase, program)
    prepare()
    step()
    return _timed(model, phase.name, step, prepare, memory, steps, (state, 0, cache))


def _timed(
    model: ShardedModule,
    phase: str,
    step: Callable[[], Tensor | None],
    prepare: Callable[[], None],
    memory: _Memory,
    steps: int,
    held: tuple[int, int, int],
) -> Measured:
    """Runs `step`, which has run before, once to see what is alive, `steps` times by the clock, and
    once under the profiler."""
    prepare()
    memory.restart()
    out = step()
    peak, finite = memory.peak(), out is None or bool(out.isfinite().all())
    del out
    seconds: list[float] = []
    with memory.unseen():
        for _ in range(steps):
            prepare()
            _synchronize(model.device)
            start = time.perf_counter()
            step()
            _synchronize(model.device)
            seconds.append(time.perf_counter() - start)
        prepare()
        spent = _profiled(model, step)
    return Measured(
        phase, steps, median(seconds), spent.played_s, spent.passes, spent.kinds,
        _classes(model, phase), finite, peak, *held,
    )  # fmt: skip


def _classes(model: ShardedModule, phase: str) -> dict[str, tuple[str, ...]]:
    decoding = model.DECODE if phase == DECODE.name else None
    layers = (decoding or type(model)).LAYERS
    return {path: tuple(each.__name__ for each in kinds) for path, kinds in layers.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_of(tensors: Iterable[object]) -> int:
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


# --- memory ---------------------------------------------------------------------------------------


class _Memory:
    """Bytes of tensors: of the allocator on CUDA, else those that `LiveBytes` sees."""

    def __init__(self, live: LiveBytes | None) -> None:
        self._live = live
        if live is None:
            torch.cuda.empty_cache()
        self._before = 0 if live is not None else torch.cuda.memory_allocated()

    def now(self) -> int:
        """Bytes that are alive."""
        if self._live is None:
            return torch.cuda.memory_allocated() - self._before
        return self._live.now

    def restart(self) -> None:
        """The peak is that from now on."""
        if self._live is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._live.reset_peak()

    def peak(self) -> int:
        """Most bytes that were alive."""
        if self._live is None:
            return torch.cuda.max_memory_allocated() - self._before
        return self._live.peak

    def unseen(self) -> AbstractContextManager[None]:
        """Inside, nothing is looked at, which takes time."""
        return _without(self._live)


@contextmanager
def _memory(device: torch.device | None) -> Generator[_Memory]:
    if device is not None and device.type == "cuda":
        yield _Memory(None)
        return
    with LiveBytes() as live:
        yield _Memory(live)


@contextmanager
def _without(live: LiveBytes | None) -> Generator[None]:
    if live is None:
        yield
        return
    live.__exit__(None, None, None)
    try:
        yield
    finally:
        live.__enter__()


# --- where time goes ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Spent:
    passes: dict[tuple[str, str], float]
    kinds: dict[str, float]
    played_s: float


def _profiled(model: ShardedModule, step: Callable[[], object]) -> _Spent:
    """Seconds of one more step, by layer and pass, and by kind."""
    on_gpu = model.device.type == "cuda"
    with _layers_told(model):
        events = _traced(step, model.device)
    places = _Places(events)
    passes: dict[tuple[str, str], float] = {}
    kinds: dict[str, float] = {PRODUCTS: 0.0, ATTENTION: 0.0, LIGHT: 0.0}
    played = 0.0
    for event in events:
        if event.name.startswith(_LAYER) or not _computes(event, on_gpu=on_gpu):
            continue
        micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        place = places.of(event)
        if place is None:
            played += micro / 1e6
            continue
        passes[place] = passes.get(place, 0.0) + micro / 1e6
        if place[1] != OPTIMIZER:
            kinds[_kind_of(event)] += micro / 1e6
    return _Spent(passes, kinds, played)


def _traced(step: Callable[[], object], device: torch.device) -> list[Any]:
    """The profiler's events of a step, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr that it starts
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        step()
        _synchronize(device)
    return sorted(seen.events() or (), key=lambda event: event.time_range.start)


def _computes(event: Any, *, on_gpu: bool) -> bool:
    """Is it an operator, or what one is busy with in place of other ranks?"""
    name: str = event.name
    return "::" in name and not name.startswith(_BACKWARD[:10]) if not on_gpu else True


def _kind_of(event: Any) -> str:
    """By the operator's name, or by that of the one that calls it."""
    at = event
    while at is not None:
        for kind, words in _KINDS:
            if any(word in at.name for word in words):
                return kind
        at = at.cpu_parent
    return LIGHT


class _Places:
    """In which layer and pass events are; None for what is done in place of other ranks."""

    def __init__(self, events: Sequence[Any]) -> None:
        self._layer_of: dict[int, str] = {}  # by the number of a node of autograd
        self._known: dict[int, tuple[str, str] | None] = {}
        for event in events:  # the last that has a number is the one that makes the node
            place = self.of(event)
            if event.sequence_nr >= 0 and place is not None and place[1] == FORWARD:
                self._layer_of[event.sequence_nr] = place[0]
        self._known.clear()

    def of(self, event: Any) -> tuple[str, str] | None:
        """(layer's class, pass)."""
        if event.id not in self._known:
            self._known[event.id] = self._found(event)
        return self._known[event.id]

    def _found(self, event: Any) -> tuple[str, str] | None:
        name, parent = event.name, event.cpu_parent
        if name == PLAYED:
            return None
        if name.startswith(_BACKWARD):
            return self._layer_of.get(event.sequence_nr, ""), BACKWARD
        if name.startswith(_OPTIMIZER):
            return "", OPTIMIZER
        around = ("", FORWARD) if parent is None else self.of(parent)
        if name.startswith(_LAYER) and around is not None:
            return name.removeprefix(_LAYER), around[1]
        return around


@contextmanager
def _layers_told(model: nn.Module) -> Generator[None]:
    """The profiler sees which layer's forward runs."""
    open_ranges: list[Any] = []

    def begin(layer: nn.Module, _: Any) -> None:
        open_ranges.append(record_function(_LAYER + type(layer).__name__))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles: list[Any] = []
    for layer in model.modules():
        if isinstance(layer, Layer):
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(layer.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["ATTENTION", "LIGHT", "PRODUCTS", "Measured", "measure"]
