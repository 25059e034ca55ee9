"""Flags of Megatron-LM, as `megatron/training/arguments.py` of megatron-core 0.19.2 reads them."""

from __future__ import annotations

from collections.abc import Iterator

from ...planner.errors import PlanError
from ...planner.plan.plan import MIXED, PlanData
from ...planner.strategies.layout import Layout
from .flags import Flags
from .target import (
    Read,
    Target,
    Written,
    attention_algorithms,
    ranks,
    rows_per_rank,
    shared_out,
    words_for,
)

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

    knows = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "micro-batch-size")

    def read(self, flags: Flags, gpus: int | None) -> Read:
        """Parallel sizes, batches, precision and recomputation."""
        unread: list[str] = []
        tp, pp = flags.number("tensor-model-parallel-size"), _stages_of(flags, unread)
        cp = flags.number("context-parallel-size")
        data = shared_out(gpus, {"tensor": tp, "context": cp, "pipeline": pp[0]})
        axes = [*_data_axes(flags, data, unread), *_sequence_axes(flags, cp, unread)]
        axes.append(("tp+sp" if flags.is_set("sequence-parallel") else "tp", tp))
        if any(role.startswith("fsdp") for role, _ in axes):
            joined = {"cp": "fsdp+cp", "ulysses": "fsdp+ulysses", "ddp+ep": "fsdp+ep"}
            axes = [(joined.get(role, role), size) for role, size in axes]
        options: dict[str, object] = {"phase": "train"}
        options |= _batches_of(flags, data)
        options |= _precision_of(flags)
        words = words_for(axes, pp, _recompute_of(flags, unread))
        unread += flags.others(_CHANGES)
        return Read(words, options, tuple(unread))


# Names of flags that change how a model is cut, stored or computed
_CHANGES = (
    "parallel|fsdp|recompute|offload|fp8|fp4|fp16|expert|distributed-optimizer|sharding|layers-per"
    "|pipeline|main-(grads|params)|exp-avg"
)


def _stages_of(flags: Flags, unread: list[str]) -> tuple[int, int]:
    ranks_, each = flags.number("pipeline-model-parallel-size"), 1
    each = flags.number("num-virtual-stages-per-pipeline-rank")
    in_each = flags.number("num-layers-per-virtual-pipeline-stage", default=0)
    layers = flags.number("num-layers", default=0)
    if in_each and layers % (ranks_ * in_each) == 0 and layers:
        each = layers // (ranks_ * in_each)
    elif in_each:
        unread.append(f"--num-layers-per-virtual-pipeline-stage {in_each} without --num-layers")
    return ranks_, each


def _data_axes(flags: Flags, data: int, unread: list[str]) -> list[tuple[str, int]]:
    strategy = flags.text("data-parallel-sharding-strategy") or "optim_grads_params"
    kinds = {"optim": "zero1", "optim_grads": "zero2", "optim_grads_params": "fsdp"}
    megatron, torch_ = flags.is_set("use-megatron-fsdp"), flags.is_set("use-torch-fsdp2")
    kind = "zero1" if flags.is_set("use-distributed-optimizer") else "ddp"
    if megatron:
        kind = kinds.get(strategy, "ddp")
    elif torch_:
        kind = "zero2" if flags.is_set("torch-fsdp2-no-reshard-after-forward") else "fsdp"
    copies = flags.number("num-distributed-optimizer-instances")
    spread = flags.number("expert-model-parallel-size")
    flags.number("expert-tensor-parallel-size")
    if data % (copies * spread):
        unread.append(
            f"--expert-model-parallel-size {spread}: experts are spread over data-parallel ranks, "
            f"of which there are {data}"
        )
        spread = 1
    axes = [("ddp", copies), (kind, data // (copies * spread)), ("ddp+ep", spread)]
    return [(role, size) for role, size in axes if size > 1] or [(kind, 1)]


def _sequence_axes(flags: Flags, cp: int, unread: list[str]) -> list[tuple[str, int]]:
    kind = flags.text("cp-comm-type") or "p2p"
    flags.text("hierarchical-context-parallel-sizes")
    sizes = flags.given.get("hierarchical-context-parallel-sizes", ())
    if kind == "a2a":
        return [("ulysses", cp)]
    if kind == "a2a+p2p" and len(sizes) == 2 and all(map(str.isdigit, sizes)):
        return [("cp", int(sizes[1])), ("ulysses", int(sizes[0]))]
    if kind not in _CP.values():
        unread.append(f"--cp-comm-type {kind}")
    return [("cp", cp)]


def _batches_of(flags: Flags, data: int) -> dict[str, object]:
    rows = flags.number("micro-batch-size")
    batch = flags.number("global-batch-size", default=rows * data)
    if batch % (rows * data):
        raise PlanError(
            f"--global-batch-size {batch} is no multiple of --micro-batch-size {rows} times {data} "
            "data-parallel ranks"
        )
    found: dict[str, object] = {"batch": batch, "micro_batches": batch // (rows * data)}
    if seq := flags.number("seq-length", "encoder-seq-length", default=0):
        found["seq"] = seq
    return found


def _precision_of(flags: Flags) -> dict[str, object]:
    if not flags.is_set("bf16"):
        return {"precision": "own"}
    reduced = "bfloat16" if flags.is_set("grad-reduce-in-bf16") else "float32"
    return {"precision": "mixed", "reduce_dtype": reduced}


def _recompute_of(flags: Flags, unread: list[str]) -> str:
    granularity = flags.text("recompute-granularity")
    method, layers = flags.text("recompute-method"), flags.text("recompute-num-layers")
    if flags.is_set("recompute-activations") or granularity == "selective":
        unread.append("selective recomputation: there of attention, whose result is kept here")
        return "none"
    if granularity == "full" and method == "block":
        unread.append(f"--recompute-num-layers {layers}: as many layers as must be are recomputed")
        return ""
    return "full" if granularity == "full" else "none"


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
    if layout.recompute == "full" or plan.decisions.recompute:
        kept = plan.decisions.kept_layers
        layers = max((len(loop.order) for loop in plan.graph.loops), default=0)
        yield "--recompute-granularity full"
        yield f"--recompute-method {'block' if kept else 'uniform'}"
        yield f"--recompute-num-layers {layers - kept if kept else 1}"


__all__ = ["Megatron"]
