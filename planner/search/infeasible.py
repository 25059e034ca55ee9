"""Why no plan fits, and the smallest change that would."""

from __future__ import annotations

from ...costmodel.machines.cluster import Cluster
from ...costmodel.memory import parameter_state_bytes, stepped_by
from ...facts.nested import dotted
from ...facts.units import format_bytes
from ...ir.graph import Graph, Output
from ..plan.plan import Request
from ..strategies.params import all_params
from ..strategies.setting import Setting


def explain(graph: Graph, cluster: Cluster, setting: Setting, request: Request) -> str:
    """A sentence on what fills the memory, and what would fit.

    States are counted as if sharded over every GPU, which no plan can beat; what is left is too
    little for activations and what an op holds while it runs.
    """
    parts = state_bytes(graph, setting)
    total = sum(parts)
    limit = request.memory_bytes
    share = total / request.gpus
    needed = max(1, -(-int(total) // max(1, int(0.8 * limit))))
    parameters, gradients, states = map(format_bytes, parts)
    text = (
        f"no plan fits {format_bytes(limit)} per GPU on {request.gpus} x {cluster.name}: "
        f"parameters {parameters}, gradients {gradients} and optimizer states {states} are "
        f"{format_bytes(share)} per GPU even when sharded over all of them"
    )
    if share >= 0.9 * limit:
        least = max(needed, request.gpus + 1)
        return f"{text}; at least {least} GPUs of this size are needed{_more(request, least)}"
    if request.layout:
        return (
            f"{text}; as --layout {request.layout} lays them out, they and the activations of batch"
            f" {request.batch} do not fit: without --layout a plan may"
        )
    text += _without_outputs(graph, request)
    if request.batch > 1:
        return (
            f"{text}, and the activations of batch {request.batch} do not fit in the rest; try a "
            f"smaller batch (--batch {max(1, request.batch // 2)}) or more GPUs"
            f"{_more(request, 2 * request.gpus)}"
        )
    return (
        f"{text}, and the activations of one sequence of {request.seq} tokens do not fit in the "
        f"rest; try a shorter sequence (--seq {max(1, request.seq // 2)}) or more GPUs"
        f"{_more(request, 2 * request.gpus)}"
    )


def state_bytes(graph: Graph, setting: Setting) -> list[float]:
    """Bytes of all parameters, gradients and optimizer states, each once."""
    parts = [0.0, 0.0, 0.0]
    for ref in all_params(graph):
        kind = ref.param.value.type
        state = parameter_state_bytes(
            kind.numel,
            ref.param.dtype.itemsize,
            stepped_by(setting.optimizer, matrix=ref.param.matrix),
            ref.trainable and setting.training,
        )
        for i, part in enumerate((state.parameter, state.gradient, state.optimizer)):
            parts[i] += ref.weight * part
    return parts


def _more(request: Request, least: int) -> str:
    """Options for as many GPUs or more: twice as many again and again, by which sizes of models
    divide, and the same batch, which would grow with them."""
    gpus = request.gpus
    while gpus < least:
        gpus *= 2
    return f" (--gpus {gpus} --batch {request.batch})"


def _without_outputs(graph: Graph, request: Request) -> str:
    """What the largest output besides the loss takes, where that is much: it can be left out."""
    loss, *_ = [*(out for out in graph.outputs if out.value.type.shape == ()), None]
    others = [out for out in graph.outputs if out is not loss and out.value.differentiable]
    if loss is None or not others:
        return ""
    largest = max(others, key=_bytes_of)
    share = _bytes_of(largest) / request.gpus
    if share < 0.05 * request.memory_bytes:
        return ""
    return (
        f". The output `{dotted(largest.path)}` is {format_bytes(share)} per GPU, and its gradient"
        f" as much; `--outputs {dotted(loss.path)}` does without it. Else"
    )


def _bytes_of(output: Output) -> int:
    kind = output.value.type
    return kind.numel * kind.dtype.itemsize


__all__ = ["explain", "state_bytes"]
