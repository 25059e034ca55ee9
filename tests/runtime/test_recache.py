"""KV caches that are converted from one layout to another: every token, on every rank."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.facts.blocks import block
from shardwright.facts.spec import Spec, format_spec, parse_spec
from shardwright.runtime import Cache, CacheFullError, RankPool
from shardwright.runtime.cache.cache import KVCache, owners
from shardwright.runtime.cache.pools import Pools, Room
from shardwright.runtime.cache.recache import Recaching, change_between
from shardwright.runtime.mesh.mesh import Mesh

Pool = Callable[[int], RankPool]
ROWS, HEADS, KEY, VALUE, CAPACITY = 4, 4, 4, 2, 80
LENGTHS = [70, 33, 0, 17]
R, BATCH, HEAD, TOKEN, NUMBER = -1, 0, 1, 2, 3
AXES = ("x", "y", "z")


def numbers(row: Tensor, position: Tensor, head: Tensor, number: Tensor) -> Tensor:
    """What a cache holds there: no two places have the same number."""
    return ((row * 1000 + position) * 100 + head).double() * 100 + number


def dense(rows: range, positions: Tensor, heads: range, width: int, first: int) -> Tensor:
    """Keys or values (b, heads, t, width) at positions (b, t)."""
    return numbers(
        torch.tensor(list(rows))[:, None, None, None],
        positions[:, None, :, None],
        torch.tensor(list(heads))[None, :, None, None],
        torch.arange(first, first + width),
    )


def declared(spec: Spec, window: int = 0, latent: bool = False) -> Cache:
    kind = Cache(HEADS, KEY, VALUE, torch.float64, format_spec(spec), window)
    return replace(kind, value_dim=KEY - 1, values_in_keys=True) if latent else kind


def own(spec: Spec, mesh: Mesh, dim: int, size: int) -> range:
    cuts = zip(spec, mesh.sizes, mesh.coordinates, strict=True)
    part = block(size, [(ways, at) for state, ways, at in cuts if state == dim])
    return range(part.start, part.stop)


def holder_of(spec: Spec, mesh: Mesh, place: Tensor) -> Tensor:
    """Whether this rank is to hold each token, which lies where `place` (.., axes) says."""
    mask = torch.ones(place.shape[:-1], dtype=torch.bool)
    for number, state in enumerate(spec):
        if state == TOKEN:
            mask &= place[..., number] == mesh.coordinates[number]
    return mask


def filled(
    specs: Sequence[Spec], mesh: Mesh, lengths: list[int], seed: int, **kind: Any
) -> tuple[Pools, Tensor]:
    """Caches in which tokens lie on ranks at random; (them, the place of each token by axis)."""
    table = {f"{i}.kv": declared(spec, **kind) for i, spec in enumerate(specs)}
    room = Room(ROWS, CAPACITY, 4 * ROWS * CAPACITY, limited=False, run=CAPACITY)
    pools = Pools.empty(table, room, mesh)
    randomness = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(mesh.sizes)
    place = torch.rand(ROWS, CAPACITY, len(sizes), generator=randomness) * sizes
    place = place.floor().long()
    starts = [0, 9, 30, CAPACITY]
    for start, stop in zip(starts, starts[1:], strict=False):
        at = torch.arange(start, stop).repeat(ROWS, 1)
        at = at.where(at < torch.tensor(lengths)[:, None], -1)
        given: dict[Any, Tensor] = {}
        for spec, cache in zip(specs, pools.caches.values(), strict=True):
            rows, heads = own(spec, mesh, BATCH, ROWS), own(spec, mesh, HEAD, HEADS)
            kept = at.where(holder_of(spec, mesh, place[:, start:stop]), -1)[rows.start : rows.stop]
            kept = given.setdefault(cache.table, kept)
            k = dense(rows, kept, heads, KEY, 0)
            v = None if cache.values_in_keys else dense(rows, kept, heads, VALUE, KEY)
            cache.append(k, v, kept)
    return pools, place


def check(pools: Pools, lengths: list[int], window: int, places: list[Tensor]) -> None:
    """Each rank has the numbers of exactly the tokens that are its own."""
    mesh = pools.mesh
    for (name, cache), place in zip(pools.caches.items(), places, strict=True):
        kind = pools.declared[name]
        spec = parse_spec(kind.spec)
        rows, heads = own(spec, mesh, BATCH, ROWS), own(spec, mesh, HEAD, HEADS)
        k, v, positions = cache.gathered()
        mine = holder_of(spec, mesh, place)
        for local, row in enumerate(rows):
            first = max(0, lengths[row] - window + 1) if window else 0
            want = [p for p in range(first, lengths[row]) if mine[row, p]]
            held = positions[local][positions[local] >= 0]
            needed = held[held >= first]  # a cache that stays may have more
            assert needed.tolist() == want, f"{name} row {row} of {kind.spec}"
            at = held[None]
            one = range(row, row + 1)
            torch.testing.assert_close(
                k[local : local + 1, :, : len(held)], dense(one, at, heads, KEY, 0)
            )
            first_value = 0 if kind.values_in_keys else KEY
            torch.testing.assert_close(
                v[local : local + 1, :, : len(held)],
                dense(one, at, heads, kind.value_dim, first_value),
            )


def check_going_back(pools: Pools, converted: list[str], lengths: list[int]) -> None:
    """Nothing that the next token needs is gone, and what a window dropped stays dropped."""
    tables = [pools.caches[name].table for name in converted]
    for shared in pools.tables:
        if shared.table not in tables:
            continue
        rows = own(shared.spec, pools.mesh, BATCH, ROWS)
        now = torch.tensor([lengths[row] for row in rows])
        assert not shared.table.lost(now)
        if shared.table.window and int(now.max()) > shared.table.window:
            assert "cannot go back" in shared.table.lost((now - 1).clamp(min=0))


def places_after(path: Sequence[Spec], mesh: Mesh, before: Tensor) -> Tensor:
    """Where each token lies at the end: where it was on axes that cut tokens from the beginning,
    with its page's owner on others."""
    place = before.clone()
    for number, state in enumerate(path[0]):
        if state != TOKEN:
            place[..., number] = owners(torch.arange(CAPACITY), mesh.sizes[number])
    return place


def legal(before: Spec, after: Spec, sizes: Sequence[int]) -> bool:
    """Is this a step that ranks of its axes can make among themselves, with equal blocks?"""
    try:
        change = change_between(before, after)
    except ValueError:
        return False
    others = [s for i, s in enumerate(before) if i > change.axes[0] and i not in change.axes]
    if len(change.axes) > 1 and change.b != R:
        return False
    if any(state in (BATCH, HEAD, NUMBER) and state in others for state in (change.a, change.b)):
        return False
    whole = {BATCH: ROWS, HEAD: HEADS, NUMBER: KEY + VALUE}
    for spec in (before, after):
        for dim, size in whole.items():
            if size % prod(n for n, state in zip(sizes, spec, strict=True) if state == dim):
                return False
    return True


def random_path(sizes: Sequence[int], draw: random.Random, steps: int) -> tuple[Spec, ...]:
    """Legal steps from a layout to another; token cuts on one axis at most at both ends."""
    every = list(product((R, BATCH, HEAD, TOKEN, NUMBER), repeat=len(sizes)))
    ends = [s for s in every if s.count(TOKEN) < 2 and NUMBER not in s and legal_spec(s, sizes)]
    path = [draw.choice(ends)]
    while len(path) <= steps or path[-1] not in ends or path[-1] == path[0]:
        path.append(draw.choice([s for s in every if legal(path[-1], s, sizes)]))
    return tuple(path)


def legal_spec(spec: Spec, sizes: Sequence[int]) -> bool:
    return all(
        size % prod(n for n, state in zip(sizes, spec, strict=True) if state == dim) == 0
        for dim, size in ((BATCH, ROWS), (HEAD, HEADS))
    )


def convert_on_rank(
    sizes: tuple[int, ...], cases: list[tuple[list[tuple[Spec, ...]], int, bool, int]]
) -> int:
    """Convert and check every case: the paths of its caches, window, latent, seed."""
    mesh = Mesh.create(dict(zip(AXES, sizes, strict=False)))
    for paths, window, latent, seed in cases:
        lengths = random.Random(seed).sample(LENGTHS, ROWS)
        kind = {"window": window, "latent": latent}
        pools, place = filled([p[0] for p in paths], mesh, lengths, seed, **kind)
        table = {f"{i}.kv": declared(path[-1], **kind) for i, path in enumerate(paths)}
        named = dict(zip(table, paths, strict=True))
        before = {name: weakref.ref(cache) for name, cache in pools.caches.items()}
        conversion = Recaching(pools, table, named, torch.tensor(lengths))

        def put(name: str, cache: KVCache | None, before: Any = before) -> None:
            assert cache is None or before[name]() is None  # the old pool went first

        made = conversion.run(put)
        assert list(made.caches) == list(table) and not pools.caches
        check_going_back(made, [n for n, path in named.items() if len(path) > 1], lengths)
        check(made, lengths, window, [places_after(path, mesh, place) for path in paths])
        back = {name: path[::-1] for name, path in named.items()}
        first = {f"{i}.kv": declared(path[0], **kind) for i, path in enumerate(paths)}
        again = Recaching(made, first, back, torch.tensor(lengths)).run(lambda name, cache: None)
        there = [places_after(path, mesh, place) for path in paths]
        check(
            again, lengths, window,
            [places_after(path[::-1], mesh, at) for path, at in zip(paths, there, strict=True)],
        )  # fmt: skip
    return len(cases)


@pytest.mark.parametrize("sizes", [(2,), (2, 2), (4,), (1, 2)], ids=str)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.some(3)
def test_every_token_arrives(pool: Pool, sizes: tuple[int, ...], window: int) -> None:
    """Along random paths, there and back, with sequences of different lengths."""
    draw = random.Random(str((sizes, window)))
    cases: list[tuple[list[tuple[Spec, ...]], int, bool, int]] = []
    for number in range(12):
        paths = [random_path(sizes, draw, draw.choice([1, 1, 2, 3])) for _ in range(2)]
        if number % 4 == 1:  # one stays, where the other goes
            paths[1] = paths[0][-1:]
        cases.append((paths, window, number % 3 == 0, number))
    pool(prod(sizes)).run(convert_on_rank, sizes, cases)


def run_out_on_rank() -> tuple[str, list[int]]:
    """Sequences that fit where heads are cut, but not where the batch is."""
    mesh = Mesh.create({"x": 2})
    lengths = [70, 70, 1, 1]
    room = Room(ROWS, CAPACITY, 160, limited=True, run=CAPACITY)
    pools = Pools.empty({"kv": declared((HEAD,))}, room, mesh)
    at = torch.arange(70).repeat(ROWS, 1)
    at = at.where(at < torch.tensor(lengths)[:, None], -1)
    heads = own((HEAD,), mesh, HEAD, HEADS)
    k, v = (dense(range(ROWS), at, heads, width, 0) for width in (KEY, VALUE))
    pools.caches["kv"].append(k, v, at)
    path = {"kv": ((HEAD,), (BATCH,))}
    with pytest.raises(CacheFullError) as error:
        Recaching(pools, {"kv": declared((BATCH,))}, path, torch.tensor(lengths))
    return str(error.value), pools.caches["kv"].lengths.tolist()


def test_every_rank_says_that_there_is_no_room(pool: Pool) -> None:
    for message, lengths in pool(2).run(run_out_on_rank):
        assert "in another layout, for which a rank lacks 3 pages" in message
        assert "the KV cache is full" in message and lengths == [70, 70, 1, 1]


def test_a_step_that_failed_half_way_is_refused() -> None:
    mesh = Mesh.create({"x": 1})
    room = Room(1, 8, 8, limited=False, run=8)
    table = {"a": declared((R,)), "b": declared((R,))}
    pools = Pools.empty(table, room, mesh)
    at = torch.arange(3)[None]
    k, v = (dense(range(1), at, range(HEADS), width, 0) for width in (KEY, VALUE))
    pools.caches["a"].append(k, v, at)
    paths = {name: ((R,), (HEAD,)) for name in table}
    new = {name: declared((HEAD,)) for name in table}
    with pytest.raises(ValueError, match="a layer stored 0 steps, the others 1; a step failed"):
        Recaching(pools, new, paths, torch.tensor([3]))


@pytest.mark.parametrize(
    "before, after", [((0, 1), (1, 0)), ((0, 0), (0, 0)), ((0, -2), (0, 1)), ((2, 1), (-1, 0))]
)
def test_a_step_is_one_change(before: Spec, after: Spec) -> None:
    with pytest.raises(ValueError, match="in one step: one axis changes its state"):
        change_between(before, after)
    assert change_between((0, 0), (-1, -1)).axes == (0, 1)
