"""What a part of an attention computes, moves and holds, by the algorithm that it runs."""

from __future__ import annotations

from ....facts.traffic import Traffic
from ....facts.work import Kernel, Kernels, Product, Scores, Stream
from .algorithm import Steps
from .part import Part
from .registry import algorithm_of

# Flash attention: 2 matrix products forward, 5 backward (arXiv:2307.08691, section 3.1)
BACKWARD = 2.5

# Keys and values of latents in backward: made again, and two products for the gradients.
_MADE_BACKWARD = 3

_COUNT_BYTES, _POSITION_BYTES = 8, 4


def kernels_of(part: Part, dtype: str, *, backward: bool) -> Kernels:
    """What the busiest rank computes, step by step."""
    steps = algorithm_of(part).steps(part)
    forward = _steps(part, steps, dtype, 1.0, 1, backward=False)
    if not backward:
        return Kernels(forward)
    return Kernels(forward, _steps(part, steps, dtype, BACKWARD, _MADE_BACKWARD, backward=True))


def _steps(
    part: Part, steps: Steps, dtype: str, times: float, made_times: int, *, backward: bool
) -> tuple[tuple[Kernel, ...], ...]:
    """Each so many `times` its forward pass; `made_times` is that of making heads of latents."""
    made = _made(part, steps, dtype) * made_times
    split = part.cached and 2 * steps.queries <= steps.keys  # kernels of prefill do not

    def step(number: int, share: float) -> tuple[Kernel, ...]:
        scores = Scores(
            part.batch, steps.heads, steps.kv_heads, steps.queries, steps.keys, part.key_dim,
            dtype, share, part.values_in_keys, split, times, backward,
        )  # fmt: skip
        own = made if number == 0 or steps.again and share else ()
        return (scores, *own) if share else own

    return tuple(step(number, share) for number, share in enumerate(steps.shares))


def _made(part: Part, steps: Steps, dtype: str) -> tuple[Kernel, ...]:
    """Keys and values of latents: one product makes them all, then keys are copied behind one
    another with what their heads share."""
    if part.latent is None:
        return ()
    rows, numbers = part.batch * steps.made, part.heads * part.made_dim
    copied = 2.0 * rows * part.heads * part.key_dim * part.itemsize
    return (Product(rows, numbers, part.latent[0], 1, dtype), Stream(copied))


def traffic_of(part: Part, *, backward: bool) -> tuple[Traffic, ...]:
    """What it moves in one forward pass and, if asked for, one backward pass."""
    if part.ranks == 1:
        return ()
    moved = algorithm_of(part).traffic(part)
    return tuple(each for each in moved if backward or not each.backward)


def positions_of(part: Part) -> tuple[Traffic, ...]:
    """What tells ranks which tokens the others have, once per step for all layers that ask alike:
    how many, and the positions of keys or of queries."""
    tells = algorithm_of(part).tells
    if not part.cached or part.ranks == 1 or tells == "nothing":
        return ()
    tokens = part.batch * (part.keys if tells == "keys" else part.queries)
    told = f"positions of {tells}, window {part.window}"
    return tuple(
        Traffic("all_gather", (part.axis,), float(each * part.ranks), told=told)
        for each in (_COUNT_BYTES, tokens * _POSITION_BYTES)
    )


def buffers_of(part: Part) -> float:
    """Bytes that it holds beside its operands and result while it runs.

    With latents also the keys and values of the heads, those of one rank's latents at a time, and
    without a cache, in backward, their gradients.
    """
    held = 0
    if part.latent:
        rows = part.batch * part.heads * part.cached_rows()
        held = rows * (part.key_dim + part.made_dim) * part.itemsize
        if not part.cached:
            held += rows * (part.key_dim + part.value_dim) * part.wide
    return held + algorithm_of(part).buffers(part)


__all__ = ["BACKWARD", "buffers_of", "kernels_of", "positions_of", "traffic_of"]
