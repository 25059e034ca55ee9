"""A mesh on a cluster, and what moving bytes over it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from ...costmodel.collective import AxisLink, axis_links, joint_link, staged_s
from ...costmodel.compute import elementwise_s
from ...costmodel.machines.cluster import Cluster
from ...facts.mesh import Mesh
from .lattice import Floats, Ints

LOCAL = frozenset({"slice", "mask", "pad"})
"""Primitives that move nothing between ranks."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Network:
    """A mesh on a cluster: the links of its axes, alone and together."""

    mesh: Mesh
    cluster: Cluster

    @cached_property
    def links(self) -> dict[tuple[int, ...], AxisLink]:
        """Link of every set of axes, keyed by axis numbers."""
        axes = range(len(self.mesh.axes))
        links: dict[tuple[int, ...], AxisLink] = {}
        for i, link in enumerate(axis_links(self.mesh, self.cluster)):
            links[(i,)] = link
        for n in range(2, len(self.mesh.axes) + 1):
            for subset in combinations(axes, n):
                links[subset] = joint_link(self.mesh, self.cluster, subset)
        return links

    @cached_property
    def _prices(self) -> dict[tuple[object, ...], float]:
        return {}

    @cached_property
    def _made(self) -> dict[tuple[object, ...], Any]:
        return {}

    def once(self, key: tuple[object, ...], make: Callable[[], Made]) -> Made:
        """`make()`, called the first time that `key` is asked for on this network."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def seconds(self, kind: str, axes: tuple[int, ...], n_bytes: float) -> float:
        """Seconds of a collective, or of a primitive that is a local copy of `n_bytes`."""
        if kind == "nothing":
            return 0.0
        if kind in LOCAL:
            return self.traffic_seconds(2.0 * n_bytes)
        return self.once(
            (kind, axes, n_bytes), lambda: float(staged_s(kind, n_bytes, axes, self.links))
        )

    def line(self, kind: str, axes: tuple[int, ...], n_bytes: float) -> tuple[float, float]:
        """(seconds, seconds per byte) of a collective of about `n_bytes`.

        So much are `n_bytes`, and twice as many; between the bandwidth that a message has grows.
        """
        one, two = (self.seconds(kind, axes, times * n_bytes) for times in (1.0, 2.0))
        return 2 * one - two, (two - one) / n_bytes

    def seconds_of(self, kind: str, axes: tuple[int, ...], n_bytes: Ints) -> Floats:
        """`seconds` for an array of bytes."""
        different, where = np.unique(n_bytes, return_inverse=True)
        prices = np.array([self.seconds(kind, axes, int(n)) for n in different])
        return prices[where]

    def traffic_seconds(self, n_bytes: float, *, mixed: bool = False) -> float:
        """Seconds of an elementwise kernel that reads and writes `n_bytes` in all; `mixed`: one
        that adds up rows or changes formats as it reads."""
        return self.once(
            ("bytes", n_bytes, mixed),
            lambda: float(elementwise_s(n_bytes, self.cluster, mixed=mixed)),
        )


__all__ = ["LOCAL", "Network"]
