"""A prefix shared by a batch, against the same prefix repeated before every sequence."""

from __future__ import annotations

import pytest
import torch

from shardwright.runtime import Mask, shared_prefix_attention
from tests.runtime.attention.reference import Case, Inputs, reference


@pytest.mark.parametrize("new", [9, 4, 1])
@pytest.mark.parametrize("prefix", [0, 11])
@pytest.mark.parametrize(("softcap", "sinks"), [(0.0, False), (2.0, True)])
def test_equals_repeated_prefix(new: int, prefix: int, softcap: float, sinks: bool) -> None:
    torch.manual_seed(0)
    case = Case(length=prefix + 9, batch=3, head_dims=(8, 6), softcap=softcap, sinks=sinks)
    q, grad = (torch.randn(3, 4, prefix + 9, n, dtype=torch.float64) for n in (8, 6))
    grad[:, :, : prefix + 9 - new] = 0  # the last queries alone
    k, v = (torch.randn(3, 2, prefix + 9, n, dtype=torch.float64) for n in (8, 6))
    for x in (k, v):
        x[:, :, :prefix] = x[:1, :, :prefix]
    sink = torch.randn(4, dtype=torch.float64) if sinks else None
    inputs = Inputs(q, k, v, grad, sink, None, None, Mask())
    out, dq, dk, dv, *dsinks = reference(case, inputs, torch.float64)
    leaves = [
        q[:, :, -new:], k[:, :, prefix:], v[:, :, prefix:], k[:1, :, :prefix], v[:1, :, :prefix],
    ]  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in leaves]
    if sink is not None:
        leaves.append(sink.clone().requires_grad_())
    got = shared_prefix_attention(*leaves[:5], sinks=leaves[5] if sinks else None, softcap=softcap)
    wants = [
        dq[:, :, -new:], dk[:, :, prefix:], dv[:, :, prefix:], dk[:, :, :prefix].sum(0, True),
        dv[:, :, :prefix].sum(0, True), *dsinks,
    ]  # fmt: skip
    torch.testing.assert_close(got, out[:, :, -new:], rtol=1e-12, atol=1e-12)
    gots = torch.autograd.grad(got, leaves, grad[:, :, -new:])
    for a, b in zip(gots, wants, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_refusals() -> None:
    q, prefix = torch.ones(2, 4, 3, 8), torch.ones(1, 2, 5, 8)
    with pytest.raises(ValueError, match="has other heads than k"):
        shared_prefix_attention(q, q, q, prefix, prefix)
    with pytest.raises(ValueError, match="sizes do not fit together"):
        shared_prefix_attention(q, q, q, q, q)
    with pytest.raises(ValueError, match="3 queries are more than the 2 own tokens"):
        own = torch.ones(2, 2, 2, 8)
        shared_prefix_attention(q, own, own, prefix, prefix)
