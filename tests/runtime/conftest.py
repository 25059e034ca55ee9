"""Rank pools that all tests of the runtime share: starting processes is what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shardwright.runtime import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """`pool(3)` is a pool of three ranks that is started once."""
    pools: dict[int, RankPool] = {}

    def of(ranks: int) -> RankPool:
        if ranks not in pools:
            pools[ranks] = RankPool(ranks)
        return pools[ranks]

    yield of
    for each in pools.values():
        each.close()
