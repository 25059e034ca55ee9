"""What the weights of blocks take beside everything else while they are there."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.ops.local import local_bytes
from .program import LoopCall, Program, Weight


def brought_bytes(program: Program, sizes: Sequence[int]) -> float:
    """Bytes of weights that collectives brought, at the fullest time of a step on one rank.

    Those of a unit are there together, the next unit's are on their way, and in training the
    gradients of the one before leave.  The largest weight is what a running op is counted with.
    """
    units = [[w for w in weights if w.forward] for weights in _units(program)]
    taken = [
        [float(local_bytes(w.param.value, w.used, tuple(sizes))) for w in unit] for unit in units
    ]
    taken = [unit for unit in taken if unit]
    if not taken:
        return 0.0
    pairs = zip(taken, [*taken[1:], []], strict=True)
    leaving = max(map(sum, taken)) if program.training else 0.0
    return max(sum(one) - max(one) + sum(following) for one, following in pairs) + leaving


def _units(program: Program) -> list[list[Weight]]:
    """The weights that come together, in the order in which they are used."""
    stages = program.stages()
    loops = [item for item in program.statements if isinstance(item, LoopCall)]
    units: list[list[Weight]] = []
    for stage in range(len(loops) + 1):
        units.append([w for w in program.weights if stages.get(w.item, (0, 0))[0] == stage])
        if stage < len(loops):
            bodies = loops[stage].bodies
            units += [list(bodies[kind].weights) for kind in loops[stage].loop.order]
    return units


__all__ = ["brought_bytes"]
