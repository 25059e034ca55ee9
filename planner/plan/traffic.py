"""What a program's collectives move in one step: bytes by operation, axis and phase.

This is the count that `runtime.count_collectives` makes on a rank, known before running: every
conversion of the program, the collectives inside ops (a loss over a sharded vocabulary, counting
tokens), and the second gathering of parameters that backward needs.  In backward only what a
gradient reaches is counted: with a scalar loss among the outputs, the gradient starts there alone.
Layers that are recomputed run forward twice, the second time until everything is back that
autograd had kept: what comes after in the layer is not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

from ...costmodel.collective import wire_bytes
from ...facts.mesh import Mesh
from ...facts.traffic import Traffic
from ...ir.ops.registry import is_view, local_of, operator_of, saved_values
from .program import BlockBody, Compute, Convert, LoopCall, Program, Sharded, Statement

_Gathers: TypeAlias = Mapping[Sharded, tuple[Convert, ...]]


class Moved(NamedTuple):
    """A row of the count; `axis` joins the names of several axes taken as one: `dp_tp`."""

    op: str
    axis: str
    phase: str  # forward | backward


def predicted_bytes(program: Program, mesh: Mesh) -> dict[Moved, float]:
    """Bytes that each rank receives in one forward pass and, in training, one backward pass."""
    walk = _Walk(mesh, program.recompute, program.order)
    trained = [out for out in program.outputs if out.value.differentiable and program.training]
    scalars = [out for out in trained if out.value.type.shape == ()]
    walk.run(program.statements, set(scalars[:1] or trained), {})
    return walk.moved


class _Walk:
    """Goes through statements from the last to the first, with what a gradient reaches."""

    def __init__(self, mesh: Mesh, recompute: bool, order: str) -> None:
        self.mesh = mesh
        self.recompute = recompute
        self.order = order
        self.moved: dict[Moved, float] = {}
        self._told: set[Traffic] = set()  # once per step
        # By gathering step: how many nodes will ask for its result in backward, and whether it is
        # there, as in runtime/gathering/regather.py
        self.asking: dict[int, int] = {}
        self.there: set[int] = set()

    def run(
        self,
        statements: Sequence[Statement],
        live: set[Sharded],
        entering: _Gathers,
        *,
        again: int = 0,
    ) -> set[Sharded]:
        """Count `statements`; `live` grows by what a gradient reaches, and is returned.

        `entering` are gathered parameters that come from outside; the first `again` statements
        run forward twice.
        """
        gathers = _gathers(statements, {} if again else entering)
        own = {id(item) for item in statements}
        self.there -= own
        self.asking |= dict.fromkeys(own, 0)
        if not again:
            self._expect(statements, gathers, own)
        for at, item in reversed(list(enumerate(statements))):
            times = 2 if at < again else 1
            if isinstance(item, LoopCall):
                live |= self._loop(item, live, gathers)
            elif isinstance(item, Convert):
                self._convert(item, item.target in live, times)
                if item.target in live and item.source.value.differentiable:
                    live.add(item.source)
            else:
                live_here = bool(live.intersection(item.outputs))
                self._inside(item, times, live_here)
                if live_here:
                    live.update(o for o in item.operands if o.value.differentiable)
                    if not again:  # what is gathered the second time serves backward
                        for chain in _kept_gathers(item, gathers):
                            self._gather_again(chain)
        return live

    def _loop(self, call: LoopCall, live: set[Sharded], gathers: _Gathers) -> set[Sharded]:
        """Count the layers from the last to the first; what of the outside a gradient reaches."""
        n = len(call.carried)
        reached: set[Sharded] = set()
        carried = [out in live for out in call.outputs]
        for kind in reversed(call.loop.order):
            body = call.bodies[kind]
            inner = _inner(call, body)
            entering = _entering(call, body, gathers)
            ends = {out for out, alive in zip(body.outputs, carried, strict=True) if alive}
            again = kept_until(body.statements) if self.recompute and ends else 0
            reaches = self.run(body.statements, ends, entering, again=again)
            names = {item.value.name for item in reaches}
            carried = [value.name in names for value in body.block.inputs[:n]]
            reached |= {a for a in call.arguments if inner[a].value.name in names}
        return reached | {v for v, alive in zip(call.carried, carried, strict=True) if alive}

    def _convert(self, item: Convert, live: bool, times: int) -> None:
        forward = [t for t in item.priced.traffic if not t.backward]
        for traffic in forward[:1] * times:
            self._add(traffic.kind, traffic.axes, False, traffic.bytes)
        for traffic in item.priced.traffic if live else ():
            again = traffic.kind == item.primitive == "all_gather"  # see `_gather_again`
            if traffic.backward and not again:
                self._add(traffic.kind, traffic.axes, True, traffic.bytes)

    def _expect(self, statements: Sequence[Statement], gathers: _Gathers, own: set[int]) -> None:
        """Count the nodes, those in loops too, that keep what the steps `own` gather."""
        for item in statements:
            if isinstance(item, LoopCall) and not self.recompute:
                for kind in item.loop.order:
                    body = item.bodies[kind]
                    entering = _entering(item, body, gathers)
                    self._expect(body.statements, _gathers(body.statements, entering), own)
            elif isinstance(item, Compute):
                for chain in _kept_gathers(item, gathers):
                    if id(chain[-1]) in own:
                        self._ask_later(chain)

    def _ask_later(self, chain: tuple[Convert, ...]) -> None:
        *before, last = chain
        if before and not self.asking[id(last)]:
            self._ask_later(tuple(before))
        self.asking[id(last)] += 1

    def _gather_again(self, chain: tuple[Convert, ...]) -> None:
        """A node's backward asks for a parameter: gathered, and kept for others that will ask."""
        *before, last = chain
        if id(last) not in self.there:
            if before:
                self._gather_again(tuple(before))
            for traffic in last.priced.traffic:
                if traffic.backward and traffic.kind == "all_gather":
                    self._add("all_gather", traffic.axes, True, traffic.bytes)
        self.asking[id(last)] = max(self.asking[id(last)] - 1, 0)
        if self.asking[id(last)]:
            self.there.add(id(last))
        else:
            self.there.discard(id(last))

    def _inside(self, item: Compute, times: int, live: bool) -> None:
        """What an op moves itself; of experts what is expected of balanced routing."""
        local = local_of(
            item.node,
            item.choices,
            self.mesh.sizes,
            training=live,
            order=self.order,
            imbalance=1.0,
        )
        for traffic in operator_of(item.node).traffic(local):
            if traffic.told:
                if traffic in self._told:
                    continue
                self._told.add(traffic)
            for _ in range(traffic.times * (1 if traffic.backward or traffic.told else times)):
                self._add(traffic.kind, traffic.axes, traffic.backward, traffic.bytes)

    def _add(self, kind: str, axes: tuple[int, ...], backward: bool, n_bytes: float) -> None:
        ways = prod(self.mesh.sizes[axis] for axis in axes)
        name = "_".join(self.mesh.names[axis] for axis in axes)
        key = Moved(kind, name, "backward" if backward else "forward")
        moved = float(wire_bytes(kind, float(n_bytes), ways))
        if moved:
            self.moved[key] = self.moved.get(key, 0.0) + moved


def kept_until(statements: Sequence[Statement]) -> int:
    """How many statements run until the last one of which autograd keeps something."""
    kept = [i for i, s in enumerate(statements) if isinstance(s, Compute) and saved_values(s.node)]
    return kept[-1] + 1 if kept else 0


def _inner(call: LoopCall, body: BlockBody) -> dict[Sharded, Sharded]:
    """The loop's arguments by the names that a block knows them by."""
    inputs = body.block.inputs[len(call.carried) :]
    of = {outer.name: i for outer, i in zip(call.loop.invariants, inputs, strict=True)}
    return {a: Sharded(of[a.value.name], a.spec) for a in call.arguments}


def _entering(call: LoopCall, body: BlockBody, gathers: _Gathers) -> _Gathers:
    """The gathered parameters among a loop's arguments, as a block knows them."""
    inner = _inner(call, body)
    return {inner[a]: gathers[a] for a in call.arguments if a in gathers}


def _kept_gathers(item: Compute, gathers: _Gathers) -> list[tuple[Convert, ...]]:
    """The steps behind each gathered parameter that autograd keeps from a node."""
    held = operator_of(item.node).holds(item.node, item.choices)
    kept = {value.name for value in saved_values(item.node)} & {value.name for value in held}
    operands = [o for o in dict.fromkeys(item.operands) if o.value.name in kept]
    return list(dict.fromkeys(gathers[o] for o in operands if gathers.get(o)))


def _gathers(statements: Sequence[Statement], entering: _Gathers) -> _Gathers:
    """The gathering steps behind each parameter that was gathered, and behind views of it."""
    found = dict(entering)
    for item in statements:
        if isinstance(item, Convert):
            before = found.get(item.source, ())
            if item.param and item.primitive == "all_gather":
                found[item.target] = (*before, item)
            elif item.primitive == "nothing":
                found[item.target] = before
        elif isinstance(item, Compute) and is_view(item.node):
            found |= {out: found.get(item.operands[0], ()) for out in item.outputs}
    return found


__all__ = ["Moved", "kept_until", "predicted_bytes"]
