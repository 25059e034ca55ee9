"""What a plan comes to at one point of a sweep, in numbers that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .facts.phases import find_phase
from .planner.plan.plan import PlanData
from .planner.report.throughput import exposed_share, mfu


@dataclass(frozen=True, slots=True)
class Point:
    """What is asked at once: so many GPUs of a cluster, sequences of a batch, tokens of each."""

    gpus: int
    cluster: str
    seq: int
    batch: int

    def __str__(self) -> str:
        return f"{self.gpus} x {self.cluster}, {self.batch} x {self.seq} tokens"


@dataclass(frozen=True, slots=True)
class Figures:
    """A point's best plan in numbers: seconds, bytes per GPU, tokens a second, shares of 1.

    `tokens_per_s` are tokens trained on, or of prompts; with decode and serve those of answers.
    `step_s`, `ttft_s` and `tpot_s` are None in phases that have none, `exposed` for a pipeline;
    costs are None where no price is known, in the currency of that price, for a million tokens.
    """

    point: Point
    layout: str
    micro_batches: int
    recompute: bool
    memory_bytes: float
    tokens_per_s: float
    mfu: float
    exposed: float | None
    step_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    cost_per_hour: float | None

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens a second that each GPU does."""
        return self.tokens_per_s / self.point.gpus

    @property
    def cost_per_million(self) -> float | None:
        """What a million tokens cost."""
        if self.cost_per_hour is None:
            return None
        return self.cost_per_hour / 3600 / self.tokens_per_s * 1e6


def figures_of(point: Point, plan: PlanData, peak: Callable[[str], float], price: float) -> Figures:
    """The figures of a plan; `peak` gives FLOP/s of a GPU for a dtype, `price` is that of a GPU
    hour, 0: not known."""
    request, decode = plan.request, plan.decode
    phase = find_phase(request.phase)
    last = plan if decode is None else decode
    ttft = plan.seconds if phase.serves and not phase.context else None
    tpot = decode.seconds if decode is not None else None
    tokens, seconds = request.batch * request.seq, plan.seconds
    if decode is not None:
        tokens, seconds = request.batch * request.output_tokens, plan.answer_s
    elif phase.serves and request.seq == 1:
        tpot = plan.seconds
    return Figures(
        point,
        ",".join(f"{name}={size}" for name, size in plan.mesh.axes if size > 1) or "one GPU",
        request.micro_batches,
        plan.decisions.recompute,
        last.memory.total,
        tokens / seconds,
        mfu(plan, peak),
        exposed_share(plan),
        plan.seconds if phase.backward else None,
        ttft,
        tpot,
        price * request.gpus if price else None,
    )


__all__ = ["Figures", "Point", "figures_of"]
