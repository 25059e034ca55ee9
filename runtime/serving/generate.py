"""Generation: prompts in, the likeliest or drawn tokens behind them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...facts.given import whole
from ..mesh.mesh import Mesh
from .prompts import compact
from .sampling import Choice, Sampling
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
    min_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """See `ShardedModule.generate`; `room(batch, tokens)` gives what serves as many or more."""
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
    prompts, counts = compact(input_ids, lengths, attention_mask)
    if max_new_tokens == 0:
        return input_ids
    stop = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    sampling = Sampling(temperature, top_k, top_p, min_p) if do_sample else None
    choice = Choice(sampling, tuple(stop), pad_token_id)
    serving = room(len(prompts), int(counts.max()) + max_new_tokens)
    randomness = _randomness(serving.mesh, seed) if do_sample else None
    stops, alive = torch.tensor(stop), torch.ones(len(prompts), dtype=torch.bool)
    drawn = serving.first(serving.prefill(prompts, counts), choice, randomness)[None]
    columns: list[Tensor] = []
    while True:
        columns += drawn
        for tokens in drawn:
            alive = choice.go_on(alive, tokens, stops)
        left = max_new_tokens - len(columns)
        if not left or not bool(alive.any()):
            break
        drawn = serving.draw(columns[-1], alive, left, choice, randomness)
    return torch.cat([input_ids, torch.stack(columns, 1).to(input_ids)], 1)


def _randomness(mesh: Mesh, seed: int | None) -> torch.Generator:
    """The same on every rank: from `seed`, else the mesh's own."""
    if seed is None:
        return mesh.generator()
    return torch.Generator(mesh.device).manual_seed(seed)
