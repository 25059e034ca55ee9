"""Prompts of different lengths as one tensor, and how long each is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mesh.given import check_tensor


def compact(
    input_ids: Tensor,
    lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(prompts (b, t) padded on the right, their lengths (b,)), both int64 on the CPU.

    `lengths` (b,) says how many tokens at the start of each row are the prompt; `attention_mask`
    (b, t) marks them with 1, wherever they are.  Without either every token is.
    """
    check_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers (batch, tokens), one or more, got {input_ids.dtype}"
            f" {tuple(input_ids.shape)}"
        )
    ids = input_ids.detach().to("cpu", torch.int64)
    if attention_mask is None:
        counts = checked_lengths(lengths, ids, least=1)
        return ids, counts
    if lengths is not None or attention_mask.shape != ids.shape:
        raise ValueError(
            f"give either `lengths` or an attention_mask {tuple(ids.shape)}, got"
            f" {'both' if lengths is not None else tuple(attention_mask.shape)}"
        )
    mask = attention_mask.detach().cpu() != 0
    counts = checked_lengths(mask.sum(1), ids, least=1)
    order = torch.sort(mask.to(torch.int8), dim=1, descending=True, stable=True).indices
    return ids.gather(1, order)[:, : int(counts.max())], counts


def checked_lengths(lengths: Tensor | Sequence[int] | None, ids: Tensor, least: int = 0) -> Tensor:
    """`lengths` as int64 (b,) on the CPU, by default all tokens of `ids` (b, t)."""
    batch, width = ids.shape
    if lengths is None:
        return torch.full((batch,), width, dtype=torch.int64)
    counts = torch.as_tensor(lengths).detach().to("cpu", torch.int64)
    if counts.shape != (batch,) or bool(((counts < least) | (counts > width)).any()):
        raise ValueError(
            f"lengths must be {batch} numbers from {least} to {width}, got {counts.tolist()}"
        )
    return counts
