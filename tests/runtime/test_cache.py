"""The paged cache against a dictionary: what is stored, dropped, given back and refused."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from shardwright.runtime import CacheFullError, KVCache, PageTable
from shardwright.runtime.cache.cache import PAGE, owners

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5


def make(batch: int = 2, tokens: int = 40, **options: int) -> KVCache:
    return KVCache(batch, tokens, HEADS, KEY_DIM, VALUE_DIM, **options)  # pyright: ignore


def tokens(positions: Tensor, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that can be told from their sequence, head, position and dim."""
    batch, count = positions.shape

    def fill(dim: int) -> Tensor:
        x = torch.zeros(batch, HEADS, count, dim)
        x += positions[:, None, :, None] + 1000 * torch.arange(batch)[:, None, None, None]
        x += 0.1 * torch.arange(HEADS)[:, None, None] + 0.01 * torch.arange(dim) + 1e5 * salt
        return x

    return fill(KEY_DIM), -fill(VALUE_DIM)


def put(cache: KVCache, positions: list[list[int]], salt: int = 0) -> None:
    at = torch.tensor(positions)
    cache.append(*tokens(at, salt), at)


def check(cache: KVCache, want: list[list[int]], salt: int = 0) -> None:
    """The cache holds exactly the positions in `want`, each with its own keys and values."""
    k, v, positions = cache.gathered()
    for i, row in enumerate(want):
        held = positions[i] >= 0
        assert positions[i][held].tolist() == row
        keys, values = tokens(positions, salt)
        torch.testing.assert_close(k[i][:, held], keys[i][:, held], rtol=0, atol=0)
        torch.testing.assert_close(v[i][:, held], values[i][:, held], rtol=0, atol=0)
    assert k.isfinite().all() and v.isfinite().all()
    assert cache.lengths.tolist() == [len(row) for row in want]


def test_append_and_truncate() -> None:
    cache = make()
    check(cache, [[], []])
    put(cache, [[0, 1, 2], [0, -1, -1]])
    put(cache, [[-1, -1], [1, 2]])
    check(cache, [[0, 1, 2], [0, 1, 2]])
    put(cache, [list(range(3, 20)), [3, 20, *[-1] * 15]])  # gaps: another rank has the rest
    check(cache, [list(range(20)), [0, 1, 2, 3, 20]])
    cache.truncate([17, 4])
    check(cache, [list(range(17)), [0, 1, 2, 3]])
    put(cache, [[17], [4]])
    check(cache, [list(range(18)), [0, 1, 2, 3, 4]])
    cache.truncate([0, 0])
    check(cache, [[], []])


def test_positions_of_one_step_may_be_in_any_order() -> None:
    cache = make(1)
    put(cache, [[0, 1, 6, -1, 7, 3]])
    check(cache, [[0, 1, 3, 6, 7]])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[2], [5]], "position 2 of sequence 0 does not follow position 2"),
        ([[5, 5], [5, 6]], "position 5 of sequence 0 does not follow position 5"),
        ([[5], [0]], "position 0 of sequence 1 does not follow position 1"),
    ],
)
def test_refuses_positions_that_are_stored(positions: list[list[int]], message: str) -> None:
    cache = make()
    put(cache, [[0, 1, 2], [0, 1, -1]])
    with pytest.raises(ValueError, match=message):
        put(cache, positions)
    check(cache, [[0, 1, 2], [0, 1]])


def test_refuses_wrong_tensors() -> None:
    cache = make()
    at = torch.tensor([[0], [0]])
    k, v = tokens(at)
    with pytest.raises(ValueError, match=r"k is torch.float64 .* expected torch.float32"):
        cache.append(k.double(), v, at)
    with pytest.raises(ValueError, match=r"v is torch.float32 \(2, 2, 1, 3\)"):
        cache.append(k, k, at)
    with pytest.raises(ValueError, match="positions must be int64"):
        cache.append(k, v, at.int())
    with pytest.raises(ValueError, match="a length of 0 or more for each of 2 sequences"):
        cache.truncate([1])


def test_sequences_share_the_pool() -> None:
    """Three sequences of up to 64 tokens in a pool for 96: long ones borrow from short ones."""
    cache = make(3, 64, pages=6)
    put(cache, [list(range(60)), [0, *[-1] * 59], [0, *[-1] * 59]])
    check(cache, [list(range(60)), [0], [0]])
    table = cache.table
    assert not table.in_place and "6 of 6 pages" in repr(table)
    with pytest.raises(CacheFullError, match=r"17 new tokens do not fit .* hold 62 tokens; 0 of 6"):
        put(cache, [[-1] * 17, list(range(1, 18)), [-1] * 17])
    check(cache, [list(range(60)), [0], [0]])  # nothing was stored
    cache.truncate([20, 1, 1])
    put(cache, [[-1] * 17, list(range(1, 18)), [-1] * 17])
    check(cache, [list(range(20)), list(range(18)), [0]])
    assert table.shortage(torch.arange(18, 100).expand(3, -1)) > 0
    assert table.shortage(torch.full((3, 1), 30)) <= 0


def test_reads_in_place_while_sequences_stay_in_their_part() -> None:
    cache = make(2, 32)
    put(cache, [list(range(20)), list(range(20))])
    k, _, _ = cache.gathered()
    assert k.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()


def test_layers_share_a_table_and_must_keep_in_step() -> None:
    table = PageTable(2, 4)
    first, second = (KVCache(2, 0, HEADS, KEY_DIM, VALUE_DIM, table=table) for _ in range(2))
    at = torch.tensor([[0, 1], [0, -1]])
    for layer, cache in enumerate((first, second)):
        cache.append(*tokens(at, layer), at)
    with pytest.raises(ValueError, match="differ from those of the first layer"):
        first.append(*tokens(at + 2), at + 2)
        second.append(*tokens(at + 3), at + 3)
    second.append(*tokens(at + 2, 1), (at + 2).clone())
    for layer, cache in enumerate((first, second)):
        check(cache, [[0, 1, 2, 3], [0, 1, 2]] if layer else [[0, 1, 2, 3], [0, 1, 2]], layer)
    last = torch.tensor([[4], [4]])
    first.append(*tokens(last), last)
    first.append(*tokens(last + 1), last + 1)
    with pytest.raises(ValueError, match="a layer stores step 2, the others are at step 3"):
        second.append(*tokens(last), last)


def test_a_window_gives_pages_back() -> None:
    window = 20
    cache = make(1, 48, window=window)  # three pages
    for position in range(200):
        put(cache, [[position]])
        held = cache.gathered()[2][0].tolist()
        assert held == list(range(held[0], position + 1))
        assert held[0] <= max(0, position - window + 1) and len(held) <= window + PAGE
    check(cache, [list(range(176, 200))])
    table = cache.table  # two pages are used; the first is out of reach after 195 tokens
    assert table.shortage(torch.arange(200, 224)[None]) == 0
    assert table.shortage(torch.arange(200, 225)[None]) == 1
    cache.truncate([198])
    check(cache, [list(range(176, 198))])
    with pytest.raises(ValueError, match="cannot go back to 190 tokens"):
        cache.truncate([190])
    cache.truncate([0])
    put(cache, [[0, 1]])
    check(cache, [[0, 1]])


def test_owners_take_pages_in_turn() -> None:
    assert owners(torch.arange(0, 80, 8), 3).tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("pages", [12, 40])
def test_random_use(pages: int, window: int) -> None:
    """Random appends (with gaps, padding, any order) and truncations, as in a dictionary."""
    rng = random.Random(pages + window)
    batch = 4
    cache = make(batch, 100, pages=pages, window=window)
    held: list[list[int]] = [[] for _ in range(batch)]
    ends = [0] * batch  # where the next token may stand
    full = 0
    for _ in range(300):
        if rng.random() < 0.2:
            limits = [rng.choice([0, 10**6, max([0, *row])]) for row in held]
            cache.truncate(limits)
            held = [[p for p in row if p < limit] for row, limit in zip(held, limits, strict=True)]
            ends = [min(end, limit) for end, limit in zip(ends, limits, strict=True)]
            continue
        width = rng.choice([1, 1, 5, 30])
        rows: list[list[int]] = []
        for end in ends:
            new = sorted(rng.sample(range(end, end + 2 * width), rng.randint(0, width)))
            padded = [*new, *[-1] * (width - len(new))]
            rng.shuffle(padded)
            rows.append(padded)
        try:
            put(cache, rows)
        except CacheFullError:
            full += 1
            continue
        for row, new in zip(held, rows, strict=True):
            row += sorted(p for p in new if p >= 0)
        ends = [max(end, row[-1] + 1) if row else end for end, row in zip(ends, held, strict=True)]
        positions = cache.gathered()[2]
        if not window:
            check(cache, held)
        for i, row in enumerate(held):
            kept = [p for p in positions[i].tolist() if p >= 0]
            assert kept == row[len(row) - len(kept) :]
            start = min((p for p in rows[i] if p >= 0), default=10**6)
            assert all(p in kept for p in row if p > start - window) or not window
    assert full or pages > 12 or window


def test_values_in_keys_are_stored_once() -> None:
    cache = KVCache(2, 40, HEADS, KEY_DIM, 2, values_in_keys=True)
    at = torch.tensor([[0, 1, 2], [0, 1, -1]])
    k, v = tokens(at)
    cache.append(k, None, at)
    keys, values, _ = cache.gathered()
    assert torch.equal(keys[0], k[0]) and torch.equal(values, keys[..., :2])
    assert cache.nbytes == 2 * 48 * HEADS * KEY_DIM * 4
    with pytest.raises(ValueError, match="v is given; the cache holds values in its keys"):
        cache.append(k, v, at + 3)
    assert cache.lengths.tolist() == [3, 2]


def test_values_are_needed_and_fit_into_keys() -> None:
    with pytest.raises(ValueError, match="v is None; the cache stores values"):
        make().append(tokens(torch.tensor([[0], [0]]))[0], None, torch.tensor([[0], [0]]))
    with pytest.raises(ValueError, match="3 numbers of a key hold no 5 of a value"):
        KVCache(2, 40, HEADS, KEY_DIM, VALUE_DIM, values_in_keys=True)
