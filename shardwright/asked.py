"""What a user asks for: checked once, for the command line and the Python API alike.

What is of the wrong type is a TypeError, what is of the right one and makes no sense a PlanError;
both say what was given and what would do.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from .codegen.names import may_be_an_axis
from .costmodel.machines.cluster import Cluster, load_cluster
from .costmodel.memory import OPTIMIZERS
from .facts.given import finite, shown, text, whole
from .facts.mesh import MOST_RANKS, Mesh
from .facts.nested import spelled
from .facts.phases import find_phase
from .facts.schedules import SCHEDULES
from .formats import formats_of
from .ir.capture.arguments import Arguments
from .planner.errors import PlanError
from .planner.ilp.solve import SOLVERS
from .planner.plan.plan import OUTPUT_LAYOUTS, Request
from .planner.search.search import Clock, Job
from .planner.search.shapes import check_phase, default_in_flight, default_micro_batches
from .planner.strategies.layout import Layout, limited

AXES = ("x", "y", "z", "u")  # names of a mesh whose sizes alone are given
_AXIS = re.compile("[a-z][a-z0-9_]{0,15}")


class Progress(Protocol):
    """Told of each planning step, and of the fraction of it that is done."""

    def __call__(self, step: str, done: float | None = None) -> None:
        """A step begins, or has come to `done`."""
        ...


def silent(step: str, done: float | None = None) -> None:
    """No progress is shown."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `shardwright.plan`.  Raises TypeError and PlanError; see there."""

    gpus: int | None
    cluster: str
    phase: str
    context: int | None
    output_tokens: int | None
    expert_imbalance: float | None
    mesh: str | None
    pins: Sequence[str]
    memory_bytes: int | None
    optimizer: str | None
    solver: str
    time_limit_s: float
    progress: Progress
    outputs: Sequence[str]
    output_layout: str = "sharded"
    layout: str | None = None
    dtype: str | None = None
    precision: str | None = None
    reduce_dtype: str | None = None
    micro_batches: int | None = None
    schedule: str | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        with _as_plan_errors():
            self._check()

    def _check(self) -> None:
        if self.gpus is not None or self.layout is None:
            whole("gpus", self.gpus, 1, MOST_RANKS)
        if self.layout is not None:
            self._check_layout(text("layout", self.layout, " such as 'fsdp=32' or 'ddp=4,tp=8,sp'"))
        for name in ("cluster", "phase", "solver"):
            text(name, getattr(self, name))
        if self.mesh is not None:
            text("mesh", self.mesh, " such as '2x4' or 'dp=2,tp=4'")
        if self.optimizer is not None:
            _known("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("dtype", "precision", "reduce_dtype", "schedule"):
            if getattr(self, name) is not None:
                text(name, getattr(self, name))
        wholes = (("context", 0), ("output_tokens", 1), ("memory_bytes", 1), ("micro_batches", 1))
        for name, least in wholes:
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least)
        if self.expert_imbalance is not None:
            most = finite("expert_imbalance", self.expert_imbalance)
            if most < 1.0:
                raise PlanError(
                    f"expert imbalance {most:g}: the busiest rank has at least the mean, 1"
                )
        if finite("time_limit_s", self.time_limit_s) <= 0:
            raise PlanError(f"the time limit must be above 0 s, got {self.time_limit_s:g} s")
        _texts("pins", self.pins, "'*.q_proj.weight=R,S0'")
        _texts("outputs", self.outputs, "'loss'")
        _known("output layout", self.output_layout, OUTPUT_LAYOUTS)
        _known("solver", self.solver, SOLVERS)
        if not callable(self.progress):
            raise TypeError(f"`progress` must be a function, got {self.progress!r}")

    def _check_layout(self, layout: str) -> None:
        """Raises PlanError where a layout contradicts the GPUs, or what is asked for besides."""
        gpus = Layout.parse(layout).ranks
        if self.gpus is not None and self.gpus != gpus:
            raise PlanError(
                f"--layout {layout} is for {gpus} GPUs, --gpus says {self.gpus}; they must agree"
            )
        if self.mesh is not None:
            raise PlanError(
                f"--layout {layout} has its own mesh, outermost axis first; leave out --mesh "
                f"{self.mesh}"
            )

    @property
    def ranks(self) -> int:
        """How many GPUs there are, by the layout where their number was not given."""
        if self.gpus is None:
            return Layout.parse(self.layout or "").ranks
        return int(self.gpus)  # numbers of numpy are no JSON

    def _passes(self, batch: int, layout: Layout | None) -> int:
        """Micro-batches of a step; where they are not given, as many as a pipeline wants."""
        pipeline = layout is not None and layout.pipeline > 1
        if self.schedule is not None:
            if self.schedule not in SCHEDULES:
                raise PlanError(
                    f"unknown schedule `{self.schedule}`; expected one of {', '.join(SCHEDULES)}"
                )
            if not pipeline and (layout is not None or self.mesh is not None):
                raise PlanError(
                    f"--schedule {self.schedule} is that of a pipeline: give its ranks, as in"
                    " --layout pp=4,ddp=2, or neither --layout nor --mesh"
                )
            if not find_phase(self.phase).backward:
                raise PlanError(
                    f"--schedule is for training: in phase {self.phase} micro-batches pass the"
                    " stages of a pipeline one behind the other"
                )
        if layout is not None and layout.pipeline > 1:
            check_phase(self.phase, layout)
            if self.micro_batches is None and not find_phase(self.phase).backward:
                return default_in_flight(batch, layout)
            if self.micro_batches is None:
                name = self.schedule or ("interleaved" if layout.per_rank > 1 else "1f1b")
                return default_micro_batches(batch, layout, name)
        return 1 if self.micro_batches is None else int(self.micro_batches)

    def job(self, target: str, batch: int, seq: int) -> Job:
        """What is to be planned, for a model that `target` names ("": a module)."""
        with _as_plan_errors():
            batch, seq = whole("batch", batch, 1, 2**31), whole("seq", seq, 1, 2**40)
            kind = find_phase(self.phase)
            kind.check_context(self.context or 0)
            kind.check_answer(self.output_tokens or 0)
        if self.outputs and not kind.backward:
            raise PlanError(
                f"--outputs is for training: phase {self.phase} returns what is asked for"
            )
        if self.output_layout != "sharded" and not kind.backward:
            raise PlanError(
                f"--output-layout is for training: phase {self.phase} returns whole logits, or what"
                " model.gather_outputs makes whole"
            )
        layout = None if self.layout is None else Layout.parse(self.layout)
        if layout is not None and layout.recompute not in (None, "none") and not kind.backward:
            raise PlanError(f"--layout {layout.text}: phase {self.phase} has no backward pass")
        if self.pins and self.mesh is None and layout is None:
            raise PlanError("--pin needs --mesh: a spec has one state per mesh axis")
        gpus = self.ranks
        machine = load_cluster(self.cluster, gpus)
        passes = self._passes(batch, layout)
        if passes > 1 and not kind.backward and (layout is None or layout.pipeline == 1):
            raise PlanError(
                f"--micro-batches is for training and for pipelines: phase {self.phase} adds up no"
                " gradients"
            )
        if batch % passes:
            raise PlanError(
                f"--micro-batches {passes} does not divide the batch of {batch} sequences; take a "
                f"divisor of {batch}, or another --batch"
            )
        formats = formats_of(
            self.dtype, self.precision, self.reduce_dtype, kind, faster=_faster(machine)
        )
        request = Request(
            target, gpus, self.cluster, self.phase, batch, seq, formats.dtype,
            self.optimizer or kind.optimizer, float(self.memory_bytes or machine.memory_bytes),
            tuple(self.pins), kind.context if self.context is None else int(self.context),
            int(self.output_tokens or kind.answer), float(self.expert_imbalance or 0.0),
            self.output_layout, self.layout or "",
            formats.precision, formats.reduce_dtype, passes, self.schedule or "",
        )  # fmt: skip
        mesh = parse_mesh(self.mesh, gpus) if self.mesh else None
        return Job(
            machine,
            request,
            mesh if layout is None else layout.mesh,
            limited(request.pins, request.layout),
            self.solver,
            self.time_limit_s,
            Clock(),
            self.progress,
            layout,
        )


def _faster(machine: Cluster) -> bool:
    """Are products in bfloat16 faster than those in float32?"""
    rates = dict(machine.flops)
    return rates.get("bf16", 0.0) > rates.get("fp32", 0.0)


def _known(name: str, given: object, known: Iterable[str]) -> None:
    """Raises TypeError unless `given` is text, PlanError unless it is one of those."""
    if text(name, given) not in known:
        raise PlanError(f"unknown {name} `{given}`; expected one of {', '.join(known)}")


def _texts(name: str, given: object, such: str) -> None:
    """Raises TypeError for what is no list of texts."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"`{name}` must be a list of texts such as {such}, got {given!r}")
    for item in cast("Sequence[object]", given):
        text(name, item, f" such as {such}")


@contextmanager
def _as_plan_errors() -> Generator[None]:
    """What a check of a single value says is said of the request."""
    try:
        yield
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(str(error)) from error


def check_model(model: object) -> None:
    """Raises TypeError for what is no module."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(
            f"`model` must be a module, got the class {model.__name__}; build it: "
            f"{model.__name__}(...), on the device meta if it is large"
        )
    tip = "; `plan` on the command line takes names of files" if isinstance(model, str) else ""
    raise TypeError(f"`model` must be an nn.Module, got {shown(model)}{tip}")


def check_inputs(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    """The tensors among `inputs`, by the names that a graph has for them.

    Raises TypeError for what is neither a dict nor a tuple or list, PlanError where no tensor is in
    it or an empty one, and CaptureError for what `forward` does not take.
    """
    if not isinstance(inputs, (Mapping, tuple, list)):
        raise TypeError(
            "`inputs` must be forward's arguments: a dict by name, or a tuple by position; got "
            f"{shown(inputs)}"
        )
    if not inputs:
        raise PlanError("`inputs` is empty; give forward's arguments, by name or by position")
    arguments = Arguments.of(model, cast(object, inputs))
    tensors = arguments.tensors
    if not tensors:
        raise PlanError("`inputs` has no tensor")
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            place = spelled(arguments.paths[name])
            raise PlanError(f"input `{place}` is empty, of shape {tuple(tensor.shape)}")
    return tensors


def parse_mesh(text: str, gpus: int) -> Mesh:
    """`2x4`, or `dp=2,tp=4` with names; outermost axis first.

    >>> str(parse_mesh("2x4", 8))
    'x=2 x y=4'
    """
    parts = (
        [part for part in text.replace("x", ",").split(",")] if "=" not in text else text.split(",")
    )
    axes: list[tuple[str, int]] = []
    for part, default in zip(parts, AXES, strict=False):
        name, sign, size = part.partition("=")
        name, size = (name.strip(), size) if sign else (default, name)
        if not (size.strip().isascii() and size.strip().isdigit() and 0 < int(size) < 10**9):
            raise PlanError(f"--mesh {text}: expected sizes such as 2x4, or dp=2,tp=4")
        if not _AXIS.fullmatch(name) or not may_be_an_axis(name):
            raise PlanError(f"--mesh {text}: `{name}` is no name for an axis; take one as dp or tp")
        axes.append((name, int(size)))
    if not 1 <= len(axes) <= 3 or len(axes) != len(parts):
        raise PlanError(f"--mesh {text}: a mesh has one to three axes")
    mesh = Mesh(tuple(axes))
    if mesh.ranks != gpus:
        raise PlanError(f"--mesh {text} has {mesh.ranks} GPUs, --gpus says {gpus}; they must agree")
    return mesh


__all__ = ["AXES", "Asked", "Progress", "check_inputs", "check_model", "parse_mesh", "silent"]
