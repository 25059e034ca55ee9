"""Every conversion, both directions, against what the states mean.

A conversion changes where a value lies, not the value.  So the reference is simulated here on full
tensors: `lay` puts a value on the ranks in a state (with rubbish in padding rows), `read` puts it
together again, and after any conversion a -> b the value read in b is the one laid in a; of
the gradient likewise from dual(b) to dual(a).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from shardwright.runtime import Axis, Mesh, RankError, RankPool, count_collectives

Pool = Callable[[int], RankPool]
SHAPES = {"even": (6, 12, 2), "uneven": (5, 7, 4)}  # even for 2 and 3 ranks; dims 0, 1 uneven
STATES: list[str | int] = ["R", "P", "V", 0, 1]
DUAL = {"R": "R", "P": "V", "V": "P"}
CODE = {"R": -1, "P": -2, "V": -3}


def code(state: str | int) -> int:
    return state if isinstance(state, int) else CODE[state]


def dual(state: str | int) -> str | int:
    return state if isinstance(state, int) else DUAL[state]


def lay(x: Tensor, state: str | int, ranks: int) -> list[Tensor]:
    """One local tensor per rank for the value part of `state`."""
    if isinstance(state, int):
        rows = -(-x.shape[state] // ranks)
        padding = list(x.shape)
        padding[state] = rows * ranks - x.shape[state]
        padded = torch.cat([x, torch.full(padding, 1e30, dtype=x.dtype)], state)
        return list(padded.split(rows, state))
    if state == "P":
        summands = [torch.randn_like(x) for _ in range(ranks - 1)]
        return [*summands, x - sum(summands, torch.zeros_like(x))]
    return [x] * ranks


def read(parts: list[Tensor], state: str | int, size: int) -> Tensor:
    """The value that the parts make up; parts that must agree do."""
    if isinstance(state, int):
        assert len({part.shape for part in parts}) == 1
        return torch.cat(parts, state).narrow(state, 0, size)
    if state == "P":
        return torch.stack(parts).sum(0)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], rtol=0, atol=0)
    return parts[0]


def convert_on_rank(
    xs: list[Tensor], grads: list[Tensor], source: int, target: int, size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, gradient, result without gradient) on this rank."""
    axis = Mesh.create({"tp": len(xs)})["tp"]
    x = xs[axis.rank].clone().requires_grad_()
    y = axis.convert(x, source, target, size)
    y.backward(grads[axis.rank])
    assert x.grad is not None
    with torch.no_grad():
        plain = axis.convert(x, source, target, size)
    return y.detach(), x.grad, plain


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("source", "target"), list(product(STATES, STATES)), ids=lambda state: str(state)
)
@pytest.mark.some(40)
def test_conversion_keeps_value_and_gradient(
    pool: Pool, ranks: int, kind: str, source: str | int, target: str | int
) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, *SHAPES[kind], dtype=torch.float64)
    size = x.shape[source] if isinstance(source, int) else None
    xs, grads = lay(x, source, ranks), lay(grad, dual(target), ranks)
    results = pool(ranks).run(convert_on_rank, xs, grads, code(source), code(target), size)
    ys, x_grads, plain = (list(parts) for parts in zip(*results, strict=True))

    def rows(state: str | int) -> int:
        return x.shape[state] if isinstance(state, int) else 0

    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(read(ys, target, rows(target)), x, **close)
    torch.testing.assert_close(read(plain, target, rows(target)), x, **close)
    got = read(x_grads, dual(source), rows(source))
    torch.testing.assert_close(got, grad, **close)


Call = Callable[[Axis, Tensor], Tensor]
METHODS: dict[str, tuple[str | int, str | int, Call]] = {
    "copy": ("R", "V", lambda a, x: a.copy(x)),
    "own_gradient": ("V", "R", lambda a, x: a.own_gradient(x)),
    "all_reduce": ("P", "R", lambda a, x: a.all_reduce(x)),
    "all_reduce all_reduce": ("P", "V", lambda a, x: a.all_reduce(x, backward="all_reduce")),
    "all_gather": (1, "V", lambda a, x: a.all_gather(x, 1)),
    "all_gather slice": (1, "R", lambda a, x: a.all_gather(x, 1, backward="slice")),
    "reduce_scatter": ("P", 1, lambda a, x: a.reduce_scatter(x, 1)),
    "shard": ("R", 1, lambda a, x: a.shard(x, 1)),
    "shard pad": ("V", 1, lambda a, x: a.shard(x, 1, backward="pad")),
    "all_to_all": (1, 0, lambda a, x: a.all_to_all(x, gather_dim=1, shard_dim=0)),
    "partial": ("R", "P", lambda a, x: a.partial(x)),
    "partial mask": ("V", "P", lambda a, x: a.partial(x, backward="mask")),
    "pad": (0, "P", lambda a, x: a.pad(x, 0)),
}
# Bytes that each of 3 ranks receives for a whole of 144 numbers of 8 bytes: 1152 bytes.
RING = {"all_gather": 768.0, "reduce_scatter": 768.0, "all_reduce": 1536.0, "all_to_all": 256.0}
MOVES: dict[str, tuple[str | None, str | None]] = {
    "copy": (None, "all_reduce"),
    "own_gradient": (None, None),
    "all_reduce": ("all_reduce", None),
    "all_reduce all_reduce": ("all_reduce", "all_reduce"),
    "all_gather": ("all_gather", "reduce_scatter"),
    "all_gather slice": ("all_gather", None),
    "reduce_scatter": ("reduce_scatter", "all_gather"),
    "shard": (None, "all_gather"),
    "shard pad": (None, None),
    "all_to_all": ("all_to_all", "all_to_all"),
    "partial": (None, None),
    "partial mask": (None, None),
    "pad": (None, None),
}


def call_on_rank(
    name: str, xs: list[Tensor], grads: list[Tensor]
) -> tuple[Tensor, Tensor, dict[tuple[str, str, str], tuple[int, float]]]:
    axis = Mesh.create({"tp": len(xs)})["tp"]
    x = xs[axis.rank].clone().requires_grad_()
    with count_collectives() as counter:
        y = METHODS[name][2](axis, x)
        y.backward(grads[axis.rank])
    assert x.grad is not None
    counts = {tuple(key): (count.calls, count.bytes) for key, count in counter.counts.items()}
    return y.detach(), x.grad, counts  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", METHODS)
def test_method_is_its_conversion_and_reports_its_bytes(pool: Pool, name: str) -> None:
    source, target, _ = METHODS[name]
    torch.manual_seed(0)
    x, grad = torch.randn(2, *SHAPES["even"], dtype=torch.float64)
    results = pool(3).run(call_on_rank, name, lay(x, source, 3), lay(grad, dual(target), 3))
    ys, x_grads, counts = (list(parts) for parts in zip(*results, strict=True))
    rows = x.shape[target] if isinstance(target, int) else 0
    torch.testing.assert_close(read(ys, target, rows), x)
    rows = x.shape[source] if isinstance(source, int) else 0
    torch.testing.assert_close(read(x_grads, dual(source), rows), grad)
    forward, backward = MOVES[name]
    want = {(forward, "tp", "forward"): (1, RING[forward])} if forward else {}
    want |= {(backward, "tp", "backward"): (1, RING[backward])} if backward else {}
    assert counts == [want] * 3


def move_dtypes() -> dict[str, str]:
    """What goes wrong, by dtype: nothing should."""
    axis = Mesh.create({"tp": 3})["tp"]
    wrong: dict[str, str] = {}
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64,
    ):  # fmt: skip
        whole = (torch.arange(36).reshape(6, 6).t() % 2).to(dtype)  # not contiguous
        own = axis.shard(whole, 1)
        results = {
            "shard": (own, whole[:, 2 * axis.rank : 2 * axis.rank + 2]),
            "gather": (axis.all_gather(own, 1), whole),
            "exchange": (
                axis.all_to_all(own, gather_dim=1, shard_dim=0),
                whole[2 * axis.rank : 2 * axis.rank + 2],
            ),
            "transposed": (axis.all_gather(own.t(), 0), whole.t()),
            "uneven": (axis.all_gather(axis.shard(whole[:4], 0), 0, 4), whole[:4]),
            "scalar": (axis.copy(whole[0, 0]), whole[0, 0]),
        }
        if dtype != torch.bool:
            results["reduce"] = (axis.all_reduce(whole), whole * 3)
            results["scatter"] = (axis.reduce_scatter(whole, 1), own * 3)
            results["large"] = (axis.all_reduce(whole.repeat(99, 99)), whole.repeat(99, 99) * 3)
        for name, (got, want) in results.items():
            if got.dtype != dtype or not torch.equal(got, want):
                wrong[f"{dtype} {name}"] = f"{got} instead of {want}"
    return wrong


def test_every_dtype_moves(pool: Pool) -> None:
    assert pool(3).run(move_dtypes) == [{}] * 3


def sum_bfloat16() -> tuple[float, float]:
    axis = Mesh.create({"tp": 3})["tp"]
    x = torch.full((3,), [256.0, 1.0, 1.0][axis.rank], dtype=torch.bfloat16)
    return axis.all_reduce(x)[0].item(), axis.reduce_scatter(x, 0)[0].item()


def test_half_precision_is_added_up_in_float32(pool: Pool) -> None:
    # bfloat16 has 8 bits: 256 + 1 rounds to 256, twice; 258 is representable.
    assert pool(3).run(sum_bfloat16) == [(258.0, 258.0)] * 3


def count_messages() -> dict[str, int]:
    axis = Mesh.create({"tp": 3})["tp"]
    x = torch.ones(3, 3)
    with count_collectives() as counter:
        axis.all_gather(x, 0)
        axis.reduce_scatter(x, 0)
        axis.all_to_all(x, gather_dim=0, shard_dim=1)
        axis.all_reduce(x)
    assert counter.messages() == counter.messages(axis="tp", phase="forward")
    return {key.op: count.messages for key, count in counter.counts.items()}


def test_messages_are_those_of_rings(pool: Pool) -> None:
    want = {"all_gather": 2, "reduce_scatter": 2, "all_to_all": 2, "all_reduce": 4}
    assert pool(3).run(count_messages) == [want] * 3


def nest_uneven() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """10 rows over dp=2, then tp=2: step by step, and over both axes at once."""
    mesh = Mesh.create({"dp": 2, "tp": 2})
    dp, tp = mesh.axes
    both = mesh["dp", "tp"]
    results: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for size in (8, 10, 5):
        whole = torch.arange(2.0 * size).reshape(size, 2)
        steps = tp.shard(dp.shard(whole, 0), 0)
        half = -(-size // 2)
        back = dp.all_gather(tp.all_gather(steps, 0, half), 0, size)
        flat = both.all_gather(both.shard(whole, 0), 0, size)
        columns = both.all_to_all(both.shard(whole, 0), gather_dim=0, shard_dim=1, size=size)
        results.append((steps - both.shard(whole, 0), back - whole, flat - whole, columns))
    return results


def test_two_axes_on_one_dim(pool: Pool) -> None:
    for rank, results in enumerate(pool(4).run(nest_uneven)):
        for size, (steps, back, flat, columns) in zip((8, 10, 5), results, strict=True):
            assert not steps.any() and not back.any() and not flat.any()
            want = torch.arange(2.0 * size).reshape(size, 2)
            # 2 columns over 2 x 2 ranks: one each for tp=0, padding for tp=1.
            if rank % 2 == 0:
                torch.testing.assert_close(columns, want[:, rank // 2 : rank // 2 + 1])


def zigzag_on_rank(whole: Tensor, grad: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(got, wanted) of every conversion that takes or makes slices in zigzag order."""
    mesh = Mesh.create({"dp": 2, "tp": 2})
    dp, tp = mesh.axes
    both = mesh["dp", "tp"]
    chunks = whole.chunk(8, 0)
    held = [(0, 7), (1, 6), (2, 5), (3, 4)][both.rank]
    own = torch.cat([chunks[i] for i in held])
    own_grad = torch.cat([grad.chunk(8, 0)[i] for i in held])
    x = whole.clone().requires_grad_()
    y = tp.shard(dp.shard(x, 0, zigzag=True), 0, zigzag=True)
    back = dp.all_gather(tp.all_gather(y, 0, zigzag=True), 0, zigzag=True, backward="slice")
    y.backward(own_grad)
    assert x.grad is not None
    columns = both.all_to_all(own, gather_dim=0, shard_dim=1, zigzag=(0,))
    rows = both.all_to_all(columns, gather_dim=1, shard_dim=0, zigzag=(0,))
    return {
        "shard": (y.detach(), own),
        "shard both": (both.shard(whole, 0, zigzag=True), own),
        "gather": (back.detach(), whole),
        "gradient": (x.grad, grad),
        "columns": (columns, whole[:, both.rank :: 4]),
        "rows": (rows, own),
        "pad": (both.all_reduce(both.pad(own, 0, zigzag=True)), whole),
        "scatter": (both.reduce_scatter(whole, 0, zigzag=True), 4 * own),
    }


def test_zigzag_order_is_undone_by_every_conversion(pool: Pool) -> None:
    whole, grad = torch.randn(2, 16, 4, dtype=torch.float64)
    for results in pool(4).run(zigzag_on_rank, whole, grad):
        for what, (got, want) in results.items():
            torch.testing.assert_close(got, want, msg=what)


def refuse_zigzag() -> None:
    Mesh.create({"tp": 2})["tp"].shard(torch.ones(6, 2), 0, zigzag=True)


def test_zigzag_needs_two_chunks_per_rank(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"into 4 equal chunks, but dim 0 of \(6, 2\) has 6 rows"):
        pool(2).run(refuse_zigzag)


def differentiate_twice() -> tuple[float, float]:
    """d2/dx2 of sum(x^3) through a gather: with and without axis."""
    axis = Mesh.create({"tp": 2})["tp"]
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    x = axis.shard(whole, 0).requires_grad_()
    y = axis.all_gather(x, 0, backward="slice").pow(3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    return second[0].item(), 2 * 3 * x[0].item() ** 2 * 6 * x[0].item()


def test_gradient_of_gradient(pool: Pool) -> None:
    for got, want in pool(2).run(differentiate_twice):
        assert got == pytest.approx(want, rel=1e-14)


def refuse(what: str) -> None:
    axis = Mesh.create({"tp": 2})["tp"]
    x = torch.ones(2, 2)
    if what == "negative":
        axis.all_gather(x, -1)
    if what == "missing":
        axis.reduce_scatter(x, 2)
    if what == "bool":
        axis.all_reduce(x > 0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("negative", "dim -1: dims count from the front, from 0"),
        ("missing", r"axis `tp`: \(2, 2\) has no dim 2; dims count from 0"),
        ("bool", "axis `tp`: bool tensors cannot be added up over ranks; convert to int"),
    ],
)
def test_refusals(pool: Pool, what: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        pool(2).run(refuse, what)


def test_one_rank_is_the_identity_and_needs_no_launch() -> None:
    axis = Mesh.create({"dp": 1, "tp": 1})["dp", "tp"]
    x = torch.ones(3, 2, requires_grad=True)
    for name, (_, _, call) in METHODS.items():
        assert call(axis, x) is x, name
