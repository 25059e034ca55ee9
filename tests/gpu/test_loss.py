"""Losses on a CUDA device: near float64, and little memory.  Without a GPU this is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwright.facts import logits as sizes
from shardwright.runtime import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

TOKENS, CLASSES, WIDTH = 4096, 32_000, 256
LOGITS = TOKENS * CLASSES * 2  # bytes


def given() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, device="cuda").mul_(0.1).bfloat16().requires_grad_()
    labels = torch.randint(0, CLASSES, (TOKENS,), device="cuda")
    labels[::5] = -100
    return x, weight, labels


@pytest.mark.parametrize("chunked", [False, True])
def test_gradients_and_memory(monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    monkeypatch.setattr(sizes, "CHUNK_BYTES", LOGITS // 16)
    monkeypatch.setattr(sizes, "BLOCK_NUMBERS", TOKENS * CLASSES // 64)
    x, weight, labels = given()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if chunked:
        loss = ops.linear_cross_entropy(x, weight, labels, softcap=30.0, dtype=torch.float32)
    else:
        capped = ops.softcap(F.linear(x, weight), 30.0)
        loss = ops.cross_entropy(capped, labels, dtype=torch.float32)
    grads = torch.autograd.grad(loss, (x, weight))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < (0.6 if chunked else 4.5) * LOGITS
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = 30.0 * torch.tanh(F.linear(*wide) / 30.0)
    want = F.cross_entropy(exact, labels)
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=0)
    for got, expected in zip(grads, torch.autograd.grad(want, wide), strict=True):
        assert (got.double() - expected).abs().max() < 0.02 * expected.abs().max()
