"""KV caches that prefill leaves in another layout than decode reads: what the conversion costs.

It is made once per answer, of the prompt's tokens, cache by cache: each is read from its pool, goes
the way that any value would go between the two specs (see `conversion.py`), and is written to its
new pool.  `runtime/cache/recache.py` does it and counts the same bytes.  States of fixed size lie
alike in both phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...costmodel.collective import wire_bytes
from ...facts.blocks import local_shape
from ...facts.spec import S, Spec
from ...ir.graph import Graph, Node, TensorType
from ...ir.ops.attention import cached_per_head
from ...ir.ops.caches import cache_bytes_in, cache_name, cache_spec, keeps_tokens
from ...ir.ops.registry import operator_of, rule_of
from ..strategies.build import Decisions
from ..strategies.conversion import Conversions
from ..strategies.network import Network
from ..strategies.regions import Place, Scope, scopes
from ..strategies.steps import Moving
from .plan import PlanData, Recache
from .program import priced_path
from .traffic import Moved

Key: TypeAlias = tuple[Place, object]  # where the attention stands, and its cache's name there
_Floats: TypeAlias = NDArray[np.float64]
_POSITION_BYTES = 4  # who holds a token, told once for all caches that lie alike
_ROOM_BYTES = 8  # how many pages a rank lacks


@dataclass(frozen=True, slots=True)
class Cached:
    """An operator with a cache, how many layers have it, and the cache's name, layers as `*`."""

    node: Node
    count: int
    name: str


def all_cached(graph: Graph) -> dict[Key, Cached]:
    """Every operator with a cache or a state; the same keys in both graphs of a model."""
    found: dict[Key, Cached] = {}
    for scope in scopes(graph):
        for node in scope.nodes:
            if operator_of(node).remembers:
                path = f"{scope.loop.path}.*." if scope.loop is not None else ""
                name = f"{path}{cache_name(node)}"
                found[key_of(scope, node)] = Cached(node, scope.weight, name)
    return found


def key_of(scope: Scope, node: Node) -> Key:
    """What an operator with a cache is called in both graphs of a model."""
    return scope.place, cache_name(node)


class Recaching:
    """The conversions of the cache that prefill's `cached` fills."""

    def __init__(self, cached: Cached, network: Network) -> None:
        self._cached, self._network = cached, network

    @cached_property
    def _conversions(self) -> Conversions:
        """Those of (batch, heads, tokens, numbers of a head), which are gathered, never summed."""
        node, ranks = self._cached.node, self._network.mesh.ranks
        sizes, window = rule_of(node).sizes, node.arg("window")
        assert isinstance(window, int)
        tokens = min(sizes["c"], window - 1) if window > 1 else sizes["c"]
        tokens = -(-tokens // ranks) * ranks
        kind = TensorType(
            (sizes["b"], sizes["n"], tokens, cached_per_head(node)), node.output.type.dtype
        )
        return Conversions(Moving(kind, False, param=True, usual=True), self._network)

    def seconds(self, ours: Sequence[Spec], theirs: Sequence[Spec]) -> _Floats:
        """Seconds of all layers from each of `ours` (rows) to each of `theirs` (columns)."""
        if not keeps_tokens(self._cached.node):
            return np.array([[0.0 if a == b else np.inf for b in theirs] for a in ours])
        rows, columns = list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))
        prices = np.zeros((len(rows), len(columns)))
        if set(rows) != set(columns) or len(rows) > 1:
            copies = [[self._copies_s(a, b) for b in columns] for a in rows]
            prices = self._cached.count * (self._conversions.matrix(rows, columns) + copies)
        return prices[np.ix_([rows.index(a) for a in ours], [columns.index(b) for b in theirs])]

    def recache(self, source: Spec, target: Spec) -> Recache:
        """The conversion between two layouts that differ."""
        steps = priced_path(self._conversions, source, target)
        seconds = sum(step.seconds for step in steps) + self._copies_s(source, target)
        return Recache(
            self._cached.name, self._cached.node.name, self._cached.count, source, target, steps,
            self._cached.count * seconds,
        )  # fmt: skip

    def _copies_s(self, source: Spec, target: Spec) -> float:
        """Seconds to read a cache from its pool and to write it to another."""
        if source == target:
            return 0.0
        kind, sizes = self._conversions.type, self._network.mesh.sizes
        numels = [prod(local_shape(kind.shape, spec, sizes)) for spec in (source, target)]
        return sum(self._network.traffic_seconds(2.0 * n * kind.dtype.itemsize) for n in numels)


def recaches(
    graph: Graph, ours: Decisions, decode: Graph, theirs: Decisions, network: Network
) -> tuple[Recache, ...]:
    """The conversions that two sets of decisions ask for, those of prefill and of decode."""
    found: list[Recache] = []
    for key, other in all_cached(decode).items():
        cached = all_cached(graph)[key]
        source = cache_spec(cached.node, ours.choices[cached.node.name])
        target = cache_spec(other.node, theirs.choices[other.node.name])
        if source != target:
            found.append(Recaching(cached, network).recache(source, target))
    return tuple(found)


def state_bytes(plan: PlanData) -> float:
    """Bytes of states of fixed size that each rank keeps for the planned batch."""
    chosen, sizes = plan.decisions.choices, plan.mesh.sizes
    return sum(
        cached.count * cache_bytes_in(node, cache_spec(node, chosen[node.name]), sizes)
        for cached in all_cached(plan.graph).values()
        if not keeps_tokens(node := cached.node)
    )


def recached_bytes(plan: PlanData) -> dict[Moved, float]:
    """Bytes that each rank receives when the caches of the planned prompts are converted."""
    moved: dict[Moved, float] = {}

    def add(kind: str, axes: Sequence[int], n_bytes: float) -> None:
        sizes = [plan.mesh.sizes[axis] for axis in axes]
        name = "_".join(plan.mesh.names[axis] for axis in axes)
        if prod(sizes) > 1:
            key = Moved(kind, name, "forward")
            moved[key] = moved.get(key, 0.0) + float(wire_bytes(kind, n_bytes, *sizes))

    for recache in plan.recached:
        for priced in recache.steps:
            for traffic in priced.traffic:
                add(traffic.kind, traffic.axes, recache.count * traffic.bytes)
    for axis in _asked_over(plan):
        add("all_reduce", (axis,), _POSITION_BYTES * plan.request.batch * plan.request.seq)
    for axis in range(len(plan.mesh.axes)) if _may_run_out(plan) else ():
        add("all_reduce", (axis,), _ROOM_BYTES)
    return moved


def _asked_over(plan: PlanData) -> list[int]:
    """The axes over which ranks tell each other who holds a token, once for each layout."""
    cached = [c.node for c in all_cached(plan.graph).values() if keeps_tokens(c.node)]
    windows = {node.name: node.arg("window") for node in cached}
    layouts = {
        (tuple(state if state in (S(0), S(2)) else -1 for state in r.source), windows[r.node])
        for r in plan.recached
    }
    return [
        axis
        for spec, _ in layouts
        if S(2) in spec
        for axis, state in enumerate(spec)
        if state in (S(0), S(2))
    ]


def _may_run_out(plan: PlanData) -> bool:
    """Does decode's layout cut tokens, so that ranks ask each other for room?"""
    if plan.decode is None or not plan.recached:
        return False
    chosen = plan.decode.decisions.choices
    cached = [c.node for c in all_cached(plan.decode.graph).values()]
    return any(
        keeps_tokens(node) and S(2) in cache_spec(node, chosen[node.name]) for node in cached
    )


__all__ = [
    "Cached", "Key", "Recaching", "all_cached", "key_of", "recached_bytes", "recaches",
    "state_bytes",
]  # fmt: skip
