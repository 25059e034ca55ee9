"""Every distributed attention beside one process, torch's own ring, and what this host can do.

    python -m benchmarks.attention [--ranks 2 4] [--seq 1024 4096] [--dtype float32] [--rounds 5]
    python -m benchmarks.attention --decode [--cached 65536]

Causal attention with 8 query and 2 key heads of 64 numbers, on gloo ranks of one thread each; all
sides in the same processes, taking turns.  A round's time is that of its slowest rank, and medians
of all rounds are shown.

ceiling      each rank computes its share of the queries with all keys already there: the same
             kernel in the fewest calls, no messages, nothing to merge but neighbours in position
one process  `F.scaled_dot_product_attention` of the whole, on rank 0 alone, with one thread
torch ring   `_templated_ring_attention` of torch.distributed.tensor.experimental, driven with the
             same CPU kernel (`context_parallel` itself has no causal CPU path), its keys and values
             passed on by `alltoall`
torch gather the same by `allgather`, torch's default: it is no ring, all are fetched at once

`/ceiling` is time over the ceiling's, and `cpu` the same of the processor time of all ranks
together, which says more where ranks share cores with each other or with other work.  Memory is
what one forward and backward step adds to the resident set of a rank at its peak, inputs not
counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.memory import give_back_freed_blocks, peak_bytes, resident_bytes, start_peak
from shardwright.runtime import (
    Axis,
    Layout,
    Mesh,
    RankPool,
    count_collectives,
    gather_kv_attention,
    pass_q_attention,
    ring_attention,
    tree_attention,
    ulysses_attention,
    usp_attention,
    window_attention,
)

QUERY_HEADS, KEY_HEADS, HEAD_DIM = 8, 2, 64

# Forward alone, or forward and backward.
Step = Callable[[bool], object]


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    ranks: int
    length: int
    dtype: torch.dtype
    rounds: int


@dataclass(frozen=True, slots=True)
class Row:
    """One side: medians forward, and forward and backward; peak bytes of a rank."""

    name: str
    seconds: tuple[float, float]
    cpu_seconds: tuple[float, float]
    peak: float


def main() -> None:
    """Print a table per number of ranks and sequence length, or decoding."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--seq", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", action="store_true", help="tree against ring, one new token")
    parser.add_argument("--cached", type=int, default=65536, help="cached tokens of --decode")
    args = parser.parse_args()
    if args.decode:
        for ranks in args.ranks:
            print_decode(Case(ranks, args.cached, getattr(torch, args.dtype), args.rounds))
        return
    for ranks in args.ranks:
        for length in args.seq:
            print_table(Case(ranks, length, getattr(torch, args.dtype), args.rounds))


def print_table(case: Case) -> None:
    """All sides of one case."""
    with RankPool(case.ranks) as pool:
        ranks = pool.run(measure, case, timeout_s=3600.0)
    rows = [_over_ranks([rank[i] for rank in ranks]) for i in range(len(ranks[0]))]
    ceiling = next(row for row in rows if row.name == "ceiling")
    print(f"\n{case.ranks} ranks, {case.length} tokens, {str(case.dtype).removeprefix('torch.')}")
    columns = "{:12}" + " {:>12} {:>9} {:>6}" * 2 + " {:>10}"
    heads = ("forward", "/ceiling", "cpu", "and backward", "/ceiling", "cpu", "memory")
    print(columns.format("", *heads))
    for row in rows:
        cells: list[str] = []
        for which in (0, 1):
            cells += [
                f"{row.seconds[which] * 1e3:.1f} ms",
                f"{row.seconds[which] / ceiling.seconds[which]:.2f}",
                f"{row.cpu_seconds[which] / ceiling.cpu_seconds[which]:.2f}",
            ]
        print(columns.format(row.name, *cells, f"{row.peak / 1e6:.1f} MB"), flush=True)


def _over_ranks(of_ranks: list[Measured]) -> Row:
    """Of each round the slowest rank, and the processor time of all."""

    def wall(which: int) -> float:
        rounds = zip(*(rank.seconds[which] for rank in of_ranks), strict=True)
        return median(max(of_round) for of_round in rounds)

    def cpu(which: int) -> float:
        rounds = zip(*(rank.cpu_seconds[which] for rank in of_ranks), strict=True)
        return median(sum(of_round) for of_round in rounds)

    peak = max(rank.peak for rank in of_ranks)
    return Row(of_ranks[0].name, (wall(0), wall(1)), (cpu(0), cpu(1)), peak)


# --- in each rank --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """One side on one rank: seconds of each round (forward, forward and backward), peak bytes."""

    name: str
    seconds: tuple[list[float], list[float]]
    cpu_seconds: tuple[list[float], list[float]]
    peak: int


def measure(case: Case) -> list[Measured]:
    """All sides by turns, after one step of each that is not counted."""
    steps = make_steps(case)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    cpu: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for step in steps.values():
        dist.barrier()
        step(True)
    for number in range(case.rounds):
        names = list(steps)
        for name in names if number % 2 == 0 else reversed(names):
            for which in (0, 1):
                dist.barrier()
                start, cpu_start = time.perf_counter(), time.process_time()
                steps[name](which == 1)
                seconds[name][which].append(time.perf_counter() - start)
                cpu[name][which].append(time.process_time() - cpu_start)
    give_back_freed_blocks()  # not before: every new block would be timed with its page faults
    return [Measured(name, seconds[name], cpu[name], _peak(steps[name])) for name in steps]


def _peak(step: Step) -> int:
    dist.barrier()
    before = resident_bytes()
    start_peak()
    step(True)
    return peak_bytes() - before


def whole_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the result, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    q, grad = torch.randn(2, 1, QUERY_HEADS, case.length, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, 1, KEY_HEADS, case.length, HEAD_DIM, generator=generator)
    return q.to(case.dtype), k.to(case.dtype), v.to(case.dtype), grad.to(case.dtype)


def make_steps(case: Case) -> dict[str, Step]:
    """The sides by name."""
    axis = Mesh.create({"cp": case.ranks})["cp"]
    whole = whole_inputs(case)
    layout = Layout.zigzag(case.length, case.ranks)
    zigzag = partial(_sharded, whole, layout, axis.rank, group=axis, causal=True)
    steps: dict[str, Step] = {
        "ceiling": _ceiling(whole, layout, axis.rank),
        "one process": _one_process(whole, axis.rank),
        "torch ring": _torch_ring(whole, layout, axis, "alltoall"),
        "torch gather": _torch_ring(whole, layout, axis, "allgather"),
        "ring": zigzag(ring_attention),
        "gather": zigzag(gather_kv_attention),
        "pass q": zigzag(pass_q_attention),
        "ulysses": zigzag(ulysses_attention),
    }
    if case.ranks % 2 == 0 and case.ranks > 2:
        mesh = Mesh.create({"ring": case.ranks // 2, "ulysses": 2})
        nested = Layout.zigzag(case.length, case.ranks // 2).split(2)
        axes = {"ring": mesh["ring"], "ulysses": mesh["ulysses"]}
        steps["usp"] = _sharded(whole, nested, mesh.rank, usp_attention, causal=True, **axes)
    window = case.length // 8
    blocks = Layout.contiguous(case.length, case.ranks)
    steps["window 1/8"] = _sharded(
        whole, blocks, axis.rank, window_attention, group=axis, window=window
    )
    return steps


def _leaves(whole: tuple[Tensor, ...], layout: Layout, rank: int) -> list[Tensor]:
    return [layout.shard(x, 2, rank).requires_grad_(i < 3) for i, x in enumerate(whole)]


def _run(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, backward: bool
) -> None:
    if not backward:
        with torch.no_grad():
            attention(q, k, v)
        return
    torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def _sharded(
    whole: tuple[Tensor, ...],
    layout: Layout,
    rank: int,
    attention: Callable[..., Tensor],
    **options: Any,
) -> Step:
    return partial(
        _run, partial(attention, layout=layout, **options), *_leaves(whole, layout, rank)
    )


def _one_process(whole: tuple[Tensor, ...], rank: int) -> Step:
    if rank > 0:
        return lambda backward: None
    leaves = [x.clone().requires_grad_(i < 3) for i, x in enumerate(whole)]
    attention = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return partial(_run, attention, *leaves)


def _ceiling(whole: tuple[Tensor, ...], layout: Layout, rank: int) -> Step:
    """Two chunks of queries, each over the keys before it and over its own."""
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kernel_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    _, k, v, _ = whole
    q, _, _, grad = (x.detach() for x in _leaves(whole, layout, rank))
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor, bool]] = []
    for row, position, length, _ in layout.runs[rank]:
        own, own_grad = q.narrow(2, row, length), grad.narrow(2, row, length)
        if position:
            calls.append((own, k[:, :, :position], v[:, :, :position], own_grad, False))
        keys, values = k.narrow(2, position, length), v.narrow(2, position, length)
        calls.append((own, keys, values, own_grad, True))

    def step(backward: bool) -> None:
        for own, keys, values, own_grad, causal in calls:
            out, lse = kernel(own, keys, values, 0.0, causal)
            if backward:
                kernel_backward(own_grad, own, keys, values, out, lse, 0.0, causal)

    return step


def _torch_ring(whole: tuple[Tensor, ...], layout: Layout, axis: Axis, method: str) -> Step:
    """torch's private ring; its zigzag is `Layout.zigzag`."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as private

    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kernel_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    q, k, v, grad = (x.detach() for x in _leaves(whole, layout, axis.rank))

    def step(backward: bool) -> None:
        private.set_rotate_method(method)
        out, lse = private._templated_ring_attention(  # pyright: ignore[reportPrivateUsage]
            axis.group, 2, kernel, q, k, v, is_causal=True, dropout_p=0.0
        )
        if backward:
            private._templated_ring_attention_backward(  # pyright: ignore[reportPrivateUsage]
                axis.group, 2, kernel_backward, grad, "grad_out", q, k, v, out, lse,
                is_causal=True, dropout_p=0.0,
            )  # fmt: skip

    return step


# --- decoding ------------------------------------------------------------------------------------


def print_decode(case: Case) -> None:
    """One new token over a cache that is sharded by sequence: tree, and ring."""
    with RankPool(case.ranks) as pool:
        ranks = pool.run(measure_decode, case, timeout_s=600.0)
    rows: dict[str, tuple[float, float, int]] = {}
    for name in ("tree", "ring"):
        rounds = zip(*(rank[name][0] for rank in ranks), strict=True)
        _, nbytes, messages = ranks[0][name]
        rows[name] = (median(max(r) for r in rounds), nbytes, messages)
    print(f"\ndecode: {case.ranks} ranks, {case.length} cached tokens, {case.dtype}")
    for name, (seconds, nbytes, messages) in rows.items():
        print(f"{name:5} {seconds * 1e3:9.2f} ms  {nbytes:12,.0f} bytes in {messages} messages")
    (tree, tree_bytes, _), (ring, ring_bytes, _) = rows["tree"], rows["ring"]
    print(f"ring / tree: time {ring / tree:.1f}, bytes {ring_bytes / tree_bytes:.0f}", flush=True)


def measure_decode(case: Case) -> dict[str, tuple[list[float], float, int]]:
    """By algorithm: seconds of each round, bytes and messages received."""
    axis = Mesh.create({"cp": case.ranks})["cp"]
    q, k, v, _ = whole_inputs(case)
    layout = Layout.contiguous(case.length, case.ranks)
    token = Layout.contiguous(1, case.ranks, start=case.length - 1)
    q = q[:, :, -1:].contiguous()
    k, v = (layout.shard(x, 2, axis.rank) for x in (k, v))
    options: dict[str, Any] = {"group": axis, "causal": True, "layout": layout}
    steps: dict[str, Callable[[], Tensor]] = {
        "tree": partial(tree_attention, q, k, v, **options),
        "ring": partial(ring_attention, q, k, v, query_layout=token, **options),
    }
    results: dict[str, tuple[list[float], float, int]] = {}
    for name, step in steps.items():
        with count_collectives() as counter:
            step()
        seconds: list[float] = []
        for _ in range(4 * case.rounds):
            dist.barrier()
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        results[name] = (seconds, counter.bytes(), counter.messages())
    return results


if __name__ == "__main__":
    from benchmarks.attention import main as run  # so that ranks find the functions by this name

    run()
