"""What recomputing the layers of a plan takes and saves, whole and in part."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.decide import Solved


@dataclass(slots=True)
class InLayers:
    """Of all layers of a plan in a micro-batch: seconds more where they are recomputed whole, and
    where they keep a part; bytes of all that backward needs, and of that part."""

    full_s: float = 0.0
    part_s: float = 0.0
    kept: float = 0.0
    part: float = 0.0

    @property
    def part_pays(self) -> bool:
        """Does keeping a part save more time for each byte than keeping all?"""
        return (self.full_s - self.part_s) * self.kept > self.full_s * self.part


def in_layers(solved: Solved) -> InLayers:
    """The sums over the regions of all layers, as they were decided."""
    builder, choices, found = solved.builder, solved.decisions.choices, InLayers()
    for me, region in enumerate(builder.regions):
        if region.scope.block is None:
            continue
        taken = tuple(choices[node.name] for node in region.nodes)
        at = next(i for i, way in enumerate(region.strategies) if way.choices == taken)
        runs, weight = builder.runs(me), region.scope.weight
        found.full_s += weight * float(runs.again[at])
        found.part_s += weight * float(runs.again_in_part[at])
        found.kept += weight * float(runs.kept[at])
        found.part += weight * float(runs.part[at])
    return found


__all__ = ["InLayers", "in_layers"]
