"""What compiled layers gain on one core, and what compiling them takes.

    python -m benchmarks.compiled [MODEL ...] [--batch 4] [--seq 256] [--rounds 9]

The examples, planned for one process.  Two modules with the same weights take turns, one as it is
and one whose layers inductor compiles, forward and backward; a row compares their medians, the
losses of both, and says how long the first step took that compiled and how many graphs it made.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

_EXAMPLES = Path(__file__).parents[1] / "examples"
_MODELS = ("llama", "gpt", "encoder_decoder")


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(_MODELS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise SystemExit(
            "inductor needs a C++ compiler for the CPU: there is neither g++ nor clang++"
        )
    torch.set_num_threads(1)
    print(
        f"{'ms per step':18}{'eager':>9}{'compiled':>10}{'ratio':>8}{'loss diff':>11}  first step"
    )
    for name in asked.models:
        print(row(name, asked.batch, asked.seq, asked.rounds), flush=True)


def row(name: str, batch: int, seq: int, rounds: int) -> str:
    """One model, both ways."""
    made, example = planned(name, batch, seq), load(_EXAMPLES / f"{name}.py")
    torch.manual_seed(0)
    weights, inputs = example.build_model().state_dict(), example.example_inputs(batch, seq)
    eager, compiled = (made.ShardedModel.from_state_dict(weights, compile=False) for _ in range(2))
    compiled.compile_layers()
    counters.clear()
    first = seconds(compiled, inputs)[0]
    graphs = counters["stats"]["unique_graphs"]
    took: dict[Any, list[float]] = {eager: [], compiled: []}
    losses: dict[Any, float] = {}
    for _ in range(rounds):
        for model, own in took.items():
            spent, losses[model] = seconds(model, inputs)
            own.append(spent)
    ours, theirs = median(took[eager]), median(took[compiled])
    difference = abs(losses[eager] - losses[compiled])
    times = f"{ours * 1e3:9.1f}{theirs * 1e3:10.1f}{ours / theirs:7.2f}x{difference:11.1e}"
    return f"{name:18}{times}  {first:.1f} s, {graphs} graphs"


def planned(name: str, batch: int, seq: int) -> Any:
    """The generated module of an example for one process."""
    from shardwright import plan

    example = load(_EXAMPLES / f"{name}.py")
    made = plan(example.build_model(), example.example_inputs(batch, seq), gpus=1, cluster="cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"compiled_{name}.py"
        made.write_module(str(path))
        return load(path)


def load(path: Path) -> Any:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(model: Any, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """(seconds of forward and backward, loss)"""
    own = model.shard_inputs(**inputs)
    begin = time.perf_counter()
    loss = model(**own).loss
    loss.backward()
    spent = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    return spent, loss.item()


if __name__ == "__main__":
    main()
