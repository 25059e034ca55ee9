"""Partial results: merging parts gives the whole, whatever the parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardwright.runtime import Partial, merge


def part_of(scores: Tensor, values: Tensor) -> Partial:
    """Attention over some keys, by definition."""
    if not scores.shape[-1]:
        return Partial.empty(values.new_empty(1, 2, scores.shape[2], 1), values.shape[-1])
    return Partial(torch.softmax(scores, -1) @ values, scores.logsumexp(-1))


def test_parts_make_the_whole_and_its_gradients() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 5, 12, dtype=torch.float64, requires_grad=True)
    values = torch.randn(1, 2, 12, 3, dtype=torch.float64, requires_grad=True)
    whole = part_of(scores, values)
    sizes = [4, 0, 1, 7]
    parts = [
        part_of(s, v) for s, v in zip(scores.split(sizes, -1), values.split(sizes, -2), strict=True)
    ]
    merged = merge(parts)
    step_by_step = Partial.empty(whole.out, 3)
    for part in parts:
        step_by_step.add_(part.out.detach(), part.lse.detach())
    for got in (merged, step_by_step):
        torch.testing.assert_close(got.out, whole.out, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(got.lse, whole.lse, rtol=1e-14, atol=1e-14)
    grads = [
        torch.autograd.grad((p.out * 2).sum() + p.lse.sin().sum(), (scores, values))
        for p in (whole, merged)
    ]
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_empties_merge_to_an_empty_with_finite_gradients() -> None:
    q = torch.ones(1, 2, 3, 4)
    empty = Partial.empty(q, 5)
    empty.out.requires_grad_()
    empty.lse.requires_grad_()
    both = merge([empty, Partial.empty(q, 5)])
    assert not both.out.any() and (both.lse == -torch.inf).all()
    grads = torch.autograd.grad(both.out.sum(), (empty.out, empty.lse))
    assert all(grad.isfinite().all() for grad in grads)
    again = Partial.empty(q, 5)
    again.add_(both.out.detach(), both.lse.detach())
    assert not again.out.any() and (again.lse == -torch.inf).all()


def test_far_apart_scores_do_not_overflow() -> None:
    high, low = (
        Partial(torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1), x)) for x in (900.0, -900.0)
    )
    merged = merge([low, high])
    assert merged.out.item() == merged.lse.item() == 900.0


def test_dtypes_are_wide() -> None:
    assert Partial.empty(torch.ones(1, 1, 1, 1).bfloat16(), 2).out.dtype == torch.float32
    assert Partial.empty(torch.ones(1, 1, 1, 1).double(), 2).lse.dtype == torch.float64
    with pytest.raises(ValueError, match="no partial results"):
        merge([])
