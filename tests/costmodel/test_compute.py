"""Compute times: worked by hand on a machine with round figures, then properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel.compute import attention_s, elementwise_s, matmul_s, op_s
from shardwright.costmodel.machines.cluster import (
    BUILT_IN,
    Cluster,
    ClusterError,
    Kernel,
    Tiles,
    load_cluster,
)

_PLAIN = Kernel(floor_s=1e-6, efficiency=0.5, bandwidth_efficiency=0.5, overlap=1.0)


def _round() -> Cluster:
    """1e12 FLOP/s, 1e9 bytes/s, half of both reached; 10 processors; no overlap; 1 us floor."""
    return replace(
        load_cluster("h100"),
        flops=(("bf16", 1e12), ("fp32", 1e11)),
        bandwidth_bytes_per_s=1e9,
        processors=10,
        small_head_cost=2.0,
        decode_pass_s=1e-3,
        matmul=_PLAIN,
        attention=_PLAIN,
        decode=_PLAIN,
        memory=_PLAIN,
        tiles=None,
    )


@pytest.mark.parametrize(
    "flops, moved, dtype, kind, seconds",
    [
        (0, 0, "bf16", "matmul", 1e-6),  # the floor
        (5e11, 0, "bf16", "matmul", 1 + 1e-6),  # half of 1e12 FLOP/s
        (5e10, 0, "fp32", "matmul", 1 + 1e-6),
        (0, 5e8, "bf16", "matmul", 1 + 1e-6),  # half of 1e9 bytes/s
        (5e11, 5e8, "bf16", "attention", 2 + 1e-6),  # overlap 1: they add up
        (5e11, 5e8, "int64", "memory", 1 + 1e-6),  # only traffic counts
    ],
)
def test_op_by_hand(flops: float, moved: float, dtype: str, kind: str, seconds: float) -> None:
    assert op_s(flops, moved, dtype, _round(), kind) == pytest.approx(seconds)  # pyright: ignore


def test_overlap_takes_the_larger_as_it_grows() -> None:
    kernel = replace(_PLAIN, overlap=2.0, floor_s=0.0)
    cluster = replace(_round(), matmul=kernel)
    assert op_s(1.5e12, 2e9, "bf16", cluster) == pytest.approx(5.0)  # sqrt(3^2 + 4^2)


def test_matmul_without_tiles_is_the_roofline() -> None:
    # 2*100*200*300 = 12e6 FLOP in 24 us; (100*300 + 200*300 + 100*200) * 2 = 220e3 bytes in 440 us
    assert matmul_s(100, 200, 300, 1, "bf16", _round()) == pytest.approx(465e-6)


def test_matmul_waves_by_hand() -> None:
    tiles = Tiles(
        floor_s=0.0, efficiency=1.0, bandwidth_efficiency=1.0, overlap=16.0,
        wave_s=0.0, split_s=1.0, throttle=0.0,
    )  # fmt: skip
    cluster = replace(_round(), tiles=tiles, bandwidth_bytes_per_s=1e15)
    # One processor: 1e11 FLOP/s.  A 64 x 64 tile with k = 1000: 8.192e6 FLOP: 81.92 us.
    one_wave = matmul_s(64, 640, 1000, 1, "bf16", cluster)
    assert one_wave == pytest.approx(81.92e-6)
    assert matmul_s(64, 641, 1000, 1, "bf16", cluster) == pytest.approx(2 * 81.92e-6)
    assert matmul_s(1, 64, 1000, 10, "bf16", cluster) == pytest.approx(81.92e-6)


def test_throttle_of_a_step_and_of_one_product_alone() -> None:
    tiles = Tiles(
        floor_s=0.0, efficiency=1.0, bandwidth_efficiency=1.0, overlap=16.0,
        wave_s=0.0, split_s=1.0, throttle=0.5,
    )  # fmt: skip
    cluster = replace(_round(), tiles=tiles, bandwidth_bytes_per_s=1e15)
    # 10 tiles of 64 x 64, k = 10000: 819.2 us; in a step all of it costs half as much again, alone
    # the 519.2 us beyond 0.3 ms do
    sizes = (64, 640, 10000, 1, "bf16")
    assert matmul_s(*sizes, cluster) == pytest.approx(1228.8e-6)
    assert matmul_s(*sizes, cluster, burst=True) == pytest.approx(1078.8e-6)
    slower = replace(cluster, clock=0.8)
    assert matmul_s(*sizes, slower) == pytest.approx(1536e-6)
    assert elementwise_s(1e9, slower) == elementwise_s(1e9, cluster)


def test_backward_of_attention_has_its_own_kernels() -> None:
    free = replace(
        _round(), bandwidth_bytes_per_s=1e18, attention_backward=replace(_PLAIN, efficiency=0.25)
    )
    sizes = (100, 8, 8, 1024, 1024, 128, "bf16", free)
    forward, backward = attention_s(*sizes), attention_s(*sizes, backward=True)
    assert (backward - 1e-6) / (forward - 1e-6) == pytest.approx(2.0)


def test_kernels_that_cast_or_add_up_rows_are_slower() -> None:
    cluster = replace(_round(), mixed=replace(_PLAIN, bandwidth_efficiency=0.25))
    assert elementwise_s(1e9, cluster) == pytest.approx(2 + 1e-6)
    assert elementwise_s(1e9, cluster, mixed=True) == pytest.approx(4 + 1e-6)


def test_attention_context_by_hand() -> None:
    # 10 sequences x 1 head x 128 rows: one block per processor, which visits all 128 keys:
    # 10 * 4*128*128*128 = 83.886e6 FLOP at 5e11: 167.8 us.  q, k, v, out: 4*10*128*128*2 bytes
    # = 1.311e6 at 5e8: 2621 us.
    seconds = attention_s(10, 1, 1, 128, 128, 128, "bf16", _round(), causal_fraction=0.5)
    assert seconds == pytest.approx(167.77e-6 + 2621.4e-6 + 1e-6, rel=1e-4)


def test_attention_causal_halves_the_work_of_many_blocks() -> None:
    free = replace(_round(), bandwidth_bytes_per_s=1e18)
    full = attention_s(100, 8, 8, 1024, 1024, 128, "bf16", free, 1.0)
    half = attention_s(100, 8, 8, 1024, 1024, 128, "bf16", free, 0.5)
    assert (full - 1e-6) / (half - 1e-6) == pytest.approx(2.0)


def test_few_queries_over_a_cache_use_all_processors() -> None:
    """One block of query rows per head: alone it is as slow as its keys are many; with the keys
    shared out, as fast as the same products in many blocks, and no faster than reading them."""
    h100 = load_cluster("h100")
    sizes = (1, 4, 1, 16, 131072, 128, "bf16", h100)
    alone, shared = attention_s(*sizes), attention_s(*sizes, split_keys=True)
    reading = 2 * 131072 * 128 * 2 / h100.bandwidth_bytes_per_s
    assert reading < shared < alone / 10
    many = (1, 512, 128, 2048, 4096, 128, "bf16", h100)
    assert attention_s(*many, split_keys=True) == attention_s(*many)


def test_attention_small_heads_cost_more() -> None:
    free = replace(_round(), bandwidth_bytes_per_s=1e18)
    wide = attention_s(100, 8, 8, 1024, 1024, 128, "bf16", free)
    narrow = attention_s(100, 8, 8, 1024, 1024, 64, "bf16", free)
    assert narrow == pytest.approx(wide)  # half the FLOP, twice the cost of each


def test_decode_by_hand() -> None:
    # 20 pairs over 10 processors: 2 passes of 1 ms.  20 x 1000 keys and values of 64 and 2 bytes:
    # 5.12e6 bytes + q, out 2*20*64*2: 5120, at 5e8: 10.25 ms.  4*20*1000*64 FLOP at 5e11: 10.24 us.
    seconds = attention_s(20, 1, 1, 1, 1000, 64, "bf16", _round())
    assert seconds == pytest.approx(2e-3 + 10.25024e-3 + 10.24e-6 + 1e-6)


def test_grouped_queries_read_less() -> None:
    h100 = load_cluster("h100")
    grouped = attention_s(64, 32, 8, 1, 8192, 128, "bf16", h100)
    assert grouped < attention_s(64, 32, 32, 1, 8192, 128, "bf16", h100)


def test_arrays_and_scalars_agree() -> None:
    h100 = load_cluster("h100")
    flops, moved = np.array([0.0, 1e9, 1e12]), np.array([1e3, 1e8, 1e6])
    batch = op_s(flops, moved, "bf16", h100)
    assert isinstance(batch, np.ndarray) and batch.shape == (3,)
    singles = [op_s(float(f), float(b), "bf16", h100) for f, b in zip(flops, moved, strict=True)]
    assert all(isinstance(value, float) for value in singles)
    np.testing.assert_allclose(batch, singles)
    np.testing.assert_allclose(
        matmul_s(np.array([1.0, 4096.0]), 4096, 4096, 1, "bf16", h100),
        [matmul_s(m, 4096, 4096, 1, "bf16", h100) for m in (1, 4096)],
    )


@given(
    st.sampled_from(BUILT_IN),
    st.sampled_from(["matmul", "attention", "decode", "memory"]),
    st.floats(0, 1e16),
    st.floats(0, 1e12),
    st.floats(1.0, 10.0),
)
def test_more_work_never_takes_less(
    name: str, kind: str, flops: float, moved: float, more: float
) -> None:
    cluster = load_cluster(name)
    base = op_s(flops, moved, "bf16", cluster, kind)  # pyright: ignore
    assert 0 <= base < np.inf
    slack = 1 + 1e-12
    assert op_s(flops * more, moved, "bf16", cluster, kind) * slack >= base  # pyright: ignore
    assert op_s(flops, moved * more, "bf16", cluster, kind) * slack >= base  # pyright: ignore
    if kind != "memory":
        assert base >= flops / cluster.peak("bf16")  # never faster than the datasheet
    assert base >= moved / cluster.bandwidth_bytes_per_s


@given(*(st.integers(1, 20000) for _ in range(3)), st.sampled_from(BUILT_IN))
def test_matmul_is_monotone_and_below_peak(m: int, n: int, k: int, name: str) -> None:
    cluster = load_cluster(name)
    seconds = matmul_s(m, n, k, 1, "bf16", cluster)
    assert seconds >= 2 * m * n * k / cluster.peak("bf16")
    for larger in ((2 * m, n, k), (m, 2 * n, k), (m, n, 2 * k)):
        assert matmul_s(*larger, 1, "bf16", cluster) >= seconds


def test_refusals() -> None:
    with pytest.raises(ClusterError, match="no FLOP/s for dtype `int32`"):
        matmul_s(1, 1, 1, 1, "int32", load_cluster("h100"))
    with pytest.raises(ValueError, match="unknown kind of kernel `gemm`; expected one of matmul"):
        op_s(1.0, 1.0, "bf16", load_cluster("h100"), "gemm")  # pyright: ignore


def test_plausible_on_h100() -> None:
    h100 = load_cluster("h100")
    assert elementwise_s(3.35e9, h100) == pytest.approx(1.15e-3, rel=0.01)  # 1 ms at 87 %
    large = matmul_s(8192, 8192, 8192, 1, "bf16", h100)
    assert 0.6 < 2 * 8192**3 / large / 989.4e12 < 0.85
