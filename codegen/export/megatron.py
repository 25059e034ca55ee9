"""Flags of Megatron-LM, as `megatron/training/arguments.py` of megatron-core 0.19.2 reads them."""

from __future__ import annotations

from collections.abc import Iterator

from ...planner.plan.plan import MIXED, PlanData
from ...planner.strategies.layout import Layout
from .target import Target, Written, attention_algorithms, ranks, rows_per_rank

_STRATEGY = {"fsdp": "optim_grads_params", "zero2": "optim_grads"}  # of Megatron-FSDP
_CP = {"ring": "p2p", "gather": "all_gather", "ulysses": "a2a"}


class Megatron(Target):
    """Parallel sizes, batches, precision and recomputation; the model's own flags are the user's.

    Megatron's mesh has tensor parallelism innermost, then context, data and pipeline parallelism
    (`--order` of `RankGenerator`, tp-cp-ep-dp-pp).
    """

    name = "megatron"
    title = "Megatron-LM (megatron-core 0.19)"
    trains = True
    pipelines = True
    recompute = recompute_some = True
    roles = {
        "ddp": "ddp", "fsdp": "fsdp", "zero1": "zero1", "zero2": "zero2", "tp": "tp",
        "tp+sp": "tp+sp", "cp": "cp", "fsdp+cp": "fsdp+cp", "ulysses": "ulysses",
        "fsdp+ulysses": "fsdp+ulysses", "ddp+ep": "ddp+ep", "fsdp+ep": "fsdp+ep",
    }  # fmt: skip
    order = (
        "ddp", "fsdp", "zero1", "zero2", "ddp+ep", "fsdp+ep", "cp", "fsdp+cp", "ulysses",
        "fsdp+ulysses", "tp", "tp+sp",
    )  # fmt: skip

    def write(self, plan: PlanData, layout: Layout | None) -> Written:
        """One flag a line."""
        assert layout is not None
        lost: list[str] = []
        request = plan.request
        flags = [
            f"--tensor-model-parallel-size {ranks(layout, 'tp', 'tp+sp')}",
            *(["--sequence-parallel"] if "tp+sp" in layout.roles else []),
            f"--context-parallel-size {ranks(layout, *_SEQUENCE)}",
            *_attention(plan, layout, lost),
            f"--pipeline-model-parallel-size {layout.pipeline}",
            *_stages(plan, layout, lost),
            *_experts(layout),
            *_data(layout),
            f"--micro-batch-size {rows_per_rank(plan, layout)}",
            f"--global-batch-size {request.batch}",
            f"--seq-length {request.seq}",
            *_precision(plan, lost),
            *_recomputed(plan, layout),
        ]
        return Written("\n".join(flags) + "\n", tuple(lost))


_SEQUENCE = ("cp", "fsdp+cp", "ulysses", "fsdp+ulysses")


def _attention(plan: PlanData, layout: Layout, lost: list[str]) -> Iterator[str]:
    by_heads = ranks(layout, "ulysses", "fsdp+ulysses")
    by_tokens = ranks(layout, "cp", "fsdp+cp")
    if by_heads > 1 and by_tokens > 1:
        yield "--cp-comm-type a2a+p2p"
        yield f"--hierarchical-context-parallel-sizes {by_heads} {by_tokens}"
    elif by_heads > 1:
        yield "--cp-comm-type a2a"
    elif by_tokens > 1:
        found = attention_algorithms(plan)
        known = [_CP[name] for name in sorted(found) if name in _CP]
        yield f"--cp-comm-type {known[0] if known else 'p2p'}"
        if other := sorted(found - {name for name, kind in _CP.items() if kind in known[:1]}):
            lost.append(f"attention by {', '.join(other)} runs as {known[0] if known else 'p2p'}")


def _stages(plan: PlanData, layout: Layout, lost: list[str]) -> Iterator[str]:
    if layout.per_rank > 1:
        yield f"--num-virtual-stages-per-pipeline-rank {layout.per_rank}"
    pipeline = plan.pipeline
    if pipeline is None:
        return
    if pipeline.schedule not in ("1f1b", "interleaved"):
        lost.append(f"the schedule {pipeline.schedule} runs as 1F1B")
    if len({stage.layers for stage in pipeline.stages}) > 1:
        counts = ", ".join(str(stage.layers) for stage in pipeline.stages)
        lost.append(f"stages have {counts} layers; flags share them out evenly")


def _experts(layout: Layout) -> Iterator[str]:
    spread = ranks(layout, "ddp+ep", "fsdp+ep")
    if spread > 1:
        yield f"--expert-model-parallel-size {spread}"
        yield "--expert-tensor-parallel-size 1"


def _data(layout: Layout) -> Iterator[str]:
    kinds = [role.split("+")[0] for role in layout.roles]
    if "zero1" in kinds:
        yield "--use-distributed-optimizer"
    for kind, strategy in _STRATEGY.items():
        if kind in kinds:
            yield "--use-megatron-fsdp"
            yield f"--data-parallel-sharding-strategy {strategy}"
            yield "--use-distributed-optimizer"
    copies = ranks(layout, "ddp")
    if copies > 1 and {"fsdp", "zero1", "zero2"} & set(kinds):
        yield f"--num-distributed-optimizer-instances {copies}"


def _precision(plan: PlanData, lost: list[str]) -> Iterator[str]:
    request = plan.request
    bf16 = request.precision == MIXED or request.dtype == "bfloat16"
    if bf16:
        yield "--bf16"
    if bf16 and request.precision != MIXED:
        lost.append("parameters are stored in bfloat16 alone: Megatron has them in float32, too")
    if bf16 and request.reduce_dtype == "bfloat16":
        yield "--grad-reduce-in-bf16"


def _recomputed(plan: PlanData, layout: Layout) -> Iterator[str]:
    """Of whole layers; `block` recomputes the first ones of each stage and keeps the rest."""
    if layout.recompute or plan.decisions.recompute:
        kept = plan.decisions.kept_layers
        layers = max((len(loop.order) for loop in plan.graph.loops), default=0)
        yield "--recompute-granularity full"
        yield f"--recompute-method {'block' if kept else 'uniform'}"
        yield f"--recompute-num-layers {layers - kept if kept else 1}"


__all__ = ["Megatron"]
