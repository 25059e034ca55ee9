"""Flags of servers: vLLM's and SGLang's, which have replicas, tensor parallelism and experts."""

from __future__ import annotations

from collections.abc import Iterator

from ...planner.plan.plan import PlanData
from ...planner.strategies.layout import Layout
from .flags import Flags
from .target import Read, Target, Written, ranks, rows_per_rank, words_for

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

    def read(self, flags: Flags, gpus: int | None) -> Read:
        """Parallel sizes, sequences of a batch and the dtype."""
        unread: list[str] = []
        tp, data = flags.number(*self.all_tensor), flags.number(*self.all_data)
        pp = flags.number(*self.all_stages)
        axes = [*self.data_axes(flags, data, tp, unread), ("tp", tp)]
        options: dict[str, object] = {}
        if rows := flags.number(self.sequences.lstrip("-"), default=0):
            options["batch"] = rows * data
        dtype = _SAME.get(flags.text("dtype") or "auto", "own")
        if dtype != "own":
            options["dtype"] = dtype
        for name in ("tensor", "length"):
            flags.text(getattr(self, name).lstrip("-"))
        unread += flags.others(_CHANGES)
        return Read(words_for(axes, (pp, 1), ""), options, tuple(unread))

    all_tensor: tuple[str, ...] = ()  # every name of these flags
    all_data: tuple[str, ...] = ()
    all_stages: tuple[str, ...] = ("pipeline-parallel-size", "pp-size", "pp")

    def data_axes(
        self, flags: Flags, data: int, tp: int, unread: list[str]
    ) -> list[tuple[str, int]]:
        """Replicas, and how experts lie on them."""
        raise NotImplementedError


_SAME = {
    "bfloat16": "bfloat16", "float16": "float16", "half": "float16", "float": "float32",
    "float32": "float32",
}  # fmt: skip
# Names of flags that change how a model is cut, stored or computed
_CHANGES = (
    "parallel|attn|-cp-|^cp-|dcp|quantization|kv-cache-dtype|offload|expert|^ep|speculative|disagg"
)


class Vllm(Server):
    """`vllm serve`, as `EngineArgs` of vLLM 0.32 reads its flags."""

    name = "vllm"
    title = "vLLM 0.32"
    tensor, data = "--tensor-parallel-size", "--data-parallel-size"
    length, sequences = "--max-model-len", "--max-num-seqs"
    knows = ("tensor-parallel-size", "data-parallel-size", "max-model-len", "max-num-seqs", "tp")
    all_tensor, all_data = ("tensor-parallel-size", "tp"), ("data-parallel-size", "dp")

    def data_axes(
        self, flags: Flags, data: int, tp: int, unread: list[str]
    ) -> list[tuple[str, int]]:
        """Experts go over all ranks; no layout of ours has them over tensor parallelism, too."""
        if not flags.is_set("enable-expert-parallel"):
            return [("ddp", data)]
        if tp > 1:
            unread.append("--enable-expert-parallel: experts over ranks of tensor parallelism")
            return [("ddp", data)]
        return [("ddp+ep", data)]

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
    knows = ("tp-size", "dp-size", "context-length", "max-running-requests", "mem-fraction-static")
    all_tensor = ("tp-size", "tensor-parallel-size", "tp")
    all_data = ("dp-size", "data-parallel-size", "dp")
    roles = {**Server.roles}
    roles.pop("ddp+ep")
    roles.pop("fsdp+ep")

    def data_axes(
        self, flags: Flags, data: int, tp: int, unread: list[str]
    ) -> list[tuple[str, int]]:
        """Replicas; data parallelism of attention alone is within tensor parallelism."""
        if flags.is_set("enable-dp-attention"):
            unread.append("--enable-dp-attention: attention by sequences, the rest by heads")
            return []
        return [("ddp", data)]

    def experts(self, layout: Layout) -> Iterator[str]:
        """Its expert parallelism is within tensor parallelism, which no layout of ours has."""
        yield from ()


__all__ = ["Sglang", "Vllm"]
