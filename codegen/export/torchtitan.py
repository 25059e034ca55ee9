"""A configuration file of torchtitan: the TOML that its versions up to 0.2.2 read.

Versions from 0.3 on have no such file; their command line takes the same names as flags
(`--parallelism.tensor_parallel_degree 8`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...planner.errors import PlanError
from ...planner.plan.plan import MIXED, PlanData
from ...planner.strategies.layout import Layout
from .flags import Flags
from .target import (
    DATA,
    Read,
    Target,
    Written,
    attention_algorithms,
    ranks,
    rows_per_rank,
    shared_out,
    words_for,
)

_SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B"}
_DTYPES = ("bfloat16", "float32")


class Torchtitan(Target):
    """Sections `parallelism`, `training` and `activation_checkpoint`; model and data are the
    user's.  Its tensor parallelism has the sequence cut between the blocks."""

    name = "torchtitan"
    title = "torchtitan 0.2.2"
    trains = True
    pipelines = True
    recompute = True
    roles = {
        "ddp": "ddp", "fsdp": "fsdp", "zero1": "fsdp", "zero2": "fsdp", "tp": "tp+sp",
        "tp+sp": "tp+sp", "cp": "fsdp+cp", "fsdp+cp": "fsdp+cp", "fsdp+ep": "fsdp+ep",
        "ddp+ep": "fsdp+ep",
    }  # fmt: skip
    order = ("ddp", "fsdp", "fsdp+ep", "fsdp+cp", "tp+sp")

    def write(self, plan: PlanData, layout: Layout | None) -> Written:
        """The file."""
        assert layout is not None
        request, lost = plan.request, list[str]()
        if attention_algorithms(plan) - {"ring", "gather"}:
            lost.append("attention over cut tokens runs as ring attention, or by gathers")
        sections: dict[str, Mapping[str, object]] = {
            "parallelism": dict(_degrees(plan, layout)),
            "training": {
                "local_batch_size": request.batch // ranks(layout, *DATA) or 1,
                "global_batch_size": request.batch,
                "seq_len": request.seq,
                **dict(_formats(plan, lost)),
            },
            "activation_checkpoint": {"mode": "full" if layout.recompute == "full" else "none"},
        }
        if request.micro_batches > 1 and plan.pipeline is None:
            sections["training"] = {
                **sections["training"],
                "local_batch_size": rows_per_rank(plan, layout),
            }
        return Written(toml_of(sections), tuple(lost))

    knows = ("parallelism.tensor-parallel-degree", "parallelism.data-parallel-shard-degree")

    def read(self, flags: Flags, gpus: int | None) -> Read:
        """Keys as `section.key`: those of the file, or flags of later versions."""
        unread: list[str] = []
        copies = _degree(flags, "data-parallel-replicate")
        tp, cp = _degree(flags, "tensor-parallel"), _degree(flags, "context-parallel")
        pp, spread = _degree(flags, "pipeline-parallel"), _degree(flags, "expert-parallel")
        left = shared_out(gpus, {"replicate": copies, "tensor": tp, "context": cp, "pipeline": pp})
        asked = flags.text("parallelism.data-parallel-shard-degree") or "-1"
        if asked not in ("-1", str(left)):
            raise PlanError(
                f"data_parallel_shard_degree = {asked} makes another number of GPUs than {gpus}"
            )
        if left % spread:
            unread.append(f"expert_parallel_degree = {spread}: the shards are {left} ranks")
            spread = 1
        axes = [("ddp", copies), ("fsdp", left // spread), ("fsdp+ep", spread), ("fsdp+cp", cp)]
        axes = axes if left > 1 else [("ddp", copies), ("cp", cp)]
        options = _training_of(flags, copies * left)
        words = words_for([*axes, ("tp+sp", tp)], (pp, 1), _recompute_of(flags, unread))
        unread += flags.others("^parallelism|enable-cpu-offload|float8|mx|compile")
        return Read(words, options, tuple(unread))


def _degree(flags: Flags, name: str) -> int:
    return flags.number(f"parallelism.{name}-degree")


def _training_of(flags: Flags, data: int) -> dict[str, object]:
    rows = flags.number("training.local-batch-size", "training.batch-size", default=8)
    whole = flags.text("training.global-batch-size") or "-1"
    batch = rows * data if whole == "-1" else flags.number("training.global-batch-size")
    if batch % (rows * data):
        raise PlanError(
            f"global_batch_size = {batch} is no multiple of local_batch_size = {rows} times {data} "
            "data-parallel ranks"
        )
    found: dict[str, object] = {
        "phase": "train",
        "batch": batch,
        "seq": flags.number("training.seq-len", default=2048),
        "micro_batches": batch // (rows * data),
    }
    size = flags.number("parallelism.pipeline-parallel-microbatch-size", default=1)
    if flags.number("parallelism.pipeline-parallel-degree") > 1:
        found["micro_batches"] = max(batch // (size * data), 1)
        schedules = {theirs.lower(): ours for ours, theirs in _SCHEDULES.items()}
        name = (flags.text("parallelism.pipeline-parallel-schedule") or "1F1B").lower()
        if name in schedules:
            found["schedule"] = schedules[name]
    stored = flags.text("training.dtype") or "float32"
    used = flags.text("training.mixed-precision-param") or "bfloat16"
    if (stored, used) == ("float32", "bfloat16"):
        found["precision"] = "mixed"
    else:
        found["dtype"] = stored
    return found


def _recompute_of(flags: Flags, unread: list[str]) -> str:
    mode = flags.text("activation-checkpoint.mode") or "selective"
    if mode == "selective":
        unread.append("activation checkpoints: every second product runs again there, too")
    elif mode not in ("full", "none"):
        unread.append(f"activation checkpoints by `{mode}`")
        return "none"
    return mode


def _degrees(plan: PlanData, layout: Layout) -> Iterator[tuple[str, object]]:
    yield "data_parallel_replicate_degree", ranks(layout, "ddp")
    yield "data_parallel_shard_degree", ranks(layout, "fsdp", "fsdp+ep")
    yield "tensor_parallel_degree", ranks(layout, "tp+sp")
    yield "context_parallel_degree", ranks(layout, "fsdp+cp")
    if (spread := ranks(layout, "fsdp+ep")) > 1:
        yield "expert_parallel_degree", spread
    yield "pipeline_parallel_degree", layout.pipeline
    if plan.pipeline is not None:
        yield "pipeline_parallel_schedule", _SCHEDULES[plan.pipeline.schedule]
        yield "pipeline_parallel_microbatch_size", rows_per_rank(plan, layout)


def _formats(plan: PlanData, lost: list[str]) -> Iterator[tuple[str, object]]:
    request = plan.request
    if request.precision == MIXED:
        yield "dtype", "float32"
        yield "mixed_precision_param", "bfloat16"
        if request.reduce_dtype == "bfloat16":
            lost.append("gradients are added up in bfloat16 between ranks; here in float32")
        yield "mixed_precision_reduce", "float32"
        return
    dtype = request.dtype if request.dtype in _DTYPES else "float32"
    yield "dtype", dtype
    yield "mixed_precision_param", dtype


def toml_of(sections: Mapping[str, Mapping[str, object]]) -> str:
    """Sections of numbers and texts as TOML."""
    lines: list[str] = []
    for name, pairs in sections.items():
        lines += [f"[{name}]"]
        lines += [f"{key} = {_value(value)}" for key, value in pairs.items()]
        lines += [""]
    return "\n".join(lines)


def _value(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


__all__ = ["Torchtitan", "toml_of"]
