"""Sharded embedding, loss, attention and dropout against the plain operations on the full data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.runtime import (
    Mesh,
    RankError,
    RankPool,
    attention,
    count_collectives,
    cross_entropy,
    dropout,
    vocab_embedding,
)

Pool = Callable[[int], RankPool]
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def embed(ids: Tensor, weight: Tensor, grad: Tensor, padding_idx: int | None) -> list[Tensor]:
    """[result, gradient of the whole weight]."""
    axis = Mesh.create({"tp": 3})["tp"]
    own = axis.shard(weight, 0).requires_grad_()
    y = axis.all_reduce(vocab_embedding(ids, own, axis, len(weight), padding_idx))
    y.backward(grad)
    assert own.grad is not None
    return [y.detach(), axis.all_gather(own.grad, 0, len(weight))]


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("size", [9, 10, 4])
def test_embedding(pool: Pool, size: int, padding_idx: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(size, 4, dtype=torch.float64, requires_grad=True)
    ids, grad = torch.randint(0, size, (2, 7)), torch.randn(2, 7, 4, dtype=torch.float64)
    ids[0, 0], ids[0, 1] = size - 1, 0
    want = F.embedding(ids, weight, padding_idx)
    want.backward(grad)
    for y, weight_grad in pool(3).run(embed, ids, weight.detach(), grad, padding_idx):
        torch.testing.assert_close(y, want.detach(), **EXACT)
        torch.testing.assert_close(weight_grad, weight.grad, **EXACT)


@pytest.mark.parametrize("bad", [-1, 10])
def test_embedding_refuses_ids_outside_the_table(pool: Pool, bad: int) -> None:
    with pytest.raises(RankError, match="index out of range"):
        pool(3).run(embed, torch.tensor([bad]), torch.ones(10, 2), torch.ones(1, 2), None)


def lose(
    logits: Tensor, labels: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """(loss, gradient of the full logits, collective calls): tokens over dp, classes over tp."""
    mesh = Mesh.create({"dp": 2, "tp": 2})
    dp, tp = mesh.axes
    size = logits.shape[-1]
    own = tp.shard(dp.shard(logits, 0), logits.ndim - 1)
    if own.shape[-1] * tp.size > size and tp.rank == tp.size - 1:
        own[..., -1] = 1e30  # rubbish in the padding column
    own.requires_grad_()
    with count_collectives() as counter:
        loss = cross_entropy(
            own, dp.shard(labels, 0), vocab_axis=tp, vocab_size=size, token_axes=(dp,), **options
        )
        reduced = loss.ndim == 0
        loss = dp.all_reduce(loss) if reduced else dp.all_gather(loss, 0, backward="slice")
        calls = counter.calls(axis="tp")
        loss.sum().backward()
    assert own.grad is not None
    grad = tp.all_gather(own.grad, logits.ndim - 1, size)
    return loss.detach(), dp.all_gather(grad, 0), {"tp": calls}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("ignore", [-100, 2])
def test_cross_entropy(
    pool: Pool, reduction: str, smoothing: float, size: int, ignore: int
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 5, size, dtype=torch.float64) * 5
    labels = torch.randint(0, size, (4, 5))
    labels[:2, 1:] = ignore  # unevenly: the first half keeps few tokens
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore}
    full = logits.clone().requires_grad_()
    want = F.cross_entropy(full.flatten(0, 1), labels.flatten(), **options)  # pyright: ignore
    want.sum().backward()
    for loss, grad, calls in pool(4).run(lose, logits, labels, options):
        torch.testing.assert_close(loss.flatten(), want.detach().flatten(), **EXACT)
        torch.testing.assert_close(grad, full.grad, **EXACT)
        assert calls == {"tp": 2}  # the maximum, and the sums together


def test_cross_entropy_of_ignored_labels_alone(pool: Pool) -> None:
    logits, labels = torch.randn(2, 3, 6), torch.full((2, 3), -100)
    for loss, grad, _ in pool(4).run(lose, logits, labels, {}):
        assert loss.isnan() and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_in_one_process_keeps_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 11).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (50,))
    loss = cross_entropy(logits, labels)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    F.cross_entropy(exact, labels).backward()
    assert loss.dtype == dtype and logits.grad is not None and logits.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2 * eps, atol=eps / 10)
    want = F.cross_entropy(exact, labels)
    torch.testing.assert_close(loss.double(), want, rtol=2 * eps, atol=0)


def test_cross_entropy_refusals() -> None:
    logits = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"integer labels of shape \(2, 3\) for logits of shape"):
        cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(IndexError, match="label 5 is outside the vocabulary of 5"):
        cross_entropy(logits, torch.full((2, 3), 5))
    with pytest.raises(ValueError, match="mean, sum or none, got 'avg'"):
        cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64), reduction="avg")  # pyright: ignore


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    query_start: int,
) -> Tensor:
    """Written out pair by pair."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for i, j in product(range(q.shape[2]), range(k.shape[2])):
        at = query_start + i
        ahead, behind = j > at, bool(window) and j <= at - window
        if (causal and ahead) or behind:
            scores[:, :, i, j] = -torch.inf
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize(("sq", "sk", "query_start"), [(6, 6, 0), (3, 9, 3), (4, 4, 2), (1, 5, 4)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 2, 100])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("masked", ["", "bool", "float"])
def test_attention(
    sq: int, sk: int, query_start: int, causal: bool, window: int, softcap: float, masked: str
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, sq, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, sk, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 2, sk, 6, dtype=torch.float64, requires_grad=True)
    mask = None
    if masked:
        keep = torch.rand(2, 1, sq, sk) < 0.7
        keep[..., :1] = True  # else softmax of nothing: its own test
        keep |= torch.arange(sk) == query_start + torch.arange(sq)[:, None]
        mask = keep if masked == "bool" else torch.where(keep, 0.5, -torch.inf).double()
    got = attention(
        q, k, v, mask, causal=causal, window=window, softcap=softcap, query_start=query_start
    )
    want = reference_attention(q, k, v, mask, causal, window, softcap, query_start)
    grad = torch.randn_like(want)
    torch.testing.assert_close(got, want, **EXACT)
    assert got.shape == (2, 4, sq, 6)
    gots = torch.autograd.grad(got, (q, k, v), grad)
    wants = torch.autograd.grad(want, (q, k, v), grad)
    for a, b in zip(gots, wants, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1)], ids=str)
def test_attention_with_a_learned_bias(shape: tuple[int, int]) -> None:
    """The bias gets a gradient, and no score matrix of all sequences and heads is made for it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 300, 8), (2, 2, 303, 8), (2, 2, 303, 6), (*shape, 300, 303)]
    q, k, v, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    hidden = torch.ones(300, 303, dtype=torch.bool).triu(4)
    with _Largest() as largest:
        got = attention(q, k, v, bias, causal=True, query_start=3, softcap=2.0)
        gots = torch.autograd.grad(got.sin().sum(), (q, k, v, bias))
    assert largest.numbers <= max(bias.numel(), 2 * 4 * 256 * 303)  # a tile of 256 queries
    want = reference_attention(q, k, v, bias.masked_fill(hidden, -torch.inf), False, 0, 2.0, 3)
    torch.testing.assert_close(got, want, **EXACT)
    wants = torch.autograd.grad(want.sin().sum(), (q, k, v, bias))
    for a, b in zip(gots, wants, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_attention_query_that_may_attend_nothing_gives_zeros() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    q.requires_grad_()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    for softcap in (0.0, 2.0):
        out = attention(q, k, v, mask, softcap=softcap)
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert not out[:, :, 2].any() and grad.isfinite().all()


def test_attention_in_parts_is_attention_as_a_whole() -> None:
    """What a rank with queries 4 to 7 and all keys computes is rows 4 to 7 of the whole."""
    q, k, v = torch.randn(3, 1, 4, 8, 16, dtype=torch.float64)
    whole = attention(q, k, v, causal=True)
    part = attention(q[:, :, 4:], k, v, causal=True, query_start=4)
    torch.testing.assert_close(part, whole[:, :, 4:], **EXACT)


class _Largest(TorchDispatchMode):
    """The most numbers that any result had."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


@pytest.mark.parametrize(
    "options",
    [{"causal": True, "query_start": 4000}, {"causal": True, "window": 40},
     {"causal": True, "window": 1000}, {"causal": True, "softcap": 3.0}, {"window": 300}],
    ids=str,
)  # fmt: skip
def test_attention_never_makes_a_score_matrix(options: dict[str, Any]) -> None:
    sq = 2000
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (sq, 6000, 6000))
    with _Largest() as largest:
        attention(q, k, v, **options).sum().backward()
    # Two heads: a tile has 256 x 1024 scores each; a score matrix would have 12 million.
    assert largest.numbers <= 2 * 256 * 1024


def test_attention_under_autocast() -> None:
    q, k, v = torch.randn(3, 1, 2, 30, 8)
    want = attention(q, k, v, causal=True, window=5)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(q, k.bfloat16(), v, causal=True, window=5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 3, "causal": True}, {}], ids=str)
def test_attention_over_latents(options: dict[str, Any]) -> None:
    """Result and gradients are those over the keys and values that are made from them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 8), (2, 1, 9, 5 + 2), (4, 6 + 4, 5), (2, 4, 3, 4)]
    q, latents, up, grad = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
    )
    leaves = [x.requires_grad_() for x in (q, latents, up)]
    made = torch.einsum("bsr,hur->bhsu", latents[:, 0, :, :5], up)
    k, v = torch.cat([made[..., :6], latents[..., 5:].expand(-1, 4, -1, -1)], 3), made[..., 6:]
    want = attention(q, k, v, query_start=4, **options)
    got = attention(q, latents, None, query_start=4, up=up, **options)
    torch.testing.assert_close(got, want, **EXACT)
    wants, gots = (torch.autograd.grad(out, leaves, grad) for out in (want, got))
    for one, other in zip(gots, wants, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    with pytest.raises(ValueError, match="take neither mask nor dropout"):
        attention(q, latents, None, torch.ones(3, 9).bool(), up=up)
    with pytest.raises(ValueError, match="v is None with `up`"):
        attention(q, latents, None)


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="attention: 3 query heads over 2 key heads"):
        attention(torch.ones(1, 3, 2, 4), torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))


def test_attention_dropout_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 100, 4)
    v = torch.ones(1, 1, 100, 2)
    out = attention(q, k, v, dropout_p=0.3, generator=generator)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02) and out.std().item() > 0.03


def test_dropout() -> None:
    x = torch.ones(10_000, requires_grad=True)
    y = dropout(x, 0.2, generator=torch.Generator().manual_seed(0))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert dropout(x, 0.2, training=False) is x and dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        dropout(x, 1.5)
