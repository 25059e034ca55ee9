"""How much of what weights take to move passes behind computing.

The runtime has two streams (`runtime/gathering`): while one unit of weights is used, the weights of
the next one come, and while one runs backward, those of the one before come again and the gradients
of the one after leave.  A window is what one unit computes with what moves meanwhile:

    seconds = max(communication, computing + contention * communication)

as computing is slowed by what runs beside it (`Cluster.contention`).  So of a window
min((1 - contention) * communication, computing) is hidden.  Nothing is behind what comes first and
leaves last: the weights before the first loop over layers, and one layer of each.  What activations
move is waited for, and hides nothing here.

The integer program counts contention * communication, of which no window has less to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...ir.graph import Graph
from ..strategies.build import Decisions
from ..strategies.network import Network
from ..strategies.prices import Prices
from ..strategies.regions import InLoop, Unit, scopes
from .program import LoopCall, Program, Sharded
from .traffic import Together

_GATHERS = ("all_gather",)


@dataclass(slots=True)
class MovedWeights:
    """Seconds of a step that the collectives of a unit's weights take, forward and backward, and
    those of the latter that bring weights again."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0


@dataclass(slots=True)
class _Computed:
    """Seconds that one run of a unit computes, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0


def hidden_s(
    program: Program, prices: Prices, decisions: Decisions, together: Sequence[Together]
) -> float:
    """Seconds of a step's collectives of weights, `together`, that computing hides."""
    free = 1 - prices.network.cluster.contention
    if not free or not together:
        return 0.0
    moved = moved_by_unit(program, prices.network, decisions, together)
    computed = _computed(prices, decisions)
    runs, hidden, last = prices.setting.micro_batches, 0.0, _Computed()
    for stage, loop in enumerate(prices.graph.loops, start=1):
        layers = len(loop.order)
        for kind in range(len(loop.blocks)):
            unit = InLoop(loop.path, kind)
            windows = runs * loop.order.count(kind) * (layers - 1) / layers
            mine, own = moved.get(unit, MovedWeights()), computed[unit]
            each = runs * loop.order.count(kind)
            hidden += windows * min(free * mine.forward / each, own.forward)
            hidden += windows * min(free * mine.backward / each, own.backward)
            left = own.backward - min(free * mine.backward / each, own.backward)
            last = _Computed(own.forward, left)
        after = moved.get(stage, MovedWeights())
        leaving = after.backward - after.again
        hidden += runs * min(free * after.forward / runs, last.forward)
        hidden += runs * min(free * leaving / runs, last.backward)
    return hidden


def moved_by_unit(
    program: Program, network: Network, decisions: Decisions, together: Sequence[Together]
) -> dict[Unit, MovedWeights]:
    """What the collectives of each unit's weights take in a step."""
    unit_of = dict(_units(program))
    layers = decisions.recomputed
    shares = {scope.unit: layers.runs(scope).again for scope in scopes(program.graph)}
    found: dict[Unit, MovedWeights] = {}
    for each in together:
        traffic = each.traffic
        seconds = each.times * network.seconds(traffic.kind, traffic.axes, traffic.bytes)
        unit = unit_of[each.shares[0][0]]
        moved = found.setdefault(unit, MovedWeights())
        if traffic.backward:
            moved.backward += seconds
            moved.again += seconds * (traffic.kind in _GATHERS)
        else:  # the second time in backward
            again = shares.get(unit, 0.0)
            moved.forward += seconds / (1 + again)
            moved.backward += seconds * again / (1 + again)
    return found


def _units(program: Program) -> Iterator[tuple[Sharded, Unit]]:
    stages = program.stages()
    for weight in program.weights:
        yield weight.item, stages.get(weight.item, (0, 0))[0]
    for call in program.statements:
        if isinstance(call, LoopCall):
            for kind, body in enumerate(call.bodies):
                for weight in body.weights:
                    yield weight.item, InLoop(call.loop.path, kind)


def _computed(prices: Prices, decisions: Decisions) -> Mapping[Unit, _Computed]:
    found = {unit: _Computed() for unit in _blocks(prices.graph)}
    for scope in scopes(prices.graph):
        if not isinstance(scope.place, InLoop):
            continue
        mine, again = found[scope.place], decisions.again(scope)
        for node in scope.nodes:
            work = prices.work(node, decisions.choices[node.name])
            mine.forward += work.forward_s - work.forward_moving_s
            mine.backward += work.backward_s - work.backward_moving_s
            more = again[node.name]
            mine.backward += work.again_s(more) - work.again_moving_s(more)
    return found


def _blocks(graph: Graph) -> Iterator[Unit]:
    for loop in graph.loops:
        for kind in range(len(loop.blocks)):
            yield InLoop(loop.path, kind)


__all__ = ["MovedWeights", "hidden_s", "moved_by_unit"]
