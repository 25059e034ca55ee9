"""Parts of an attention in tests: what they cost, and what the declarations say that they move."""

from __future__ import annotations

from collections.abc import Iterable

from shardwright.costmodel.collective import messages, wire_bytes
from shardwright.facts.traffic import Traffic
from shardwright.ir.ops.algorithms.part import Part
from shardwright.ir.ops.algorithms.quantities import kernels_of, traffic_of
from shardwright.planner.strategies.network import Network
from shardwright.planner.strategies.pricing import pass_seconds

# (operation, phase) -> (bytes, messages) that one rank receives, as `CollectiveCounter` counts them
Volume = dict[tuple[str, str], tuple[float, int]]


def seconds(
    part: Part, dtype: str, network: Network, *, backward: bool, moving: bool = True
) -> tuple[float, float]:
    """(forward, backward) seconds on the busiest rank; without `moving`, of its compute alone."""
    kernels = kernels_of(part, dtype, backward=backward)
    moved = traffic_of(part, backward=backward) if moving else ()
    steps = (kernels.forward, kernels.backward)
    passes = [[t for t in moved if t.backward == back] for back in (False, True)]
    forward, back = (pass_seconds(*each, network)[0] for each in zip(steps, passes, strict=True))
    return forward, back if backward else 0.0


def volume(traffic: Iterable[Traffic], ranks: int) -> Volume:
    """What a rank receives by `traffic` over one axis."""
    found: Volume = {}
    for t in traffic:
        key = (t.kind, "backward" if t.backward else "forward")
        n_bytes, count = found.get(key, (0.0, 0))
        moved = t.times * float(wire_bytes(t.kind, t.bytes, ranks))
        if moved:
            found[key] = (n_bytes + moved, count + t.times * messages(t.kind, ranks))
    return found


def declared(part: Part, *, backward: bool = False) -> Volume:
    """What a rank receives in the attention of its part."""
    return volume(traffic_of(part, backward=backward), part.ranks)
