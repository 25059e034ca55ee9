"""Steps as CUDA graphs: recorded once, and then started by the host with one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Kernels are chosen, compiled and given their work space in a first run, which no graph may hold.
_SWITCH_OFF = "new_cache(..., capture=False), or generate(..., capture=False), runs it as it is"


class Graphs:
    """The graphs of steps, by what tells them apart; they share memory.

    `capture` True: a step that can't be captured is an error; None: a warning, once, and steps run
    as they are; False: so do all.  `models` are the modules whose parts are named then.
    """

    def __init__(self, capture: bool | None, device: torch.device, *models: nn.Module) -> None:
        if capture and device.type != "cuda":
            raise ValueError(
                f"capture=True: a step is captured as a CUDA graph, and the mesh is on {device};"
                " leave capture out, and steps are captured where there is CUDA"
            )
        self.wanted, self._models = capture, models
        self._on = device.type == "cuda" and capture is not False
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._seen: set[Hashable] = set()
        self._moves = 0
        self._pool: Any = None  # memory that all share

    def keep(self, moves: int) -> None:
        """Let go of all graphs if `moves` changed: what they use lies elsewhere now."""
        if moves != self._moves:
            self._graphs.clear()
            self._seen.clear()
            self._moves, self._pool = moves, None

    def give_up(self, why: str) -> None:
        """Steps are not captured from now on; raises RuntimeError where they had to be."""
        if not self._on:
            return
        said = f"decoding can't be captured as a CUDA graph: {why}; {_SWITCH_OFF}"
        if self.wanted:
            raise RuntimeError(said)
        warnings.warn(said, stacklevel=2)
        self._on = False

    def run(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """What `step` returns, which is overwritten by the next run of that key.

        It is run as it is at first, captured at the second time, and replayed from then on.
        """
        if self._on and key in self._seen and key not in self._graphs:
            self._capture(key, step)
        if key in self._graphs:
            graph, out = self._graphs[key]
            graph.replay()
            return out
        if not self._on:
            return step()
        self._seen.add(key)
        return _beside(step)

    def _capture(self, key: Hashable, step: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        running: list[nn.Module] = []
        try:
            with (
                _last_module(running),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                out = step()
        except RuntimeError as error:
            torch.cuda.synchronize()
            first = str(error).strip().splitlines()[0]
            self.give_up(f"{self._name(running)} does what a graph can't hold ({first})")
            return
        self._graphs[key] = graph, out
        self._pool = graph.pool()

    def _name(self, running: list[nn.Module]) -> str:
        """What the module that was entered last is called."""
        for model in self._models:
            for name, module in model.named_modules():
                if running and module is running[-1]:
                    return f"`{name or 'the model'}` ({type(module).__name__})"
        return "the step"


def _beside(step: Callable[[], Tensor]) -> Tensor:
    """Run on another stream, as whoever captures later must have run."""
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        out = step()
    here.wait_stream(beside)
    out.record_stream(here)
    return out


@contextmanager
def _last_module(running: list[nn.Module]) -> Generator[None]:
    """Inside it `running` ends with the module that was entered last."""

    def note(module: nn.Module, inputs: object) -> None:
        running.append(module)

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()
