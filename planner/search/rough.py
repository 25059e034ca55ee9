"""A rough time of a pipeline: its stages run as the whole model does on their mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...costmodel.timeline import StageTimes
from ..plan.decide import Solved
from ..strategies.launches import launches_s
from ..strategies.regions import scopes
from .cuts import balanced_layers
from .partly import in_layers


@dataclass(frozen=True, slots=True)
class Rough:
    """Seconds of a micro-batch: of each layer, of what is before and behind all of them; the part
    of these that is forward; and bytes that a GPU keeps of all of it for backward.

    `part`: bytes where layers keep a part alone; then the share `again` of them is done once more.
    """

    layers: tuple[float, ...]
    before: float
    behind: float
    forward: float
    kept: float
    part: float
    again: float

    def recomputed(self) -> Rough:
        """The same where layers run forward again in backward."""
        return self._longer(self.forward, 0.0)

    def in_part(self) -> Rough:
        """The same where layers keep a part."""
        return self._longer(self.again, self.part)

    def _longer(self, share: float, kept: float) -> Rough:
        layers = tuple((1 + share) * each for each in self.layers)
        return replace(self, layers=layers, forward=self.forward / (1 + share), kept=kept)

    def stages(self, count: int) -> list[StageTimes]:
        """Those of so many stages, of which the slowest takes as little as it can."""
        besides = [0.0] * count
        besides[0] += self.before
        besides[-1] += self.behind
        found: list[StageTimes] = []
        first = 0
        for own, other in zip(self._cut(besides), besides, strict=True):
            seconds = other + sum(self.layers[first : first + own])
            found.append(StageTimes(self.forward * seconds, (1 - self.forward) * seconds))
            first += own
        return found

    def _cut(self, besides: Sequence[float]) -> list[int]:
        return balanced_layers(self.layers, besides, [1.0] * len(besides))


def rough_of(solved: Solved, gpus: int = 1) -> Rough:
    """That of the whole model's plan: what it takes beside operators is shared out as they are.

    `gpus`: so many share everything perfectly, but for launches.
    """
    builder, choices = solved.builder, solved.decisions.choices
    works = [
        (scope, [builder.work(node, choices[node.name]) for node in scope.nodes])
        for scope in scopes(builder.graph)
    ]
    ahead = sum(scope.weight * work.forward_s for scope, own in works for work in own)
    total = sum(scope.weight * work.seconds for scope, own in works for work in own) or 1.0
    scale = solved.cost / builder.setting.micro_batches / total
    seconds = [
        (scope, _shared(scale * sum(w.seconds for w in own), launches_s(builder, scope), gpus))
        for scope, own in works
    ]
    of_block = {id(scope.block): s for scope, s in seconds if scope.block is not None}
    layers = [
        of_block[id(loop.blocks[kind])] for loop in builder.graph.loops for kind in loop.order
    ]
    outside = [(scope.stage, s) for scope, s in seconds if scope.block is None]
    before = sum(s for stage, s in outside if stage == 0)
    behind = sum(s for _, s in outside) - before
    kept, inside = solved.live["kept"], in_layers(solved)
    return Rough(
        tuple(layers), before, behind, ahead / total, kept / gpus,
        max(kept - inside.kept + inside.part, 0.0) / gpus,
        scale * inside.part_s / max(sum(layers) * gpus, 1e-12),
    )  # fmt: skip


def _shared(seconds: float, launches: float, gpus: int) -> float:
    return launches + (seconds - launches) / gpus if gpus > 1 else seconds


__all__ = ["Rough", "rough_of"]
