"""Launching ranks: results, failures, deaths and time limits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from shardwright.runtime import RankError, RankPool, run_ranks

Pool = Callable[[int], RankPool]


def add(x: torch.Tensor, factor: float) -> torch.Tensor:
    assert torch.get_num_threads() == 1
    x = x * factor + dist.get_rank()
    dist.all_reduce(x)
    return x


def fail_on(rank: int, how: str) -> int:
    if dist.get_rank() == rank:
        if how == "raise":
            raise KeyError("no such thing")
        if how == "die":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), 9)
        time.sleep(60)
    dist.barrier()
    return os.getpid()


def test_run_ranks_returns_one_result_per_rank() -> None:
    results = run_ranks(add, 2, torch.ones(3), 2.0, timeout_s=60)
    assert [result.tolist() for result in results] == [[5.0] * 3] * 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"(?s)rank 1 of 2 failed:\nTraceback.*fail_on.*KeyError: 'no such thing'"),
        ("die", "rank 1 of 2 failed:\nthe process died with exit code 7"),
        ("kill", r"rank 1 of 2 failed:\nthe process died with signal 9 \(SIGKILL: out of memory"),
    ],
)
@pytest.mark.some(1)
def test_failure_names_the_rank_and_the_pool_goes_on(how: str, message: str) -> None:
    with RankPool(2) as pool:
        before = pool.run(fail_on, -1, how, timeout_s=60)
        with pytest.raises(RankError, match=message) as caught:
            pool.run(fail_on, 1, how, timeout_s=60)
        assert caught.value.rank == 1
        after = pool.run(fail_on, -1, how, timeout_s=60)
    assert not set(before) & set(after)
    for pid in before + after:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_failure_on_all_ranks_keeps_the_processes() -> None:
    with RankPool(1) as pool:
        before = pool.run(fail_on, -1, "raise")
        with pytest.raises(RankError, match="no such thing"):
            pool.run(fail_on, 0, "raise")
        assert pool.run(fail_on, -1, "raise") == before


def test_time_limit_names_the_ranks_that_hang(pool: Pool) -> None:
    pool(3).run(fail_on, -1, "")
    start = time.monotonic()
    with pytest.raises(
        TimeoutError, match=r"ranks 0, 1, 2 of 3 did not finish `fail_on` within 1 s"
    ):
        pool(3).run(fail_on, 1, "hang", timeout_s=1)
    assert time.monotonic() - start < 5


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank is needed, got 0"):
        RankPool(0)
