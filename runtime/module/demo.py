"""The demonstration of a module: steps on random weights and batches, with time and memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...facts.phases import DECODE, Phase
from ..cache.declared import specs_of
from ..mesh.batches import Input, arguments_of, look_up, random_batch, shard_inputs
from ..mesh.mesh import Mesh, WrongRanks
from ..mesh.rows import DataShard, data_shard
from ..serving.program import Program
from ..serving.serving import Serving
from ..training.optimizer import Kind as OptimizerKind
from ..training.step import scalar_loss

OptimizerName: TypeAlias = Literal["adamw", "sgd", "muon", "none"]


class Stepped(Protocol):
    """A module that makes its own optimizer."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's."""
        ...

    def optimizer(self, kind: OptimizerKind, *, lr: float, **options: Any) -> torch.optim.Optimizer:
        """One over them."""
        ...


@dataclass(frozen=True, slots=True)
class Clock:
    """Times `steps` steps of all ranks after a first; rank 0 prints."""

    mesh: Mesh
    steps: int

    def best(
        self, what: str, step: Callable[[], str], before: Callable[[], None] = lambda: None
    ) -> float:
        """Seconds of the fastest step; each is printed, and what `step` returns behind it.

        `before` each of them, not timed, comes what it needs.
        """
        seconds: list[float] = []
        for number in range(self.steps + 1):
            before()
            _wait_for_all(self.mesh)
            start = time.perf_counter()
            said = step()
            _wait_for_all(self.mesh)
            seconds.append(time.perf_counter() - start)
            if self.mesh.rank == 0:
                label = f"{what} {number}" if number else "warm-up"
                print(f"{label}: {seconds[-1] * 1e3:.1f} ms{said}", flush=True)
        return min(seconds[1:])

    def say(self, text: str) -> None:
        """Rank 0 prints a result and the peak memory so far."""
        if self.mesh.rank == 0:
            peak = _peak_bytes(self.mesh.device) / 1e9
            print(f"{self.mesh}: {text}, peak {peak:.2f} GB on rank 0", flush=True)


def started_mesh(axes: Mapping[str, int]) -> Mesh:
    """The mesh over the ranks that torchrun started.

    Where it started another number, rank 0 ends the program with a sentence, the others in silence.
    """
    try:
        return Mesh.create(axes)
    except WrongRanks as error:
        first = os.environ.get("RANK", "0") == "0"
        raise SystemExit(str(error) if first else 0) from None


def compiled_unless_asked() -> bool | None:
    """Whether layers are compiled: as by default, not with `--eager` on the command line."""
    return False if "--eager" in sys.argv[1:] else None


def demonstrate(
    model: nn.Module,
    program: Program,
    optimizer: torch.optim.Optimizer | None,
    clock: Clock,
    take_step: Callable[..., Tensor],
    micro_batches: int,
    *,
    trains: bool,
) -> None:
    """Steps of training, or forward passes of `model`.

    Steps of several `micro_batches` are those of `take_step`, which takes rows.
    """
    step = demonstrated_step(
        model, program, clock.mesh, optimizer, take_step, micro_batches, trains=trains
    )

    def told() -> str:
        out = step()
        return f", loss {out.item():.4f}" if trains and out is not None else ""

    best = clock.best("step", told)
    clock.say(f"best {best * 1e3:.1f} ms per step")


def demonstrated_step(
    model: nn.Module,
    program: Program,
    mesh: Mesh,
    optimizer: torch.optim.Optimizer | None,
    take_step: Callable[..., Tensor],
    micro_batches: int,
    *,
    trains: bool,
) -> Callable[[], Tensor | None]:
    """One step on a random batch, which gives its loss if there is one; where nothing is trained, a
    forward pass, which gives its first output."""
    whole = arguments_of(program.inputs, random_batch(program.inputs), program.fixed)
    batch = shard_inputs(program.inputs, whole, mesh, program.fixed)
    if not trains:
        return partial(_forward, program, batch)
    if micro_batches > 1:
        own = random_rows(program.inputs, data_shard(program.inputs, mesh), micro_batches)
        rows = arguments_of(program.inputs, own, program.fixed)
        return partial(_step, model, take_step, rows, optimizer)
    return partial(_train, model, program, batch, optimizer)


def demonstrate_serving(
    room: Callable[[int, int], Serving], planned: Mapping[Phase, Program], clock: Clock
) -> None:
    """Time each phase that the module was planned for, the first of which begins with prompts.

    `room(batch, tokens)` gives what serves as many.  A phase runs over a cache as full as planned,
    of random keys and values.  Then caches are converted, if the phases lay them out differently.
    """
    programs = list(planned.values())
    first, last = programs[0], programs[-1]
    longest = max(program.tokens.shape[1] + program.context for program in programs)
    serving = room(first.tokens.shape[0], longest)
    for phase, program in planned.items():
        _time_phase(serving, phase, program, clock)
    if specs_of(first.caches) != specs_of(last.caches):
        _time_conversion(serving, first.tokens.shape, clock)


def _time_phase(serving: Serving, phase: Phase, program: Program, clock: Clock) -> None:
    (batch, tokens), context = program.tokens.shape, program.context
    step, before = phase_step(serving, phase, program)

    def run() -> str:
        step()
        return ""

    best = clock.best(phase.name, run, before=before)
    cached = f" over {context} cached ones" if context else ""
    clock.say(
        f"best {best * 1e3:.1f} ms per {phase.name} of {batch} x {tokens} tokens{cached}, "
        f"{batch * tokens / best:,.0f} tokens/s"
    )


def phase_step(
    serving: Serving, phase: Phase, program: Program
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A run of a phase over a cache as full as planned, which gives logits (b, v), and what is to
    be done before each."""
    context = program.context
    ids = random_batch(program.inputs)["input_ids"]
    if context:
        serving.fill(context, phase)
    step = partial(_serve, serving, phase, ids, context)
    if context and serving.stateful:  # which cannot go back
        return step, partial(serving.fill, context, phase)
    return step, lambda: None


def _time_conversion(serving: Serving, shape: Sequence[int], clock: Clock) -> None:
    """Time the conversion of prompts' caches to the layout of decode."""
    batch, tokens = shape

    def convert() -> str:
        serving.lay_out(DECODE)
        return ""

    best = clock.best("conversion", convert, before=partial(serving.fill, tokens))
    clock.say(f"best {best * 1e3:.1f} ms per conversion of {batch} x {tokens} cached tokens")


def _serve(serving: Serving, phase: Phase, ids: Tensor, context: int) -> Tensor:
    """One step from `context` cached tokens on."""
    serving.truncate([context] * len(ids))
    if phase == DECODE:  # as answers go on: on CUDA a captured step
        return serving.decode(ids[:, 0])
    return serving.step(phase, ids, torch.full((len(ids),), ids.shape[1]))


def _forward(program: Program, batch: Mapping[str, Any]) -> Tensor | None:
    """The first of the outputs, if there is one."""
    with torch.no_grad():
        out = program.run(**batch)
    return look_up(out, program.outputs[0].path) if program.outputs else None


def _train(
    model: nn.Module,
    program: Program,
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
) -> Tensor | None:
    """One step on the scalar output if there is one, else on the sum of all that are trained."""
    out = program.run(**batch)
    loss = scalar = scalar_loss(program.outputs, out)
    if loss is None:
        results = [look_up(out, output.path) for output in program.outputs]
        loss = torch.stack([x.float().sum() for x in results if x.requires_grad]).sum()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return None if scalar is None else loss.detach()


def random_rows(
    inputs: Mapping[str, Input], shard: DataShard, micro_batches: int
) -> dict[str, Tensor]:
    """This rank's rows of one random batch, once for each micro-batch, by the names of inputs."""
    rows: dict[str, Tensor] = {}
    for name, x in random_batch(inputs).items():
        free = 0 in inputs[name].free
        own = shard.of(x) if free else x
        rows[name] = torch.cat([own] * micro_batches) if x.ndim else own
    return rows


def _step(
    model: nn.Module,
    take_step: Callable[..., Tensor],
    rows: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
) -> Tensor:
    loss = take_step(**rows)
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss


def make_optimizer(kind: OptimizerName, model: Stepped) -> torch.optim.Optimizer | None:
    """What steps the demonstration; None where nothing does."""
    if kind == "none" or not any(param.requires_grad for param in model.parameters()):
        return None
    if kind == "muon":
        return model.optimizer(kind, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    return model.optimizer(kind, lr=1e-3)


def _wait_for_all(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    if mesh.size > 1:
        dist.barrier()


def _peak_bytes(device: torch.device) -> int:
    """Most bytes held so far: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
