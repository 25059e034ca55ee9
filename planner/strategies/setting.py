"""What is planned for, and what may be chosen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ...facts.spec import Spec
from ...ir.graph import Param, Value
from .regions import Recomputed, Region, Strategy
from .storage import Storage

OfNodes: TypeAlias = tuple[bool, str, float, int]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is planned for: phase, optimizer, and bytes per GPU (None: no limit).

    `recompute`: the layers of loops keep only their inputs, and run forward again in backward; but
    for the last `kept_layers` of each loop, and of the others the last `part_layers`, which keep
    the results of products and attention (see `Recomputed`).
    `order`: how ranks that share a sequence hold its tokens, `contiguous` or `zigzag`.
    `expert_imbalance`: load of the busiest rank's experts over the mean; 0 for a power-law router.
    `longest_run`: new tokens of another phase that shares the KV caches.
    `whole_outputs`: every rank returns all of each output, and not its part.
    `micro_batches`: of a step; the graph is that of one.  `reduced`: the dtype of gradients on
    their way between ranks, None: that of the weights.  `in_flight`: micro-batches of which a stage
    of a pipeline keeps what their backward needs, or caches, the one that runs among them.
    """

    training: bool
    optimizer: str
    memory_bytes: float | None
    recompute: bool = False
    order: str = "contiguous"
    expert_imbalance: float = 0.0
    longest_run: int = 0
    whole_outputs: bool = False
    micro_batches: int = 1
    reduced: torch.dtype | None = None
    in_flight: int = 1
    kept_layers: int = 0
    part_layers: int = 0

    @property
    def of_nodes(self) -> OfNodes:
        """On what in it depends what nodes cost, each by itself."""
        return self.training, self.order, self.expert_imbalance, self.longest_run

    @property
    def recomputed(self) -> Recomputed:
        """Which layers run again."""
        return Recomputed(self.recompute, self.kept_layers, self.part_layers)

    @property
    def alone(self) -> bool:
        """Is no other phase planned with this one, which shares its weights and caches?"""
        return self.longest_run == 0


class Restriction:
    """Which strategies may be chosen; the default allows all.  Baselines and pins narrow it."""

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """May `region` run so?"""
        return True

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """May the parameter called `name` (loops as `path.*.rest`) be stored so?"""
        return True

    def allows_home(
        self, param: Param, name: str, storage: Storage, *, several: bool, homeless: Collection[int]
    ) -> bool:
        """May the parameter called `name` be kept so between its uses?  `several`: a step has more
        than one micro-batch.  `homeless` are axes on which it can have no home."""
        return True

    def allows_end(self, value: Value, spec: Spec) -> bool:
        """May `value`, an input or output of the graph, come and go so?"""
        return True

    def allows_gather(self, axis: int) -> bool:
        """May a parameter that is sharded over `axis` be gathered over it?"""
        return True

    def none_allowed(self, param: Param, name: str, sizes: tuple[int, ...]) -> None:
        """No storage of the parameter `name` is allowed: all will be, unless this raises."""

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        """No strategy of `region` is allowed: all will be, unless this raises."""


class Within(Restriction):
    """What another restriction allows; what extends it narrows that further."""

    def __init__(self, inner: Restriction) -> None:
        self._inner = inner

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """As `inner` says."""
        return self._inner.allows(region, strategy)

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """As `inner` says."""
        return self._inner.allows_storage(param, name, spec)

    def allows_home(
        self, param: Param, name: str, storage: Storage, *, several: bool, homeless: Collection[int]
    ) -> bool:
        """As `inner` says."""
        return self._inner.allows_home(param, name, storage, several=several, homeless=homeless)

    def allows_end(self, value: Value, spec: Spec) -> bool:
        """As `inner` says."""
        return self._inner.allows_end(value, spec)

    def allows_gather(self, axis: int) -> bool:
        """As `inner` says."""
        return self._inner.allows_gather(axis)

    def none_allowed(self, param: Param, name: str, sizes: tuple[int, ...]) -> None:
        """As `inner` says."""
        self._inner.none_allowed(param, name, sizes)

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        """As `inner` says."""
        self._inner.no_strategy(region, sizes)


__all__ = ["OfNodes", "Restriction", "Setting", "Within"]
