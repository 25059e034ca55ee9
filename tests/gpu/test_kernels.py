"""Attention's CUDA kernels against tiles in float64.  Without a GPU all of this is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardwright.runtime.attention.kernels import Queries, attend, attend_backward
from shardwright.runtime.attention.partial import Partial
from shardwright.runtime.attention.scores import Mask, Scores
from shardwright.runtime.attention.tokens import Layout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

B, HQ, HKV, S, D = 2, 4, 2, 512, 64
SCORES = {
    "causal": Scores(D**-0.5, causal=True),
    "everything": Scores(D**-0.5),
    "window": Scores(D**-0.5, causal=True, window=200),
    "softcap": Scores(D**-0.5, causal=True, softcap=20.0),
    "softcap in a window": Scores(D**-0.5, causal=True, softcap=20.0, window=200),
    "window to both sides": Scores(D**-0.5, window=150),
    "alibi": Scores(D**-0.5, causal=True, slopes=torch.linspace(0.1, 0.8, HQ)),
    "bias": Scores(D**-0.5, bias=torch.randn(1, HQ, S, S)),
    "padding": Scores(
        D**-0.5, causal=True, mask=Mask(keys=torch.arange(2 * S).view(B, S) % 7 != 3)
    ),
    "documents": Scores(
        D**-0.5, causal=True, mask=Mask(documents=torch.arange(S).expand(B, -1) // 150)
    ),
}


def on_cuda(scores: Scores, dtype: torch.dtype) -> Scores:
    """The same rules for queries there, with a bias that is trained."""

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to("cuda", dtype if x.is_floating_point() else x.dtype)

    mask = replace(
        scores.mask, keys=there(scores.mask.keys), documents=there(scores.mask.documents)
    )
    bias = there(scores.bias)
    dbias = (
        None
        if bias is None
        else torch.zeros_like(bias, dtype=torch.promote_types(dtype, torch.float32))
    )
    return replace(
        scores, bias=bias, slopes=there(scores.slopes), mask=mask, dbias=dbias,
        bands=dtype != torch.float64,
    )  # fmt: skip


def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scores: Scores) -> dict[str, Tensor]:
    """Result, log-sum-exp and all gradients."""
    layout = Layout.contiguous(S, 1)
    pieces = scores.pieces(layout, 0, layout, 0)
    whole = Partial.empty(q, D)
    attend(whole, q, k, v, pieces, scores)
    queries = Queries.of(q, whole.out.to(q.dtype), whole.lse, grad)
    sums = [torch.zeros_like(x, dtype=whole.lse.dtype) for x in (q, k, v)]
    attend_backward((sums[0], sums[1], sums[2]), queries, k, v, pieces, scores)
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), (whole.out, whole.lse, *sums), strict=True))
    return found if scores.dbias is None else found | {"dbias": scores.dbias}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_results_and_gradients_equal_tiles_in_float64(scores: Scores) -> None:
    torch.manual_seed(0)
    q, grad = (torch.randn(B, HQ, S, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(B, HKV, S, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = run(q, k, v, grad, on_cuda(scores, torch.bfloat16))
    exact = [x.double() for x in (q, k, v, grad)]
    want = run(*exact, on_cuda(scores, torch.float64))
    for name, x in want.items():
        error = (found[name].double() - x).norm() / x.norm()
        assert error < 1e-2, f"{name} is off by {error:.1e}"
