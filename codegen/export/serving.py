"""Flags of servers: vLLM's and SGLang's, which have replicas, tensor parallelism and experts."""

from __future__ import annotations

from collections.abc import Iterator

from ...planner.plan.plan import PlanData
from ...planner.strategies.layout import Layout
from .target import Target, Written, ranks, rows_per_rank

_DTYPES = ("bfloat16", "float16", "float32")


class Server(Target):
    """What both have: replicas of weights outside, tensor parallelism inside.

    Their tensor parallelism keeps values whole between the blocks, and nothing is gathered for a
    use.
    """

    serves = True
    roles = {
        "ddp": "ddp", "tp": "tp", "tp+sp": "tp", "ddp+ep": "ddp+ep", "fsdp": "ddp", "zero1": "ddp",
        "zero2": "ddp", "fsdp+ep": "ddp+ep",
    }  # fmt: skip
    order = ("ddp", "ddp+ep", "tp")
    tensor = data = length = sequences = ""  # names of flags

    def write(self, plan: PlanData, layout: Layout | None) -> Written:
        """One flag a line."""
        assert layout is not None
        request = plan.request
        flags = [
            f"{self.tensor} {ranks(layout, 'tp')}",
            f"{self.data} {ranks(layout, 'ddp', 'ddp+ep')}",
            *self.experts(layout),
            f"{self.length} {request.context + request.seq + request.output_tokens}",
            f"{self.sequences} {rows_per_rank(plan, layout)}",
            *([f"--dtype {request.dtype}"] if request.dtype in _DTYPES else []),
        ]
        lost: list[str] = []
        if plan.recached:
            lost.append("the KV caches lie otherwise in decode than in prefill")
        return Written("\n".join(flags) + "\n", tuple(lost))

    def experts(self, layout: Layout) -> Iterator[str]:
        """The flags that spread experts over GPUs."""
        raise NotImplementedError


class Vllm(Server):
    """`vllm serve`, as `EngineArgs` of vLLM 0.32 reads its flags."""

    name = "vllm"
    title = "vLLM 0.32"
    tensor, data = "--tensor-parallel-size", "--data-parallel-size"
    length, sequences = "--max-model-len", "--max-num-seqs"

    def experts(self, layout: Layout) -> Iterator[str]:
        """Over all ranks of data and tensor parallelism together."""
        if "ddp+ep" in layout.roles:
            yield "--enable-expert-parallel"


class Sglang(Server):
    """`sglang.launch_server`, as `ServerArgs` of SGLang 0.5.23 reads its flags."""

    name = "sglang"
    title = "SGLang 0.5.23"
    tensor, data = "--tp-size", "--dp-size"
    length, sequences = "--context-length", "--max-running-requests"
    roles = {**Server.roles}
    roles.pop("ddp+ep")
    roles.pop("fsdp+ep")

    def experts(self, layout: Layout) -> Iterator[str]:
        """Its expert parallelism is within tensor parallelism, which no layout of ours has."""
        yield from ()


__all__ = ["Sglang", "Vllm"]
