"""The CUDA kernel over pages, on a GPU or in Triton's interpreter, against plain float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="`pip install triton` to run CUDA kernels in its interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton reads this when it is imported, so that without a GPU a process of its own runs the cases.
HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

PAGE, PAGES, B = 16, 24, 4
TOKENS = (0, 5, 170, 380)  # that the sequences hold, at every other position

CASES: dict[str, dict[str, Any]] = {
    "grouped heads": dict(hq=8, hkv=2, d=64, dv=64),
    "dims that are no powers of two": dict(
        hq=8, hkv=2, d=80, dv=80, t=3, window=40, softcap=30.0, sinks=True
    ),
    "chunks": dict(hq=4, hkv=4, d=128, dv=128, chunk=32, sinks=True, dtype=torch.float16),
    "values in keys": dict(hq=16, hkv=1, d=144, dv=128, t=2, in_keys=True),
    "keys wider than values": dict(hq=4, hkv=2, d=96, dv=64, causal=False),
    "latents": dict(hq=16, hkv=1, d=576, dv=512, in_keys=True, dtype=torch.float16),
}


@pytest.mark.skipif(HERE, reason="the cases run in this process")
def test_the_cases_hold_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert f"{len(CASES)} passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not HERE, reason="they run in a process of their own, above")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pages_give_what_whole_sequences_give(case: dict[str, Any]) -> None:
    from shardwright.runtime.attention.paged_triton import attend_pages

    torch.manual_seed(0)
    case = {"t": 1, "dtype": torch.float32, "sinks": False, "in_keys": False} | case
    hq, hkv, d, dv, t, dtype = (case[key] for key in ("hq", "hkv", "d", "dv", "t", "dtype"))
    rules = {key: case.get(key, 0) for key in ("window", "chunk", "softcap")}
    rules |= {"causal": case.get("causal", True), "scale": d**-0.5}
    keys = torch.randn(PAGES * B * PAGE, hkv, d).to(dtype)
    values = None if case["in_keys"] else torch.randn(PAGES * B * PAGE, hkv, dv).to(dtype)
    table = torch.randperm(PAGES * B).reshape(B, PAGES).int()
    counts = torch.tensor(TOKENS)
    stored = torch.full((B, PAGES * PAGE), -1, dtype=torch.int32)
    for i, n in enumerate(TOKENS):
        stored[i, :n] = torch.arange(0, 2 * n, 2)
    positions = torch.stack([torch.arange(t) + max(2 * n - t, 0) for n in TOKENS])
    positions[1, 0] = -1  # padding
    q = torch.randn(B, hq, t, d).to(dtype)
    sinks = torch.randn(hq) if case["sinks"] else None
    given = [q, keys, values, table, counts, stored, positions, sinks]
    *tensors, own_sinks = (None if x is None else x.to(DEVICE) for x in given)
    out, lse = attend_pages(
        *tensors, sinks=own_sinks, page=PAGE, value_dim=dv, dtype=torch.float32, **rules
    )  # pyright: ignore
    held = keys[..., :dv] if values is None else values
    want, want_lse = plain(q, keys, held, table, stored, positions, sinks, rules)
    limit = 1e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out.cpu().double(), want, atol=limit, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-5, rtol=0)


def plain(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    stored: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    rules: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out, lse), sequence by sequence."""
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for i, n in enumerate(TOKENS):
        slots = (table[i].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()[:n]
        k, v = (
            x[slots].double().transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)
            for x in (keys, values)
        )
        scores = q[i].double() @ k.transpose(-1, -2) * rules["scale"]
        if rules["softcap"]:
            scores = rules["softcap"] * torch.tanh(scores / rules["softcap"])
        key, query = stored[i, :n].long()[None], positions[i][:, None]
        attended = (key >= 0) & (query >= 0)
        if rules["causal"]:
            attended &= key <= query
        if rules["window"]:
            attended &= key > query - rules["window"]
        if rules["chunk"]:
            attended &= key // rules["chunk"] == query // rules["chunk"]
        scores = scores.masked_fill(~attended, -torch.inf)
        lse = scores.logsumexp(-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
        outs.append(torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]) @ v)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)
