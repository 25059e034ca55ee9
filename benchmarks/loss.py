"""Time and memory of a head and its loss: `python -m benchmarks.loss [--tokens N] [--classes V]`.

Forward and backward of each way to compute them, in turns; on a CUDA device where there is one.
Peak memory is what is alive beside inputs and weights.  `--sizes` tries chunks and blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.facts import logits as sizes
from shardwright.runtime import ops
from shardwright.runtime.live import LiveBytes

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CUDA = torch.cuda.is_available()
IGNORED = -100


def library(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers do."""
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def library_in_half(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Faster, but with probabilities that are rounded."""
    return F.cross_entropy(F.linear(x, weight), labels)


def of_logits(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours where the logits are returned."""
    return ops.cross_entropy(F.linear(x, weight), labels, dtype=torch.float32)


def in_chunks(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours where they are not."""
    return ops.linear_cross_entropy(x, weight, labels, dtype=torch.float32)


WAYS: dict[str, Loss] = {
    "F.cross_entropy of float32": library,
    "F.cross_entropy in bf16": library_in_half,
    "ops.cross_entropy": of_logits,
    "ops.linear_cross_entropy": in_chunks,
}


@dataclass(frozen=True)
class Problem:
    """A head of `weight` (v, k) in bf16, tokens x (t, k) and labels (t), every seventh ignored."""

    x: Tensor
    weight: Tensor
    labels: Tensor

    @staticmethod
    def of(tokens: int, classes: int, width: int) -> Problem:
        """Random numbers, logits about as large as a model's."""
        torch.manual_seed(0)
        device = "cuda" if CUDA else "cpu"
        x = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        weight = torch.randn(classes, width, device=device).mul_(2 * width**-0.5)
        labels = torch.randint(0, classes, (tokens,), device=device)
        labels[::7] = IGNORED
        return Problem(x, weight.bfloat16().requires_grad_(), labels)

    def seconds(self, loss: Loss) -> float:
        """One forward and backward pass; on the CPU processor time, which others disturb least."""
        clock = time.perf_counter if CUDA else time.process_time
        _wait()
        start = clock()
        self.gradients(loss)
        _wait()
        return clock() - start

    def gradients(self, loss: Loss) -> Sequence[Tensor]:
        """Of x and of the weight."""
        return torch.autograd.grad(loss(self.x, self.weight, self.labels), (self.x, self.weight))

    def peak(self, loss: Loss) -> int:
        """Bytes that are alive at most, beside what was there before."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.gradients(loss)
            return torch.cuda.max_memory_allocated() - before
        with LiveBytes([self.x, self.weight, self.labels]) as live:
            before = live.now
            self.gradients(loss)
        return live.peak - before

    def errors(self, loss: Loss, exact: Sequence[Tensor]) -> list[float]:
        """Largest difference of each gradient, beside its largest number."""
        return [
            float((a.float() - b).abs().max() / b.abs().max())
            for a, b in zip(self.gradients(loss), exact, strict=True)
        ]

    def exact(self) -> Sequence[Tensor]:
        """Gradients in float32 throughout."""
        wide = [t.detach().float().requires_grad_() for t in (self.x, self.weight)]
        return Problem(wide[0], wide[1], self.labels).gradients(in_chunks)


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def times(problem: Problem, ways: Sequence[Loss], rounds: int) -> list[float]:
    """The median of each in rounds in which they take turns."""
    for loss in ways:
        problem.seconds(loss)
    found = [[problem.seconds(loss) for loss in ways] for _ in range(rounds)]
    return [median(row[i] for row in found) for i in range(len(ways))]


def compare(problem: Problem, rounds: int) -> None:
    """A row for each way."""
    took, exact = times(problem, list(WAYS.values()), rounds), problem.exact()
    print(f"{'':28}{'time':>10}{'ratio':>7}{'peak':>10}   error of gradients (x, weight)")
    for (name, loss), seconds in zip(WAYS.items(), took, strict=True):
        errors = " ".join(f"{error:.1e}" for error in problem.errors(loss, exact))
        peak = f"{problem.peak(loss) / 1e6:.0f} MB"
        print(f"{name:28}{seconds * 1e3:7.1f} ms{seconds / took[0]:7.2f}{peak:>10}   {errors}")


def try_sizes(problem: Problem, rounds: int) -> None:
    """Chunks and blocks half and twice as large as they are, and further on."""
    for name in ("CHUNK_BYTES", "BLOCK_NUMBERS"):
        usual = getattr(sizes, name)
        for shift in (-3, -2, -1, 0, 1, 2, 3):
            setattr(sizes, name, int(usual * 2.0**shift))
            took = times(problem, (of_logits, in_chunks), rounds)
            texts = "".join(f"{seconds * 1e3:10.1f} ms" for seconds in took)
            print(f"{name} {getattr(sizes, name):>12,}{texts}")
        setattr(sizes, name, usual)


def main() -> None:
    """Compare, and try sizes where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192 if CUDA else 256)
    parser.add_argument("--classes", type=int, default=128_256 if CUDA else 32_000)
    parser.add_argument("--width", type=int, default=4096 if CUDA else 256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", action="store_true")
    asked = parser.parse_args()
    problem = Problem.of(asked.tokens, asked.classes, asked.width)
    print(f"{asked.tokens} tokens of {asked.width} numbers, {asked.classes} classes, bf16")
    compare(problem, asked.rounds)
    if asked.sizes:
        try_sizes(problem, asked.rounds)


if __name__ == "__main__":
    main()
