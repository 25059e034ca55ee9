"""What `plan verify` says to a served model: tokens in several steps, and logits after each.

A conversation feeds each sequence of a batch its next tokens, step by step, and compares the logits
of the token that follows.  The tokens of a row are always the next columns of one tensor, so that
one pass over whole sequences gives the logits of every step, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .ir.graph import Graph
from .ir.ops.registry import operator_of
from .ir.reference.interpret import Caches, interpret
from .runtime.cache.cache import PAGE


class Step(NamedTuple):
    """`counts[i]` new tokens for sequence i; a prefill forgets what was cached."""

    phase: Literal["prefill", "decode", "append"]
    counts: list[int]

    def __str__(self) -> str:
        least, most = min(self.counts), max(self.counts)
        return f"{self.phase} {most}" if least == most else f"{self.phase} {least} to {most}"


def is_served(graph: Graph) -> bool:
    """Does this graph keep a KV cache?"""
    return any(operator_of(node).remembers for node in graph.nodes)


def conversation(batch: int, tokens: int, context: int, ranks: int, capacity: int) -> list[Step]:
    """Steps of `tokens` new ones at a time, as planned, and of fewer.

    First the planned number in an empty cache.  Then anew: up to `context` tokens, but no more than
    fill a page of every rank; twice `tokens`, the second time ragged; one token of each.  No
    sequence exceeds `capacity`, 4 or more.
    """
    first = min(tokens, capacity)
    cached = max(1, min(max(context, tokens), PAGE * ranks + PAGE // 2, (capacity - 1) // 2))
    new = max(1, min(tokens, (capacity - cached - 1) // 2))
    uneven = _ragged(batch, new)
    if batch > 1:
        uneven[-1] = 0
    return [
        Step("prefill", [first] * batch),
        Step("prefill", _ragged(batch, cached)),
        Step("append", [new] * batch),
        Step("append", uneven),
        Step("decode", [1] * batch),
    ]


def _ragged(batch: int, most: int) -> list[int]:
    """From `most` tokens down to a few less."""
    return [most - row % min(most, 5) for row in range(batch)]


def length_of(steps: Sequence[Step]) -> int:
    """Tokens of the longest sequence at any time."""
    return max(max(ends) for ends in _ends(steps))


def _ends(steps: Sequence[Step]) -> list[list[int]]:
    """Tokens of each sequence after each step."""
    ends: list[list[int]] = []
    for step in steps:
        before = [0] * len(step.counts) if step.phase == "prefill" else ends[-1]
        ends.append([a + b for a, b in zip(before, step.counts, strict=True)])
    return ends


def _named(steps: Sequence[Step], logits: Sequence[Tensor]) -> dict[str, Tensor]:
    """Logits (rows, v) by step, of the rows that got tokens."""
    return {
        f"logits after step {number}: {step}": x[torch.tensor(step.counts, device=x.device) > 0]
        for number, (step, x) in enumerate(zip(steps, logits, strict=True), 1)
    }


def by_module(model: Any, steps: Sequence[Step], ids: Tensor) -> dict[str, Tensor]:
    """Logits of a `ShardedModule` that is given the tokens `ids` (b, s); the same on all ranks."""
    model.new_cache(len(ids), ids.shape[1])
    logits: list[Tensor] = []
    for step in steps:
        start = torch.zeros(len(ids)) if step.phase == "prefill" else model.cached_lengths
        given = _columns(ids, start, step.counts)
        if step.phase == "decode":
            logits.append(model.decode(given[:, 0]))
        else:
            logits.append(getattr(model, step.phase)(given, step.counts))
    return _named(steps, logits)


def by_graph(
    graph: Graph, state: Mapping[str, Tensor], steps: Sequence[Step], ids: Tensor
) -> dict[str, Tensor]:
    """Logits of a served graph in one process with a plain cache, as many tokens as it takes at a
    time."""
    width = next(item for item in graph.inputs if item.name == "position_ids").value.type.shape[1]
    caches: Caches = {}
    lengths = torch.zeros(len(ids), dtype=torch.int64)
    logits: list[Tensor] = []
    for step in steps:
        if step.phase == "prefill":
            caches, lengths = {}, torch.zeros_like(lengths)
        counts = torch.tensor(step.counts)
        found: Tensor | None = None
        for start in range(0, max(step.counts), width):
            some = (counts - start).clamp(0, width)
            new = _interpreted(graph, state, caches, ids, lengths + start, some, width)
            found = new if found is None else torch.where(some[:, None] > 0, new, found)
        assert found is not None
        logits.append(found)
        lengths = lengths + counts
    return _named(steps, logits)


def _interpreted(
    graph: Graph,
    state: Mapping[str, Tensor],
    caches: Caches,
    ids: Tensor,
    start: Tensor,
    counts: Tensor,
    width: int,
) -> Tensor:
    """Logits (b, v) after `counts[i]` tokens from `start[i]` on, extending `caches`."""
    tokens = _columns(ids, start, counts.tolist(), width)
    columns = torch.arange(width)
    positions = torch.where(columns < counts[:, None], start[:, None] + columns, -1)
    inputs = {"input_ids": tokens, "position_ids": positions}
    taken = {item.name: inputs[item.name] for item in graph.inputs}
    with torch.no_grad():
        (logits,) = interpret(graph, state, taken, caches).values()
    return logits[:, 0]


def _columns(ids: Tensor, start: Tensor, counts: Sequence[int], width: int = 0) -> Tensor:
    """The next `counts[i]` tokens of row i from column `start[i]` on, padded to `width` with 0."""
    out = ids.new_zeros(len(ids), width or max(counts))
    for row, (first, count) in enumerate(zip(start.tolist(), counts, strict=True)):
        out[row, :count] = ids[row, int(first) : int(first) + count]
    return out


def by_whole(logits: Tensor, steps: Sequence[Step]) -> dict[str, Tensor]:
    """The same from the logits (b, s, v) of whole sequences."""
    rows = torch.arange(len(logits))
    lasts = [torch.tensor(ends).clamp(min=1) - 1 for ends in _ends(steps)]
    return _named(steps, [logits[rows, last] for last in lasts])


__all__ = ["Step", "by_graph", "by_module", "by_whole", "conversation", "is_served", "length_of"]
