"""Published runs beside their prices: predicted / measured, row by row and by source.

    python -m benchmarks.end_to_end [--data FILE] [--source WORDS] [--every N] [--kind train|infer]

Every row is planned as it was run, with `--layout`; memory is no limit, since the runs did fit.
The software of a run is in the figures of its cluster (`Software`): layers compiled or not, and the
attention kernels of its time.  What cannot be asked for (pipelines, FP8, ...) is counted with the
reason.  Where a word is not there yet, the nearest is taken and the row is marked: `*` for other
recomputation than was run, `+` where the run recomputes every second product beside what
`recompute=selective` does: its time is added, its memory is not taken off.  FILE is
`published.csv`, by default that in `shared/data/e2e` beside the repository; without it there is
nothing to print.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from shardwright.api import Plan, plan_file
from shardwright.costmodel.machines.cluster import BUILT_IN
from shardwright.ir.ops.registry import operator_of
from shardwright.planner.errors import PlanError
from shardwright.planner.report.report import split_seconds
from shardwright.planner.strategies.regions import scopes

DATA = Path(__file__).parents[2] / "shared" / "data" / "e2e" / "published.csv"
_CLUSTERS = {  # how the table calls machines -> ours
    "H100-80GB-SXM": "h100", "H100-80GB": "h100", "H100": "h100",
    "H100-96GB-HBM2e-500W": "h100-hbm2e", "A100-80GB-SXM": "a100", "A100-80GB": "a100",
    "A100-80GB-330W": "a100", "A100-40GB-SXM": "a100-40", "B200": "b200",
}  # fmt: skip
_MPT = {  # layers, width, heads: the yamls of llm-foundry
    "MPT-1b": (24, 2048, 16), "MPT-3b": (32, 2560, 20), "MPT-7b": (32, 4096, 32),
    "MPT-13b": (40, 5120, 40), "MPT-30b": (48, 7168, 56), "MPT-70b": (80, 8192, 64),
}  # fmt: skip
_LLAMA = {  # layers, width, heads, key heads, hidden, vocabulary, tied
    "Llama-3-8B": (32, 4096, 32, 8, 14336, 128256, False),
    "Llama-3.1-8B": (32, 4096, 32, 8, 14336, 128256, False),
    "Llama-3.1-70B": (80, 8192, 64, 8, 28672, 128256, False),
    "Llama-3.1-405B": (126, 16384, 128, 8, 53248, 128256, False),
    "Llama-2-7B": (32, 4096, 32, 32, 11008, 32000, False),
    "Llama-2-70B": (80, 8192, 64, 8, 28672, 32000, False),
    "Llama-like 1.34B": (16, 2048, 32, 32, 8192, 131072, True),
    "Llama-like 3.57B": (28, 3072, 32, 32, 8192, 131072, True),
    "Llama-like 8.86B": (32, 4096, 32, 32, 14336, 131072, False),
    "Llama-like 80B": (80, 8192, 64, 64, 28672, 131072, False),
    "Mistral-7B": (32, 4096, 32, 8, 14336, 32000, False),
}  # fmt: skip
_MIXTRAL = {"Mixtral-8x7B": (8, 2, "Mistral-7B")}  # experts, those of a token, and the rest


@dataclass(frozen=True)
class Software:
    """What a source ran: shares of the peak that its attention kernels reach, forward and backward,
    by the processor; whether layers were compiled where the table does not say; whether
    communication of weights passed behind computing; and how steps of one token ran."""

    attention: Mapping[str, tuple[float, float]]
    compiled: bool = False
    overlaps: bool = True
    steps: str = "captured"


# forward 30-50 %, backward 25-35 % of an A100's peak: arXiv:2307.08691, section 1; the H100 by that
# paper's 335 and 203 TFLOP/s for the same kernels, forward and backward, on both (figures 4 and 7)
_FLASH_1 = {"a100": (0.40, 0.30), "h100": (0.21, 0.158)}
# fitted on the flash rows of h100_torch/kernels.csv as the cluster file's own on those of cuDNN
_FLASH_2 = {"h100": (0.355, 0.29)}
_SOFTWARE = {  # by words in the name of a source
    "MosaicML": Software(_FLASH_1),  # 2023, before FlashAttention-2
    "torchtitan": Software(_FLASH_2),  # torch 2.5 to 2.8 chooses it in scaled_dot_product_attention
    # flash-attn 2.5; 0.5 "overlaps little across nodes" (README of the table)
    "nanotron": Software(_FLASH_2, overlaps=False),
    "gpt-fast": Software({}, compiled=True, steps="compiled"),  # torch.compile, "reduce-overhead"
}
_PEAK = 989.4e12  # FLOP/s of an H100, to which rows that give nothing but MFU refer


class Unpriced(Exception):
    """A row that cannot be asked for; the message says why."""


@dataclass(frozen=True)
class Priced:
    """A row with the seconds that were measured and predicted, and bytes where both are known."""

    source: str
    name: str
    measured_s: float
    predicted_s: float
    compute_s: float
    memory: float  # predicted / published, nan where it was not published

    @property
    def ratio(self) -> float:
        """Predicted / measured."""
        return self.predicted_s / self.measured_s


def config_of(model: str, positions: int) -> dict[str, Any]:
    """A `config.json` with the sizes of a model of the table."""
    if model in _MPT:
        layers, width, heads = _MPT[model]
        return {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": layers,
            "n_embd": width, "n_head": heads, "n_positions": positions, "vocab_size": 50368,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    if model in _MIXTRAL:
        experts, chosen, like = _MIXTRAL[model]
        own = {"num_local_experts": experts, "num_experts_per_tok": chosen}
        kind = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        return config_of(like, positions) | kind | own
    if model not in _LLAMA:
        raise Unpriced("a model whose sizes are not in this file")
    layers, width, heads, kv_heads, hidden, vocabulary, tied = _LLAMA[model]
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
        "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": hidden, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": positions, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


def number(row: Mapping[str, str], key: str, default: int = 1) -> int:
    """A whole number of the table; empty: not said."""
    return int(float(row[key])) if row[key] else default


def layout_of(row: Mapping[str, str]) -> tuple[str, str]:
    """The row's layout in our words, and the marks of what is not as it was run."""
    if number(row, "EP") > 1:
        raise Unpriced("experts")
    sharding, dp, tp, cp = row["sharding"], number(row, "DP"), number(row, "TP"), number(row, "CP")
    marks, data = "", "fsdp" if "FSDP" in sharding else "ddp"
    if "SHARD_GRAD_OP" in sharding:
        data = "zero2"
    elif "ZeRO-1" in sharding or "distributed" in sharding:
        data = "zero1"
    pipeline = [f"pp={number(row, 'PP')}", f"vpp={number(row, 'VPP')}"]
    words = pipeline if number(row, "PP") > 1 else []
    words += [f"{data}={dp}", f"cp={cp}"]
    sizes = [8, tp // 8] if tp > 8 else [tp]  # over more than a node: its GPUs are the inner axis
    words += [f"tp={size}" for size in reversed(sizes)]
    words += ["sp"] if number(row, "SP", 0) and tp > 1 else []
    if row["kind"] == "train":
        again = row["act_recompute"]
        marks += "" if again in ("", "none", "full") else "+" if by_op(row) else "*"
        how = "selective" if by_op(row) else "full" if again == "full" else "none"
        words.append(f"recompute={how}")
    return ",".join(words), marks


def by_op(row: Mapping[str, str]) -> bool:
    """Are light operators and every second product run again, as torchtitan's selective
    recomputation does (its `_save_list` and `mm_count`)?"""
    return "selective" in row["act_recompute"] and "torchtitan" in row["source"]


def again_s(plan: Plan) -> float:
    """Seconds of a step that it takes to run every second product again."""
    seconds, products = 0.0, 0
    for scope in scopes(plan.graph):
        for node in scope.nodes if scope.loop is not None else ():
            product = operator_of(node).spent_on == "matrix products"
            products += product
            if product and products % 2 == 0:
                once = plan.work[node.name].forward_s
                seconds += scope.weight * plan.request.micro_batches * once
    return seconds


def cluster_of(row: Mapping[str, str], folder: Path) -> str:
    """The cluster of a row: built in, or a file in `folder` with what its software does."""
    name = _CLUSTERS.get(row["gpu"], "")
    if name not in BUILT_IN:
        raise Unpriced(f"no cluster file for {row['gpu']}")
    found = [ran for words, ran in _SOFTWARE.items() if words in row["source"]]
    if not found:
        return name
    compiled = "compile" in row["compile_graph"] or found[0].compiled
    lines = [f'base = "{name}"', f"compiled = {str(compiled).lower()}"]
    lines += [f'steps = "{found[0].steps}"']
    lines += [] if found[0].overlaps else ["contention = 1.0"]
    ahead, behind = found[0].attention.get(name[:4], (0.0, 0.0))
    if ahead:
        lines += ["[kernels.attention]", f"efficiency = {ahead}"]
        lines += ["[kernels.attention_backward]", f"efficiency = {behind}"]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines))
    return str(path)


def plan_row(row: Mapping[str, str], layout: str, batch: int, micro: int, context: int) -> Plan:
    """The plan of a row.  Raises PlanError for what cannot be planned."""
    train = row["kind"] == "train"
    seq = number(row, "seq_len") if train else 1
    more: dict[str, Any] = {}
    mixed = train and row["precision"] != "bf16 pure"
    if mixed:
        more["precision"] = "mixed"
    if train and micro > 1:
        more["micro_batches"] = micro
    if mixed and "MP mode PURE" in row["notes"]:
        more["reduce_dtype"] = "bfloat16"
    with TemporaryDirectory() as folder:
        config = config_of(row["model"], max(seq, context + 2))
        (Path(folder) / "config.json").write_text(json.dumps(config))
        cluster = cluster_of(row, Path(folder))
        return plan_file(
            folder, gpus=None, cluster=cluster, phase="train" if train else "decode",
            batch=batch, seq=seq, dtype=None if mixed else "bfloat16", memory_bytes=2**62,
            mesh=None, pins=(),
            optimizer="adamw" if train else "none", solver="highs", time_limit_s=120.0,
            context=context or None, outputs=("loss",) if train else (), layout=layout, **more,
        )  # fmt: skip


def train_row(row: Mapping[str, str]) -> Priced:
    """A training step: forward and backward of every micro-batch, and one optimizer step."""
    if row["precision"].lower() not in ("bf16", "amp_bf16"):
        raise Unpriced("FP8, FP4")
    layout, marks = layout_of(row)
    batch, dp = number(row, "global_batch"), number(row, "DP")
    passes = number(row, "grad_accum", max(1, batch // (dp * number(row, "micro_batch"))))
    plan = plan_row(row, layout, batch, passes, 0)
    if plan.pipeline is not None and by_op(row):
        raise Unpriced("pipelines that recompute by op")
    compute = computing_s(plan)
    again = again_s(plan) if by_op(row) else 0.0
    published = float(row["mem_gib"] or "nan") * 2**30
    return Priced(
        row["source"], f"{name_of(row)} {layout}{marks}", measured_step_s(row, plan),
        plan.seconds + again, compute + again + plan.casts_s + plan.optimizer_s,
        plan.memory.total / published,
    )  # fmt: skip


def computing_s(plan: Plan) -> float:
    """Seconds of a step that are computing; in a pipeline those of the busiest stage's rank."""
    if plan.pipeline is None:
        return split_seconds(plan)[0]
    return plan.pipeline.per_rank * max(split_seconds(kind)[0] for kind in plan.pipeline.kinds)


def measured_step_s(row: Mapping[str, str], plan: Plan) -> float:
    """Seconds of a step, of whichever figure was published."""
    if row["step_time_s"]:
        return float(row["step_time_s"])
    tokens = number(row, "global_batch") * number(row, "seq_len") / number(row, "n_gpus")
    if row["tokens_s_gpu"]:
        return tokens / float(row["tokens_s_gpu"])
    if not row["mfu_pct"]:
        raise Unpriced("no time is published")
    layers, width, _, _, hidden, vocabulary, _ = _LLAMA[row["model"]]
    weights = layers * (4 * width**2 + 3 * width * hidden) + vocabulary * width
    flops = 6 * weights + 12 * layers * width * number(row, "seq_len")  # nanotron's own count
    return tokens * flops / (float(row["mfu_pct"]) / 100 * _PEAK)


def decode_row(row: Mapping[str, str]) -> Priced:
    """One output token over half of the answer."""
    if row["precision"] != "bf16" or not row["tpot_ms"]:
        raise Unpriced("quantised weights, or no time per output token")
    layout = f"tp={number(row, 'TP')}"
    context = number(row, "isl") + number(row, "osl") // 2
    plan = plan_row(row, layout, number(row, "concurrency"), 1, context)
    compute, _ = split_seconds(plan)
    measured = float(row["tpot_ms"]) / 1000
    name = f"{name_of(row)} {layout}"
    return Priced(row["source"], name, measured, plan.seconds, compute, float("nan"))


def name_of(row: Mapping[str, str]) -> str:
    """Model, machines and sequence."""
    where = f"{number(row, 'n_gpus')} x {_CLUSTERS.get(row['gpu'], row['gpu'])}"
    length = f", {row['seq_len']} tokens" if row["seq_len"] else ""
    return f"{row['model']} on {where}{length}:"


def summary(what: str, rows: list[Priced]) -> str:
    """Median and 90th percentile of the error in percent, and median ratios."""
    errors = np.abs(np.array([row.ratio - 1 for row in rows])) * 100
    ratios = [row.ratio for row in rows]
    alone = [row.compute_s / row.measured_s for row in rows]
    return (
        f"{what[:58]:<60}{len(rows):5d}{np.median(errors):9.1f}{np.percentile(errors, 90):9.1f}"
        f"{np.median(ratios):9.2f}{np.median(alone):9.2f}"
    )


def price_all(rows: list[dict[str, str]]) -> Iterator[tuple[Priced | None, str]]:
    """Each row's price, or why it has none."""
    for row in rows:
        try:
            yield (train_row(row) if row["kind"] == "train" else decode_row(row)), ""
        except Unpriced as why:
            yield None, str(why)
        except PlanError as error:
            yield None, f"refused ({name_of(row)} {error})"


def main() -> None:
    """Print the rows, then what they come to by source."""
    parser = argparse.ArgumentParser(description="Published runs beside their prices.")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--kind", choices=("train", "infer"))
    parser.add_argument("--source", default="", help="words in the name of the source")
    parser.add_argument("--every", type=int, default=1, help="only every n-th row")
    args = parser.parse_args()
    if not args.data.exists():
        print(
            f"skipped: there is no {args.data.name} at {args.data.parent.name}/; give --data FILE"
        )
        return
    with args.data.open(newline="") as file:
        table = [
            row
            for row in csv.DictReader(file)
            if row["kind"] in (args.kind or "train", args.kind or "infer")
            and args.source.lower() in row["source"].lower()
        ][:: args.every]
    priced: list[Priced] = []
    reasons: dict[str, int] = {}
    print(f"{'predicted / measured':<86}{'time':>7}{'compute':>9}{'memory':>8}")
    for found, why in price_all(table):
        if found is None:
            reasons[why] = reasons.get(why, 0) + 1
            continue
        priced.append(found)
        alone = found.compute_s / found.measured_s
        print(f"{found.name:<86}{found.ratio:7.2f}{alone:9.2f}{found.memory:8.2f}", flush=True)
    print(f"\n{'source':<60}{'rows':>5}{'median %':>9}{'90th %':>9}{'ratio':>9}{'compute':>9}")
    for source in sorted({row.source for row in priced}):
        print(summary(source, [row for row in priced if row.source == source]))
    if priced:
        print(summary("all", priced))
    for why, count in sorted(reasons.items(), key=lambda entry: -entry[1]):
        print(f"not priced: {count} rows: {why}")


if __name__ == "__main__":
    main()
