"""Generation: prompts in, the likeliest or drawn tokens behind them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...facts.given import whole
from ...facts.phases import DECODE
from ..mesh.mesh import Mesh
from .prompts import compact
from .serving import Serving


def generate(
    room: Callable[[int, int], Serving],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """See `ShardedModule.generate`; `room(batch, tokens)` gives what serves as many or more."""
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
    prompts, counts = compact(input_ids, lengths, attention_mask)
    if max_new_tokens == 0:
        return input_ids
    stop = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    stops = torch.tensor(stop, dtype=torch.int64)
    serving = room(len(prompts), int(counts.max()) + max_new_tokens)
    randomness = _randomness(serving.mesh, seed) if do_sample else None
    logits = serving.prefill(prompts, counts)
    alive = torch.ones(len(prompts), dtype=torch.bool)
    columns: list[Tensor] = []
    while True:
        chosen = next_tokens(logits, randomness, temperature, top_k, top_p)
        chosen = _agreed(chosen, serving.mesh).cpu().where(alive, pad_token_id)
        columns.append(chosen)
        alive = alive & ~torch.isin(chosen, stops)
        if len(columns) == max_new_tokens or not bool(alive.any()):
            break
        logits = serving.step(DECODE, chosen[:, None], alive.to(torch.int64))
    return torch.cat([input_ids, torch.stack(columns, 1).to(input_ids)], 1)


def next_tokens(
    logits: Tensor,
    randomness: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """One token per row of `logits` (b, v): the likeliest, or drawn from `randomness`.

    Drawn as transformers does it: logits / temperature, then the `top_k` highest (0: all), then
    the fewest tokens whose probabilities sum to `top_p` or more.
    """
    if randomness is None:
        return logits.argmax(-1)
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0 (0: no limit), got"
            f" {temperature}, {top_p}, {top_k}"
        )
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if 0 < top_k < scores.shape[-1]:
        lowest = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(descending=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share  # of the likelier tokens; 0 for the first
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        scores = torch.empty_like(scores).scatter_(-1, order, ordered)
    return torch.multinomial(scores.softmax(-1), 1, generator=randomness).squeeze(1)


def _randomness(mesh: Mesh, seed: int | None) -> torch.Generator:
    """The same on every rank: from `seed`, else the mesh's own."""
    if seed is None:
        return mesh.generator()
    return torch.Generator(mesh.device).manual_seed(seed)


def _agreed(tokens: Tensor, mesh: Mesh) -> Tensor:
    """Rank 0's choice: ranks whose logits differ in the last bit must not part ways."""
    if mesh.size > 1:
        tokens = tokens.to(mesh.device).contiguous()
        dist.broadcast(tokens, 0)
    return tokens
