"""Plans for eight ranks, one rank of each run here: memory at the peak beside what was predicted.

    python -m benchmarks.rehearsals [WORDS ...]

Small models on the CPU, in all layouts, with `plan rehearse`; bytes are those of tensors alive.
Words choose the cases whose names have one of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from shardwright.api import plan_file, rehearse
from shardwright.rehearse import Rehearsal, Rehearsed

RANKS = 8
_SIZES = {
    "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "vocab_size": 4096,
    "num_key_value_heads": 4, "intermediate_size": 704, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SIZES},
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **_SIZES,
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 352,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 4, "n_embd": 256,
        "n_head": 8, "n_positions": 1024, "vocab_size": 4096, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, how it is cut (""; as the search says), and what else is asked for."""

    model: str
    layout: str
    asked: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rank: int = 3

    @property
    def name(self) -> str:
        """What is run."""
        more = ", ".join(f"{value}" for value in self.asked.values())
        return f"{self.model} {self.layout or 'searched'}{', ' if more else ''}{more}"


CASES = (
    Case("llama", "ddp=8"),
    Case("llama", "zero1=8"),
    Case("llama", "zero2=8"),
    Case("llama", "fsdp=8"),
    Case("llama", "fsdp=8,recompute=full"),
    Case("llama", "fsdp=8", {"precision": "mixed"}),
    Case("llama", "ddp=8", {"precision": "mixed"}),
    Case("llama", "fsdp=8", {"micro_batches": 2, "batch": 32}),
    Case("llama", "fsdp=8", {"outputs": ("loss",)}),
    Case("llama", "fsdp=8", {"optimizer": "sgd"}),
    Case("llama", "ddp=2,tp=4"),
    Case("llama", "ddp=2,tp=4,sp"),
    Case("llama", "fsdp=4,tp=2,sp"),
    Case("llama", "fsdp=2,cp=4"),
    Case("llama", "fsdp=2,ulysses=4"),
    Case("llama", ""),
    Case("gpt2", "fsdp=8"),
    Case("mixtral", "fsdp=8"),
    Case("mixtral", "fsdp=1,ep=8"),
    Case("llama", "ddp=2,tp=4", {"phase": "prefill"}),
    Case("llama", "ddp=2,tp=4", {"phase": "decode", "context": 2048}),
    Case("mixtral", "ddp=2,tp=4", {"phase": "decode", "context": 2048}),
    Case("llama", "", {"phase": "serve", "output_tokens": 64}),
)


def rehearsed(case: Case, folder: Path) -> Rehearsal:
    """The case, planned and run in `folder`."""
    (folder / "config.json").write_text(json.dumps(_MODELS[case.model]))
    decode = case.asked.get("phase") == "decode"
    asked: dict[str, Any] = {
        "cluster": "cpu", "phase": "train", "batch": 16, "seq": 1 if decode else 512,
        "dtype": None if "precision" in case.asked else "float32", "memory_bytes": None,
        "mesh": None, "pins": (), "optimizer": None, "solver": "highs", "time_limit_s": 60.0,
    }  # fmt: skip
    plan = plan_file(
        str(folder), gpus=RANKS, layout=case.layout or None, **(asked | dict(case.asked))
    )
    out = folder / "plan"
    out.mkdir()
    plan.save(out / "plan.json")
    plan.write_module(out / "sharded_model.py")
    return rehearse(out, case.rank, 1)


def all_rehearsed(cases: list[Case]) -> Iterator[tuple[str, Rehearsed]]:
    """The phases of the cases, with their names."""
    for case in cases:
        with TemporaryDirectory() as folder:
            for phase in rehearsed(case, Path(folder)).phases:
                yield case.name, phase


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Memory of plans, predicted and measured.")
    parser.add_argument("words", nargs="*", help="words in the names of cases")
    words = parser.parse_args().words
    chosen = [case for case in CASES if not words or any(word in case.name for word in words)]
    ratios: list[float] = []
    print(f"{'peak memory':<44}{'predicted':>11}{'measured':>11}{'ratio':>8}  verdict")
    for name, phase in all_rehearsed(chosen):
        line = phase.peak
        ratios.append(phase.predicted_bytes / phase.measured_bytes)
        print(
            f"{name:<44}{line.predicted:>11}{line.measured:>11}{ratios[-1]:8.3f}  {line.verdict}",
            flush=True,
        )
    errors = np.abs(np.array(ratios) - 1) * 100
    print(
        f"{len(ratios)} cases: median error {np.median(errors):.1f} %, largest {errors.max():.1f} %"
    )


if __name__ == "__main__":
    main()
