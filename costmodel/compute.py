"""Seconds for one operation on one GPU.

`op_s` is what the planner calls, on whole arrays: a roofline with a floor and measured
efficiencies.  `matmul_s` and `attention_s` know the shapes, and with them the waves of tiles that
decide the time of small problems.

Efficiencies are fitted by `calibrate.py`; held-out errors are printed by
`benchmarks/costmodel.py`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .machines.cluster import Cluster, Kernel, Tiles, short_dtype

Floats: TypeAlias = NDArray[np.float64]
Number: TypeAlias = "float | Floats"
Kind: TypeAlias = Literal["matmul", "attention", "decode", "memory", "mixed", "optimizer"]

_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "fp8": 1}

# Rows x columns of the result that one processor computes at a time: the shapes that CUTLASS and
# cuBLAS choose from.  The model takes the fastest, as their heuristics try to.
_TILE_SHAPES = ((256, 128), (128, 256), (128, 128), (64, 256), (64, 128), (64, 64))
_K_SPLITS = (1, 2, 4, 8)  # a long inner dimension is also cut, to give every processor a tile
# A matmul alone meets the power limit only after so long (gemm_bfloat16_h100_sxm.csv); a step in
# which one follows the other is always there
_BURST_S = 3e-4

_QUERY_BLOCK = 128  # query rows that one processor of a flash-attention kernel takes


def op_s(
    flops: Number, bytes_moved: Number, dtype: str, cluster: Cluster, kind: Kind = "matmul"
) -> Number:
    """Seconds for an operation of `flops` FLOP that reads and writes `bytes_moved` bytes.

    Works elementwise on arrays.  For `kind="memory"` (elementwise ops, copies), `"mixed"` (casts,
    norms, each a kernel of torch's) and `"optimizer"` only the traffic counts: their
    arithmetic always hides behind it, and integers have no FLOP rate.
    An operation of 0 FLOP and 0 bytes still pays the kernel's floor.

    >>> from shardwright.costmodel.machines.cluster import load_cluster
    >>> h100 = load_cluster("h100")
    >>> round(op_s(2 * 8192**3, 3 * 2 * 8192**2, "bf16", h100) * 1e3, 1)
    1.5
    """
    kernel = _kernel(cluster, kind)
    streams = kind in ("memory", "mixed", "optimizer")
    rate = 1.0 if streams else _rate(cluster, dtype)
    work = 0.0 * np.asarray(flops) if streams else np.asarray(flops)
    return _plain(
        kernel_s(work, np.asarray(bytes_moved), rate, cluster.bandwidth_bytes_per_s, kernel)
    )


def elementwise_s(bytes_moved: Number, cluster: Cluster, *, mixed: bool = False) -> Number:
    """Seconds for an elementwise kernel that reads and writes `bytes_moved` bytes in all; `mixed`:
    one that adds up rows or changes formats as it reads."""
    return op_s(0.0, bytes_moved, "bf16", cluster, "mixed" if mixed else "memory")


def matmul_s(
    m: Number,
    n: Number,
    k: Number,
    batch: Number,
    dtype: str,
    cluster: Cluster,
    *,
    burst: bool = False,
) -> Number:
    """Seconds for `batch` products [m, k] x [k, n].

    1. The result is cut into tiles; `processors` of them are computed at once: a wave.
    2. A wave costs its FLOP at one processor's rate, and `wave_s` to start and drain.
    3. Cutting k gives more tiles and costs `split_s` for adding the parts.
    4. The fastest of the tile shapes and cuts counts; it grows by `throttle`, since a step of
       products runs at the clock that the power limit leaves.  In a `burst`, a product alone as in
       tables of kernels, only what is beyond 0.3 ms does.
    5. Traffic overlaps with it as in `Kernel`.

    A cluster without `tiles` gives the roofline of `op_s`; one that `streams_rows` reads the
    weight of a single row as a light kernel does.
    """
    peak = _rate(cluster, dtype)
    m_, n_, k_, b_ = (np.asarray(value, dtype=float) for value in (m, n, k, batch))
    moved = b_ * (m_ * k_ + n_ * k_ + m_ * n_) * _ITEMSIZE[short_dtype(dtype)]
    if cluster.tiles is None:
        return op_s(2.0 * b_ * m_ * n_ * k_, moved, dtype, cluster)
    seconds = tiled_s(
        (m_, n_, k_, b_), moved, peak, cluster.bandwidth_bytes_per_s, cluster.processors,
        cluster.tiles, burst=burst,
    )  # fmt: skip
    if cluster.streams_rows:
        streamed = np.minimum(seconds, np.asarray(elementwise_s(moved, cluster)))
        seconds = np.where(m_ <= 1, streamed, seconds)
    return _plain(seconds)


def attention_s(
    batch: Number,
    heads_q: Number,
    heads_kv: Number,
    seq_q: Number,
    seq_kv: Number,
    head_dim: Number,
    dtype: str,
    cluster: Cluster,
    causal_fraction: float = 1.0,
    *,
    values_in_keys: bool = False,
    split_keys: bool = False,
    backward: bool = False,
) -> Number:
    """Seconds for flash attention; `causal_fraction` of the scores are computed.

    Forward, or as many products in the kernels of `backward`, which does 2.5 times as many.

    0.5 for causal self-attention, 1 without a mask.  One query row per sequence (`seq_q == 1`) is
    decoding: bound by reading keys and values.  Otherwise blocks of 128 query rows are spread over
    the processors, and the longest row of keys is the shortest possible time, unless `split_keys`:
    over a cache, kernels share out the keys of a few blocks among all processors (FlashAttention-2
    does where blocks fill less than 80 % of them, `num_splits_heuristic`).  With `values_in_keys`
    decoding reads the keys alone.
    """
    b, hq, hk, sq, sk, d = (
        np.asarray(value, dtype=float)
        for value in (batch, heads_q, heads_kv, seq_q, seq_kv, head_dim)
    )
    peak = _rate(cluster, dtype)
    itemsize = _ITEMSIZE[short_dtype(dtype)]
    read = 1 if values_in_keys else 2
    decode = decode_s((b, hq, hk, sk, d), peak, cluster, itemsize, cluster.decode, read)
    context = context_s(
        (b, hq, hk, sq, sk, d), peak, cluster, itemsize,
        cluster.attention_backward if backward else cluster.attention, causal_fraction,
        0.0 if split_keys else 1.0,
    )  # fmt: skip
    return _plain(np.where((sq == 1) & (not backward), decode, context))


def kernel_s(
    flops: Floats, bytes_moved: Floats, peak: float, bandwidth: float, kernel: Kernel | Tiles
) -> Floats:
    """The formula of `Kernel`, on arrays."""
    compute = flops / (kernel.efficiency * peak)
    traffic = bytes_moved / (kernel.bandwidth_efficiency * bandwidth)
    return kernel.floor_s + _overlapped(compute, traffic, kernel.overlap)


def tiled_s(
    shape: tuple[Floats, Floats, Floats, Floats],
    bytes_moved: Floats,
    peak: float,
    bandwidth: float,
    processors: int,
    tiles: Tiles,
    *,
    burst: bool = True,
) -> Floats:
    """`matmul_s` on arrays (m, n, k, batch), with the parameters given."""
    m, n, k, batch = shape
    rate = tiles.efficiency * peak / processors
    best = np.full(np.broadcast(m, n, k, batch).shape, np.inf)
    for rows, columns in _TILE_SHAPES:
        count = batch * np.ceil(m / rows) * np.ceil(n / columns)
        for split in _K_SPLITS:
            waves = np.ceil(count * split / processors)
            per_wave = 2 * rows * columns * k / split / rate + tiles.wave_s
            best = np.minimum(best, waves * per_wave + (tiles.split_s if split > 1 else 0.0))
    best = best + tiles.throttle * np.maximum(0.0, best - (_BURST_S if burst else 0.0))
    traffic = bytes_moved / (tiles.bandwidth_efficiency * bandwidth)
    return tiles.floor_s + _overlapped(best, traffic, tiles.overlap)


def context_s(
    shape: tuple[Floats, Floats, Floats, Floats, Floats, Floats],
    peak: float,
    cluster: Cluster,
    itemsize: int,
    kernel: Kernel,
    causal_fraction: float,
    least: float = 1.0,
) -> Floats:
    """Attention over many query rows, on arrays (batch, heads_q, heads_kv, seq_q, seq_kv, dim).

    The busiest processor visits the keys of `least` rows of blocks or more.
    """
    b, hq, hk, sq, sk, d = shape
    blocks = b * hq * np.ceil(sq / _QUERY_BLOCK) / cluster.processors  # per processor
    keys = np.maximum(blocks * causal_fraction, least) * sk  # that the busiest processor visits
    narrow = np.where(d <= 64, cluster.small_head_cost, 1.0)  # exp outweighs the products
    flops = 4.0 * _QUERY_BLOCK * d * narrow * keys * cluster.processors
    moved = b * d * (2 * hq * sq + 2 * hk * sk) * itemsize
    return kernel_s(flops, moved, peak, cluster.bandwidth_bytes_per_s, kernel)


def decode_s(
    shape: tuple[Floats, Floats, Floats, Floats, Floats],
    peak: float,
    cluster: Cluster,
    itemsize: int,
    kernel: Kernel,
    read: int = 2,
) -> Floats:
    """Attention of one query row per sequence, on arrays (batch, heads_q, heads_kv, seq_kv, dim).

    Each processor takes whole (sequence, kv head) pairs: `decode_pass_s` per pass over them.
    `read` vectors of `dim` are read per cached token and kv head: key and value, or one for both.
    """
    b, hq, hk, sk, d = shape
    passes = np.ceil(b * hk / cluster.processors)
    moved = b * d * (2 * hq + read * hk * sk) * itemsize
    seconds = kernel_s(4.0 * b * hq * sk * d, moved, peak, cluster.bandwidth_bytes_per_s, kernel)
    return seconds + cluster.decode_pass_s * passes


def _overlapped(a: Floats, b: Floats, power: float) -> Floats:
    """(a^p + b^p)^(1/p), scaled by the larger so that tiny times do not underflow."""
    top = np.maximum(a, b)
    safe = np.where(top > 0, top, 1.0)
    return top * ((a / safe) ** power + (b / safe) ** power) ** (1.0 / power)


def _rate(cluster: Cluster, dtype: str) -> float:
    """FLOP/s at the clock that the power limit allows."""
    return cluster.clock * cluster.peak(dtype)


def _kernel(cluster: Cluster, kind: str) -> Kernel:
    kernels = {
        "matmul": cluster.matmul,
        "attention": cluster.attention,
        "decode": cluster.decode,
        "memory": cluster.memory,
        "mixed": cluster.mixed,
        "optimizer": cluster.optimizer,
    }
    if kind not in kernels:
        raise ValueError(f"unknown kind of kernel `{kind}`; expected one of {', '.join(kernels)}")
    return kernels[kind]


def _plain(value: Floats) -> Number:
    """A float for a scalar, the array otherwise."""
    return float(value) if np.ndim(value) == 0 else value
