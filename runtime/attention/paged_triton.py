"""Attention over the pages of a cache as one CUDA kernel, and one that merges what parts of it say.

Sequences of any lengths, read where they lie: how many tokens there are is known on the device
alone, so the host gives the same launch in every step.  Triton comes with torch for CUDA.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...compat.torch import in_rows

_ROWS = 16  # queries of a program at least: what a matrix product of the hardware takes
_WIDE = 256  # numbers of a key from which on a program has few keys at once
_PROGRAMS = 4  # for each multiprocessor, if the keys can be split into so many parts
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    table: Tensor,
    counts: Tensor,
    stored: Tensor,
    positions: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    page: int,
    value_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(out (b, hq, t, dv) in `dtype`, lse (b, hq, t) float32); see `paged.paged_attention`.

    Without `values` they are the first `value_dim` numbers of the keys.
    """
    q = in_rows(q)
    b, hq, t, d = q.shape
    hkv = keys.shape[1]
    rows = hq // hkv * t
    first, rest = _halves(d)
    in_keys = values is None
    if in_keys and first < value_dim:
        values = keys  # the second part of a key holds some of the value, which is read again
        in_keys = False
    block_m = min(max(_ROWS, triton.next_power_of_2(rows)), 32 if first > _WIDE else 64)
    block_n = 32 if first >= _WIDE else 64
    row_blocks = triton.cdiv(rows, block_m)
    splits = _splits(q.device, b * hkv * row_blocks, stored.shape[1], block_n)
    part = torch.empty(splits, b, hq, t, value_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(splits, b, hq, t, dtype=torch.float32, device=q.device)
    held = keys if values is None else values
    _attend[(b * hkv * row_blocks, splits)](
        q, keys, held, table, counts, stored, positions, part, part_lse,
        *q.stride()[:3], *keys.stride()[:2], *held.stride()[:2],
        table.stride(0), stored.stride(0), positions.stride(0),
        b, hkv, t, rows, scale * float(_LOG2_E.value), softcap, window, chunk,
        D=d, D1=first, D2=rest, DV=value_dim,
        DV_BLOCK=first if in_keys else triton.next_power_of_2(max(value_dim, 16)),
        PAGE=page, M=block_m, N=block_n, CAUSAL=causal, IN_KEYS=in_keys, CAPPED=softcap > 0,
        EXACT=q.dtype == torch.float32,
        num_warps=8 if first > _WIDE else 4,
        num_stages=2,
    )  # fmt: skip
    out = torch.empty(b, hq, t, value_dim, dtype=dtype, device=q.device)
    lse = torch.empty(b, hq, t, dtype=torch.float32, device=q.device)
    _merge[(b * hq * t,)](
        part, part_lse, part if sinks is None else sinks, out, lse, b * hq * t, hq, t, splits,
        DV=value_dim, DV_BLOCK=triton.next_power_of_2(value_dim),
        SPLITS=triton.next_power_of_2(splits), SINKS=sinks is not None,
    )  # fmt: skip
    return out, lse


def _halves(d: int) -> tuple[int, int]:
    """Two powers of two that hold `d` numbers, the second 0 or at least 16.

    >>> _halves(128), _halves(576), _halves(80)
    ((128, 0), (512, 64), (64, 16))
    """
    first = max(1 << (d.bit_length() - 1), 16)
    rest = d - first
    return first, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0


def _splits(device: torch.device, programs: int, tokens: int, block: int) -> int:
    """Into how many parts the keys are split: as many as keep all multiprocessors at work."""
    if device.type != "cuda":  # Triton's interpreter
        return 3
    many = torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS
    return max(1, min(many // programs, triton.cdiv(tokens, 4 * block), 64))


@triton.jit
def _attend(
    q, keys, values, table, counts, stored, positions, part, part_lse,
    q_b, q_h, q_t, key_slot, key_head, value_slot, value_head, table_b, stored_b, positions_b,
    b, hkv, t, rows, scale, softcap, window, chunk,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DV_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, IN_KEYS: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    blocks = tl.cdiv(rows, M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % hkv
    sequence = tl.program_id(0) // blocks // hkv
    row = block * M + tl.arange(0, M)  # group * t + token
    there = row < rows
    query_head = head * (rows // t) + row // t
    at = tl.load(positions + sequence * positions_b + row % t, mask=there, other=-1)
    q_row = q + sequence * q_b + query_head[:, None] * q_h + (row % t)[:, None] * q_t
    low = tl.arange(0, D1)
    q_low = tl.load(q_row + low[None], mask=there[:, None] & (low[None] < D), other=0.0)
    if D2 > 0:
        high = D1 + tl.arange(0, D2)
        q_high = tl.load(q_row + high[None], mask=there[:, None] & (high[None] < D), other=0.0)
    number = tl.arange(0, DV_BLOCK)

    count = tl.load(counts + sequence).to(tl.int32)
    share = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), N) * N
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, count)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DV_BLOCK], tl.float32)
    for start in range(begin, end, N):
        column = start + tl.arange(0, N)
        inside = column < end
        position = tl.load(stored + sequence * stored_b + column, mask=inside, other=-1)
        attended = (position >= 0)[None] & (at >= 0)[:, None]
        if CAUSAL:
            attended &= position[None] <= at[:, None]
        if window > 0:
            attended &= position[None] > at[:, None] - window
        if chunk > 0:
            attended &= position[None] // chunk == at[:, None] // chunk
        if tl.max(attended.to(tl.int32)) > 0:
            page = tl.load(table + sequence * table_b + column // PAGE, mask=inside, other=0)
            slot = page.to(tl.int64) * PAGE + column % PAGE
            key = keys + slot[:, None] * key_slot + head * key_head
            k_low = tl.load(key + low[None], mask=inside[:, None] & (low[None] < D), other=0.0)
            score = tl.dot(q_low, tl.trans(k_low), input_precision=precision)
            if D2 > 0:
                k_high = tl.load(
                    key + high[None], mask=inside[:, None] & (high[None] < D), other=0.0
                )
                score = tl.dot(q_high, tl.trans(k_high), score, input_precision=precision)
            score *= scale
            if CAPPED:
                natural = score / _LOG2_E / softcap
                score = softcap * _LOG2_E * (2 * tl.sigmoid(2 * natural) - 1)
            score = tl.where(attended, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(score - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weight, 1)
            if IN_KEYS:
                v = k_low
            else:
                value = values + slot[:, None] * value_slot + head * value_head
                v = tl.load(
                    value + number[None], mask=inside[:, None] & (number[None] < DV), other=0.0
                )
            weighted = weight.to(v.dtype)
            out = tl.dot(weighted, v, out * shrink[:, None], input_precision=precision)
            top = higher

    # (part, sequence, head, token)
    to = (tl.program_id(1) * b + sequence) * hkv * rows + query_head * t + row % t
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    into = part + to[:, None].to(tl.int64) * DV + number[None]
    tl.store(into, out, mask=there[:, None] & (number[None] < DV))
    tl.store(part_lse + to, (top + tl.log2(total)) / _LOG2_E, mask=there)


@triton.jit
def _merge(
    part, part_lse, sinks, out, lse, n, heads, t, splits,
    DV: tl.constexpr, DV_BLOCK: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    own = tl.load(part_lse + split * n + row, mask=split < splits, other=float("-inf"))
    top = tl.max(own)
    if SINKS:
        sink = tl.load(sinks + row // t % heads).to(tl.float32)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(own - base)
    total = tl.sum(weight)
    if SINKS:
        total += tl.exp(sink - base)
    number = tl.arange(0, DV_BLOCK)
    where = (split[:, None] * n + row).to(tl.int64) * DV + number[None]
    mask = (split < splits)[:, None] & (number < DV)[None]
    summed = tl.sum(tl.load(part + where, mask=mask, other=0.0) * weight[:, None], 0)
    result = summed / tl.where(total == 0, 1.0, total)
    tl.store(out + row * DV + number, result.to(out.dtype.element_ty), mask=number < DV)
    tl.store(lse + row, base + tl.log(total))
