"""The loss of a linear layer's logits against `F.cross_entropy` of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.facts import logits as sizes
from shardwright.runtime import (
    Mesh,
    RankPool,
    count_collectives,
    cross_entropy,
    linear_cross_entropy,
    softcap,
)
from shardwright.runtime.live import LiveBytes

Pool = Callable[[int], RankPool]
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
TOKENS, WIDTH = (4, 5), 6


def small_sizes(patch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 columns for 20 tokens in float64, blocks of 3 tokens."""
    patch.setattr(sizes, "CHUNK_BYTES", 128 * 20 * 8)
    patch.setattr(sizes, "BLOCK_NUMBERS", 3 * 128)


def problem(
    classes: int, dtype: torch.dtype = torch.float64, ignored: int = -100
) -> dict[str, Any]:
    torch.manual_seed(0)
    labels = torch.randint(0, classes, TOKENS)
    labels[:2, 1:3] = ignored
    return {
        "x": torch.randn(*TOKENS, WIDTH, dtype=dtype),
        "weight": torch.randn(classes, WIDTH, dtype=dtype),
        "bias": torch.randn(classes, dtype=dtype),
        "labels": labels,
    }


def whole(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **options: Any
) -> list[Tensor]:
    """Loss and gradients with all logits at once."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    z = F.linear(*leaves) * options.pop("scale", 1.0)
    cap = options.pop("softcap", 0.0)
    z = (z / cap).tanh() * cap if cap else z
    loss = F.cross_entropy(z.flatten(0, 1), labels.flatten(), **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def in_chunks(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **options: Any
) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    given = {"bias": leaves[2]} if bias is not None else {}
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, **given, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1, "ignore_index": 2},
    {"scale": 0.3, "softcap": 1.5},
    {"softcap": 2.0, "label_smoothing": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("classes", [7, 300])
def test_one_process(
    monkeypatch: pytest.MonkeyPatch, classes: int, biased: bool, options: dict[str, Any]
) -> None:
    small_sizes(monkeypatch)
    given = problem(classes, ignored=options.get("ignore_index", -100))
    given["bias"] = given["bias"] if biased else None
    for got, want in zip(in_chunks(**given, **options), whole(**given, **options), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def on_ranks(given: dict[str, Any], options: dict[str, Any]) -> tuple[list[Tensor], int]:
    """Tokens over dp, classes over tp: [loss, whole gradients], and collectives over tp."""
    with pytest.MonkeyPatch.context() as patch:
        small_sizes(patch)
        dp, tp = Mesh.create({"dp": 2, "tp": 2}).axes
        classes = len(given["weight"])
        weight, bias = (tp.shard(given[name], 0) for name in ("weight", "bias"))
        if len(weight) * tp.size > classes and tp.rank == tp.size - 1:
            weight[-1] = bias[-1] = 1e30  # rubbish in the padding row
        leaves = [t.requires_grad_() for t in (dp.shard(given["x"], 0), weight, bias)]
        labels = dp.shard(given["labels"], 0)
        with count_collectives() as counter:
            loss = linear_cross_entropy(
                leaves[0], leaves[1], labels, bias=leaves[2], vocab_axis=tp, vocab_size=classes,
                token_axes=(dp,), **options,
            )  # fmt: skip
            loss = dp.all_reduce(loss)
            grads = torch.autograd.grad(loss, leaves)
        calls = counter.calls(axis="tp")
        x = dp.all_gather(tp.reduce(grads[0]), 0)
        rows = [tp.all_gather(dp.reduce(g.contiguous()), 0, classes) for g in grads[1:]]
        return [loss.detach(), x, *rows], calls


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", [300, 301])
def test_classes_and_tokens_on_ranks(pool: Pool, classes: int, options: dict[str, Any]) -> None:
    given = problem(classes, ignored=options.get("ignore_index", -100))
    want = whole(**given, **options)
    for found, calls in pool(4).run(on_ranks, given, options):
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected, **EXACT)
        assert calls == 2  # the largest lse, and the sums: once, not for each chunk


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_up_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Each gradient is as near to that in float64 as one rounding allows, in 20 chunks."""
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 128 * 20 * 2)
    given = problem(2560, dtype)
    got = in_chunks(**given, dtype=torch.float32)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype, dtype]
    for mine, want in zip(got, whole(**exact), strict=True):
        error = (mine.double() - want).abs().max() / want.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


def test_classes_that_are_masked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of whole chunks among them."""
    small_sizes(monkeypatch)
    given = problem(300)
    given["bias"][100:] = -torch.inf
    given["labels"] %= 100
    for got, want in zip(in_chunks(**given), whole(**given), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    logits = F.linear(given["x"], given["weight"], given["bias"])
    want = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())
    torch.testing.assert_close(cross_entropy(logits, given["labels"]), want, **EXACT)


def test_only_gradients_that_are_asked_for() -> None:
    given = problem(7)
    for name in ("x", "weight", "bias"):
        leaf = given[name].clone().requires_grad_()
        loss = linear_cross_entropy(**(given | {name: leaf}))
        loss.backward()
        assert leaf.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(**given).requires_grad


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes above weights and gradients: far below those of all logits, 20 x 25600 x 4."""
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 128 * 20 * 4)
    monkeypatch.setattr(sizes, "BLOCK_NUMBERS", 3 * 128)
    given = problem(25600, torch.float32)
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias")]
    with LiveBytes(given.values()) as live:
        before = live.now
        linear_cross_entropy(**given).backward()
    gradients = sum(leaf.nbytes for leaf in leaves)
    assert live.peak - before - gradients < 3 * 128 * 20 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_have_no_wide_copy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Their gradient, as large as they are, is the only other thing of their size."""
    monkeypatch.setattr(sizes, "BLOCK_NUMBERS", 10 * 256)
    logits = torch.randn(64, 16, 256).to(dtype).requires_grad_()
    labels = torch.randint(0, 256, (64, 16))
    with LiveBytes([logits, labels]) as live:
        before = live.now
        loss = cross_entropy(logits, labels, dtype=torch.float32)
        assert live.peak - before < logits.nbytes / 4
        loss.backward()
        assert live.peak - before < 1.25 * logits.nbytes
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_softcap(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 4, 50) * 30).to(dtype).requires_grad_()
    y = softcap(x, 20.0)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    want = 20.0 * torch.tanh(exact / 20.0)
    (want_grad,) = torch.autograd.grad(want.square().sum(), exact)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), want.detach(), rtol=4 * eps, atol=eps)
    torch.testing.assert_close(grad.double(), want_grad, rtol=8 * eps, atol=200 * eps)


@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_compiles_to_one_graph(loss: str) -> None:
    given = problem(7)
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias")]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        labels = given["labels"]
        if loss == "linear":
            return linear_cross_entropy(x, weight, labels, bias=bias)
        return cross_entropy(F.linear(x, weight, bias), labels)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    made = [torch.autograd.grad(f(*leaves), leaves) for f in (run, compiled)]
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_refusals() -> None:
    given = problem(7)
    with pytest.raises(ValueError, match=r"a weight of shape \(v, 6\) for x of shape"):
        linear_cross_entropy(given["x"], given["weight"].T, given["labels"])
    with pytest.raises(IndexError, match="label 7 is outside the vocabulary of 7"):
        linear_cross_entropy(given["x"], given["weight"], torch.full(TOKENS, 7))


def test_labels_that_nobody_looks_at_first_make_nan() -> None:
    """As in a compiled layer, or on CUDA."""
    logits = torch.randn(4, 7, requires_grad=True)

    @torch.compile(backend="eager")
    def loss(labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    found = loss(torch.tensor([1, 6, -100, 0]))
    assert found.isfinite()
    found = loss(torch.tensor([1, 7, -100, 0]))
    found.backward()
    assert found.isnan() and logits.grad is not None and logits.grad[1].isnan().all()
    assert logits.grad[0].isfinite().all()


def test_there_is_no_second_derivative() -> None:
    logits, labels = torch.randn(4, 7, requires_grad=True), torch.arange(4)
    loss = cross_entropy(logits, labels)
    with pytest.raises(RuntimeError, match="the cross entropy has no second derivative .*create_g"):
        torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.autograd.grad(cross_entropy(logits, labels), logits)[0].shape == (4, 7)
