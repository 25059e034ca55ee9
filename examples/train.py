"""Train any plan on text files, under torchrun.

    plan examples/llama.py --gpus 2 --cluster cpu --batch 8 --seq 128
    torchrun --nproc-per-node 2 examples/train.py plan_out --text README.md --steps 200
    torchrun --nproc-per-node 2 examples/train.py plan_out --text README.md --steps 400 --resume

A token is a byte; `--tokens FILE` takes a file of uint16 tokens instead, which is mapped into
memory. Every step draws `--accumulate` micro-batches of the planned size from the step's number
alone, so that a run that goes on sees what it would have seen, on any number of ranks. Rank 0
writes a line for each step to `OUT/losses.csv`. `--alone MODEL.py` trains the model itself in one
process, and leaves the weights that it began with in `OUT/initial.safetensors`, for `--weights`.

The labels of a row are the tokens after it; `--labels same` is for models that shift by themselves,
as those of transformers do.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Batch: TypeAlias = tuple[Tensor, Tensor]  # tokens and labels


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plan", type=Path, help="the folder that `plan` wrote")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files of text")
    parser.add_argument("--tokens", type=Path, help="a file of uint16 tokens")
    parser.add_argument("--labels", choices=("next", "same"), default="next")
    parser.add_argument("--steps", type=int, default=200, help="in all, earlier runs included")
    parser.add_argument("--accumulate", type=int, help="micro-batches of a step, as planned")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps until the full rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="norm of all gradients at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("run"), help="losses and checkpoints")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument(
        "--resume", action="store_true", help="from --out's last checkpoint, if any"
    )
    parser.add_argument("--weights", type=Path, help="a .safetensors file to begin with")
    parser.add_argument("--alone", type=Path, help="the model file, in one process")
    return parser.parse_args()


class Data:
    """Rows of tokens; the last twentieth is held out."""

    def __init__(self, asked: argparse.Namespace, rows: int, length: int) -> None:
        if asked.tokens is not None:
            tokens = np.memmap(asked.tokens, dtype=np.uint16, mode="r")
        else:
            tokens = np.frombuffer(b"".join(p.read_bytes() for p in asked.text), dtype=np.uint8)
        if len(tokens) < 40 * (length + 1):
            raise SystemExit(f"--text or --tokens: {len(tokens)} tokens are too few for {length}")
        held = len(tokens) // 20
        self.parts = {"train": tokens[:-held], "held out": tokens[-held:]}
        self.rows, self.length, self.shift = rows, length, int(asked.labels == "next")
        self.numbers = rows * length  # tokens of a batch
        self.seed = asked.seed

    def batch(self, part: str, number: int) -> Batch:
        """(tokens, labels) of the `number`-th batch: the same wherever it is drawn."""
        tokens = self.parts[part]
        draw = np.random.default_rng((self.seed, number))
        starts = draw.integers(len(tokens) - self.length - 1, size=self.rows)
        rows = np.stack([tokens[s : s + self.length + 1] for s in starts]).astype(np.int64)
        ids = torch.from_numpy(rows)
        return ids[:, : self.length].contiguous(), ids[:, self.shift :][
            :, : self.length
        ].contiguous()


def rate(step: int, asked: argparse.Namespace) -> float:
    """Of the learning rate: up in a line, down by a cosine to a tenth."""
    if step < asked.warmup:
        return (step + 1) / asked.warmup
    done = (step - asked.warmup) / max(asked.steps - asked.warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))


class Sharded:
    """A plan's module on this rank."""

    def __init__(self, asked: argparse.Namespace) -> None:
        module = load(asked.plan / "sharded_model.py")
        if asked.weights is not None:
            self.model = module.ShardedModel.from_checkpoint(asked.weights)
        else:
            self.model = module.ShardedModel()
            self.model.reset_parameters(asked.seed)
        self.names = input_names(list(self.model.INPUTS))
        self.rows, self.length = self.model.INPUTS[self.names[0]].shape
        self.batches = asked.accumulate or self.model.MICRO_BATCHES
        self.ranks, self.first = self.model.mesh.size, self.model.mesh.rank == 0

    def optimizer(self, asked: argparse.Namespace) -> torch.optim.Optimizer:
        undecayed = {"*norm*": {"weight_decay": 0.0}}
        return self.model.optimizer(lr=asked.lr, weight_decay=asked.weight_decay, groups=undecayed)

    def own(self, batch: Batch) -> Batch:
        """This rank's rows; a loader would read these alone."""
        tokens, labels = (self.model.data_shard.of(x) for x in batch)
        return tokens, labels

    def loss(self, batch: Batch) -> Tensor:
        rows = dict(zip(self.names, self.own(batch), strict=True))
        return self.model(**self.model.shard_rows(**rows)).loss

    def step(self, batches: list[Batch]) -> Tensor:
        """The loss of all batches; their gradients are then there."""
        rows = [torch.cat(parts) for parts in zip(*map(self.own, batches), strict=True)]
        named = dict(zip(self.names, rows, strict=True))
        return self.model.step(**named, micro_batches=len(batches))

    def clip(self, most: float) -> Tensor:
        return self.model.clip_grad_norm_(most, error_if_nonfinite=True)


class Alone:
    """The user's model in one process, for comparison; its sizes are those of the plan."""

    def __init__(self, asked: argparse.Namespace) -> None:
        torch.manual_seed(asked.seed)
        self.model = load(asked.alone).build_model()
        if asked.weights is not None:
            self.model.load_state_dict(load_file(asked.weights))
        asked.out.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state_dict(), asked.out / "initial.safetensors")
        planned = load(asked.plan / "sharded_model.py").ShardedModel
        self.names = input_names(list(planned.INPUTS))
        self.rows, self.length = planned.INPUTS[self.names[0]].shape
        self.batches = asked.accumulate or planned.MICRO_BATCHES
        self.ranks, self.first = 1, True

    def optimizer(self, asked: argparse.Namespace) -> torch.optim.Optimizer:
        named = list(self.model.named_parameters())
        norms = [p for name, p in named if "norm" in name]
        others = [p for name, p in named if "norm" not in name]
        groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=asked.lr, weight_decay=asked.weight_decay)

    def loss(self, batch: Batch) -> Tensor:
        return self.model(**dict(zip(self.names, batch, strict=True)))["loss"]

    def step(self, batches: list[Batch]) -> Tensor:
        total = torch.zeros(())
        for batch in batches:  # all have as many labels
            loss = self.loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    def clip(self, most: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), most, error_if_nonfinite=True
        )


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def input_names(names: list[str]) -> tuple[str, str]:
    """(tokens, labels)"""
    others = [name for name in names if name != "labels"]
    if "labels" not in names or len(others) != 1:
        raise SystemExit(f"this loop feeds tokens and `labels`; the plan takes {', '.join(names)}")
    return others[0], "labels"


@torch.no_grad()
def evaluate(side: Sharded | Alone, data: Data, batches: int = 4) -> float:
    """Mean loss of held out batches."""
    return sum(side.loss(data.batch("held out", n)).item() for n in range(batches)) / batches


def resume(side: Sharded, folder: Path, optimizer: Any, schedule: Any, data: Data, say: Any) -> int:
    """The number of the step that a run goes on with: 0 before its first checkpoint."""
    try:
        resumed = side.model.load_checkpoint(folder, optimizer)
    except FileNotFoundError:
        return 0
    schedule.load_state_dict(resumed.extra["schedule"])
    if (before := resumed.extra["tokens"]) != (now := data.numbers * side.batches):
        say(f"steps had {before} tokens, from step {resumed.step} on {now}, at the same rate")
    return resumed.step


def main() -> None:
    asked = parse()
    side = Alone(asked) if asked.alone is not None else Sharded(asked)
    data = Data(asked, side.rows, side.length)
    optimizer = side.optimizer(asked)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, asked))
    say = partial(print, flush=True) if side.first else lambda text: None
    begin = 0
    if asked.resume and isinstance(side, Sharded):
        begin = resume(side, asked.out, optimizer, schedule, data, say)
    asked.out.mkdir(parents=True, exist_ok=True)
    log = (asked.out / "losses.csv" if side.first else Path(os.devnull)).open("a" if begin else "w")
    for step in range(begin, asked.steps):
        start, first = time.perf_counter(), step * side.batches
        batches = [data.batch("train", first + number) for number in range(side.batches)]
        total = side.step(batches).item()
        norm = side.clip(asked.clip).item()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        speed = data.numbers * side.batches / (time.perf_counter() - start) / side.ranks
        say(f"step {step}: loss {total:.4f}, norm {norm:.3f}, {speed:,.0f} tokens/s/rank")
        print(f"{step},{total:.9f},{norm:.9f}", file=log, flush=True)
        if (step + 1) % asked.evaluate_every == 0:
            say(f"step {step}: loss of held out text {evaluate(side, data):.4f}")
        if (step + 1) % asked.save_every == 0 and isinstance(side, Sharded):
            tokens = data.numbers * side.batches
            state = {"schedule": schedule.state_dict(), "tokens": tokens}
            side.model.save_checkpoint(asked.out, optimizer, step=step + 1, extra=state)
    if isinstance(side, Sharded):
        side.model.wait_for_checkpoint()


if __name__ == "__main__":
    main()
