"""What a plan comes to: tokens per second, MFU, exposed communication, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.ops.registry import local_of, operator_of
from ..plan.plan import PlanData
from ..strategies.regions import scopes
from .report import hidden_seconds, split_seconds

_PASSES = 3  # FLOPs of a training step over those of its forward pass: backward has twice as many


def mfu(plan: PlanData, peak: Callable[[str], float]) -> float:
    """Model FLOPs utilisation: FLOPs of the model / (seconds x GPUs x peak FLOP/s).

    Counted are products, attention (as if no score was masked) and experts, forward, and in
    training twice as much again for backward; what is recomputed is not, nor what is light.
    `peak` gives the dense FLOP/s of one GPU for a dtype.
    """
    passes = _PASSES if plan.training else 1
    at_peak = 0.0  # seconds that one GPU would take at its peak
    for scope in scopes(plan.graph):
        for node in scope.nodes:
            local = local_of(node)
            if flops := operator_of(node).flops(local):
                at_peak += passes * scope.weight * flops / peak(local.dtype)
    at_peak *= plan.request.micro_batches  # the graph is that of one
    return at_peak / (plan.seconds * plan.request.gpus)


def exposed_share(plan: PlanData) -> float | None:
    """The share of a step, or of a forward pass, that is communication which nothing hides; None
    for a pipeline, whose ranks wait at other times each."""
    if plan.pipeline is not None:
        return None
    _, communication = split_seconds(plan)
    return (sum(communication.values()) - hidden_seconds(plan)) / plan.seconds


def throughput(plan: PlanData, peak: Callable[[str], float], price: float) -> str:
    """One line; `price` is that of a GPU hour, 0: not known."""
    request = plan.request
    tokens = request.batch * request.seq
    rate = tokens / plan.seconds
    text = (
        f"Throughput: {rate:,.0f} tokens/s, {rate / request.gpus:,.0f} tokens/s/GPU, MFU "
        f"{mfu(plan, peak):.1%}"
    )
    if (share := exposed_share(plan)) is not None:
        text += f"; {share:.0%} of the time is communication that nothing hides"
    text += "."
    if not price:
        return text
    cost = plan.seconds / 3600 * request.gpus * price
    return f"{text} A step costs {cost:.3g}, a million tokens {cost / tokens * 1e6:.3g}."


__all__ = ["exposed_share", "mfu", "throughput"]
