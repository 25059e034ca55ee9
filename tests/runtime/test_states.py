"""States of sequences: what is padding never enters them, and they only go forward."""

from __future__ import annotations

import pytest
import torch

from shardwright.runtime import StateCache
from shardwright.runtime.convolution import cached_convolution, causal_convolution


def positions(starts: list[int], counts: list[int], width: int) -> torch.Tensor:
    columns = torch.arange(width)
    first, count = torch.tensor(starts)[:, None], torch.tensor(counts)[:, None]
    return torch.where(columns < count, first + columns, -1)


@pytest.mark.parametrize(("groups", "dilation"), [(6, 1), (6, 2), (1, 1), (2, 1)])
def test_convolutions_go_on_where_they_ended(groups: int, dilation: int) -> None:
    """Ragged steps, some of a sequence empty, against whole sequences at once."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 11, dtype=torch.float64)
    weight, bias = torch.randn(6, 6 // groups, 3).double(), torch.randn(6).double()
    want = causal_convolution(x, weight, bias, dilation)
    state = StateCache(2, (6, 2 * dilation), dtype=x.dtype)
    done = [0, 0]
    for counts in ([3, 1], [0, 4], [1, 1], [5, 2]):
        at = positions(done, counts, 5)
        given = torch.full((2, 6, 5), 1e6, dtype=x.dtype)  # what stands at padding
        for row, count in enumerate(counts):
            given[row, :, :count] = x[row, :, done[row] : done[row] + count]
        got = cached_convolution(given, weight, state, at, bias, dilation)
        for row, count in enumerate(counts):
            torch.testing.assert_close(
                got[row, :, :count], want[row, :, done[row] : done[row] + count]
            )
        done = [a + b for a, b in zip(done, counts, strict=True)]
    assert done == state.table.counts.tolist() == [9, 8]
    last = torch.stack([x[row, :, n - 2 * dilation : n] for row, n in enumerate(done)])
    assert torch.equal(state.values, last)


@pytest.mark.parametrize(
    "given", [[[0, 1, -1], [0, -1, 1]], [[1, 0, -1], [0, 1, 2]], [[1, 2, 3], [0, 1, 2]]]
)
def test_tokens_come_in_order(given: list[list[int]]) -> None:
    state = StateCache(2, (4,))
    with pytest.raises(ValueError, match="the next must follow in order, with padding"):
        state.turn(torch.tensor(given))
    state.turn(torch.tensor([[0, 1, -1], [0, 1, 2]]))


def test_a_state_does_not_go_back() -> None:
    state = StateCache(2, (4,))
    state.turn(positions([0, 0], [3, 2], 3))
    state.keep(torch.ones(2, 4))
    state.table.truncate([3, 7])
    with pytest.raises(ValueError, match="sequence 0 cannot go back to 1 tokens.*all 3"):
        state.table.truncate([1, 2])
    state.table.truncate([0, 2])
    state.reset(state.table.counts == 0)
    assert state.values.tolist() == [[0.0] * 4, [1.0] * 4]
    state.turn(positions([0, 2], [1, 1], 1))


def test_layers_see_every_step() -> None:
    first = StateCache(1, (2,))
    second = StateCache(1, (2,), table=first.table)
    at = positions([0], [2], 2)
    assert first.turn(at) is second.turn(at)
    first.turn(positions([2], [1], 1))
    with pytest.raises(ValueError, match="the positions differ"):
        second.turn(positions([3], [1], 1))
    first.turn(positions([3], [1], 1))
    with pytest.raises(ValueError, match="every layer must see every step once"):
        StateCache(1, (2,), table=first.table)._turns = 1  # pyright: ignore[reportPrivateUsage]
        second.turn(positions([4], [1], 1))
