"""Measures CPUs and gloo links, of this machine or of several, and writes them as a cluster file.

Imports torch inside its functions only, so that loading the cost model stays cheap.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

_SMALL = 1 << 10  # bytes: latency only
_LARGE = 1 << 24  # bytes: bandwidth only
_MESSAGE = 1 << 22  # bytes: bandwidth only, also where links are slow
_NODE = 8  # ranks that a "node" of this machine is said to hold


@dataclass(frozen=True, slots=True)
class CpuFigures:
    """What one rank with one thread reaches while the others work too."""

    flops: dict[str, float]  # dtype -> FLOP/s of a product of square matrices
    bytes_per_s: float  # read + written by adding a number to a large tensor
    floor_s: float  # one tiny operation
    all_reduce_s: dict[int, tuple[float, float]]  # ranks -> seconds of (1 kB, 16 MB)


@dataclass(frozen=True, slots=True)
class HostFigures:
    """What the ranks of several hosts reach while all of them work."""

    flops: dict[str, float]
    bytes_per_s: float
    floor_s: float
    # seconds of messages of 1 kB and of 4 MB, sent at the same time by
    inside_s: tuple[float, float]  # all ranks to their neighbours on the same host
    across_s: tuple[float, float]  # the last rank of each host to the first of the next
    together_s: tuple[float, float]  # all ranks to those in their place on the next host


def measure_cpu(ranks: int = 2, timeout_s: float = 120.0) -> str:
    """TOML text of a `cpu` cluster as measured now on this machine.

    Compute is measured with `ranks` processes of one thread at work at once, all-reduces
    with 2, 4, ... up to 8.  Raises `TimeoutError` when a group takes longer than `timeout_s`.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: at least one rank is needed to measure")
    first = _run(ranks, True, timeout_s)
    groups = {size: _run(size, False, timeout_s).all_reduce_s[size] for size in (2, 4, _NODE)}
    figures = CpuFigures(first.flops, first.bytes_per_s, first.floor_s, groups)
    return format_cpu(figures, _memory_bytes(), ranks)


def measure_hosts(per_host: int) -> str:
    """TOML text of a cluster of CPU hosts, as measured now by the ranks of torch.distributed.

    Every rank of the default process group calls it; ranks fill the hosts in order, `per_host` on
    each.  Each returns what it measured itself; all work at once, as when a module runs.  Raises
    ValueError for fewer than two hosts, or hosts of different numbers of ranks.
    """
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    if per_host < 1 or ranks % per_host or ranks == per_host:
        raise ValueError(
            f"{ranks} ranks, {per_host} on each host: expected two hosts or more, with as many"
            " ranks on each"
        )
    host, place = divmod(rank, per_host)
    following, before = ((place + step) % per_host + host * per_host for step in (1, -1))
    beyond, behind = ((rank + step * per_host) % ranks for step in (1, -1))
    ring = (rank + 1) % ranks if place == per_host - 1 else None
    from_ring = (rank - 1) % ranks if place == 0 else None
    alone = per_host == 1
    figures = HostFigures(
        *_compute(),
        inside_s=_message_s(beyond, behind) if alone else _message_s(following, before),
        across_s=_message_s(ring, from_ring),
        together_s=_message_s(beyond, behind),
    )
    return format_hosts(figures, _memory_bytes(), per_host)


def _message_s(to: int | None, source: int | None) -> tuple[float, float]:
    """Seconds of messages of 1 kB and 4 MB to one rank, while as much comes from another.

    Ranks that neither send nor receive wait; all get the time of the slowest.
    """
    import torch
    import torch.distributed as dist

    found: list[float] = []
    for size, times in ((_SMALL, 50), (_MESSAGE, 4)):
        buffers = torch.zeros(2, size // 4).unbind()
        moves = [
            dist.P2POp(kind, buffer, peer)
            for kind, buffer, peer in zip(
                (dist.isend, dist.irecv), buffers, (to, source), strict=True
            )
            if peer is not None
        ]

        def exchange(moves: list[dist.P2POp] = moves) -> None:
            for work in dist.batch_isend_irecv(moves):
                work.wait()

        dist.barrier()
        mine = _seconds(exchange, times) if moves else 0.0
        slowest = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(float(slowest))
    return found[0], found[1]


def format_cpu(figures: CpuFigures, machine_bytes: float, ranks: int) -> str:
    """The cluster file for `figures`.

    An all-reduce of 1 kB over the smallest group of p ranks is launch_s + 2 (p - 1) hop_s, taken
    as equal parts (larger groups measure how processes wait for a core).  One of 16 MB gives the
    rate of each group: 2 (p - 1) / p of it in what is left.
    """
    sizes = sorted(figures.all_reduce_s)
    hop_s = launch_s = figures.all_reduce_s[sizes[0]][0] / (2 * (sizes[0] - 1) + 1)
    source = f"measured on {platform.machine()}, {os.cpu_count()} cores; calibrate --cpu"
    rates = {
        size: 2 * (size - 1) / size * _LARGE / max(large - little, 0.01 * large)
        for size, (little, large) in figures.all_reduce_s.items()
    }
    best = max(rates.values())
    lines = _compute_lines(figures, ranks, machine_bytes, _NODE, source)
    lines += [
        "",
        "[intra_node]  # gloo over the loopback device",
        f"bytes_per_s = {best:.3g}  # {source}",
        "efficiency = 1.0  # the rate is a measured one",
        f"launch_s = {launch_s:.3g}  # {source}",
        f"hop_s = {hop_s:.3g}  # {source}",
        "",
        "[intra_node.group_bytes_per_s]  # ranks share the cores: the more, the slower each",
        *(f"{size} = {rates[size]:.3g}  # {source}" for size in sizes),
        "",
        "[inter_node]",
        "bytes_per_s = 125e6  # an assumption: 1 Gb/s Ethernet",
        "efficiency = 0.9  # an assumption: TCP/IP headers and gloo's copies",
        f"launch_s = {launch_s:.3g}  # as inside the machine",
        "hop_s = 1e-4  # an assumption: a switched local network's round trip",
    ]
    return "\n".join(lines) + "\n"


def format_hosts(figures: HostFigures, machine_bytes: float, per_host: int) -> str:
    """The cluster file for `figures`, each host a node of `per_host` ranks.

    A message takes launch_s + hop_s, taken as equal parts, and its bytes at the link's rate.  The
    latency between hosts is that of messages both ways: who only sends waits for nobody.
    """
    source = "measured by measure_hosts"
    lines = _compute_lines(figures, per_host, machine_bytes, per_host, source)
    links = (
        ("intra_node", _rate(*figures.inside_s), figures.inside_s[0]),
        ("inter_node", _rate(*figures.across_s), figures.together_s[0]),
    )
    for name, rate, little in links:
        lines += [
            "",
            f"[{name}]",
            f"bytes_per_s = {rate:.3g}  # {source}",
            "efficiency = 1.0  # the rate is a measured one",
            f"launch_s = {little / 2:.3g}  # {source}",
            f"hop_s = {little / 2:.3g}  # {source}",
        ]
    rate = per_host * _rate(*figures.together_s)
    lines.append(f"node_bytes_per_s = {rate:.3g}  # {source}")
    return "\n".join(lines) + "\n"


def _rate(little: float, large: float) -> float:
    """Bytes/s of a large message, less the latency of a little one."""
    return _MESSAGE / max(large - little, 0.01 * large)


def _compute_lines(
    figures: CpuFigures | HostFigures,
    ranks: int,
    machine_bytes: float,
    per_node: int,
    source: str,
) -> list[str]:
    """Everything of a cluster file but its links."""
    kernel = ["efficiency = 1.0  # the rates above are measured ones",
              "bandwidth_efficiency = 1.0  # as above",
              "overlap = 1.0  # one thread computes and loads in turn",
              f"floor_s = {figures.floor_s:.3g}  # {source}"]  # fmt: skip
    memory_bytes = 0.85 * machine_bytes / per_node
    lines = [
        f'device = "CPU rank, one thread ({ranks} at work while measured)"',
        f"gpus_per_node = {per_node}  # ranks that are started on one machine",
        f"memory_bytes = {memory_bytes:.3g}  # 85 % of RAM, shared by {per_node} ranks",
        f"bandwidth_bytes_per_s = {figures.bytes_per_s:.3g}  # {source}",
        "processors = 1  # one thread",
        "small_head_cost = 1.0  # products and exponentials run on the same units",
        "decode_pass_s = 0.0  # one processor: passes do not exist",
        "compiled = false  # layers are compiled on CUDA; elsewhere only if asked",
        'steps = "launched"  # there is no capture',
        "host_light_s = 0  # what a kernel takes at least is measured below, the host's part in it",
        "host_product_s = 0  # as above",
        "fused_norms = false  # torch 2.13 writes rms_norm out on the CPU",
        "",
        "[flops]",
        *(f"{dtype} = {rate:.3g}  # {source}" for dtype, rate in figures.flops.items()),
    ]
    for kind in ("matmul", "attention", "decode", "memory"):
        lines += ["", f"[kernels.{kind}]", *kernel]
    return lines


def _run(ranks: int, compute: bool, timeout_s: float) -> CpuFigures:
    """The figures of rank 0 among `ranks` spawned processes, which are always cleaned up."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        workers = [
            context.Process(target=_worker, args=(rank, ranks, compute, store, sender), daemon=True)
            for rank in range(ranks)
        ]
        try:
            for worker in workers:
                worker.start()
            sender.close()
            if not receiver.poll(timeout_s):
                raise TimeoutError(f"{ranks} gloo ranks gave no result within {timeout_s} s")
            figures: CpuFigures = receiver.recv()
            for worker in workers:
                worker.join(timeout_s)
            return figures
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()


def _worker(rank: int, ranks: int, compute: bool, store: str, sender: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        flops: dict[str, float] = {}
        bytes_per_s = floor_s = 0.0
        if compute:
            flops, bytes_per_s, floor_s = _compute()
        times: dict[int, tuple[float, float]] = {}
        if ranks > 1:
            small, large = torch.zeros(_SMALL // 4), torch.zeros(_LARGE // 4)
            times[ranks] = (
                _seconds(lambda: dist.all_reduce(small), 200),
                _seconds(lambda: dist.all_reduce(large), 8),
            )
        dist.barrier()
        if rank == 0:
            sender.send(CpuFigures(flops, bytes_per_s, floor_s, times))
    finally:
        dist.destroy_process_group()


def _compute() -> tuple[dict[str, float], float, float]:
    import torch

    flops: dict[str, float] = {}
    dtypes = {
        "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64
    }  # fmt: skip
    for name, dtype in dtypes.items():
        size = 256 if dtype.itemsize == 2 else 512  # 16 bits are emulated on most CPUs
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        flops[name] = 2 * size**3 / _seconds(lambda a=left, b=right: torch.mm(a, b), 9)
    large, out = torch.ones(1 << 24), torch.ones(1 << 24)
    bytes_per_s = 2 * 4 * (1 << 24) / _seconds(lambda: torch.add(large, 1.0, out=out), 9)
    tiny = torch.ones(16)
    return flops, bytes_per_s, _seconds(lambda: torch.add(tiny, tiny), 2000)


def _seconds(action: Callable[[], object], times: int) -> float:
    """Least seconds of `action` over `times` runs after one to warm up: others disturb upwards."""
    action()
    measured: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        measured.append(time.perf_counter() - start)
    return min(measured)


def _memory_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
