"""One layer of experts on gloo ranks: ours beside the same layer dense, and replicated.

    python -m benchmarks.moe [--ranks 2 4] [--rounds 7] [--skew 0 1]

All compute the same layer, h wide, on as many tokens, with ranks of one thread each:

- dense:      each rank has all experts and its share of the tokens, and runs every expert on every
              token, as a layer without dispatch must;
- replicated: each rank has all experts and its share of the tokens, and runs the chosen ones;
- dispatch:   each rank has its share of the experts and of the tokens (`expert_axis`);
- partial:    each rank has its share of the experts and all tokens; results, and gradients of the
              tokens, are added up (`partial=True` between two all-reduces).

A step is forward and backward until each rank has the whole gradient of the experts that it holds:
dense and replicated experts add theirs up over the ranks.  `--skew` s: experts are chosen with
probabilities like rank ** -s; 0 is balanced.  The variants take turns in the same processes; a
round's time is that of its slowest rank, and medians of all rounds are compared.  Results and
gradients are compared too.  "step / dense" is the time of a step over dense's, below 1 where it is
faster; "received" are the busiest rank's bytes in a step, "experts" the bytes of experts on a rank;
"flops / dense" are those of the busiest rank over dense's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.runtime import Axis, Mesh, RankPool, count_collectives, moe

VARIANTS = ("dense", "replicated", "dispatch", "partial")
Layer: TypeAlias = Callable[[], tuple[Tensor, list[Tensor]]]  # -> result, gradients of experts


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of the layer, and the number of all tokens."""

    tokens: int = 2048
    hidden: int = 384
    inner: int = 512
    experts: int = 16
    choices: int = 2


@dataclass(frozen=True, slots=True)
class Run:
    """What one rank measured of one variant."""

    forward: list[float]  # seconds of each round
    step: list[float]
    bytes: float  # received in a step
    weights: int  # bytes of experts that it holds
    pairs: int  # (token, expert) pairs that it computed
    result: Tensor  # sum over all tokens
    gradient: Tensor  # of the first projection of expert 0, on the rank that has it


def main() -> None:
    """Print one table per number of ranks and skew."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skew", nargs="+", type=float, default=[0.0, 1.0])
    args = parser.parse_args()
    for ranks in args.ranks:
        with RankPool(ranks) as pool:
            for skew in args.skew:
                runs = pool.run(measure, Size(), skew, args.rounds, timeout_s=900.0)
                report(ranks, skew, runs)


def report(ranks: int, skew: float, runs: list[dict[str, Run]]) -> None:
    """One line per variant, and how many times as fast a step with sent tokens is."""
    print(f"\n{ranks} ranks, skew {skew:g}")
    columns = "{:10} {:>10} {:>10} {:>12} {:>17} {:>11} {:>9} {:>13}"
    titles = ("", "forward", "step", "step / dense", "step / replicated", "received", "experts")
    print(columns.format(*titles, "flops / dense"))
    seconds = {name: _median(runs, name, "step") for name in VARIANTS}
    dense_pairs = max(run["dense"].pairs for run in runs)
    for name in VARIANTS:
        mine = [run[name] for run in runs]
        print(
            columns.format(
                name,
                f"{_median(runs, name, 'forward') * 1e3:.1f} ms",
                f"{seconds[name] * 1e3:.1f} ms",
                f"{seconds[name] / seconds['dense']:.3f}",
                f"{seconds[name] / seconds['replicated']:.3f}",
                f"{max(run.bytes for run in mine) / 1e6:.2f} MB",
                f"{mine[0].weights / 1e6:.1f} MB",
                f"{max(run.pairs for run in mine) / dense_pairs:.3f}",
            ),
        )
    times = (seconds[name] / seconds["dispatch"] for name in ("dense", "replicated"))
    print(
        "dispatch is {:.2f} times as fast as dense, {:.2f} as replicated".format(*times), flush=True
    )
    _compare(runs)


def _median(runs: list[dict[str, Run]], name: str, part: str) -> float:
    return median(map(max, zip(*(getattr(run[name], part) for run in runs), strict=True)))


def _compare(runs: list[dict[str, Run]]) -> None:
    """Raise AssertionError unless all variants gave the same."""
    want = runs[0]["dense"]
    for name in VARIANTS:
        got = runs[0][name]
        for a, b in ((got.result, want.result), (got.gradient, want.gradient)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=f"{name} differs")


# --- in one rank ---------------------------------------------------------------------------------


def measure(size: Size, skew: float, rounds: int) -> dict[str, Run]:
    """Run all variants in turns."""
    axis = _axis()
    layers = {name: _Variant(name, size, skew, axis) for name in VARIANTS}
    forward: dict[str, list[float]] = {name: [] for name in VARIANTS}
    step: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):  # the first round warms up
        for name, layer in layers.items():
            axis.reduce(torch.zeros(1))  # all ranks begin together
            begin = time.perf_counter()
            out = layer.forward()
            middle = time.perf_counter()
            layer.backward(out)
            if number:
                forward[name].append(middle - begin)
                step[name].append(time.perf_counter() - begin)
    return {name: layer.summary(forward[name], step[name]) for name, layer in layers.items()}


def _axis() -> Axis:
    import torch.distributed as dist

    return Mesh.create({"ep": dist.get_world_size()})["ep"]


class _Variant:
    """One way to run the layer on this rank."""

    def __init__(self, name: str, size: Size, skew: float, axis: Axis) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name, self.size, self.axis = name, size, axis
        e, f, h = size.experts, size.inner, size.hidden
        up = torch.randn(e, 2 * f, h, generator=generator) / h**0.5
        down = torch.randn(e, h, f, generator=generator) / f**0.5
        x = torch.randn(size.tokens, h, generator=generator)
        chances = torch.arange(1, e + 1).double() ** -skew
        indices = torch.multinomial(
            chances.expand(size.tokens, -1), size.choices, generator=generator
        )
        weights = torch.rand(size.tokens, size.choices, generator=generator)
        own, mine = axis.block(size.tokens), axis.block(e)
        tokens = slice(None) if name == "partial" else slice(own.start, own.stop)
        held = slice(mine.start, mine.stop) if name in ("dispatch", "partial") else slice(None)
        self.x, self.indices = x[tokens].clone().requires_grad_(), indices[tokens]
        self.weights = weights[tokens]
        self.up = up[held].clone().requires_grad_()
        self.down = down[held].clone().requires_grad_()
        self.pairs = int(((indices >= mine.start) & (indices < mine.stop)).sum())
        if name == "replicated":
            self.pairs = self.indices.numel()
        elif name == "dense":
            self.pairs = len(self.x) * e

    def forward(self) -> Tensor:
        """The result for this rank's tokens (partial: for all)."""
        self.x.grad = self.up.grad = self.down.grad = None
        given = (self.x, self.indices, self.weights, self.up, self.down)
        if self.name == "dense":
            return _dense(*given)
        if self.name == "replicated":
            return moe(*given)
        if self.name == "dispatch":
            return moe(*given, expert_axis=self.axis)
        given = (self.axis.copy(self.x), *given[1:])  # its gradient is a summand on each rank
        return self.axis.all_reduce(moe(*given, expert_axis=self.axis, partial=True))

    def backward(self, out: Tensor) -> None:
        """Gradients, added up over ranks where several hold the same experts."""
        out.sum().backward()
        if self.name in ("dense", "replicated"):
            for leaf in (self.up, self.down):
                assert leaf.grad is not None
                leaf.grad = self.axis.reduce(leaf.grad, phase="backward")

    def summary(self, forward: list[float], step: list[float]) -> Run:
        """Run once more, counting."""
        with count_collectives() as counter:
            out = self.forward()
            self.backward(out)
        moved = counter.bytes()
        total = out.detach().sum(0)
        total = total if self.name == "partial" else self.axis.reduce(total)
        assert self.up.grad is not None
        held = self.up.nbytes + self.down.nbytes
        return Run(forward, step, moved, held, self.pairs, total, self.up.grad[0])


def _dense(x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token, weighed by zero where it was not chosen."""
    shares = torch.zeros(len(x), len(up)).scatter_add(1, indices, weights)
    out = torch.zeros_like(x)
    for first, second, share in zip(up.unbind(0), down.unbind(0), shares.unbind(1), strict=True):
        gate, inner = F.linear(x, first).chunk(2, dim=-1)
        out = out + F.linear(F.silu(gate) * inner, second) * share.unsqueeze(1)
    return out


if __name__ == "__main__":
    main()
